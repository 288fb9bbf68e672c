"""The actors of a run: how many the cluster's nodes can hold, starting them, and losing them."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from rich.text import Text

from vlcp_dist.engine.attempts import Task
from vlcp_dist.engine.executor import IN_FLIGHT, Attempt, Executor, Job, Unit

REFRESH = 3.0  # seconds between looks at the nodes
CALL_SECONDS = 0.5  # a call begins no further unit after this


class Host:
    """What runs in the actor's process, a thread for each call."""

    def __init__(self) -> None:
        self._executor = Executor()
        self._job: Job | None = None

    def begin(self, job: Job) -> None:
        self._job = job

    def process(self, units: list[Unit]) -> tuple[list[Attempt], float]:
        """Attempts at the first of `units`, at least one, and the seconds they took. The others were not begun."""
        assert self._job is not None
        began = time.monotonic()
        attempts: list[Attempt] = []
        for unit in units:
            attempts.append(self._executor.attempt(self._job, unit))
            if attempts[-1].poisoned or time.monotonic() - began > CALL_SECONDS:
                break
        return attempts, time.monotonic() - began


@dataclass(slots=True)
class Call:
    """Units that travel together. `alone`: nothing else may be with the actor until it returns."""

    tasks: list[Task]
    sent: float
    alone: bool


@dataclass(eq=False, slots=True)
class Slot:
    """An actor and the calls it has. `ready` is the call that hands it the job, None once that has returned."""

    actor: Any
    ready: Any
    calls: dict[Any, Call] = field(default_factory=dict)
    heard: float = 0.0  # when it last had no call, or returned one


class Actors:
    """Keeps as many actors as the job asks for or the nodes hold, from stage to stage while the request is the same."""

    def __init__(self) -> None:
        self.slots: dict[Slot, None] = {}  # in the order in which they were started
        self.starting: dict[Any, Slot] = {}
        self.options: dict[str, Any] = {}
        self.last_error = ""
        self.refusals = 0  # actors in a row that came up and could not take the job, as when a module is missing there
        self._job: Job | None = None
        self._workers: int | None = None
        self._fit = 0  # as many as the nodes can hold, as of the last look
        self._look_at = 0.0

    @property
    def ready(self) -> int:
        return len(self.slots) - len(self.starting)

    @property
    def expected(self) -> int:
        """Those that are up, or are starting and have room to."""
        return max(self.ready, min(len(self.slots), self._fit))

    def prepare(self, job: Job) -> None:
        """Hand the job to the actors there are; those with other options, or not up yet, are given up."""
        options = actor_options(job, ray.nodes())
        for slot in list(self.slots):
            if options != self.options or slot.ready is not None:
                self._forget(slot)
        self.options, self._workers, self._job = options, job.resources.workers, job
        self.last_error, self.refusals, self._look_at = "", 0, 0.0
        for slot in self.slots:
            self._begin(slot)

    def keep(self, most: int) -> None:
        """Start what is missing, at most so that there are `most`. Nodes may have come or gone since the last time."""
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + REFRESH
        self._fit = capacity(ray.nodes(), self.options)
        wanted = self._workers or self._fit  # what was asked for may be more than fits: an autoscaler then brings nodes
        for _ in range(max(1, min(wanted, most)) - len(self.slots)):
            slot = Slot(_Actor.options(**self.options).remote(), ready=None)
            self.slots[slot] = None
            self._begin(slot)

    def started(self, ref: Any) -> Slot | None:
        """The actor that has come up; None if it died before it did, or could not take the job."""
        slot = self.starting.pop(ref)
        try:
            ray.get(ref)
        except RayError as error:
            self.last_error = Text.from_ansi(str(error)).plain
            self.refusals += isinstance(error, RayTaskError)
            self._forget(slot)  # and is replaced at the next look, not at once: the next one may fail the same way
            return None
        slot.ready = None
        self.refusals = 0
        return slot

    def lose(self, slot: Slot) -> None:
        """Kill the actor, whatever is left of it, and let it be replaced at once."""
        self._forget(slot)
        self._look_at = 0.0

    def close(self) -> None:
        """Give the actors' CPUs, GPUs and memory back."""
        for slot in list(self.slots):
            self._forget(slot)

    def _begin(self, slot: Slot) -> None:
        slot.ready = slot.actor.begin.remote(self._job)  # small: it travels in the call, not by the object store
        self.starting[slot.ready] = slot

    def _forget(self, slot: Slot) -> None:
        self.slots.pop(slot, None)
        self.starting.pop(slot.ready, None)
        with contextlib.suppress(RayError):  # it, its node or the whole cluster may be gone
            ray.kill(slot.actor)


def actor_options(job: Job, nodes: list[dict[str, Any]]) -> dict[str, Any]:
    """What one actor of the job asks of Ray."""
    asked = job.resources
    gpus = asked.gpus
    if gpus is None:
        gpus = 1 if any(node["Resources"].get("GPU", 0) >= 1 for node in nodes if node["Alive"]) else 0
    options: dict[str, Any] = {
        "num_cpus": max(asked.cpus, job.threads),
        "num_gpus": gpus,
        "max_concurrency": IN_FLIGHT,
    }
    if not gpus:  # else Ray lets the actor see every GPU of its node, and it would take the first
        options["runtime_env"] = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}}
    if asked.memory:
        options["memory"] = asked.memory
    if asked.custom:
        options["resources"] = dict(asked.custom)
    if asked.labels:
        options["label_selector"] = dict(asked.labels)
    return options


def capacity(nodes: list[dict[str, Any]], options: Mapping[str, Any]) -> int:
    """How many such actors the alive nodes can hold, each node for itself."""
    return sum(_fit(node["Resources"], options) for node in nodes if _eligible(node, options))


def describe(options: Mapping[str, Any]) -> str:
    """What an actor asks for, as a person writes it."""
    labels = [f"a node with {name}={value}" for name, value in options.get("label_selector", {}).items()]
    return " and ".join([*(_amount(name, n) for name, n in _needs(options) if n or name in ("CPU", "GPU")), *labels])


def describe_cluster(nodes: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
    """What the alive nodes that the labels allow have of it, together."""
    eligible = [node for node in nodes if _eligible(node, options)]
    sums = [(name, sum(node["Resources"].get(name, 0) for node in eligible)) for name, _ in _needs(options)]
    which = " that have these labels" if "label_selector" in options else ""
    return f"{' and '.join(_amount(name, n) for name, n in sums)} on {len(eligible)} alive nodes{which}"


def _needs(options: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    yield "CPU", options["num_cpus"]
    yield "GPU", options["num_gpus"]
    if "memory" in options:
        yield "memory", options["memory"]
    yield from options.get("resources", {}).items()


def _fit(has: Mapping[str, float], options: Mapping[str, Any]) -> int:
    rounds = []
    for name, need in _needs(options):
        if name == "GPU" and 0 < need < 1:  # a share is of one GPU, never of two
            rounds.append(int(has.get(name, 0)) * int(1 / need + 1e-6))
        elif need:
            rounds.append(int(has.get(name, 0) / need + 1e-6))
    return min(rounds)


def _eligible(node: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    labels = node["Labels"]
    wanted = options.get("label_selector", {})
    return node["Alive"] and all(_selects(want, labels.get(name)) for name, want in wanted.items())


def _selects(want: str, value: str | None) -> bool:
    negated, want = want.startswith("!"), want.removeprefix("!")
    values = [v.strip() for v in want[3:-1].split(",")] if want.startswith("in(") else [want]
    return (value in values) != negated


def _amount(name: str, n: float) -> str:
    return f"{n / 2**30:.1f} GiB memory" if name == "memory" else f"{n:g} {name}"


_Actor = ray.remote(max_restarts=0, max_task_retries=0)(Host)
