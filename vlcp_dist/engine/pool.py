"""Units on Ray actors. The driver owns every attempt: it retries, replaces what died and gives up with a reason."""

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from rich.text import Text

from vlcp_dist.engine.executor import Event, Executor, Job, Unit
from vlcp_dist.errors import StageFailed

IN_FLIGHT = 2  # the next unit waits in the actor's queue, so that an actor never idles between units
DEATHS_TO_QUARANTINE = 3
TICK = 1.0  # seconds between looks at timeouts when nothing finishes


class EngineError(StageFailed):
    """No unit can run; the message says what the cluster has and what was asked of it."""


@dataclass
class _Task:
    unit: Unit
    errors: int = 0
    deaths: int = 0


@dataclass
class _Slot:
    """An actor, the tasks sent to it in their order, and when the first of them began."""

    actor: Any
    ready: Any
    tasks: dict[Any, _Task] = field(default_factory=dict)
    began: float = 0.0


class RayEngine:
    """Actors with `cpus_per_worker` CPUs and `gpus_per_worker` GPUs each, kept from stage to stage."""

    def __init__(
        self,
        *,
        workers: int | None,
        cpus_per_worker: int,
        gpus_per_worker: float | None,
        max_retries: int,
        unit_timeout: float | None,
        start_timeout: float,
    ):
        resources = ray.cluster_resources()
        if gpus_per_worker is None:
            gpus_per_worker = 1 if resources.get("GPU", 0) >= 1 else 0
        self._gpus = gpus_per_worker
        self._cpus = cpus_per_worker
        self._max_workers = workers
        self._max_retries = max_retries
        self._unit_timeout = unit_timeout
        self._start_timeout = start_timeout
        self._slots: list[_Slot] = []
        self._slot_cpus = 0
        self._start_error = ""

    def run(self, job: Job, units: Iterable[Unit], on_event: Callable[[Event], None]) -> None:
        """Process all units; every one of them ends in exactly one `done` or `failed` event.

        Raises:
            EngineError: no actor could be started within `start_timeout` seconds.
        """
        cpus = max(self._cpus, job.threads)
        if cpus != self._slot_cpus:
            self.close()
            self._slot_cpus = cpus
        pending = deque(_Task(unit) for unit in units)
        reference = ray.put(job)
        stalled_since = time.monotonic()
        while pending or any(slot.tasks for slot in self._slots):
            self._keep_actors(len(pending) + sum(len(slot.tasks) for slot in self._slots))
            self._dispatch(reference, pending)
            waiting = [ref for slot in self._slots for ref in (slot.tasks if slot.ready is None else [slot.ready])]
            finished, _ = ray.wait(waiting, timeout=TICK)
            for ref in finished:
                self._settle(ref, pending, on_event)
            self._kill_overdue(pending, on_event)
            if any(slot.ready is None for slot in self._slots):
                stalled_since = time.monotonic()
            elif time.monotonic() - stalled_since > self._start_timeout:
                raise EngineError(self._cannot_start())

    def close(self) -> None:
        """Give the actors' CPUs, GPUs and memory back."""
        for slot in self._slots:
            ray.kill(slot.actor)
        self._slots = []

    def _keep_actors(self, tasks: int) -> None:
        self._slots = [slot for slot in self._slots if self._has_started_or_may(slot)]
        room = ray.cluster_resources()
        capacity = int(room.get("CPU", 0) // self._slot_cpus)
        if self._gpus:
            capacity = min(capacity, int(room.get("GPU", 0) / self._gpus))
        limit = max(1, min(self._max_workers or capacity, capacity, tasks))
        while len(self._slots) < limit:
            actor: Any = _Actor.options(num_cpus=self._slot_cpus, num_gpus=self._gpus).remote()
            self._slots.append(_Slot(actor, ready=actor.__ray_ready__.remote()))

    def _dispatch(self, job: Any, pending: deque[_Task]) -> None:
        """One unit for every actor first, then a second for each, so that the last units are shared evenly."""
        for depth in range(1, IN_FLIGHT + 1):
            for slot in self._slots:
                if not pending:
                    return
                if slot.ready is None and len(slot.tasks) < depth:
                    task = pending.popleft()
                    if not slot.tasks:
                        slot.began = time.monotonic()
                    slot.tasks[slot.actor.process.remote(job, task.unit)] = task

    def _settle(self, ref: Any, pending: deque[_Task], on_event: Callable[[Event], None]) -> None:
        slot = next((slot for slot in self._slots if ref in slot.tasks), None)
        if slot is None:  # its actor was given up together with it a moment ago
            return
        try:
            marker = ray.get(ref)
        except RayTaskError as error:
            task = slot.tasks.pop(ref)
            self._retry(task, error, pending, on_event)
            if "CUDA error" in str(error.cause):  # after one, every call in that process fails
                ray.kill(slot.actor)
                self._slots.remove(slot)
                pending.extendleft(reversed(slot.tasks.values()))
                return
        except RayError as error:  # a dead actor, a dead node, or Ray's own out-of-memory kill
            self._bury(slot, pending, on_event, f"its worker died: {error}")
            return
        else:
            task = slot.tasks.pop(ref)
            on_event(Event("done", task.unit, marker=marker))
        slot.began = time.monotonic()

    def _retry(self, task: _Task, error: RayTaskError, pending: deque[_Task], on_event: Callable[[Event], None]):
        task.errors += 1
        cause = error.cause
        message = f"{type(cause).__name__}: {cause}"
        # A ValueError speaks of the input, which another attempt finds unchanged.
        if isinstance(cause, ValueError) or task.errors > self._max_retries:
            on_event(Event("failed", task.unit, message=message, traceback=Text.from_ansi(str(error)).plain))
        else:
            on_event(Event("retry", task.unit, message=message))
            pending.append(task)

    def _bury(self, slot: _Slot, pending: deque[_Task], on_event: Callable[[Event], None], why: str) -> None:
        """Forget a dead actor. Only the unit it was working on is blamed; the one queued behind it is not."""
        self._slots.remove(slot)
        lost = []
        for ref, task in slot.tasks.items():
            try:
                on_event(Event("done", task.unit, marker=ray.get(ref, timeout=0)))
            except (RayError, GetTimeoutError):
                lost.append(task)
        if not lost:
            return
        suspect, *innocent = lost
        pending.extendleft(reversed(innocent))
        suspect.deaths += 1
        if suspect.deaths >= DEATHS_TO_QUARANTINE:
            message = f"quarantined: {suspect.deaths} workers died of it; the last time {why}"
            on_event(Event("failed", suspect.unit, message=message, traceback=message))
        else:
            on_event(Event("retry", suspect.unit, message=why))
            pending.append(suspect)

    def _kill_overdue(self, pending: deque[_Task], on_event: Callable[[Event], None]) -> None:
        if self._unit_timeout is None:
            return
        for slot in list(self._slots):
            if slot.tasks and time.monotonic() - slot.began > self._unit_timeout:
                ray.kill(slot.actor)
                self._bury(slot, pending, on_event, f"it took longer than engine.unit_timeout={self._unit_timeout} s")

    def _has_started_or_may(self, slot: _Slot) -> bool:
        """Notes an actor that has come up; False for one that died before it did."""
        if slot.ready is not None:
            try:
                ray.get(slot.ready, timeout=0)
                slot.ready = None
            except GetTimeoutError:
                pass  # still starting
            except RayError as error:
                self._start_error = f"; the last one that tried died: {error}"
                return False
        return True

    def _cannot_start(self) -> str:
        has, free = ray.cluster_resources(), ray.available_resources()
        return (
            f"no worker could be started within engine.start_timeout={self._start_timeout} s: a worker needs "
            f"{self._slot_cpus} CPU and {self._gpus} GPU; the cluster has {has.get('CPU', 0):g} CPU and "
            f"{has.get('GPU', 0):g} GPU, of which {free.get('CPU', 0):g} and {free.get('GPU', 0):g} are free"
            f"{self._start_error}"
        )


_Actor = ray.remote(max_restarts=0, max_task_retries=0)(Executor)
