"""Nearest neighbours of each point within its class: from inner products, measured again where these say too little."""

import torch
from torch import Tensor

from vlcp_dist.ops.gram import Gram

_QUERY_ROWS = 2048  # rows of the distance matrix held at a time: bounds memory for very large classes
_DIFFERENCE_ELEMENTS = 2**20  # differences held at a time: small enough to stay in a CPU's cache
_CLOSE = 1e-8  # of the square norms: below, rounding takes more than a few digits of a squared distance
_TIE = 1e-12  # of the square norms: closer together, squared distances from products cannot be told apart


def nearest(products: Gram, k: int) -> tuple[Tensor, Tensor]:
    """Distances (n, k) float64 to each point's k nearest other points, ascending, and their indices (n, k).

    Of points at the same distance, as far as float64 can tell, those with the smallest indices come first. `k` must lie
    between 1 and n - 1.
    """
    everyone = torch.arange(len(products), device=products.factor.device)
    found = []
    for rows in everyone.split(_QUERY_ROWS):
        sq_distances = products.sq_distances(rows)
        # Self is dropped by index: a duplicate may well come before it.
        sq_distances.scatter_(1, rows[:, None], torch.inf)
        _mend(products, rows[:, None].expand_as(sq_distances), everyone.expand_as(sq_distances), sq_distances)
        best = _first(products, rows, sq_distances, k)
        found.append(_in_order(sq_distances.gather(1, best), best))
    return torch.cat([d for d, _ in found]), torch.cat([i for _, i in found])


def _first(products: Gram, rows: Tensor, sq_distances: Tensor, k: int) -> Tensor:
    """The columns (m, k) of the least of each row (m, n), ties for the last place by column."""
    values, best = sq_distances.topk(k, dim=1, largest=False)
    last, margin = values[:, -1:], _TIE * (products.sq_norms[rows][:, None] + products.sq_norms.max())
    tied = (sq_distances <= last + margin).sum(dim=1) > k
    if bool(tied.any()):
        some = sq_distances[tied]
        some = torch.where((some - last[tied]).abs() <= margin[tied], last[tied], some)
        best[tied] = some.sort(dim=1, stable=True).indices[:, :k]
    return best


def nearest_of(products: Gram, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `nearest`, of only these candidates (n, m) with m >= k + 1, such as an index in float32 has found.

    A point's own index among its candidates is passed over, and so is a negative one.
    """
    everyone, in_order = torch.arange(len(products), device=candidates.device), candidates.sort(dim=1).values
    found = []
    for rows, listed in zip(everyone.split(_QUERY_ROWS), in_order.split(_QUERY_ROWS), strict=True):
        near = listed.clamp(min=0)
        sq_distances = products.sq_distances(rows).gather(1, near)
        _mend(products, rows[:, None].expand_as(near), near, sq_distances)
        sq_distances[(listed < 0) | (listed == rows[:, None])] = torch.inf
        best = _first(products, rows, sq_distances, k)
        found.append(_in_order(sq_distances.gather(1, best), near.gather(1, best)))
    return torch.cat([d for d, _ in found]), torch.cat([i for _, i in found])


def _in_order(sq_distances: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    indices, by_index = indices.sort(dim=1)
    distances, order = sq_distances.gather(1, by_index).sqrt().sort(dim=1, stable=True)
    return distances, indices.gather(1, order)


def _mend(products: Gram, i: Tensor, j: Tensor, sq_distances: Tensor) -> None:
    """Measure again, in place, the distances of those pairs (i, j) that lie all but on each other."""
    norms = products.sq_norms
    close = sq_distances <= _CLOSE * (norms[i] + norms[j])
    if bool(close.any()):
        sq_distances[close] = _from_differences(products.points, i[close], j[close])


def _from_differences(points: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Squared distances (m,) float64 of the pairs: exactly 0 between equal points."""
    first = _first_equal(points, torch.cat([i, j]).unique())
    i, j = first[i], first[j]
    distances = torch.zeros(len(i), dtype=torch.float64, device=points.device)
    differ = (i != j).nonzero().flatten()
    for pairs in differ.split(max(1, _DIFFERENCE_ELEMENTS // points.shape[1])):
        distances[pairs] = (points[i[pairs]].double() - points[j[pairs]].double()).square().sum(dim=1)
    return distances


def _first_equal(points: Tensor, rows: Tensor) -> Tensor:
    """For each point (n,) the first of `rows` that equals it bit by bit, for those rows; for others themselves."""
    first = torch.arange(len(points))
    seen: dict[bytes, int] = {}
    for row in rows.tolist():
        first[row] = seen.setdefault(points[row].cpu().numpy().tobytes(), row)
    return first.to(points.device)
