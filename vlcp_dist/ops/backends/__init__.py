"""Neighbours and clusters of a class's latents, by any of four libraries behind one small interface.

A backend is a module with four functions, and a class's points in whatever form it computes on:

    prepare(x) -> points                             x (n, d); once per class: what all that follows shares
    neighbors(points, k) -> (distances, indices)     (n, k) each, of the others, ascending
    subset(points, rows) -> points                   of these points alone, as of the inliers
    cluster([points, ...], k, ...) -> [labels, ...]  K-means of each class, int64 (n,), every label in 0..k-1 in use

Everything else, LOF's arithmetic, centres and inertia, is the same for all: `ops.lof` and `ops.kmeans`.
"""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

Name = Literal["torch", "faiss", "cuml", "sklearn"]
Algorithm = Literal["lloyd", "minibatch"]


def load(name: Name) -> ModuleType:
    """The backend's module; only it imports the library. Raises ValueError when the library is not installed."""
    if name == "faiss":
        _need("faiss", name, "'vlcp-dist[cpu]' (faiss-cpu) or 'vlcp-dist[gpu]' (faiss-gpu)")
    if name == "cuml":
        _need("cuml", name, "'vlcp-dist[gpu]' (cuml-cu13)")
    return import_module(f"vlcp_dist.ops.backends.with_{name}")


def _need(library: str, name: str, extra: str) -> None:
    if find_spec(library) is None:
        raise ValueError(
            f"prototypes.backend={name} needs the package {library}, which is not installed: "
            f"pip install {extra}, or choose prototypes.backend=torch"
        )
