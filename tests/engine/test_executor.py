"""One unit computes at a time, while others are read and written; and what a unit raises becomes a value."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from misbehaving import Misbehaving, meet

from vlcp_dist.data.manifest import Outcome, StageFolder, Unit
from vlcp_dist.engine.executor import Executor, Job


class Pipelined:
    """`a` is written only while `b` computes, `b` computes only while `c` is read: all three at once, or never."""

    def __init__(self, events):
        self.events = events
        self.computing = []

    def read(self, unit):
        if unit.name == "c":
            self.events["c reads"].set()
        return unit.name

    def process(self, unit, data):
        assert data == unit.name
        assert not self.computing, f"{unit.name} computes while {self.computing} does"
        self.computing.append(unit.name)
        if unit.name == "b":
            self.events["b computes"].set()
            for other in ("a writes", "c reads"):
                assert self.events[other].wait(30), other
        self.computing.remove(unit.name)
        return Outcome({}, n_in=1)


class Watched(StageFolder):
    def __init__(self, path, events):
        super().__init__(path)
        self.events = events

    def commit(self, unit, outcome, **times):
        if unit.name == "a":
            self.events["a writes"].set()
            assert self.events["b computes"].wait(30)
        return super().commit(unit, outcome, **times)


def test_reading_computing_and_writing_overlap(tmp_path):
    events = {name: threading.Event() for name in ("a writes", "b computes", "c reads")}
    worker = Pipelined(events)
    job = Job("test", Watched(tmp_path, events), lambda _: worker, None)
    executor = Executor()
    with ThreadPoolExecutor(3) as threads:
        markers = list(threads.map(lambda name: executor.process(job, Unit(name, 1)), "abc"))
    assert [marker["unit"] for marker in markers] == ["a", "b", "c"]


class Plain:
    def __init__(self, argument):
        pass

    def read(self, unit):
        pass

    def process(self, unit, data):
        return Outcome({}, n_in=1)


def test_the_time_for_which_data_were_missing_is_told_from_the_time_of_reading(tmp_path, monkeypatch):
    """On a clock of the test's own: the worker takes 2 s, reading 5 s, computing 3 s, nothing else is in the way."""
    ticks = iter([98.0, 100.0, 100.0, 105.0, 105.5, 108.5])
    monkeypatch.setattr("vlcp_dist.engine.executor.clock", lambda: next(ticks))
    marker = Executor().process(Job("test", StageFolder(tmp_path), Plain, None), Unit("u", 1))
    assert (marker["read_seconds"], marker["wait_seconds"], marker["seconds"]) == (5.0, 5.0, 3.0)
    assert marker["start_seconds"] == 2.0


def test_reading_that_ends_before_the_unit_before_does_costs_no_wait(tmp_path, monkeypatch):
    ticks = iter([99.0, 100.0, 100.0, 100.0, 100.0, 110.0, 104.0, 109.0, 110.0, 111.0, 104.0, 112.0, 112.0, 113.0])
    monkeypatch.setattr("vlcp_dist.engine.executor.clock", lambda: next(ticks))
    executor, job = Executor(), Job("test", StageFolder(tmp_path), Plain, None)
    assert executor.process(job, Unit("first", 1))["seconds"] == 10.0
    assert executor.process(job, Unit("read in time", 1))["wait_seconds"] == 0.0
    late = executor.process(job, Unit("read late", 1))
    assert late["wait_seconds"] == 1.0  # 111 to 112, though it took 8 s
    assert late["start_seconds"] == 0.0  # the first unit's worker serves all


def test_a_late_attempt_does_not_replace_what_another_has_done(tmp_path, scratch):
    """As when a worker that was given up is merely cut off, and finishes after another has done its unit."""
    job = Job("test", StageFolder(tmp_path / "stage"), Misbehaving, scratch)
    with ThreadPoolExecutor(1) as elsewhere:
        unit = Unit("u", 1, {"await": ["gate"]})
        late = elsewhere.submit(Executor().process, job, unit)
        meet(scratch / "u.on-here")
        done = Executor().process(job, Unit("u", 1))
        before = (tmp_path / "stage" / "u.txt").stat()
        (scratch / "gate").touch()
        assert late.result() == done == job.folder.marker("u")
        assert (tmp_path / "stage" / "u.txt").stat().st_ino == before.st_ino


def test_a_worker_is_built_once_for_a_job_and_anew_for_the_next(tmp_path):
    built = []

    def build(argument):
        built.append(argument)
        return Plain(argument)

    executor = Executor()
    for argument in ("one", "two"):
        job = Job("test", StageFolder(tmp_path / argument), build, argument)
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda i, job=job: executor.process(job, Unit(f"u{i}", 1)), range(8)))
    assert built == ["one", "two"]


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        ("raise", ("OSError: attempt 1", False, False)),
        ("value", ("ValueError: bad input", True, False)),
        ("cuda", ("RuntimeError: CUDA error: an illegal memory access was encountered", False, True)),
    ],
)
def test_what_a_unit_raises_becomes_a_value(act, expected, tmp_path, scratch):
    attempt = Executor().attempt(Job("test", StageFolder(tmp_path), Misbehaving, scratch), Unit("u", 1, {"act": act}))
    assert (attempt.message, attempt.final, attempt.poisoned) == expected
    assert attempt.marker is None
    assert "in _act" in attempt.traceback
    assert not attempt.stopped


THREADS = """
import sys
from pathlib import Path
from vlcp_dist.data.manifest import Outcome, StageFolder, Unit
from vlcp_dist.engine.executor import Executor, Job

class Plain:
    def __init__(self, _): pass
    def read(self, unit): pass
    def process(self, unit, data): return Outcome({}, 1)

class Torch(Plain):
    def __init__(self, _): import torch
    def process(self, unit, data):
        import torch
        return Outcome({}, 1, info={"threads": torch.get_num_threads()})

def process(make, threads):
    folder = StageFolder(Path(sys.argv[1]) / f"{make.__name__}{threads}")
    return Executor().process(Job("s", folder, make, None, threads), Unit("u", 1))

print(process(Plain, 1)["info"], "torch" in sys.modules)
print(process(Torch, 3)["info"], process(Torch, 1)["info"])
"""


def test_torch_has_the_jobs_threads_and_is_not_imported_for_a_worker_that_does_without(tmp_path):
    out = subprocess.run(
        [sys.executable, "-c", THREADS, tmp_path], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert out[0] == "{'device': 'cpu'} False"
    assert "'threads': 3" in out[1]
    assert "'threads': 1" in out[1]
