"""Mini-batch K-means (Sculley 2010) over inner products: the clustering of D4M (docs/method.md, 5)."""

import math

import torch
from torch import Tensor

from vlcp_dist.ops.gram import Gram
from vlcp_dist.ops.lloyd import fill_empty, seed_draws, seed_labels, single

_BATCH = 1024  # points in a step, as in scikit-learn
_PATIENCE = 10  # steps without a better smoothed inertia after which a start ends, as there


def minibatch(products: Gram, k: int, *, seed: int, n_init: int, max_iter: int) -> Tensor:
    """Labels (n,) in 0..k-1, none unused, of the best of `n_init` starts of at most `max_iter` passes over the points.

    A step moves each centre towards the mean of those of its batch that are nearest to it, the less the more it has
    seen. Draws come from `seed` and are made on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    device = products.factor.device
    draws, owner = seed_draws(k, n_init, generator).to(device), torch.zeros(n_init, dtype=torch.long, device=device)
    starts = seed_labels(single(products), owner, k, draws)
    runs = [_run(products, labels, k, generator, max_iter) for labels in starts]
    return min(runs, key=lambda run: run[1])[0]


def _run(products: Gram, labels: Tensor, k: int, generator: torch.Generator, max_iter: int) -> tuple[Tensor, float]:
    n, norms = len(products), products.sq_norms
    everyone = torch.arange(n, device=norms.device)
    inner, own, _ = _means(products, everyone, labels, k)
    seen = torch.zeros(k, dtype=torch.float64, device=norms.device)
    smoothed, best, since = 0.0, math.inf, 0
    weight = min(1.0, 2 * _BATCH / (n + 1))
    for step in range(math.ceil(max_iter * n / _BATCH)):
        batch = torch.randint(n, (_BATCH,), generator=generator).to(norms.device)
        sq_distances, nearest = (norms[batch] - 2 * inner[:, batch] + own[:, None]).min(dim=0)
        means, mean_norms, sizes = _means(products, batch, nearest, k)
        seen += sizes
        share = sizes / seen.clamp(min=1)
        towards = _average(inner[:, batch], nearest, sizes)  # inner product of each centre with its batch mean
        own = (1 - share) ** 2 * own + 2 * share * (1 - share) * towards + share**2 * mean_norms
        inner = (1 - share)[:, None] * inner + share[:, None] * means
        inertia = float(sq_distances.clamp(min=0).mean())
        smoothed = inertia if step == 0 else smoothed * (1 - weight) + inertia * weight
        best, since = (smoothed, 0) if smoothed < best else (best, since + 1)
        if since >= _PATIENCE:
            break
    sq_distances, labels = (norms - 2 * inner + own[:, None]).clamp(min=0).min(dim=0)
    return fill_empty(labels, sq_distances, k), float(sq_distances.sum())


def _means(products: Gram, points: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the clusters that `labels` make of these points: their means' inner products (k, n), square norms, sizes."""
    members = torch.nn.functional.one_hot(labels, k).double()
    sizes = members.sum(dim=0)
    weights = torch.zeros(len(products), k, dtype=torch.float64, device=members.device)
    weights.index_add_(0, points, members / sizes.clamp(min=1))
    inner = (products.factor @ (weights if products.is_whole else products.factor.T @ weights)).T
    return inner, _average(inner[:, points], labels, sizes), sizes


def _average(inner: Tensor, labels: Tensor, sizes: Tensor) -> Tensor:
    """(k,): the mean of row c of `inner` (k, m) over the points with label c."""
    members = labels == torch.arange(len(sizes), device=labels.device)[:, None]
    return (inner * members).sum(dim=1) / sizes.clamp(min=1)
