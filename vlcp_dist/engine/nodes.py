"""The nodes of the cluster, each asked the same question, and what must be the same on all of them before a run."""

import hashlib
import platform
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import vlcp_dist
from vlcp_dist.data import storage
from vlcp_dist.data.storage import Location
from vlcp_dist.errors import InputError

PATIENCE = 120.0  # seconds for a node to start a process and answer
LOOKS = 4  # at a file that another machine has just written: network file systems may remember for a moment that it
PAUSE = 0.5  # was not there; seconds between the looks


@dataclass(frozen=True, eq=False)
class Node:
    """An alive node. `resources` is what it has in all, in Ray's terms (memory in bytes)."""

    id: str
    name: str
    address: str
    resources: Mapping[str, float]

    @property
    def gpus(self) -> float:
        return self.resources.get("GPU", 0)


@dataclass(frozen=True)
class NoAnswer:
    """Why a node did not say what it was asked."""

    reason: str


@dataclass(frozen=True)
class Look:
    """What a process on a node finds: which code it runs, and which of the places it was given it does not see."""

    build: str
    missing: tuple[str, ...]


def alive_nodes() -> list[Node]:
    """Those of the cluster that this process is connected to, the head first."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    alive.sort(key=lambda node: ("node:__internal_head__" not in node["Resources"], node["NodeManagerAddress"]))
    return [Node(node["NodeID"], _name(node), node["NodeManagerAddress"], node["Resources"]) for node in alive]


def workers(nodes: Iterable[Node]) -> list[Node]:
    """The nodes that can hold a worker: a head that only manages has no CPUs."""
    return [node for node in nodes if node.resources.get("CPU", 0) > 0]


def ask(
    function: Callable[..., Any],
    arguments: Mapping[Node, tuple[Any, ...]],
    *,
    gpus: float = 0,
    timeout: float = PATIENCE,
) -> dict[Node, Any]:
    """Call `function(*arguments[node])` on each of these nodes at the same time; each one's result, or a `NoAnswer`.

    It needs no CPU of the scheduler, so it also runs beside workers; `gpus` it would have to wait for.
    """
    task = ray.remote(max_retries=0, num_cpus=0, num_gpus=gpus)(function)
    calls = {}
    for node, values in arguments.items():
        there = NodeAffinitySchedulingStrategy(node.id, soft=False)
        calls[node] = task.options(scheduling_strategy=there).remote(*values)
    if calls:
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout)
    return {node: _result(ref, timeout) for node, ref in calls.items()}


def build() -> str:
    """Version of the package, a digest of its code, and the versions of what nodes exchange objects with."""
    folder = Path(vlcp_dist.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return (
        f"vlcp_dist {vlcp_dist.__version__} ({digest.hexdigest()[:8]}), ray {ray.__version__}, "
        f"Python {platform.python_version()}"
    )


def look(places: Mapping[str, Location]) -> Look:
    """What this process runs, and which places it does not see, by the names they are given."""
    return Look(build(), tuple(name for name, place in places.items() if not seen(place)))


def seen(place: Location) -> bool:
    """Whether a file or folder is there, now or in a moment."""
    for i in range(LOOKS):
        if place.exists():
            return True
        if i < LOOKS - 1:
            time.sleep(PAUSE)
    return False


def check_nodes(root: Location, places: Mapping[str, Location], say: Callable[[str], None]) -> None:
    """See that all nodes run this code, and that what is written to `root` and what lies at `places` is there for them.

    `places` are what is there from here, by the key of the configuration. A node that does not answer is named by
    `say` and otherwise left alone: runs survive nodes that go. Costs nothing where this node is the only one.

    Raises:
        InputError: nodes run other code, or do not see the same storage; the message lists them.
    """
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in workers(alive_nodes()) if node.id != here]
    if not others:
        return
    probe = root / f".probe-{uuid.uuid4().hex}"
    storage.publish(probe, b"")
    try:
        answers = ask(look, {node: ({"root": probe, **places},) for node in others})
    finally:
        storage.remove(probe)
    for node, answer in answers.items():
        if isinstance(answer, NoAnswer):
            say(f"node {node.name} could not be asked what it has: {answer.reason}")
    looks = {node: answer for node, answer in answers.items() if isinstance(answer, Look)}
    check_builds({node: found.build for node, found in looks.items()})
    given = {"root": root, **places}
    for name, place in given.items():
        if blind := [node.name for node, found in looks.items() if name in found.missing]:
            raise InputError(
                f"{name}={place} is not shared: {len(blind)} of {len(looks)} other nodes do not see what this one sees "
                f"there ({_list(blind)}). Give a folder that every node mounts, or a URL such as s3://bucket/folder; "
                f"`vlcp doctor` looks at everything."
            )


def check_builds(builds: Mapping[Node, str]) -> None:
    """Refuse nodes that run other code than this process.

    Raises:
        InputError: the message lists what each of them has.
    """
    mine = build()
    if other := {node: found for node, found in builds.items() if found != mine}:
        listed = "\n".join(f"  {node.name}: {found}" for node, found in other.items())
        raise InputError(
            f"{len(other)} of {len(builds)} other nodes run other code than this process:\n"
            f"  here: {mine}\n{listed}\n"
            f"Install the same version on all of them, or submit a job with its working folder "
            f"(`ray job submit --working-dir . ...`), which all of them then run."
        )


def check_gpus(asked: Mapping[str, float | None], *, autoscaling: bool, say: Callable[[str], None]) -> None:
    """Say at once that no node has a GPU: an error for stages that ask for one, a line for those that use one if any.

    `asked` is GPUs of a worker by stage, None for "where there are any". With `autoscaling` nodes may yet come.

    Raises:
        InputError: a stage asks for a GPU; the message says what the cluster has.
    """
    nodes = alive_nodes()
    if autoscaling or any(node.gpus for node in nodes):
        return
    has = f"{len(nodes)} alive nodes with {sum(node.resources.get('CPU', 0) for node in nodes):g} CPUs and no GPU"
    if stages := [stage for stage, gpus in asked.items() if gpus]:
        raise InputError(
            f"{', '.join(stages)}: a worker needs {asked[stages[0]]:g} GPU (engine.gpus_per_worker), but this cluster "
            f"has {has}. Start nodes with GPUs, check `nvidia-smi` on them, ask for gpus_per_worker=0, or, where an "
            f"autoscaler brings nodes, set engine.autoscaling=true."
        )
    if stages := [stage for stage, gpus in asked.items() if gpus is None]:
        say(f"this cluster has {has}: {', '.join(stages)} run on CPUs")


def _result(ref: Any, timeout: float) -> Any:
    if not ray.wait([ref], timeout=0)[0]:
        ray.cancel(ref, force=True)
        return NoAnswer(f"no answer within {timeout:g} s")
    try:
        return ray.get(ref)
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        return NoAnswer(f"{type(cause).__name__}: {str(cause).strip().splitlines()[-1]}")


def _name(node: Mapping[str, Any]) -> str:
    """Host and address as a person knows them, and enough of the id to tell two nodes of one machine apart."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"


def _list(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
