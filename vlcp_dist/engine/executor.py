"""Runs one unit at a time through a stage's worker and commits what comes out. The same in every engine."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from vlcp_dist.data.manifest import Marker, Outcome, StageFolder, Unit


class Worker(Protocol):
    """The one thing that a stage writes for the engine: built once per process, then called for unit after unit."""

    def process(self, unit: Unit) -> Outcome:
        """Do a unit. The result depends on the unit and the configuration only, never on earlier units."""
        ...


@dataclass(frozen=True)
class Job:
    """What an engine needs to know of a stage to run its units. Everything in it can be sent to another machine.

    `threads` is fixed by the configuration, not by the machine: arithmetic depends on it in the last digit.
    """

    stage: str
    folder: StageFolder
    make_worker: Callable[[Any], Worker]
    argument: Any
    threads: int = 1


@dataclass(frozen=True)
class Event:
    """News of a unit for the driver: `kind` is done, retry or failed; `message` says why it is not done."""

    kind: str
    unit: Unit
    marker: Marker | None = None
    message: str = ""
    traceback: str = ""


class Executor:
    """Keeps the worker of the current stage, so that a model is loaded once for many units."""

    def __init__(self) -> None:
        self._stage = ""
        self._worker: Worker | None = None

    def process(self, job: Job, unit: Unit) -> Marker:
        import torch
        from threadpoolctl import threadpool_limits

        torch.set_num_threads(job.threads)
        with threadpool_limits(job.threads):
            if self._worker is None or self._stage != job.stage:
                self._worker = None  # frees the memory of the stage before
                self._worker = job.make_worker(job.argument)
                self._stage = job.stage
            start = time.perf_counter()
            outcome = self._worker.process(unit)
            outcome.info["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
            return job.folder.commit(unit, outcome, time.perf_counter() - start)
