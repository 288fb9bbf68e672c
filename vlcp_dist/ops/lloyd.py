"""Greedy k-means++ and Lloyd's iterations over inner products: all starts, and several classes, in step.

The mean of a cluster has inner products that are the means of its members' rows of the Gram matrix: a step adds n rows
of n numbers for each start, whatever k is, and no centre is formed. On a GPU, where such small sums are limited by
their launch, classes are stacked: they share every launch and nothing else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from vlcp_dist.ops.gram import Gram

_ELEMENTS = 2**24  # of an array (starts, k, n): more starts than that are run one group after the other
_ROUNDING = 64 * torch.finfo(torch.float64).eps  # what errors of sums may feign, in square norms


def lloyd(
    classes: Sequence[Gram],
    k: int,
    *,
    seed: int,
    n_init: int,
    max_iter: int,
    within: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Of every class the labels (n,) in 0..k-1, none unused, of the best of `n_init` starts.

    Each start goes on until no label changes, for at most `max_iter` steps. Draws come from `seed` and are made on the
    CPU: the same for every class, device and company. `within` gives labels (n,) of fewer clusters for each class:
    their means are the first seeds, and k-means++ adds the others.
    """
    draws = seed_draws(k, n_init, torch.Generator().manual_seed(seed))
    stacks = [_stack(classes)] if all(c.is_whole for c in classes) else [_stack([c]) for c in classes]
    seeds = list(within) if within is not None else None
    labels: list[Tensor] = []
    for stack in stacks:
        given, seeds = (seeds[: stack.size], seeds[stack.size :]) if seeds is not None else (None, None)
        labels += _best(stack, k, draws.to(stack.factor.device), max_iter, given)
    return labels


@dataclass(frozen=True)
class Stack:
    """Inner products of several classes, padded to n points each; a pad is a point without norm or label."""

    factor: Tensor  # (size * n, n): Gram matrices one below the other; or one class's centred points (n, d)
    is_whole: bool
    sq_norms: Tensor  # (size, n)
    counts: Tensor  # (size,): points that are no pads

    @property
    def size(self) -> int:
        return len(self.counts)

    @property
    def n(self) -> int:
        return self.sq_norms.shape[1]

    @property
    def valid(self) -> Tensor:
        return torch.arange(self.n, device=self.counts.device) < self.counts[:, None]


def _stack(classes: Sequence[Gram]) -> Stack:
    device = classes[0].factor.device
    counts = torch.tensor([len(c) for c in classes], device=device)
    if len(classes) == 1:
        return Stack(classes[0].factor, classes[0].is_whole, classes[0].sq_norms[None], counts)
    n = max(len(c) for c in classes)
    factor = torch.cat([pad(c.factor, (0, n - len(c), 0, n - len(c))) for c in classes])
    return Stack(factor, True, torch.stack([pad(c.sq_norms, (0, n - len(c))) for c in classes]), counts)


def single(products: Gram) -> Stack:
    """A stack of one class."""
    return _stack([products])


def _best(stack: Stack, k: int, draws: Tensor, max_iter: int, within: Sequence[Tensor] | None) -> list[Tensor]:
    """Runs (class, start) pairs in groups that fit memory; returns each class's labels of least inertia."""
    n_init = len(draws)
    owners = torch.arange(stack.size, device=draws.device).repeat_interleave(n_init)
    starts = torch.arange(n_init, device=draws.device).repeat(stack.size)
    group = max(1, _ELEMENTS // (k * stack.n))
    found = []
    for owner, start in zip(owners.split(group), starts.split(group), strict=True):
        base = None if within is None else torch.stack([_padded(within[i], stack.n) for i in owner.tolist()])
        found.append(_run(stack, owner, seed_labels(stack, owner, k, draws[start], base), k, max_iter))
    labels = torch.cat([f[0] for f in found]).view(stack.size, n_init, stack.n)
    best = torch.cat([f[1] for f in found]).view(stack.size, n_init).argmin(dim=1)
    return [labels[i, best[i], : stack.counts[i]] for i in range(stack.size)]


def _padded(labels: Tensor, n: int) -> Tensor:
    return pad(labels, (0, n - len(labels)), value=-1)


def seed_draws(k: int, n_init: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers (n_init, k, m) float64 on the CPU, for m = 2 + log k candidates at each step of k-means++."""
    return torch.rand(n_init, k, 2 + int(math.log(k)), generator=generator, dtype=torch.float64)


def seed_labels(stack: Stack, owner: Tensor, k: int, draws: Tensor, within: Tensor | None = None) -> Tensor:
    """Labels (p, n) of k-means++ starts (Arthur and Vassilvitskii 2007) from `draws` (p, k, m), -1 for pads.

    Greedy: of m candidates, drawn by squared distance to the nearest seed, the one that lowers the sum of these
    distances most becomes the next seed. `owner` (p,) says whose class each start is.
    """
    valid, counts = stack.valid[owner], stack.counts[owner]
    if within is None:
        first = (draws[:, 0, :1] * counts[:, None]).long().minimum(counts[:, None] - 1)
        closest = _to_points(stack, owner, first)[:, 0] * valid
        labels, done = torch.zeros_like(valid, dtype=torch.long), 1
    else:
        done = int(within.max()) + 1
        closest, labels = _to_means(stack, owner, within, done).clamp_(min=0).min(dim=1)
        closest = closest * valid
    for step in range(done, k):
        mass = _prefix_sums(closest)
        candidates = torch.searchsorted(mass, draws[:, step] * mass[:, -1:], right=True).minimum(counts[:, None] - 1)
        lowered = torch.minimum(closest[:, None], _to_points(stack, owner, candidates))
        best = lowered.sum(dim=2).argmin(dim=1)
        now = lowered[torch.arange(len(owner), device=owner.device), best]
        labels[now < closest] = step
        closest = now
    return _filled(torch.where(valid, labels, -1), closest, k)


def _run(stack: Stack, owner: Tensor, labels: Tensor, k: int, max_iter: int) -> tuple[Tensor, Tensor]:
    """Lloyd's iterations from `labels` (p, n), without empty clusters: the labels at the end and inertias (p,)."""
    final, inertia = labels.clone(), torch.zeros(len(owner), dtype=torch.float64, device=owner.device)
    running = torch.arange(len(owner), device=owner.device)
    for step in range(max_iter + 1):
        mine = owner[running]
        sq_distances = _to_means(stack, mine, labels, k)
        to_own = sq_distances.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        to_nearest, nearest = sq_distances.min(dim=1)
        # A point moves only for more than rounding could feign: else points between equal centres move for ever.
        rounding = _ROUNDING * stack.sq_norms[mine].amax(dim=1, keepdim=True)
        moves = (to_nearest < to_own - rounding) & (labels >= 0)
        ends = ~moves.any(dim=1) if step < max_iter else torch.ones_like(mine, dtype=torch.bool)
        final[running[ends]] = labels[ends]
        inertia[running[ends]] = (to_own.clamp(min=0) * (labels >= 0))[ends].sum(dim=1)
        goes_on = (~ends).nonzero().flatten()
        if not len(goes_on):
            break
        running = running[goes_on]
        labels = torch.where(moves, nearest, labels)[goes_on]
        closest = torch.where(moves, to_nearest, to_own)[goes_on]
        labels = _filled(labels, closest, k)
    return final, inertia


def _to_points(stack: Stack, owner: Tensor, points: Tensor) -> Tensor:
    """Squared distances (p, m, n) from the points of each start with these indices (p, m) to all of its class."""
    rows = stack.factor[points + stack.n * owner[:, None]]
    inner = rows if stack.is_whole else rows @ stack.factor.T
    norms = stack.sq_norms[owner]
    return (norms[:, None] + norms.gather(1, points)[:, :, None] - 2 * inner).clamp_(min=0)


def _to_means(stack: Stack, owner: Tensor, labels: Tensor, k: int) -> Tensor:
    """Squared distances (p, k, n) from the cluster means of each start to all points."""
    members = labels[:, None] == torch.arange(k, device=labels.device)[:, None]
    bags = _sizes(labels, k)
    sizes = bags[:, 1:]
    # The rows of each cluster's members are added up; pads, with label -1, come first and make a bag of their own.
    in_order = labels.sort(dim=1, stable=True).indices + stack.n * owner[:, None]
    first = bags.flatten().cumsum(0) - bags.flatten()
    sums = embedding_bag(in_order.flatten(), stack.factor, first, mode="sum")
    means = sums.view(len(labels), k + 1, -1)[:, 1:] / sizes[:, :, None]
    inner = means if stack.is_whole else means @ stack.factor.T
    own = (inner * members).sum(dim=2) / sizes
    return stack.sq_norms[owner][:, None] - 2 * inner + own[:, :, None]


def _sizes(labels: Tensor, k: int) -> Tensor:
    """How many points (p, k + 1) of each start are pads, and how many in each cluster."""
    bins = labels + 1 + (k + 1) * torch.arange(len(labels), device=labels.device)[:, None]
    return torch.bincount(bins.flatten(), minlength=len(labels) * (k + 1)).view(-1, k + 1)


def _prefix_sums(mass: Tensor) -> Tensor:
    """Cumulated along rows (p, n), in an order that does not vary from run to run."""
    if not mass.is_cuda:
        return mass.cumsum(dim=1)
    n = mass.shape[1]
    return (mass @ torch.ones(n, n, dtype=mass.dtype, device=mass.device).triu()).cummax(dim=1).values


def _filled(labels: Tensor, to_own: Tensor, k: int) -> Tensor:
    """`labels` (p, n) where no cluster is empty: each empty one gets the point farthest from its own centre."""
    for start in (_sizes(labels, k)[:, 1:] == 0).any(dim=1).nonzero().flatten().tolist():
        labels, valid = labels.clone(), labels[start] >= 0
        labels[start, valid] = fill_empty(labels[start, valid], to_own[start, valid], k)
    return labels


def fill_empty(labels: Tensor, to_own: Tensor, k: int) -> Tensor:
    """Give each empty cluster the point farthest from its centre (`to_own`) that does not empty another."""
    sizes = torch.bincount(labels, minlength=k).tolist()
    filled = labels.tolist()
    farthest_first = iter(to_own.argsort(descending=True, stable=True).tolist())
    for cluster in (c for c in range(k) if sizes[c] == 0):
        point = next(p for p in farthest_first if sizes[filled[p]] > 1)
        sizes[filled[point]] -= 1
        filled[point] = cluster
    return torch.tensor(filled, device=labels.device)
