"""Local outlier factor (Breunig et al. 2000) of a class's latents, and its inliers at a contamination."""

import warnings

import numpy as np
import torch
from torch import Tensor

from vlcp_dist.ops.points import as_points

_QUERY_ROWS = 2048  # rows of the distance matrix held at a time: bounds memory for very large classes
_DIFFERENCE_ELEMENTS = 2**20  # differences held at a time: small enough to stay in a CPU's cache
_DENSITY_FLOOR = 1e-10  # scikit-learn's: keeps the density of more than n_neighbors duplicates finite


def local_outlier_factor(x: Tensor, n_neighbors: int = 10) -> Tensor:
    """LOF scores of the rows of `x` (n, d): float64 (n,) on x's device; about 1 for inliers, more for outliers.

    They are scikit-learn's `-LocalOutlierFactor(n_neighbors).fit(x).negative_outlier_factor_` (METHOD.md section 4),
    except where distinct points at exactly the same distance compete for the last place among the neighbours: no
    rule says which wins (scikit-learn's choice varies with its algorithm and threads). Duplicates do not matter. With
    `n_neighbors >= n` all n - 1 other points are neighbours, as there, and a warning says so.

    Raises ValueError for n < 2, n_neighbors < 1, and non-finite values.
    """
    x = as_points(x)
    n = len(x)
    if n < 2:
        raise ValueError(f"LOF compares points with their neighbours and needs at least 2 of them, got {n}")
    if n_neighbors < 1:
        raise ValueError(f"n_neighbors must be at least 1, got {n_neighbors}")
    if n_neighbors >= n:
        warnings.warn(f"n_neighbors={n_neighbors} but there are {n} points: using {n - 1}", stacklevel=2)

    distances, neighbors = _nearest(x, min(n_neighbors, n - 1))
    k_distance = distances[:, -1]
    reachability = torch.maximum(distances, k_distance[neighbors])
    density = 1 / (reachability.mean(dim=1) + _DENSITY_FLOOR)
    return (density[neighbors] / density[:, None]).mean(dim=1)


def inlier_mask(scores: Tensor, contamination: float) -> Tensor:
    """Which of the points with LOF `scores` (n,) are inliers: bool (n,) on the same device.

    `contamination` is the fraction in [0, 0.5] to call outliers; 0 keeps everything. As in scikit-learn's
    `fit_predict` the offset is that percentile of the negative scores and an outlier lies strictly below it, so
    that points tied with the offset stay.

    Raises ValueError for a contamination outside its range.
    """
    if not 0 <= contamination <= 0.5:
        raise ValueError(f"contamination must lie in [0, 0.5], got {contamination}")
    negative_factor = -scores.cpu().numpy()
    offset = np.percentile(negative_factor, 100 * contamination)
    return torch.from_numpy(negative_factor >= offset).to(scores.device)


def _nearest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances (n, k) float64 to each row's k nearest other rows, ascending, and the indices (n, k) of these."""
    neighbors = _neighbors(x, k).sort(dim=1).values  # by index, so that the stable sort below settles ties by it
    rows = max(1, _DIFFERENCE_ELEMENTS // (k * x.shape[1]))
    # From differences: exactly 0 between duplicates, where |a|^2 - 2ab + |b|^2 leaves noise that LOF would turn
    # into huge densities, and equal for equal rows, so that ties stay ties.
    distances = torch.cat(
        [
            torch.linalg.vector_norm(x[near].sub_(block[:, None]), dim=2)
            for block, near in zip(x.split(rows), neighbors.split(rows), strict=True)
        ]
    )
    distances, order = distances.double().sort(dim=1, stable=True)
    return distances, neighbors.gather(1, order)


def _neighbors(x: Tensor, k: int) -> Tensor:
    """Indices (n, k) of each row's k nearest other rows, in no particular order."""
    # float64 and centred, because distances come here as differences of norms: among near-duplicates far from the
    # origin nothing would be left of them in float32.
    centred = x.to(torch.float64, copy=True)
    centred -= centred.mean(dim=0)
    sq_norms = centred.square().sum(dim=1)
    found = []
    for start in range(0, len(x), _QUERY_ROWS):
        # The query's own norm is the same along its row and does not change the order.
        sq_distances = torch.addmm(sq_norms, centred[start : start + _QUERY_ROWS], centred.T, alpha=-2)
        # Self is dropped by index: a duplicate may well come before it.
        sq_distances.diagonal(offset=start).fill_(torch.inf)
        found.append(sq_distances.topk(k, dim=1, largest=False).indices)
    return torch.cat(found)
