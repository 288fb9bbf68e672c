"""cuML: NearestNeighbors and KMeans on the GPU, over the points turned into min(n, d) dimensions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cuml
import torch
from cuml.cluster import KMeans
from cuml.neighbors import NearestNeighbors
from torch import Tensor

from vlcp_dist.ops.gram import Gram, coordinates, gram
from vlcp_dist.ops.lloyd import fill_empty
from vlcp_dist.ops.neighbors import nearest_of

_SPARE = 8  # candidates beyond those asked for: float32 may misplace what lies close to the last one


@dataclass(frozen=True)
class Points:
    products: Gram
    rows: Tensor  # float32 (n, min(n, d)) on the GPU


def prepare(x: Tensor) -> Points:
    if not torch.cuda.is_available():
        raise ValueError("prototypes.backend=cuml needs a GPU, and this worker sees none; choose torch or faiss")
    return _points(gram(x.cuda()))


def neighbors(points: Points, k: int) -> tuple[Tensor, Tensor]:
    n = len(points.products)
    with cuml.using_output_type("cupy"):
        index = NearestNeighbors(n_neighbors=min(n, k + 1 + _SPARE), algorithm="brute").fit(points.rows)
        found = index.kneighbors(points.rows, return_distance=False)
    return nearest_of(points.products, _tensor(found), k)


def subset(points: Points, rows: Tensor) -> Points:
    return _points(points.products.subset(rows))


def cluster(classes: Sequence[Points], k: int, *, seed: int, n_init: int, max_iter: int) -> list[Tensor]:
    return [_cluster(points, k, seed, n_init, max_iter) for points in classes]


def _cluster(points: Points, k: int, seed: int, n_init: int, max_iter: int) -> Tensor:
    with cuml.using_output_type("cupy"):
        kmeans = KMeans(n_clusters=k, init="k-means++", n_init=n_init, max_iter=max_iter, random_state=seed)
        labels = _tensor(kmeans.fit(points.rows).labels_)
    means = torch.stack([points.rows[labels == c].mean(dim=0) for c in range(k) if bool((labels == c).any())])
    return fill_empty(labels, torch.cdist(points.rows, means).min(dim=1).values, k)


def _points(products: Gram) -> Points:
    return Points(products, coordinates(products).contiguous())


def _tensor(array: Any) -> Tensor:
    return torch.as_tensor(array, device="cuda").long()
