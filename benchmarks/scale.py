"""scale.*: ImageNet-1K's units on 32 simulated nodes of 8 GPUs: how busy the pool keeps its workers, and when nodes go.

What is measured is the scheduler. The units are those that the stages make for an index of 1,281,167 images, in the
order in which a run hands them out; a worker only sleeps. No unit has been timed on GPUs, so durations are relative:
in proportion to the stage's own `work` (images; images x epochs), and up to 10% more or less, as texts and machines
differ. Each stage is scaled to the same mean, long enough for two cores to serve all workers. All stages ask for the
same workers, of 2 GPUs each: the processes of 256 do not fit into 24 GiB. Fine-tuning, one unit here, is not the
pool's in a run.

Utilisation is busy worker seconds over workers x time, until 95% of the units are done. The baseline: each worker has
a fixed share of the units. The ceiling: the longest unit first, to whoever is free, at no cost. Both are computed.
"""

import heapq
import itertools
import math
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engine import OBJECT_STORE, Row, gather, in_a_process, scratch, simulated
from vlcp_dist.data.manifest import Outcome, StageFolder, Unit
from vlcp_dist.engine.executor import Event, Job, Resources
from vlcp_dist.engine.pool import RayEngine

CONFIG = Path(__file__).parents[1] / "configs" / "imagenet1k.yaml"
NODE = {"num_cpus": 4, "num_gpus": 8}  # Ray starts a process for every CPU at once
WORKER = Resources(cpus=1, gpus=2)
WORKERS_PER_NODE = 4
DONE = 0.95  # of the units; what is left is the tail
VARIATION = 0.1
PER_CLASS, SHORT_CLASSES = 1300, 0.1  # images of most classes of ImageNet-1K, and the share of those with fewer
TEST_PER_CLASS = 50
GO, RETURN = 0.25, 0.4  # shares of the units that are done when a third of the nodes goes, and when it is back

Span = tuple[float, float]  # from when to when a worker was busy
Capacity = list[tuple[float, int]]  # from when on there are how many workers


@dataclass(frozen=True)
class Size:
    """`seconds`: of a unit on average, in the stages; `long`: the same where nodes go, which takes time itself."""

    nodes: int
    classes: int
    images: int
    seconds: float
    long: float


SIZES = {
    "tiny": Size(nodes=3, classes=40, images=51_000, seconds=1.0, long=10.0),
    "real": Size(nodes=32, classes=1000, images=1_281_167, seconds=5.0, long=30.0),
}


def measure(size: str = "real") -> list[Row]:
    rows: list[Row] = in_a_process("scale._measure", size)
    return rows


class Sleeper:
    """Sleeps as long as a unit says. A file for each process tells what it has begun, and when."""

    def __init__(self, folder: Path):
        self._begun = folder / str(os.getpid())

    def read(self, unit: Unit) -> None:
        pass

    def process(self, unit: Unit, data: None) -> Outcome:
        began = time.time()
        with self._begun.open("a") as file:
            file.write(f"{unit.name} {began}\n")
        time.sleep(unit.payload["seconds"])
        return Outcome({}, unit.size, info={"began": began, "ended": time.time()})


def _measure(size: str) -> list[Row]:
    asked = SIZES[size]
    workers = asked.nodes * WORKERS_PER_NODE
    with scratch() as root:
        plan = _plan(root / "run", asked)
        with simulated(asked.nodes, **NODE) as (cluster, _):
            engine = RayEngine(max_retries=0, start_timeout=300)
            gather(engine, root / "up", workers, WORKER)
            rows = [
                _stage(engine, root / stage, stage, _timed(units, asked.seconds), workers)
                for stage, units in plan.items()
            ]
            long = _timed(plan["caption"], asked.long)
            rows.append(_nodes_go(engine, root / "nodes_go", cluster, long, asked.nodes))
            engine.close()
    return rows


def _plan(root: Path, asked: Size) -> dict[str, list[Unit]]:
    """The units of every stage that has any, the most work first as in a run; `size` is their work."""
    from vlcp_dist import config, costs, pipeline
    from vlcp_dist.data.classes import ClassInfo
    from vlcp_dist.data.index import assign, files
    from vlcp_dist.stages import base

    cfg = config.load(CONFIG, [f"root={root}"])
    stages = pipeline.stages(cfg)
    run = base.make_run(cfg, stages)
    table = assign(
        _samples(asked),
        validation=cfg.data.validation,
        test=cfg.data.test,
        shard_size=cfg.data.shard_size,
        limit_per_class=None,
        seed=cfg.seed,
    )
    classes = [ClassInfo(_class_id(i), f"class {i}") for i in range(asked.classes)]
    index = files(table, classes, shard_size=cfg.data.shard_size)
    run.folders["index"].commit(Unit("index", 0), Outcome(index, len(table)), seconds=0.0)
    plan = {}
    for stage in stages:
        units = [replace(unit, size=round(costs.pieces(stage.name, run.cfg, unit))) for unit in stage.units(run)]
        if units:
            plan[stage.name] = sorted(units, key=lambda unit: unit.size, reverse=True)
    return plan


def _samples(asked: Size) -> Iterator[Any]:
    """1,300 images in nine of ten classes, and between none and many fewer in the others."""
    from vlcp_dist.data.samples import Sample

    missing = PER_CLASS * asked.classes - asked.images
    shares = np.arange(round(SHORT_CLASSES * asked.classes))
    fewer = missing * shares // shares.sum()
    fewer[-1] += missing - fewer.sum()
    for i in range(asked.classes):
        n = PER_CLASS - (int(fewer[i]) if i < len(fewer) else 0)
        for split, count in (("train", n), ("test", TEST_PER_CLASS)):
            for j in range(count):
                key = f"{split}_{_class_id(i)}_{j}"
                yield Sample(key, _class_id(i), split, key)


def _class_id(i: int) -> str:
    return f"n{i:08d}"


def _timed(units: list[Unit], mean: float) -> list[Unit]:
    """The units with the seconds that they take, `mean` on average."""
    work = np.array([max(unit.size, 1) for unit in units], dtype=float)
    seconds = work * np.random.default_rng(len(units)).uniform(1 - VARIATION, 1 + VARIATION, len(units))
    seconds *= mean / seconds.mean()
    return [replace(unit, payload={"seconds": float(s)}) for unit, s in zip(units, seconds, strict=True)]


def _stage(engine: RayEngine, folder: Path, stage: str, units: list[Unit], workers: int) -> Row:
    start = time.time()
    events = _run(engine, folder, units)
    done, _ = _spans(folder, events)
    ours = _figures(done, [(start, workers)])
    seconds = [unit.payload["seconds"] for unit in units]
    fixed, best = (_figures(way(seconds, workers), [(0.0, workers)]) for way in (_fixed_shares, _longest_first))
    twice = _figures(_longest_first(seconds, workers * 2), [(0.0, workers * 2)])
    return {
        "name": f"scale.{stage}",
        "ours": ours["utilisation"],
        "baseline": fixed["utilisation"],
        "ceiling": best["utilisation"],
        "ratio": ours["utilisation"] / fixed["utilisation"],
        "unit": "busy",
        "workers": workers,
        "units": len(units),
        **ours,
        "of_baseline": fixed,
        "of_ceiling": best,
        "of_ceiling_of_twice_the_workers": twice,
        "note": f"{len(units)} units, {workers} workers; {ours['seconds']:.1f} s ({best['seconds']:.1f} at no cost, "
        f"{fixed['seconds']:.1f} in fixed shares), tail {ours['tail_seconds']:.1f} s ({best['tail_seconds']:.1f}); "
        f"ceiling of {2 * workers} workers: {twice['utilisation']:.3f}",
    }


def _nodes_go(engine: RayEngine, folder: Path, cluster: Any, units: list[Unit], nodes: int) -> Row:
    """A third of the nodes is lost, with all that runs there, and as many come later."""
    gone, start = math.ceil(nodes / 3), time.time()
    capacity = [(start, nodes * WORKERS_PER_NODE)]
    events: list[Event] = []
    with ThreadPoolExecutor(1) as aside:
        running = aside.submit(_run, engine, folder, units, events)
        _wait_for(running, events, GO * len(units))
        went = time.time()
        for node in list(cluster.worker_nodes)[:gone]:
            cluster.remove_node(node, allow_graceful=False)
            capacity.append((time.time(), capacity[-1][1] - WORKERS_PER_NODE))
        _wait_for(running, events, RETURN * len(units))
        for _ in range(gone):
            cluster.add_node(wait=False, object_store_memory=OBJECT_STORE, **NODE)
            capacity.append((time.time(), capacity[-1][1] + WORKERS_PER_NODE))
        back = time.time()
        running.result()
    done, lost = _spans(folder, events)
    ours = _figures(done, capacity, lost=[(began, went) for began in lost])
    came = [began for process in _begun(folder) if (began := process[0]) > went]
    lost_seconds = sum(max(0.0, went - began) for began in lost)
    assert len(came) >= gone * WORKERS_PER_NODE, f"{len(came)} workers came"
    full, work = max(came) - back, sum(unit.payload["seconds"] for unit in units)
    return {
        "name": "scale.nodes_go",
        "ours": ours["utilisation"],
        "baseline": None,
        "ratio": None,
        "unit": "busy",
        "workers": nodes * WORKERS_PER_NODE,
        "units": len(units),
        **ours,
        "workers_lost": gone * WORKERS_PER_NODE,
        "workers_came": len(came),
        "begun_twice": len(lost),
        "lost_seconds": lost_seconds,
        "seconds_until_full_use": full,
        "note": f"{gone} of {nodes} nodes gone after {went - start:.0f} s, back after {back - start:.0f}, in full use "
        f"{full:.0f} s later; {len(lost)} of {len(units)} units begun twice, {lost_seconds / work:.1%} of the work; "
        f"{ours['seconds']:.0f} s, tail {ours['tail_seconds']:.1f} s; workers count while their node is up",
    }


def _run(engine: RayEngine, folder: Path, units: list[Unit], events: list[Event] | None = None) -> list[Event]:
    """All events; every unit must end up done."""
    events = [] if events is None else events
    begun = folder / "begun"
    begun.mkdir(parents=True)
    engine.run(Job("scale", StageFolder(folder / "units"), Sleeper, begun, resources=WORKER), units, events.append)
    assert sorted(event.unit.name for event in events if event.kind == "done") == sorted(unit.name for unit in units)
    return events


def _wait_for(running: Future[Any], events: list[Event], done: float) -> None:
    while sum(event.kind == "done" for event in list(events)) < done:
        assert not running.done(), running.exception()
        time.sleep(0.2)


def _spans(folder: Path, events: list[Event]) -> tuple[list[Span], list[float]]:
    """When each unit was worked on, and when the attempts began that came to nothing."""
    infos = [event.marker["info"] for event in events if event.marker is not None]
    done = [(info["began"], info["ended"]) for info in infos]
    kept = {began for began, _ in done}
    return done, [began for process in _begun(folder) for began in process if began not in kept]


def _begun(folder: Path) -> Iterator[list[float]]:
    """By process, when it began its units."""
    for file in (folder / "begun").iterdir():
        yield [float(line.rpartition(" ")[2]) for line in file.read_text().splitlines()]


def _figures(done: list[Span], capacity: Capacity, lost: Iterable[Span] = ()) -> dict[str, float]:
    """Of spans since `capacity[0][0]`: how much of the capacity was used, the seconds that all took, and the tail's."""
    ends = sorted(end for _, end in done)
    start, until, last = capacity[0][0], ends[math.ceil(DONE * len(ends)) - 1], ends[-1]

    def used(until: float) -> float:
        busy = sum(max(0.0, min(end, until) - began) for began, end in [*done, *lost])
        spells = itertools.pairwise([*capacity, (until, 0)])
        there = sum(n * max(0.0, min(then, until) - since) for (since, n), (then, _) in spells)
        return busy / there

    return {
        "utilisation": used(until),
        "utilisation_total": used(last),
        "seconds": last - start,
        "tail_seconds": last - until,
    }


def _longest_first(seconds: list[float], workers: int) -> list[Span]:
    free = [0.0] * workers
    spans = []
    for each in sorted(seconds, reverse=True):
        began = heapq.heappop(free)
        spans.append((began, began + each))
        heapq.heappush(free, began + each)
    return spans


def _fixed_shares(seconds: list[float], workers: int) -> list[Span]:
    spans = []
    for share in (seconds[first::workers] for first in range(min(workers, len(seconds)))):
        ends = np.cumsum(share).tolist()
        spans += [(end - each, end) for end, each in zip(ends, share, strict=True)]
    return spans
