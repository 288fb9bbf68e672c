"""What becomes of units: which may be tried now, which wait, which are given up and why. The same in every engine."""

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import monotonic as clock

from vlcp_dist.data.manifest import Unit
from vlcp_dist.engine.executor import Attempt, Event

DEATHS_TO_QUARANTINE = 3
LONGEST_PAUSE = 60.0  # seconds


@dataclass(slots=True)
class Task:
    """A unit and what has gone wrong with it so far. `suspect`: a worker died while this unit was with it."""

    unit: Unit
    errors: int = 0
    deaths: int = 0
    suspect: bool = False


class Attempts:
    """The units that have no final event yet, but for those that an engine has in hand.

    A unit that raises an error is tried again after 1, 2, 4 ... seconds, while others run; a ValueError is final.
    All units that were with a worker when it died are suspects. Suspects go to workers that have nothing else, so
    that a unit is blamed for a death only when it was alone; three such deaths end it.
    """

    def __init__(self, units: Iterable[Unit], *, max_retries: int, on_event: Callable[[Event], None]):
        self._ready = deque(Task(unit) for unit in units)
        self._suspects: deque[Task] = deque()
        self._paused: list[tuple[float, int, Task]] = []
        self._order = itertools.count()
        self._max_retries = max_retries
        self._on_event = on_event

    def __len__(self) -> int:
        return len(self._ready) + len(self._suspects) + len(self._paused)

    @property
    def ready(self) -> int:
        return len(self._ready)

    @property
    def suspects(self) -> int:
        return len(self._suspects)

    @property
    def pause(self) -> float:
        """Seconds until the next paused unit may be tried; infinite when none is paused."""
        return max(0.0, self._paused[0][0] - clock()) if self._paused else float("inf")

    def take(self, most: int = 1) -> list[Task]:
        return [self._ready.popleft() for _ in range(min(most, len(self._ready)))]

    def take_suspect(self) -> Task:
        return self._suspects.popleft()

    def wake(self) -> None:
        """Let those be tried whose pause is over."""
        while self._paused and self._paused[0][0] <= clock():
            self.put_back([heapq.heappop(self._paused)[2]])

    def put_back(self, tasks: Sequence[Task]) -> None:
        """First in the queue again, in the same order: nothing is known against them."""
        for task in reversed(tasks):
            (self._suspects if task.suspect else self._ready).appendleft(task)

    def settle(self, task: Task, attempt: Attempt) -> None:
        if attempt.marker is not None:
            self._on_event(Event("done", task.unit, marker=attempt.marker))
        elif attempt.stopped:
            self._on_event(Event("stopped", task.unit, message=attempt.message))
        else:
            task.errors += 1
            final = attempt.final or task.errors > self._max_retries
            self._on_event(
                Event("failed" if final else "retry", task.unit, message=attempt.message, traceback=attempt.traceback)
            )
            if not final:
                due = clock() + min(LONGEST_PAUSE, 2.0 ** (task.errors - 1))
                heapq.heappush(self._paused, (due, next(self._order), task))

    def died(self, tasks: Sequence[Task], why: str, details: str = "") -> None:
        """The worker of these units died before it had a result of any of them. `details` go where tracebacks go."""
        for task in tasks:
            task.suspect = True
            task.deaths += len(tasks) == 1
            if task.deaths >= DEATHS_TO_QUARANTINE:
                message = f"quarantined: {task.deaths} workers died of it; the last time {why}"
                self._on_event(Event("failed", task.unit, message=message, traceback=details or message))
            else:
                self._on_event(Event("retry", task.unit, message=why, traceback=details))
                self._suspects.append(task)
