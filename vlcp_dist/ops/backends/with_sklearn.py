"""scikit-learn on the CPU, over the points as they are: the reference that the other backends are held against."""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from vlcp_dist.ops.points import as_points


def prepare(x: Tensor) -> np.ndarray:
    points: np.ndarray = as_points(x).cpu().numpy()
    return points


def neighbors(points: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
    distances, indices = NearestNeighbors(n_neighbors=k).fit(points).kneighbors()
    return torch.from_numpy(distances).double(), torch.from_numpy(indices)


def subset(points: np.ndarray, rows: Tensor) -> np.ndarray:
    return points[rows.cpu().numpy()]


def cluster(
    classes: Sequence[np.ndarray], k: int, *, seed: int, n_init: int, max_iter: int, algorithm: str = "lloyd"
) -> list[Tensor]:
    make = MiniBatchKMeans if algorithm == "minibatch" else KMeans
    found = []
    for points in classes:
        kmeans = make(k, n_init=n_init, max_iter=max_iter, random_state=seed % 2**32).fit(points)
        found.append(torch.from_numpy(kmeans.labels_).long())
    return found
