"""Many small waits for storage at once."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

THREADS = 32
Item = TypeVar("Item")
Result = TypeVar("Result")


def concurrently(function: Callable[[Item], Result], items: Iterable[Item], threads: int = THREADS) -> list[Result]:
    """`function` of every item, in their order.

    Raises:
        Exception: the first error; items not begun by then are left alone.
    """
    todo = list(items)
    if len(todo) <= 1:
        return [function(item) for item in todo]
    # Handing over single items would cost more than reading a small file of a local disk.
    step = max(1, min(64, len(todo) // (8 * threads)))
    parts = [todo[i : i + step] for i in range(0, len(todo), step)]
    pool = ThreadPoolExecutor(min(threads, len(todo)))
    try:
        results = pool.map(lambda part: [function(item) for item in part], parts)
        return [result for part in results for result in part]
    finally:
        pool.shutdown(cancel_futures=True)
