"""engine.*: what the pool of actors costs, against plain Python and plain Ray doing the same units and commits."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray

from vlcp_dist.data.manifest import Marker, Outcome, StageFolder, Unit
from vlcp_dist.engine.executor import Executor, Job, Resources
from vlcp_dist.engine.pool import RayEngine

Row = dict[str, Any]
LONG = 2.0  # seconds: shorter than any real unit, long enough that 64 workers leave two cores some rest
OBJECT_STORE = 80 * 2**20  # bytes of a simulated node, nearly the least that Ray takes
ROOT = Path(__file__).parents[1]


def measure(size: str = "real") -> list[Row]:
    from benchmarks import index

    files = {"tiny": 10_000, "real": 1_281_167}[size]
    return [overhead(size), dispatch(size), efficiency(size), *index.measure(files=files)]


def overhead(size: str = "real") -> Row:
    """Units of one second on one actor, against a loop over the same units with the same commits."""
    return in_a_process("engine._overhead", {"tiny": 3, "real": 30}[size])


def dispatch(size: str = "real") -> Row:
    """Empty units on two actors, each with a marker written to the disk, against ray.util.ActorPool."""
    return in_a_process("engine._dispatch", *{"tiny": (2_000, 500), "real": (100_000, 10_000)}[size])


def efficiency(size: str = "real") -> Row:
    """Units that sleep, on as many nodes as there are workers, all on this machine, against one worker."""
    return in_a_process("engine._efficiency", *{"tiny": (4, 3), "real": (64, 15)}[size])


class Sleeper:
    """Takes `seconds` for a unit, and leaves a file where that is more than none."""

    def __init__(self, seconds: float):
        self._seconds = seconds

    def read(self, unit: Unit) -> None:
        pass

    def process(self, unit: Unit, data: None) -> Outcome:
        if not self._seconds:
            return Outcome({}, n_in=unit.size)
        time.sleep(self._seconds)
        return Outcome({f"{unit.name}.bin": bytes(100_000)}, n_in=unit.size)


class Gathering(Sleeper):
    """Lets no unit end before all of `workers` processes have one; each is known by a file in `folder`."""

    def __init__(self, argument: tuple[Path, int]):
        super().__init__(0.0)
        self._folder, self._workers = argument

    def process(self, unit: Unit, data: None) -> Outcome:
        (self._folder / str(os.getpid())).touch()
        while sum(1 for _ in self._folder.iterdir()) < self._workers:
            time.sleep(0.5)
        return super().process(unit, data)


class Alone:
    """A job and what runs its units: all that a loop or a plain actor needs."""

    def __init__(self, job: Job):
        self._job = job
        self._executor = Executor()

    def process(self, unit: Unit) -> Marker:
        return self._executor.process(self._job, unit)


def _overhead(n: int) -> Row:
    with scratch() as root:
        units = _units(n)
        loop = _loop(_job(root / "loop", 1.0), units)
        start = time.perf_counter()
        with _ray(num_cpus=2):
            engine = _engine()
            _run(engine, _job(root / "first", 0.0, workers=1), units[:1])
            first = time.perf_counter() - start
            ours = _run(engine, _job(root / "pool", 1.0, workers=1), units)
            engine.close()
    percent = (ours / loop - 1) * 100
    return {
        "name": "engine.overhead",
        "ours": ours,
        "baseline": loop,
        "ceiling": float(n),
        "ratio": loop / ours,
        "unit": "s",
        "note": f"{n} units of 1 s: {percent:+.2f}%; apart from that, {first:.1f} s until Ray and the actor are up",
    }


def _dispatch(n: int, n_baseline: int) -> Row:
    with scratch() as root, _ray(num_cpus=2):
        engine = _engine()
        _run(engine, _job(root / "warm", 0.0, workers=2), _units(100))
        before = psutil.Process().memory_info().rss
        ours = n / _run(engine, _job(root / "pool", 0.0, workers=2), _units(n))
        grown = (psutil.Process().memory_info().rss - before) / 2**20
        engine.close()
        plain = n_baseline / _actor_pool(_job(root / "plain", 0.0), _units(n_baseline))
        loop = _loop(_job(root / "loop", 0.0), _units(n_baseline))
    return {
        "name": "engine.dispatch",
        "ours": ours,
        "baseline": plain,
        "ceiling": 2 * n_baseline / loop,
        "ratio": ours / plain,
        "unit": "units/s",
        "driver_growth_mib": round(grown),
        "note": f"{n} units, driver +{grown:.0f} MiB; against ActorPool.map_unordered ({n_baseline})",
    }


def _actor_pool(job: Job, units: list[Unit]) -> float:
    """Seconds that the pool that comes with Ray takes for the same function on two actors that are up."""
    from ray.util import ActorPool

    actors = [ray.remote(num_cpus=1)(Alone).remote(job) for _ in range(2)]
    for i, actor in enumerate(actors):
        ray.get(actor.process.remote(Unit(f"warm{i}", 1)))
    start = time.perf_counter()
    for _ in ActorPool(actors).map_unordered(lambda actor, unit: actor.process.remote(unit), units):
        pass
    return time.perf_counter() - start


def _loop(job: Job, units: list[Unit]) -> float:
    """Seconds that a plain loop takes."""
    alone = Alone(job)
    start = time.perf_counter()
    for unit in units:
        alone.process(unit)
    return time.perf_counter() - start


def _efficiency(workers: int, units_each: int) -> Row:
    with scratch() as root, simulated(workers, num_cpus=1) as (_, started):
        rates = {}
        for n in (1, workers):
            engine = _engine()
            gather(engine, root / f"gathered{n}", n, _resources(n))
            rates[n] = n * units_each / _run(engine, _job(root / f"run{n}", LONG, workers=n), _units(n * units_each))
            engine.close()
        used = psutil.virtual_memory().used / 2**30
    share = rates[workers] / (workers * rates[1])
    return {
        "name": "engine.efficiency",
        "ours": rates[workers],
        "baseline": rates[1],
        "ceiling": workers * rates[1],
        "ratio": rates[workers] / rates[1],
        "unit": "units/s",
        "efficiency": share,
        "note": f"{workers} workers, {units_each} units of {LONG:g} s each: {share:.3f} of {workers} times one; "
        f"{workers} nodes were up in {started:.0f} s, {used:.0f} GiB in use",
    }


def gather(engine: RayEngine, folder: Path, workers: int, resources: Resources) -> None:
    """Return once that many workers are up."""
    (folder / "up").mkdir(parents=True)
    up = Job("up", StageFolder(folder / "units"), Gathering, (folder / "up", workers), resources=resources)
    _run(engine, up, _units(workers))


@contextlib.contextmanager
def simulated(nodes: int, **resources: int) -> Iterator[tuple[Any, float]]:
    """That many nodes and a head without resources, on this machine; and the seconds they took to start.

    They report on themselves rarely: 64 nodes that did it as often as one would keep two cores busy.
    """
    from ray.cluster_utils import Cluster

    os.environ["REPORTER_UPDATE_INTERVAL_MS"] = "600000"
    settings = {"metrics_report_interval_ms": 600_000}
    start = time.perf_counter()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": settings},
    )
    try:
        for _ in range(nodes):
            cluster.add_node(wait=False, object_store_memory=OBJECT_STORE, **resources)
        cluster.wait_for_nodes(timeout=300)
        with _ray(address=cluster.address):
            yield cluster, time.perf_counter() - start
    finally:
        cluster.shutdown()


@contextlib.contextmanager
def _ray(**arguments: Any) -> Iterator[None]:
    ray.init(
        include_dashboard=False if "address" not in arguments else None, logging_level=logging.WARNING, **arguments
    )
    yield
    ray.shutdown()


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """On the disk, not in memory: markers are flushed."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        yield Path(folder)


def _engine() -> RayEngine:
    return RayEngine(max_retries=0, start_timeout=300)


def _job(path: Path, seconds: float, workers: int | None = None) -> Job:
    return Job("benchmark", StageFolder(path), Sleeper, seconds, resources=_resources(workers))


def _resources(workers: int | None) -> Resources:
    return Resources(workers=workers, gpus=0)


def _units(n: int) -> list[Unit]:
    return [Unit(f"unit{i:06d}", 1) for i in range(n)]


def _run(engine: RayEngine, job: Job, units: list[Unit]) -> float:
    """Seconds; all units must be done, at the first attempt."""
    kinds: list[str] = []
    start = time.perf_counter()
    engine.run(job, units, lambda event: kinds.append(event.kind))
    seconds = time.perf_counter() - start
    assert kinds == ["done"] * len(units)
    return seconds


def in_a_process(function: str, *arguments: Any) -> Any:
    """A measurement's own process: Ray's state and the memory of the one before are not in it."""
    module = function.partition(".")[0]
    code = f"import json; from benchmarks import {module}; print(json.dumps({function}(*{arguments})))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(result.stdout.splitlines()[-1])
