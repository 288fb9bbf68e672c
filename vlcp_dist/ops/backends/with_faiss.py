"""faiss: IndexFlatL2 and Kmeans over the points turned into min(n, d) dimensions. On GPUs where its build sees any."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from vlcp_dist.ops.gram import Gram, coordinates, gram
from vlcp_dist.ops.lloyd import fill_empty, seed_draws, seed_labels, single
from vlcp_dist.ops.neighbors import nearest_of

_SPARE = 8  # candidates beyond those asked for: float32 may misplace what lies close to the last one
_STEPS = 10  # between looks at whether anything moves
_SETTLED = 1e-7  # of the inertia: less than that is float32's noise


@dataclass(frozen=True)
class Points:
    products: Gram
    rows: np.ndarray  # float32 (n, min(n, d)), C-contiguous


def prepare(x: Tensor) -> Points:
    return _points(gram(x))


def neighbors(points: Points, k: int) -> tuple[Tensor, Tensor]:
    n = len(points.products)
    index: Any = faiss.IndexFlatL2(points.rows.shape[1])
    if _on_gpu(points):
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(points.rows)
    found = index.search(points.rows, min(n, k + 1 + _SPARE))[1]
    return nearest_of(points.products, torch.from_numpy(found).to(points.products.factor.device), k)


def subset(points: Points, rows: Tensor) -> Points:
    return _points(points.products.subset(rows))


def cluster(classes: Sequence[Points], k: int, *, seed: int, n_init: int, max_iter: int) -> list[Tensor]:
    return [_cluster(points, k, seed, n_init, max_iter) for points in classes]


def _cluster(points: Points, k: int, seed: int, n_init: int, max_iter: int) -> Tensor:
    """The best of `n_init` starts. faiss's own seeds are random points, or k-means++ over a sample: both are worse."""
    device = points.products.factor.device
    draws, owner = seed_draws(k, n_init, torch.Generator().manual_seed(seed)), torch.zeros(n_init, dtype=torch.long)
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for labels in seed_labels(single(points.products), owner.to(device), k, draws.to(device)).cpu().numpy():
        seeds = np.stack([points.rows[labels == c].mean(axis=0) for c in range(k)])
        distances, nearest = _lloyd(points, seeds, seed, max_iter)
        inertia = float(distances.sum(dtype=np.float64))
        if best is None or inertia < best[0]:
            best = inertia, nearest, distances
    assert best is not None
    return fill_empty(torch.from_numpy(best[1]).to(device), torch.from_numpy(best[2]).to(device), k)


def _lloyd(points: Points, centroids: np.ndarray, seed: int, max_iter: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances (n,) to the nearest centroids and their numbers (n,), when these do not move any more."""
    n, d = points.rows.shape
    before = np.inf
    for step in range(0, max_iter, _STEPS):  # faiss itself knows no end but a number of steps
        kmeans: Any = faiss.Kmeans(
            d,
            len(centroids),
            niter=min(_STEPS, max_iter - step),
            seed=seed,
            gpu=_on_gpu(points),
            min_points_per_centroid=1,
            max_points_per_centroid=n,
        )
        kmeans.train(points.rows, init_centroids=centroids)
        centroids = kmeans.centroids
        if kmeans.obj[-1] >= before * (1 - _SETTLED):
            break
        before = kmeans.obj[-1]
    distances, nearest = kmeans.index.search(points.rows, 1)
    return distances[:, 0], nearest[:, 0]


def _points(products: Gram) -> Points:
    return Points(products, np.ascontiguousarray(coordinates(products).cpu().numpy()))


def _on_gpu(points: Points) -> bool:
    return points.products.factor.is_cuda and faiss.get_num_gpus() > 0
