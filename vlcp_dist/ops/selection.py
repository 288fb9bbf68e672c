"""Baselines that pick m of n points instead of averaging them: random, k-center (greedy) and herding."""

import torch
from torch import Tensor

from vlcp_dist.ops.points import as_points


def random_subset(n: int, m: int, *, seed: int) -> Tensor:
    """`m` of the indices 0..n-1 without replacement: int64 (m,) on the CPU. A larger `m` extends a smaller.

    Raises ValueError unless 1 <= m <= n.
    """
    _check_count(n, m)
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:m]


def k_center_greedy(x: Tensor, m: int) -> Tensor:
    """Farthest-first traversal (Gonzalez 1985) of the rows of `x` (n, d): int64 (m,) in order of selection.

    Starts at the point nearest to the mean; each next one is the farthest from all selected. Ties go to the
    smaller index. Raises ValueError unless 1 <= m <= n, and for non-finite values.
    """
    x = as_points(x)
    _check_count(len(x), m)
    selected = [_distances(x, x.mean(dim=0)).argmin()]
    nearest = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
    while len(selected) < m:
        nearest = torch.minimum(nearest, _distances(x, x[selected[-1]]))
        nearest[selected[-1]] = -1  # below the 0 of a duplicate: selected points stay out, duplicates remain
        selected.append(nearest.argmax())
    return torch.stack(selected)


def herding(x: Tensor, m: int) -> Tensor:
    """Herding (Welling 2009) of the rows of `x` (n, d): int64 (m,) in order of selection.

    Each next point is the one, not yet selected, that brings the mean of the selection nearest to the mean of
    all points. Ties go to the smaller index. Raises ValueError unless 1 <= m <= n, and for non-finite values.
    """
    x = as_points(x)
    _check_count(len(x), m)
    centred = x - x.mean(dim=0)
    total = torch.zeros_like(centred[0])
    taken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    selected: list[Tensor] = []
    while len(selected) < m:
        # |mean of selection and x| is least where x is nearest to minus the sum of the selection.
        misfit = _distances(centred, -total).masked_fill(taken, torch.inf)
        selected.append(misfit.argmin())
        taken[selected[-1]] = True
        total = total + centred[selected[-1]]
    return torch.stack(selected)


def _distances(x: Tensor, point: Tensor) -> Tensor:
    # From differences, not norms and products: equal rows get equal distances, so ties are real ties.
    return torch.cdist(x, point[None], compute_mode="donot_use_mm_for_euclid_dist")[:, 0]


def _check_count(n: int, m: int) -> None:
    if not 1 <= m <= n:
        raise ValueError(f"cannot select m={m} of n={n} points: m must lie between 1 and n")
