"""All units one after the other in this process: for tests, for debugging, and for one GPU without Ray."""

import traceback
from collections.abc import Callable, Iterable

from vlcp_dist.engine.executor import Event, Executor, Job, Unit


class SerialEngine:
    def __init__(self, *, max_retries: int):
        self._max_retries = max_retries
        self._executor = Executor()

    def run(self, job: Job, units: Iterable[Unit], on_event: Callable[[Event], None]) -> None:
        for unit in units:
            for attempt in range(self._max_retries + 1):
                try:
                    on_event(Event("done", unit, marker=self._executor.process(job, unit)))
                    break
                except Exception as error:
                    message = f"{type(error).__name__}: {error}"
                    final = isinstance(error, ValueError) or attempt == self._max_retries
                    kind = "failed" if final else "retry"
                    on_event(Event(kind, unit, message=message, traceback=traceback.format_exc()))
                    if final:
                        break

    def close(self) -> None:
        self._executor = Executor()
