"""K-means: greedy k-means++ and Lloyd's iterations, best of several starts, on the device of the points.

A class has far fewer images than a latent has numbers (1,300 against 16,384), and a centre is a mean of points,
so every distance that K-means needs follows from the inner products of the points. These are computed once, in
float64; each Lloyd step then costs n x n x k instead of n x d x k, and no centre is formed before the last.
"""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from vlcp_dist.ops.points import as_points

_BLOCK_COLUMNS = 4096  # columns widened to float64 at a time: bounds the extra memory


@dataclass(frozen=True)
class KMeansResult:
    """Clusters in order of falling size, ties in order of their first member; none is empty."""

    centers: Tensor  # (k, d) float32: the mean of each cluster's members
    labels: Tensor  # (n,) int64: the nearest centre
    inertia: float  # sum of the squared distances to the centres


def kmeans(x: Tensor, k: int, *, seed: int, n_init: int = 10, max_iter: int = 300, tol: float = 1e-4) -> KMeansResult:
    """Cluster the rows of `x` (n, d) around `k` centres; the start with the least inertia wins.

    Each of the `n_init` starts stops when no label changes, after `max_iter` steps, or when the centres' squared
    shifts sum to at most `tol` times the mean variance of a feature. The winner goes on until no label changes
    (again for at most `max_iter` steps), so that its labels and centres fit each other. All draws come from `seed`
    and are made on the CPU: they are the same on every device.

    With fewer than `k` distinct points some centres coincide, and a warning says so.

    Raises ValueError for k < 1, k > n, n_init or max_iter < 1, and non-finite values.
    """
    x = as_points(x)
    if not 1 <= k <= len(x):
        raise ValueError(f"k must lie between 1 and the number of points: k={k}, n={len(x)}")
    if n_init < 1 or max_iter < 1:
        raise ValueError(f"n_init and max_iter must be at least 1, got {n_init} and {max_iter}")

    gram = _gram(x)
    shift_limit = tol * float(gram.sq_norms.mean()) / x.shape[1]
    generator = torch.Generator().manual_seed(seed)
    starts = (_lloyd(gram, _start(gram, k, generator), k, max_iter, shift_limit) for _ in range(n_init))
    labels, _ = min(starts, key=lambda start: start[1])
    labels, _ = _lloyd(gram, labels, k, max_iter, shift_limit=-1)

    labels = _by_size(labels, k)
    centers, inertia = _centers(x, labels, k)
    if len(torch.unique(centers, dim=0)) < k:
        warnings.warn(f"fewer than k={k} distinct points among {len(x)}: some centres coincide", stacklevel=2)
    return KMeansResult(centers, labels, inertia)


@dataclass(frozen=True)
class _Gram:
    """Inner products G (n, n) of the centred points: whole, or as the points when these are the smaller."""

    factor: Tensor  # float64: G, or the points (n, d) with G = factor @ factor.T
    is_whole: bool
    sq_norms: Tensor  # (n,): the diagonal of G

    def times(self, weights: Tensor) -> Tensor:
        """G @ weights: the inner products of the points with these weighted sums of points."""
        return self.factor @ (weights if self.is_whole else self.factor.T @ weights)

    def sq_distances_to(self, points: Tensor) -> Tensor:
        """Squared distances (n, m) to the points with these indices (m,)."""
        inner = self.factor[:, points] if self.is_whole else self.factor @ self.factor[points].T
        return (self.sq_norms[:, None] + self.sq_norms[points] - 2 * inner).clamp_(min=0)


def _gram(x: Tensor) -> _Gram:
    n, d = x.shape
    if d < n:
        points = x.double() - x.mean(dim=0, dtype=torch.float64)
        return _Gram(points, False, points.square().sum(dim=1))
    whole = torch.zeros(n, n, dtype=torch.float64, device=x.device)
    for columns in x.split(_BLOCK_COLUMNS, dim=1):
        block = columns.double()
        block = block - block.mean(dim=0)
        whole.addmm_(block, block.T)
    return _Gram(whole, True, whole.diagonal().clone())


def _start(gram: _Gram, k: int, generator: torch.Generator) -> Tensor:
    """Labels (n,) of a k-means++ start (Arthur and Vassilvitskii 2007).

    Greedy: of 2 + log(k) candidates, drawn by squared distance to the nearest seed, the one that lowers the sum
    of these distances most becomes the next seed.
    """
    n, device = len(gram.sq_norms), gram.sq_norms.device
    first = torch.randint(n, (1,), generator=generator)
    draws = torch.rand(k - 1, 2 + int(math.log(k)), generator=generator, dtype=torch.float64)
    seeds = [first.to(device)]
    nearest = gram.sq_distances_to(seeds[0])
    for draw in draws:
        mass = nearest[:, 0].cpu().cumsum(0)  # on the CPU, where the order of summation is fixed
        candidates = torch.searchsorted(mass, draw * mass[-1], right=True).clamp_(max=n - 1).to(device)
        lowered = torch.minimum(nearest, gram.sq_distances_to(candidates))
        best = lowered.sum(dim=0).argmin()[None]
        seeds.append(candidates[best])
        nearest = lowered[:, best]
    sq_distances, labels = gram.sq_distances_to(torch.cat(seeds)).min(dim=1)
    return _fill_empty(labels, sq_distances, k)


def _lloyd(gram: _Gram, labels: Tensor, k: int, max_iter: int, shift_limit: float) -> tuple[Tensor, float]:
    """Lloyd's iterations from `labels`, without empty clusters; returns the labels and their inertia."""
    weights = _mean_weights(labels, k)
    inner = gram.times(weights)
    for _ in range(max_iter):
        moved = _assign(gram, labels, _sq_distances(gram, weights, inner))
        if torch.equal(moved, labels):
            break
        labels, last_weights, last_inner = moved, weights, inner
        weights = _mean_weights(labels, k)
        inner = gram.times(weights)
        if float(((weights - last_weights) * (inner - last_inner)).sum()) <= shift_limit:
            break
    to_own = _sq_distances(gram, weights, inner).gather(1, labels[:, None])
    return labels, float(to_own.clamp(min=0).sum())


def _mean_weights(labels: Tensor, k: int) -> Tensor:
    """(n, k) float64: column j averages the members of cluster j."""
    members = torch.nn.functional.one_hot(labels, k).double()
    return members / members.sum(dim=0)


def _sq_distances(gram: _Gram, weights: Tensor, inner: Tensor) -> Tensor:
    """Squared distances (n, k) to the means, whose inner products with the points are `inner`."""
    return gram.sq_norms[:, None] - 2 * inner + (weights * inner).sum(dim=0)


def _assign(gram: _Gram, labels: Tensor, sq_distances: Tensor) -> Tensor:
    # A point moves only for more than rounding could feign: else points between equal centres move for ever.
    rounding = 64 * torch.finfo(torch.float64).eps * gram.sq_norms.max()
    to_own = sq_distances.gather(1, labels[:, None])[:, 0]
    to_nearest, nearest = sq_distances.min(dim=1)
    moves = to_nearest < to_own - rounding
    return _fill_empty(
        torch.where(moves, nearest, labels), torch.where(moves, to_nearest, to_own), sq_distances.shape[1]
    )


def _fill_empty(labels: Tensor, to_own: Tensor, k: int) -> Tensor:
    """Give each empty cluster the point farthest from its centre (`to_own`) that does not empty another."""
    sizes = torch.bincount(labels, minlength=k).tolist()
    if min(sizes) > 0:
        return labels
    filled = labels.tolist()
    farthest_first = iter(to_own.argsort(descending=True, stable=True).tolist())
    for cluster in (c for c in range(k) if sizes[c] == 0):
        point = next(p for p in farthest_first if sizes[filled[p]] > 1)
        sizes[filled[point]] -= 1
        filled[point] = cluster
    return torch.tensor(filled, device=labels.device)


def _by_size(labels: Tensor, k: int) -> Tensor:
    """Number the clusters by falling size, then by first member."""
    sizes = torch.bincount(labels, minlength=k).tolist()
    first_member: dict[int, int] = {}
    for index, label in enumerate(labels.tolist()):
        first_member.setdefault(label, index)
    order = sorted(range(k), key=lambda cluster: (-sizes[cluster], first_member[cluster]))
    return torch.tensor(order, device=labels.device).argsort()[labels]


def _centers(x: Tensor, labels: Tensor, k: int) -> tuple[Tensor, float]:
    """The members' means (k, d) float32 and the inertia around them, from the points themselves."""
    weights = _mean_weights(labels, k)
    centers, inertia = [], 0.0
    for columns in x.split(_BLOCK_COLUMNS, dim=1):
        block = columns.double()
        means = (weights.T @ block).float()
        inertia += float((block - means[labels]).square().sum())
        centers.append(means)
    return torch.cat(centers, dim=1), inertia
