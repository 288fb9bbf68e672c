"""torch, on the device of the points: everything from one matrix of inner products; classes run in step."""

from collections.abc import Sequence

from torch import Tensor

from vlcp_dist.ops.gram import Gram, gram
from vlcp_dist.ops.lloyd import lloyd
from vlcp_dist.ops.minibatch import minibatch
from vlcp_dist.ops.neighbors import nearest

prepare = gram
neighbors = nearest
subset = Gram.subset


def cluster(
    classes: Sequence[Gram],
    k: int,
    *,
    seed: int,
    n_init: int,
    max_iter: int,
    algorithm: str = "lloyd",
    within: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    if algorithm == "minibatch":
        return [minibatch(products, k, seed=seed, n_init=n_init, max_iter=max_iter) for products in classes]
    return lloyd(classes, k, seed=seed, n_init=n_init, max_iter=max_iter, within=within)
