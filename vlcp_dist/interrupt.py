"""How a run is stopped: Ctrl-C once finishes what is in flight, twice or SIGTERM ends it at once."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType


class Terminated(BaseException):
    """SIGTERM came: whoever sent it will not wait."""


class Interrupt:
    """While entered, takes SIGINT and SIGTERM. What is done stays done either way; the next run goes on from it."""

    def __init__(self) -> None:
        self._requested = threading.Event()

    def requested(self) -> bool:
        return self._requested.is_set()

    def __enter__(self) -> "Interrupt":
        self._before = {
            signal.SIGINT: signal.signal(signal.SIGINT, self._on_interrupt),
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._on_terminate),
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def notify(self, act: Callable[[], None]) -> Iterator[None]:
        """Call `act` if the request comes in the meantime: not from the signal handler, where little is allowed."""
        over = threading.Event()

        def watch() -> None:
            while not over.is_set():
                if self._requested.wait(0.2):
                    print("stopping: what is in flight is being finished; Ctrl-C again stops at once", file=sys.stderr)
                    return act()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._requested.is_set():
            raise KeyboardInterrupt
        self._requested.set()

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        raise Terminated
