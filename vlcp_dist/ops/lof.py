"""Local outlier factor (Breunig et al. 2000) of a class's latents, and its inliers at a contamination."""

import warnings

import numpy as np
import torch
from torch import Tensor

_DENSITY_FLOOR = 1e-10  # scikit-learn's: keeps the density of more than n_neighbors duplicates finite
_TIE = 1e-9  # relative: scores closer together are the same


def usable_neighbors(n: int, n_neighbors: int) -> int:
    """`n_neighbors`, or n - 1 with a warning where there are no more. Raises ValueError for n < 2, n_neighbors < 1."""
    if n < 2:
        raise ValueError(f"LOF compares points with their neighbours and needs at least 2 of them, got {n}")
    if n_neighbors < 1:
        raise ValueError(f"n_neighbors must be at least 1, got {n_neighbors}")
    if n_neighbors >= n:
        warnings.warn(f"n_neighbors={n_neighbors} but there are {n} points: using {n - 1}", stacklevel=3)
    return min(n_neighbors, n - 1)


def scores(distances: Tensor, neighbors: Tensor) -> Tensor:
    """LOF scores float64 (n,) of points with these nearest others (n, k) at these `distances` (n, k), ascending.

    About 1 for inliers, more for outliers: the `-negative_outlier_factor_` of scikit-learn's `LocalOutlierFactor`,
    except where distinct points at exactly the same distance compete for the last place among the neighbours: no
    rule says which wins (scikit-learn's choice varies with its algorithm and threads). Duplicates do not matter.
    """
    distances = distances.double()
    k_distance = distances[:, -1]
    reachability = torch.maximum(distances, k_distance[neighbors])
    density = 1 / (reachability.mean(dim=1) + _DENSITY_FLOOR)
    return (density[neighbors] / density[:, None]).mean(dim=1)


def inlier_mask(scores: Tensor, contamination: float) -> Tensor:
    """Which of the points with LOF `scores` (n,) are inliers: bool (n,) on the same device.

    `contamination` is the fraction in [0, 0.5] to call outliers; 0 keeps everything. As in scikit-learn's
    `fit_predict` the offset is that percentile of the negative scores and an outlier lies strictly below it, so
    that points tied with the offset stay, also where rounding has set equal scores apart.

    Raises ValueError for a contamination outside its range.
    """
    if not 0 <= contamination <= 0.5:
        raise ValueError(f"contamination must lie in [0, 0.5], got {contamination}")
    negative_factor = -scores.cpu().numpy()
    offset = np.percentile(negative_factor, 100 * contamination)
    return torch.from_numpy(negative_factor >= offset - _TIE * abs(offset)).to(scores.device)
