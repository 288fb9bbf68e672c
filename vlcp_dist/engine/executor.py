"""Runs units through a stage's worker and commits what comes out. The same in every engine, safe in several threads."""

import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter as clock
from typing import Any, Literal, Protocol

from threadpoolctl import threadpool_limits

from vlcp_dist.data.manifest import Marker, Outcome, StageFolder, Unit
from vlcp_dist.errors import Stopped

# Units with a worker on Ray: one is read and one written while another computes, so that it never idles between them.
IN_FLIGHT = 2


class Worker(Protocol):
    """The one thing that a stage writes for the engine: built once per process, then called for unit after unit."""

    def read(self, unit: Unit) -> Any:
        """Fetch what the unit is made from. May run in one thread while `process` computes in another."""
        ...

    def process(self, unit: Unit, data: Any) -> Outcome:
        """Do a unit. The result depends on the unit and the configuration only, never on earlier units."""
        ...


@dataclass(frozen=True)
class Resources:
    """What one worker of a stage asks of its node, in Ray's terms, and how many workers there should be.

    `workers` None: as many as the nodes hold. `gpus` may be a share of one; None: 1 where the cluster has any.
    `memory` is in bytes. `labels` select nodes as Ray's label_selector does: "x", "!x", "in(x, y)", "!in(x, y)".
    """

    workers: int | None = None
    cpus: int = 1
    gpus: float | None = None
    memory: int = 0
    custom: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """What an engine needs to know of a stage to run its units. Everything in it can be sent to another machine.

    `threads` is fixed by the configuration, not by the machine: arithmetic depends on it in the last digit.
    `unit_timeout` is in seconds; a unit that takes longer is one whose worker hangs (in a pool, which can kill it).
    """

    stage: str
    folder: StageFolder
    make_worker: Callable[[Any], Worker]
    argument: Any
    threads: int = 1
    resources: Resources = field(default_factory=Resources)
    unit_timeout: float | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """News of a unit for the driver; `message` says why it is not done."""

    kind: Literal["done", "retry", "failed", "stopped"]
    unit: Unit
    marker: Marker | None = None
    message: str = ""
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What came of one try at a unit, as plain values: they must not need the worker's libraries to be read.

    `final`: another try would find the same. `poisoned`: the process is of no more use.
    """

    marker: Marker | None = None
    message: str = ""
    traceback: str = ""
    final: bool = False
    stopped: bool = False
    poisoned: bool = False


def never() -> bool:
    return False


class Executor:
    """Keeps the worker of the current job, so that a model is loaded once for many units.

    One unit computes at a time. Others may be read and written meanwhile, each in the thread that called.
    """

    def __init__(self) -> None:
        self._building = threading.Lock()
        self._computing = threading.Lock()
        self._built: tuple[Job, Worker] | None = None
        self._created = clock()
        self._computed_until = 0.0
        self._limited = threading.local()

    def attempt(self, job: Job, unit: Unit) -> Attempt:
        """Process the unit; what it raises becomes a value."""
        try:
            return Attempt(marker=self.process(job, unit))
        except Stopped as stop:
            return Attempt(message=str(stop), stopped=True)
        except Exception as error:
            return Attempt(
                message=f"{type(error).__name__}: {error}",
                traceback=traceback.format_exc(),
                final=isinstance(error, ValueError),  # it speaks of the input, which another try finds unchanged
                poisoned="CUDA error" in str(error),  # after one, every call in this process fails
            )

    def process(self, job: Job, unit: Unit) -> Marker:
        """Read, compute and commit a unit. Times in the marker are wall-clock seconds.

        `wait_seconds` is how long nothing could be computed because this unit's data were not there yet, or not ready;
        `start_seconds` how long its worker took to be ready for the job, in the unit that found none.
        """
        worker, start_seconds = self._worker(job)
        began = clock()
        data = worker.read(unit)
        read = clock()
        with self._computing:
            self._limit_threads(job.threads)
            waited = max(0.0, read - max(self._computed_until, began))
            start = clock()
            try:
                outcome = worker.process(unit, data)
            finally:
                self._computed_until = clock()
            seconds = self._computed_until - start
        del data  # its memory is free while the outcome is written
        outcome.info |= _device()
        waited += outcome.wait_seconds
        return job.folder.commit(
            unit, outcome,
            seconds=seconds, read_seconds=read - began, wait_seconds=waited, start_seconds=start_seconds,
        )  # fmt: skip

    def _worker(self, job: Job) -> tuple[Worker, float]:
        """The job's worker, and the seconds it took to make it if there was none."""
        with self._building:
            if self._built is not None and self._built[0] is job:
                return self._built[1], 0.0
            began = self._created if self._built is None else clock()  # the first job brings its imports with it
            self._built = None  # frees the memory of the stage before
            _forget_peak()
            self._limit_threads(job.threads)
            self._built = job, job.make_worker(job.argument)
            return self._built[1], clock() - began

    def _limit_threads(self, threads: int) -> None:
        """Limit this thread, again whenever modules were imported: they may have brought thread pools with them."""
        state = threads, len(sys.modules)
        if getattr(self._limited, "state", None) == state:
            return
        threadpool_limits(threads)
        if "torch" in sys.modules:  # a worker that does without need not pay for it
            import torch

            torch.set_num_threads(threads)
        self._limited.state = threads, len(sys.modules)


def _device() -> dict[str, Any]:
    """What the unit ran on, `cpu` or the name of a GPU, and of a GPU the most memory that this stage has taken here."""
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            return {"device": torch.cuda.get_device_name(), "gpu_bytes": torch.cuda.max_memory_allocated()}
    return {"device": "cpu"}


def _forget_peak() -> None:
    """A process may serve several stages: each is told its own peak."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
