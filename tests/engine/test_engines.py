"""Every unit ends in exactly one event, whatever its worker does: raise, die or hang."""

import os
import signal
import threading
from collections import Counter
from pathlib import Path

import pytest

from vlcp_dist.data.manifest import Outcome, StageFolder, Unit
from vlcp_dist.engine.executor import Job
from vlcp_dist.engine.serial import SerialEngine


class Misbehaving:
    """Does what the unit's payload says; attempts are counted in files, which outlive the process."""

    def __init__(self, folder: Path):
        self._folder = folder

    def process(self, unit: Unit) -> Outcome:
        attempt = self._attempt(unit)
        act = unit.payload.get("act", "")
        if unit.payload.get("times", 99) >= attempt:
            if act == "raise":
                raise OSError(f"attempt {attempt}")
            if act == "value":
                raise ValueError("bad input")
            if act == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if act == "hang":
                threading.Event().wait()
        return Outcome({f"{unit.name}.txt": unit.name.encode()}, n_in=unit.size)

    def _attempt(self, unit: Unit) -> int:
        attempt = 1
        while True:
            try:
                (self._folder / f"{unit.name}.attempt{attempt}").touch(exist_ok=False)
                return attempt
            except FileExistsError:
                attempt += 1


def attempts(folder: Path, name: str) -> int:
    return len(list(folder.glob(f"{name}.attempt*")))


@pytest.fixture(scope="module")
def ray_cluster():
    import ray

    here = {"PYTHONPATH": str(Path(__file__).parent)}  # the actors import Misbehaving from this file
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": here})
    yield
    ray.shutdown()


@pytest.fixture(params=["serial", "ray"])
def engine(request):
    if request.param == "serial":
        yield SerialEngine(max_retries=2)
        return
    request.getfixturevalue("ray_cluster")
    yield from ray_engine()


def ray_engine(workers=2, unit_timeout=None):
    from vlcp_dist.engine.pool import RayEngine

    engine = RayEngine(
        workers=workers,
        cpus_per_worker=1,
        gpus_per_worker=0,
        max_retries=2,
        unit_timeout=unit_timeout,
        start_timeout=120,
    )
    yield engine
    engine.close()


def run(engine, tmp_path, units):
    """Final event kinds by unit, all events, and the stage folder."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    folder = StageFolder(tmp_path / "stage")
    events = []
    engine.run(Job("test", folder, Misbehaving, scratch), units, events.append)
    final = [(e.unit.name, e.kind) for e in events if e.kind != "retry"]
    assert max(Counter(name for name, _ in final).values()) == 1
    return dict(final), events, folder, scratch


def test_all_units_are_done_once(engine, tmp_path):
    units = [Unit(f"u{i:02d}", size=i) for i in range(20)]
    final, _, folder, scratch = run(engine, tmp_path, units)
    assert final == {unit.name: "done" for unit in units}
    assert all(attempts(scratch, unit.name) == 1 for unit in units)
    assert sum(m["n_in"] for m in folder.done(units).values()) == sum(range(20))


def test_errors_are_retried_then_reported(engine, tmp_path):
    units = [
        Unit("mends", 1, {"act": "raise", "times": 2}),
        Unit("stays", 1, {"act": "raise"}),
        Unit("input", 1, {"act": "value"}),
        Unit("fine", 1),
    ]
    final, events, folder, scratch = run(engine, tmp_path, units)
    assert final == {"mends": "done", "stays": "failed", "input": "failed", "fine": "done"}
    assert [attempts(scratch, unit.name) for unit in units] == [3, 3, 1, 1]
    failed = {e.unit.name: e for e in events if e.kind == "failed"}
    assert "OSError: attempt 3" in failed["stays"].message
    assert 'raise OSError(f"attempt {attempt}")' in failed["stays"].traceback
    assert "\x1b" not in failed["stays"].traceback
    assert "ValueError: bad input" in failed["input"].message
    assert set(folder.done(units)) == {"mends", "fine"}


def test_dead_workers_are_replaced_and_a_deadly_unit_is_quarantined(ray_cluster, tmp_path):
    units = [Unit(f"u{i}", 1) for i in range(6)]
    units[1] = Unit("once", 1, {"act": "die", "times": 1})
    units[3] = Unit("always", 1, {"act": "die"})
    for engine in ray_engine():
        final, events, _, scratch = run(engine, tmp_path, units)
    assert final.pop("always") == "failed"
    assert set(final.values()) == {"done"}
    assert attempts(scratch, "always") == 3
    assert attempts(scratch, "once") == 2
    assert "quarantined" in next(e.message for e in events if e.kind == "failed")


def test_a_hanging_worker_is_killed(ray_cluster, tmp_path):
    units = [Unit("hangs", 1, {"act": "hang", "times": 1}), *(Unit(f"u{i}", 1) for i in range(4))]
    for engine in ray_engine(unit_timeout=4):
        final, events, _, scratch = run(engine, tmp_path, units)
    assert set(final.values()) == {"done"}
    assert attempts(scratch, "hangs") == 2
    assert any("unit_timeout" in e.message for e in events if e.kind == "retry")


def test_workers_that_cannot_start_are_an_error_with_numbers(ray_cluster, tmp_path):
    from vlcp_dist.engine.pool import EngineError, RayEngine

    engine = RayEngine(
        workers=1, cpus_per_worker=64, gpus_per_worker=0, max_retries=0, unit_timeout=None, start_timeout=2
    )
    job = Job("test", StageFolder(tmp_path), Misbehaving, tmp_path)
    with pytest.raises(EngineError, match=r"64 CPU and 0 GPU; the cluster has 2 CPU"):
        engine.run(job, [Unit("u", 1)], lambda event: None)
    engine.close()
