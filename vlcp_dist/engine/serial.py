"""All units one after the other in this process: for tests, for debugging, and for one GPU without Ray."""

import time
from collections.abc import Callable, Iterable

from vlcp_dist.engine.attempts import Attempts
from vlcp_dist.engine.executor import Event, Executor, Job, Unit, never

TICK = 1.0  # seconds between two looks at `should_stop` while all units left are paused


class SerialEngine:
    def __init__(self, *, max_retries: int):
        self._max_retries = max_retries
        self._executor = Executor()

    def run(
        self,
        job: Job,
        units: Iterable[Unit],
        on_event: Callable[[Event], None],
        should_stop: Callable[[], bool] = never,
    ) -> None:
        """Process all units; every one of them ends in exactly one `done`, `failed` or `stopped` event.

        Once `should_stop()` is true no further unit is begun; those left have no event.
        """
        attempts = Attempts(units, max_retries=self._max_retries, on_event=on_event)
        while attempts and not should_stop():
            attempts.wake()
            for task in attempts.take():
                attempts.settle(task, self._executor.attempt(job, task.unit))
            if not attempts.ready and attempts:
                time.sleep(min(TICK, attempts.pause))

    def close(self) -> None:
        self._executor = Executor()
