"""Units on Ray actors. The driver owns every attempt: it retries, replaces what died and gives up with a reason."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from rich.text import Text

from vlcp_dist.engine.actors import CALL_SECONDS, Actors, Call, Slot, describe, describe_cluster
from vlcp_dist.engine.attempts import Attempts, Task
from vlcp_dist.engine.executor import IN_FLIGHT, Attempt, Event, Job, Unit, never
from vlcp_dist.engine.metrics import Metrics
from vlcp_dist.errors import StageFailed

QUICK = 0.075  # seconds of work in a call: quick units travel together, those that take longer travel alone
LARGEST_CALL = 64  # units
REFUSALS = 3  # actors that cannot even take the job, with none that can, before the run is an error
TICK = 1.0  # seconds between looks at the clock when nothing finishes


class EngineError(StageFailed):
    """No unit can run; the message says what the cluster has and what was asked of it."""


class RayEngine:
    """Runs the units of one job after the other on actors, which stay while the jobs ask for the same resources.

    `start_timeout`: seconds without any live actor after which the run is an error.
    """

    def __init__(self, *, max_retries: int, start_timeout: float):
        self._max_retries = max_retries
        self._start_timeout = start_timeout
        self._actors = Actors()

    def run(
        self,
        job: Job,
        units: Iterable[Unit],
        on_event: Callable[[Event], None],
        should_stop: Callable[[], bool] = never,
    ) -> None:
        """Process all units; every one of them ends in exactly one `done`, `failed` or `stopped` event.

        Once `should_stop()` is true nothing new is sent out; what is in flight is finished, and those left have no
        event. It is asked at least once a second and some dozen times a second when units are quick.

        Raises:
            EngineError: there was no live actor for `start_timeout` seconds, or Ray itself is gone.
        """
        metrics = Metrics(job.stage)

        def report(event: Event) -> None:
            metrics.count(event)
            on_event(event)

        attempts = Attempts(units, max_retries=self._max_retries, on_event=report)
        run = _Run(self._actors, attempts, metrics, job.unit_timeout, self._start_timeout)
        try:
            self._actors.prepare(job)
            run.loop(should_stop)
        except BaseException as error:
            self.close()  # whatever is in flight belongs to nobody now
            if isinstance(error, RayError):
                raise EngineError(
                    f"{job.stage}: Ray does not answer any more: {error}\nWhat is done stays done: "
                    f"see that the cluster is up and run the same command again."
                ) from error
            raise

    def close(self) -> None:
        """Give the actors' CPUs, GPUs and memory back."""
        self._actors.close()


class _Run:
    """One stage's units on their way. A call that returns costs the same however many actors there are."""

    def __init__(
        self,
        actors: Actors,
        attempts: Attempts,
        metrics: Metrics,
        unit_timeout: float | None,
        start_timeout: float,
    ):
        self._actors = actors
        self._attempts = attempts
        self._metrics = metrics
        self._unit_timeout = unit_timeout
        self._start_timeout = start_timeout
        self._flying: dict[Any, Slot] = {}
        self._room: dict[Slot, None] = {}  # may be sent a call
        self._seconds_per_unit: float | None = None
        self._alive_at = time.monotonic()
        self._ticked_at = 0.0

    def loop(self, should_stop: Callable[[], bool]) -> None:
        stopping = False
        while self._flying or self._attempts:
            stopping = stopping or should_stop()
            if stopping and not self._flying:
                break
            self._attempts.wake()
            if not stopping:
                self._actors.keep(len(self._attempts) + len(self._flying))
                self._dispatch()
            for ref in self._finished():
                if ref in self._actors.starting:
                    if slot := self._actors.started(ref):
                        self._room[slot] = None
                elif ref in self._flying:  # else its actor was given up a moment ago, and the unit with it
                    self._settle(ref)
            if time.monotonic() - self._ticked_at > TICK:
                self._tick()
        self._metrics.send(0)  # none works on this stage any more

    def _finished(self) -> list[Any]:
        """All calls that have returned, waiting for one if there is none yet."""
        waiting = [*self._flying, *self._actors.starting]
        pause = min(TICK, self._attempts.pause)
        if not waiting:
            time.sleep(pause)
            return []
        finished, rest = ray.wait(waiting, timeout=pause)
        if finished and rest:
            finished += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        return finished

    def _dispatch(self) -> None:
        """One call for every actor first, then a second for each while others would still find something to do.

        The last units go to whoever is free first, rather than wait behind one that may take long.
        """
        for depth in range(IN_FLIGHT):
            slots = [slot for slot in self._room if len(slot.calls) == depth]
            if depth == 0:
                while slots and self._attempts.suspects:
                    self._send(slots.pop(), [self._attempts.take_suspect()], alone=True)
            else:
                slots = slots[self._attempts.suspects :]  # so many fall idle for the suspects that are left
            others = self._actors.expected - 1 if depth else 0
            for slot in slots:
                if self._attempts.ready <= others:
                    break
                self._send(slot, self._attempts.take(self._call_size()), alone=False)

    def _call_size(self) -> int:
        if self._seconds_per_unit is None:
            return 1
        fair = math.ceil(self._attempts.ready / (self._actors.expected * IN_FLIGHT))
        return max(1, min(LARGEST_CALL, fair, int(QUICK / max(self._seconds_per_unit, 1e-6))))

    def _send(self, slot: Slot, tasks: list[Task], *, alone: bool) -> None:
        now = time.monotonic()
        if not slot.calls:
            slot.heard = now
        ref = slot.actor.process.remote([task.unit for task in tasks])
        slot.calls[ref] = Call(tasks, now, alone)
        self._flying[ref] = slot
        if alone or len(slot.calls) == IN_FLIGHT:
            del self._room[slot]

    def _settle(self, ref: Any) -> None:
        slot = self._flying[ref]
        tasks = slot.calls[ref].tasks
        try:
            attempts, seconds = ray.get(ref)
        except RayTaskError as error:  # of the call itself, such as a unit that the actor cannot read
            text = Text.from_ansi(str(error)).plain
            attempts, seconds = [Attempt(message=repr(error.cause), traceback=text)] * len(tasks), 0.0
        except RayError as error:  # a dead actor, a dead node, or Ray's own out-of-memory kill
            self._bury(slot, f"its worker died: {_cause(error)}", str(error))
            return
        del self._flying[ref], slot.calls[ref]
        self._room[slot] = None
        slot.heard = time.monotonic()
        self._account(tasks, attempts, seconds)
        if attempts[-1].poisoned:
            self._attempts.put_back(self._harvest(slot))

    def _account(self, tasks: list[Task], attempts: list[Attempt], seconds: float) -> None:
        """Book the units of a call that has returned. A call's size follows the slowest of late."""
        each = seconds / len(attempts)
        self._seconds_per_unit = max(each, (self._seconds_per_unit or 0.0) / 2)
        self._attempts.put_back(tasks[len(attempts) :])
        for task, attempt in zip(tasks, attempts, strict=False):
            self._attempts.settle(task, attempt)

    def _bury(self, slot: Slot, why: str, details: str = "") -> None:
        if lost := self._harvest(slot):
            self._attempts.died(lost, why, details)

    def _harvest(self, slot: Slot) -> list[Task]:
        """Give an actor up. What it had finished counts; the units it had not are returned."""
        self._actors.lose(slot)
        self._room.pop(slot, None)
        lost: list[Task] = []
        for ref, call in slot.calls.items():
            del self._flying[ref]
            try:
                self._account(call.tasks, *ray.get(ref, timeout=0))
            except (RayError, GetTimeoutError):
                lost += call.tasks
        slot.calls = {}
        return lost

    def _tick(self) -> None:
        """What is looked at by the clock: overdue units, the metrics, and whether there is any actor at all."""
        now = self._ticked_at = time.monotonic()
        if self._unit_timeout is not None:
            why = f"it took longer than engine.unit_timeout={self._unit_timeout} s"
            for slot in [slot for slot in self._actors.slots if self._overdue(slot, now, self._unit_timeout)]:
                self._bury(slot, why)
        self._metrics.send(self._actors.ready)
        if self._actors.ready:
            self._alive_at = now
        elif now - self._alive_at > self._start_timeout:
            raise EngineError(self._cannot_start())
        elif self._actors.refusals >= REFUSALS:
            raise EngineError(f"{self._actors.refusals} workers could not take the job: {self._actors.last_error}")

    def _overdue(self, slot: Slot, now: float, unit_timeout: float) -> bool:
        """Of two calls one may wait while the other computes, so one is heard of in time, and both in twice that."""
        limit = unit_timeout + CALL_SECONDS
        return bool(slot.calls) and (
            now - slot.heard > limit or any(now - call.sent > 2 * limit for call in slot.calls.values())
        )

    def _cannot_start(self) -> str:
        options, nodes = self._actors.options, ray.nodes()
        error = f"; the last one that tried: {self._actors.last_error}" if self._actors.last_error else ""
        return (
            f"no worker could be started within engine.start_timeout={self._start_timeout} s: a worker needs "
            f"{describe(options)}; the cluster has {describe_cluster(nodes, options)}{error}"
        )


def _cause(error: RayError) -> str:
    """The one line of Ray's many that says why."""
    lines = str(error).splitlines()
    return next((line for line in lines if "because" in line), lines[0])
