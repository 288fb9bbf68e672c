"""Work done in threads a little ahead of whoever needs it, with a count of the time it came too late."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Ahead(Generic[Result]):
    """Iterates over `function` of every item, in their order; at most `most` are begun and not yet taken.

    `waited` is how many seconds the taker has stood still so far. What `function` raises is raised where its result
    would have been taken. As a context manager it leaves no thread behind, however it is left.
    """

    def __init__(
        self,
        function: Callable[[Item], Result],
        items: Iterable[Item],
        *,
        threads: int,
        most: int,
        initializer: Callable[[], None] | None = None,
    ):
        """`initializer` is called once in each thread."""
        self.waited = 0.0
        self._function = function
        self._items = iter(items)
        self._pool = ThreadPoolExecutor(threads, initializer=initializer)
        self._begun: deque[Future[Result]] = deque()
        self._most = most

    def __enter__(self) -> "Ahead[Result]":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        while len(self._begun) < self._most:
            try:
                item = next(self._items)
            except StopIteration:
                break
            self._begun.append(self._pool.submit(self._function, item))
        if not self._begun:
            raise StopIteration
        began = time.perf_counter()
        try:
            return self._begun.popleft().result()
        finally:
            self.waited += time.perf_counter() - began
