"""Inner products of a class's latents, computed once: LOF's neighbours and every K-means follow from them.

A class has far fewer images than a latent has numbers (1,300 against 16,384), and a centre is a mean of points, so
all distances that either needs are sums over an n x n matrix. It is computed in float64, where a difference of norms
and products still has 13 digits: only points all but equal have to be measured again, from their differences.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlcp_dist.ops.points import as_matrix, check_finite

BLOCK_COLUMNS = 2048  # columns widened to float64 at a time: bounds the extra memory
BLOCK_ROWS = 256  # rows of the lower triangle computed at a time: the upper one is its mirror


@dataclass(frozen=True)
class Gram:
    """Inner products G (n, n) of centred points: whole, or as the points when these are the smaller."""

    points: Tensor  # (n, d) as they were given, float16 to float64
    factor: Tensor  # float64: G, or the centred points (n, d) with G = factor @ factor.T
    is_whole: bool
    sq_norms: Tensor  # (n,): the diagonal of G

    def __len__(self) -> int:
        return len(self.points)

    def inner(self, rows: Tensor) -> Tensor:
        """Inner products (m, n) of the points with these indices (m,) with all."""
        return self.factor[rows] if self.is_whole else self.factor[rows] @ self.factor.T

    def sq_distances(self, rows: Tensor) -> Tensor:
        """Squared distances (m, n) from the points with these indices (m,) to all."""
        return (self.sq_norms[rows][:, None] + self.sq_norms - 2 * self.inner(rows)).clamp_(min=0)

    def subset(self, rows: Tensor) -> "Gram":
        """Of the points with these indices (m,) alone."""
        factor = self.factor[rows]
        return Gram(self.points[rows], factor[:, rows] if self.is_whole else factor, self.is_whole, self.sq_norms[rows])


def gram(x: Tensor) -> Gram:
    """The inner products of the rows of `x` (n, d), on its device.

    Raises ValueError when `x` is not a matrix with d >= 1, and for non-finite values.
    """
    points = as_matrix(x)
    n, d = points.shape
    if d < n:
        centred = points.double()
        centred = centred - centred.mean(dim=0)
        _check(points, centred[0])
        return Gram(points, centred, False, centred.square().sum(dim=1))
    whole = torch.zeros(n, n, dtype=torch.float64, device=points.device)
    for columns in points.split(BLOCK_COLUMNS, dim=1):
        block = columns.double()
        mean = block.mean(dim=0)
        _check(points, mean)
        block = block - mean
        for start in range(0, n, BLOCK_ROWS):
            stop = start + BLOCK_ROWS
            whole[start:stop, :stop].addmm_(block[start:stop], block[:stop].T)
    whole = whole.tril() + whole.tril(-1).T
    return Gram(points, whole, True, whole.diagonal().clone())


def coordinates(products: Gram) -> Tensor:
    """The points (n, min(n, d)) float32, centred and turned so that min(n, d) numbers each are enough.

    An isometry but for 1e-10 of the mean square norm, which is added to the squared distance of every pair: with it
    a Cholesky factor of the inner products exists also where points repeat.
    """
    if not products.is_whole:
        return products.factor.float()
    shift = 1e-10 * products.sq_norms.mean().clamp(min=1e-300)
    factor: Tensor = torch.linalg.cholesky(products.factor + shift * torch.eye(len(products)).to(products.factor))
    return factor.float()


def _check(points: Tensor, mean: Tensor) -> None:
    # A mean over all points is finite only where all of them are: one look at it spares one at every number.
    if not bool(torch.isfinite(mean).all()):
        check_finite(points)
