"""What every function over a matrix of points asks of its input."""

import torch
from torch import Tensor


def as_points(x: Tensor) -> Tensor:
    """`x` (n, d) as float32, or float64 where it already is; the same storage when nothing changes.

    Raises ValueError when `x` is not a matrix with d >= 1, or holds NaN or infinity; it names the first such row.
    """
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"expected points of shape (n, d), got {tuple(x.shape)}; flatten each item first")
    points = x if x.dtype == torch.float64 else x.float()
    bad_rows = (~torch.isfinite(points)).any(dim=1).nonzero().flatten()
    if len(bad_rows):
        raise ValueError(
            f"{len(bad_rows)} of {len(x)} points hold NaN or infinity, the first is row {int(bad_rows[0])}; "
            "drop these rows or encode their images again"
        )
    return points
