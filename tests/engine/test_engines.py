"""Every unit ends in exactly one event, whatever its worker does: raise, die or hang. The same in both engines."""

import pytest
from misbehaving import Unbuildable, Unreadable, attempts

from vlcp_dist.data.manifest import StageFolder, Unit
from vlcp_dist.engine.executor import Job, Resources
from vlcp_dist.engine.pool import EngineError, RayEngine
from vlcp_dist.engine.serial import SerialEngine


@pytest.fixture(scope="module")
def ray_cluster():
    import ray

    ray.init(num_cpus=2, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.fixture
def pool(ray_cluster):
    """pool(...) -> RayEngine, closed at the end."""
    engines = []

    def pool(start_timeout=120):
        engines.append(RayEngine(max_retries=2, start_timeout=start_timeout))
        return engines[-1]

    yield pool
    for engine in engines:
        engine.close()


@pytest.fixture(params=["serial", "ray"])
def engine(request):
    return SerialEngine(max_retries=2) if request.param == "serial" else request.getfixturevalue("pool")()


def test_all_units_are_done_once(engine, run):
    units = [Unit(f"u{i:03d}", size=i) for i in range(300)]
    ran = run(engine, units)
    assert ran.final == {unit.name: "done" for unit in units}
    assert all(attempts(ran.scratch, unit.name) == 1 for unit in units)
    assert sum(marker["n_in"] for marker in ran.markers.values()) == sum(range(300))


def test_errors_are_tried_again_then_reported(engine, run):
    units = [
        Unit("mends", 1, {"act": "raise", "times": 2}),
        Unit("stays", 1, {"act": "raise"}),
        Unit("input", 1, {"act": "value"}),
        Unit("unread", 1, {"act": "unreadable"}),
        Unit("fine", 1),
    ]
    ran = run(engine, units)
    assert ran.final == {"mends": "done", "stays": "failed", "input": "failed", "unread": "failed", "fine": "done"}
    assert [attempts(ran.scratch, unit.name) for unit in units] == [3, 3, 1, 0, 1]
    order = [(e.unit.name, e.kind) for e in ran.events]
    assert order.index(("fine", "done")) < order.index(("mends", "done"))  # others run while a unit is paused
    failed = {e.unit.name: e for e in ran.events if e.kind == "failed"}
    assert failed["stays"].message == "OSError: attempt 3"
    assert 'raise OSError(f"attempt {attempt}")' in failed["stays"].traceback
    assert "\x1b" not in failed["stays"].traceback
    assert failed["input"].message == "ValueError: bad input"
    assert failed["unread"].message == "OSError: the storage does not answer"


def test_a_unit_that_was_asked_to_stop_is_neither_retried_nor_failed(engine, run):
    ran = run(engine, [Unit("stops", 1, {"act": "stop"}), Unit("fine", 1)])
    assert ran.final == {"stops": "stopped", "fine": "done"}
    assert ran.messages("stopped") == {"stops": "saved at step 7"}
    assert attempts(ran.scratch, "stops") == 1


def test_after_a_stop_nothing_new_is_begun_and_what_is_in_flight_is_finished(engine, run):
    units = [Unit(f"u{i:04d}", 1, {"act": "raise", "times": 1} if i % 3 else {}) for i in range(2000)]
    asked = []
    ran = run(engine, units, on_event=asked.append, should_stop=lambda: bool(asked))
    begun = {unit.name for unit in units if attempts(ran.scratch, unit.name)}
    assert begun == {event.unit.name for event in ran.events}
    assert 0 < len(begun) < len(units)


def test_a_worker_that_cannot_be_built_is_every_units_failure(engine, tmp_path, scratch):
    events = []
    engine.run(Job("test", StageFolder(tmp_path), Unbuildable, scratch), [Unit("u", 1)], events.append)
    assert [(e.kind, e.message) for e in events] == [("retry", "OSError: no such model")] * 2 + [
        ("failed", "OSError: no such model")
    ]


def test_what_is_done_is_not_overwritten_by_a_later_attempt(engine, run):
    first = run(engine, [Unit("u", 1)]).markers["u"]
    again = run(engine, [Unit("u", 1)])
    assert again.final == {"u": "done"}
    assert again.markers["u"] == again.events[-1].marker == first
    replaced = run(engine, [Unit("u", 1, replaces=first["finished"])])
    assert replaced.markers["u"]["finished"] > first["finished"]


def test_dead_workers_are_replaced_and_a_deadly_unit_is_quarantined(pool, run):
    units = [Unit(f"u{i}", 1) for i in range(6)]
    units[1] = Unit("once", 1, {"act": "die", "times": 1})
    units[3] = Unit("always", 1, {"act": "die"})
    ran = run(pool(), units)
    assert ran.final.pop("always") == "failed"
    assert set(ran.final.values()) == {"done"}
    assert "quarantined: 3 workers died of it; the last time its worker died" in ran.messages("failed")["always"]
    assert 3 <= attempts(ran.scratch, "always") <= 5  # those in company are nobody's fault
    assert attempts(ran.scratch, "once") >= 2


def test_a_hanging_worker_is_killed(pool, run):
    units = [Unit("hangs", 1, {"act": "hang", "times": 1}), *(Unit(f"u{i}", 1) for i in range(4))]
    ran = run(pool(), units, unit_timeout=3)
    assert set(ran.final.values()) == {"done"}
    assert attempts(ran.scratch, "hangs") == 2
    assert "engine.unit_timeout=3 s" in ran.messages("retry")["hangs"]


def test_a_unit_that_hangs_every_worker_is_quarantined(pool, run):
    ran = run(pool(), [Unit("hangs", 1, {"act": "hang"}), Unit("fine", 1)], unit_timeout=1)
    assert ran.final == {"hangs": "failed", "fine": "done"}
    assert "quarantined: 3 workers died of it; the last time it took longer than" in ran.messages("failed")["hangs"]


def test_a_cuda_error_costs_the_process_and_blames_no_other_unit(pool, run):
    units = [Unit("bad", 1, {"act": "cuda", "times": 1}), *(Unit(f"u{i}", 1) for i in range(20))]
    ran = run(pool(), units, resources=Resources(workers=1, gpus=0))
    assert set(ran.final.values()) == {"done"}
    assert set(ran.messages("retry")) == {"bad"}
    poisoned, healthy = ((ran.scratch / f"bad.attempt{i}").read_text() for i in (1, 2))
    assert poisoned != healthy
    assert str(ran.markers["bad"]["info"]["pid"]) == healthy


def test_the_next_unit_is_read_while_one_computes(pool, run):
    """Each computes until the other has been read, on one actor: whichever is first would wait in vain otherwise."""
    units = [Unit("a", 1, {"await": ["b.attempt1"]}), Unit("b", 1, {"await": ["a.attempt1"]})]
    ran = run(pool(), units, resources=Resources(workers=1, gpus=0))
    assert [e.kind for e in ran.events] == ["done", "done"]
    assert len({marker["info"]["pid"] for marker in ran.markers.values()}) == 1


def test_actors_stay_for_the_next_stage_unless_it_asks_for_other_resources(pool, run):
    engine = pool()
    pids = [
        run(engine, [Unit(name, 1)], resources=resources).markers[name]["info"]["pid"]
        for name, resources in [
            ("first", Resources(workers=1, gpus=0)),
            ("same", Resources(workers=1, gpus=0)),
            ("other", Resources(workers=1, gpus=0, memory=2**20)),
        ]
    ]
    assert pids[0] == pids[1] != pids[2]


def test_more_workers_than_fit_are_no_error(pool, run):
    units = [Unit(f"u{i}", 1) for i in range(20)]
    ran = run(pool(start_timeout=5), units, resources=Resources(workers=5, gpus=0))
    assert set(ran.final.values()) == {"done"}
    assert len({marker["info"]["pid"] for marker in ran.markers.values()}) <= 2


def test_workers_that_cannot_start_are_an_error_with_numbers(pool, run):
    resources = Resources(workers=1, cpus=64, gpus=0, memory=2**50, custom={"tape": 2}, labels={"zone": "b"})
    with pytest.raises(EngineError) as error:
        run(pool(start_timeout=2), [Unit("u", 1)], resources=resources)
    assert "64 CPU and 0 GPU and 1048576.0 GiB memory and 2 tape and a node with zone=b" in str(error.value)
    assert "on 0 alive nodes that have these labels" in str(error.value)
    with pytest.raises(EngineError, match="64 CPU and 0 GPU; the cluster has 2 CPU and 0 GPU on 1 alive nodes"):
        run(pool(start_timeout=2), [Unit("u", 1)], resources=Resources(workers=1, cpus=64, gpus=0))


def test_a_job_that_no_actor_can_take_is_an_error_with_its_cause(pool, tmp_path):
    with pytest.raises(EngineError, match="No module named 'elsewhere'"):
        pool().run(Job("test", StageFolder(tmp_path), Unbuildable, Unreadable()), [Unit("u", 1)], lambda event: None)
