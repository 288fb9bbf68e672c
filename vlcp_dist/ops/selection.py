"""Baselines that pick m of n points instead of averaging them: random, k-center (greedy) and herding.

The last two follow from the inner products of the points: a step costs n additions, not n x d.
"""

import torch
from torch import Tensor

from vlcp_dist.ops.gram import gram

_TIE = 1e-12  # of the largest square norm: closer together, distances from inner products cannot be told apart


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
    _check_count(len(x), m)
    products = gram(x)
    margin = _TIE * products.sq_norms.max()
    selected = [_first_least(products.sq_norms, margin)]  # the mean is the origin of the centred points
    nearest = torch.full_like(products.sq_norms, torch.inf)
    while len(selected) < m:
        nearest = torch.minimum(nearest, products.sq_distances(selected[-1])[0])
        nearest[selected[-1]] = -torch.inf  # below the 0 of a duplicate: selected points stay out, duplicates remain
        selected.append(_first_least(-nearest, margin))
    return torch.cat(selected)


def herding(x: Tensor, m: int) -> Tensor:
    """Herding (Welling 2009) of the rows of `x` (n, d): int64 (m,) in order of selection.

    Each next point is the one, not yet selected, that brings the mean of the selection nearest to the mean of
    all points. Ties go to the smaller index. Raises ValueError unless 1 <= m <= n, and for non-finite values.
    """
    _check_count(len(x), m)
    products = gram(x)
    # The mean of selection s and x is nearest to the mean, the origin, where |s + x|^2 = |s|^2 + 2 sx + |x|^2 is least.
    misfit = products.sq_norms.clone()
    selected: list[Tensor] = []
    while len(selected) < m:
        selected.append(_first_least(misfit, _TIE * (len(selected) + 1) * products.sq_norms.max()))
        misfit += 2 * products.inner(selected[-1])[0]
        misfit[selected[-1]] = torch.inf
    return torch.cat(selected)


def _first_least(values: Tensor, margin: Tensor) -> Tensor:
    """The smallest index (1,) of the least values, as far as rounding of less than `margin` can tell."""
    return (values <= values.min() + margin).int().argmax()[None]


def _check_count(n: int, m: int) -> None:
    if not 1 <= m <= n:
        raise ValueError(f"cannot select m={m} of n={n} points: m must lie between 1 and n")
