"""What this machine can do at best, measured: bytes copied and multiplications done in a second."""

import statistics
import time
from collections.abc import Callable

import torch

REPEATS = 7


def copy_bytes_per_second(device: str) -> float:
    """Bytes read and written by a second of copying within the device's memory, with the threads torch has.

    The buffers (512 MiB on a GPU, 128 MiB on a CPU) are larger than caches, and random: zeros may be compressed.
    """
    size = (512 if device == "cuda" else 128) * 2**20
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device)


def matmul_flops_per_second(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations (2 n^3 for n x n matrices) of a second of multiplying, with the threads torch has."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / seconds(lambda: torch.mm(a, b, out=out), device)


def seconds(call: Callable[[], object], device: str) -> float:
    """The median time of a call, after one that warms up; a GPU is waited for."""
    call()
    times = []
    for _ in range(REPEATS):
        wait(device)
        began = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def wait(device: str) -> None:
    """Until the GPU has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
