"""What every function over a matrix of points asks of its input."""

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.float32, torch.float64)


def as_points(x: Tensor) -> Tensor:
    """`x` (n, d) as float32, or float64 where it already is; the same storage when nothing changes.

    Raises ValueError when `x` is not a matrix with d >= 1, or holds NaN or infinity; it names the first such row.
    """
    points = as_matrix(x)
    points = points if points.dtype == torch.float64 else points.float()
    check_finite(points)
    return points


def as_matrix(x: Tensor) -> Tensor:
    """`x` (n, d) in the precision that it has, float16 included; float32 where it has another type.

    Raises ValueError when `x` is not a matrix with d >= 1.
    """
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"expected points of shape (n, d), got {tuple(x.shape)}; flatten each item first")
    return x if x.dtype in FLOATS else x.float()


def check_finite(points: Tensor) -> None:
    """Raises ValueError that names the first row with NaN or infinity."""
    bad_rows = (~torch.isfinite(points)).any(dim=1).nonzero().flatten()
    if len(bad_rows):
        raise ValueError(
            f"{len(bad_rows)} of {len(points)} points hold NaN or infinity, the first is row {int(bad_rows[0])}; "
            "drop these rows or encode their images again"
        )
