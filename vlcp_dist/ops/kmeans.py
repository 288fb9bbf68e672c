"""K-means as the stage wants it: clusters in a fixed order, centres and inertia from the points themselves."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from vlcp_dist.ops.gram import BLOCK_COLUMNS
from vlcp_dist.ops.points import as_matrix


@dataclass(frozen=True)
class KMeansResult:
    """Clusters in order of falling size, ties in order of their first member; none is empty."""

    centers: Tensor  # (k, d) float32: the mean of each cluster's members
    labels: Tensor  # (n,) int64
    nearest: Tensor  # (k,) int64: the point nearest to each centre
    inertia: float  # sum of the squared distances to the centres


def check_clusters(n: int, k: int, n_init: int, max_iter: int) -> None:
    """Raises ValueError for k < 1, k > n, and n_init or max_iter < 1."""
    if not 1 <= k <= n:
        raise ValueError(f"k must lie between 1 and the number of points: k={k}, n={n}")
    if n_init < 1 or max_iter < 1:
        raise ValueError(f"n_init and max_iter must be at least 1, got {n_init} and {max_iter}")


def summarize(x: Tensor, labels: Tensor, k: int) -> KMeansResult:
    """The clusters of the rows of `x` (n, d) that `labels` (n,) make, all of 0..k-1 among them."""
    labels = _by_size(labels, k)
    centers, nearest, inertia = _centers(as_matrix(x), labels, k)
    if len(torch.unique(centers, dim=0)) < k:
        warnings.warn(f"fewer than k={k} distinct points among {len(x)}: some centres coincide", stacklevel=3)
    return KMeansResult(centers, labels, nearest, inertia)


def _by_size(labels: Tensor, k: int) -> Tensor:
    """Number the clusters by falling size, then by first member."""
    sizes = torch.bincount(labels, minlength=k).tolist()
    first_member: dict[int, int] = {}
    for index, label in enumerate(labels.tolist()):
        first_member.setdefault(label, index)
    order = sorted(range(k), key=lambda cluster: (-sizes[cluster], first_member[cluster]))
    return torch.tensor(order, device=labels.device).argsort()[labels]


def _centers(x: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor, float]:
    """The members' means (k, d) float32, the point nearest to each, and the inertia around them."""
    members = torch.nn.functional.one_hot(labels, k).double()
    sizes = members.sum(dim=0)
    weights = (members / sizes).T
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    norms, inner = total.new_zeros(len(x)), total.new_zeros(k, len(x))
    centers = []
    for columns in x.split(BLOCK_COLUMNS, dim=1):
        block = columns.double()
        offset = block.mean(dim=0)
        block = block - offset
        means = weights @ block
        norms += block.square().sum(dim=1)
        inner.addmm_(means, block.T)
        total += (sizes * means.square().sum(dim=1)).sum()
        centers.append((means + offset).float())
    # Of one centre's distances |x|^2 - 2 cx + |c|^2 the last part is the same for all points.
    nearest = (norms - 2 * inner).argmin(dim=1)
    return torch.cat(centers, dim=1), nearest, float((norms.sum() - total).clamp(min=0))
