"""Who is tried again, when, and who is given up: the rules that both engines follow."""

import pytest

from vlcp_dist.data.manifest import Unit
from vlcp_dist.engine.attempts import Attempts
from vlcp_dist.engine.executor import Attempt


@pytest.fixture
def events():
    return []


@pytest.fixture
def attempts(events):
    """Ten units a, b, c ..., each with 8 further attempts."""
    return Attempts([Unit(name, 1) for name in "abcdefghij"], max_retries=8, on_event=events.append)


def names(tasks):
    return [task.unit.name for task in tasks]


def test_units_come_in_their_order_and_what_was_not_begun_goes_back_in_front(attempts):
    tasks = attempts.take(4)
    attempts.put_back(tasks[1:])
    assert names(attempts.take(5)) == ["b", "c", "d", "e", "f"]
    assert len(attempts) == 4


def test_pauses_grow_to_a_minute_and_the_unit_then_comes_first(attempts, events, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("vlcp_dist.engine.attempts.clock", lambda: now)
    pauses = []
    for _ in range(8):
        (task,) = attempts.take()
        attempts.settle(task, Attempt(message="storage"))
        pauses.append(attempts.pause)
        now += attempts.pause - 0.1
        attempts.wake()
        others = attempts.take(9)
        assert names(others) == list("bcdefghij")
        attempts.put_back(others)
        now += 0.1
        attempts.wake()
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    attempts.settle(attempts.take()[0], Attempt(message="storage"))
    assert [event.kind for event in events] == ["retry"] * 8 + ["failed"]


def test_those_who_died_in_company_are_suspects_without_blame(attempts, events):
    attempts.died(attempts.take(3), "boom")
    assert (attempts.suspects, attempts.ready) == (3, 7)
    assert [event.kind for event in events] == ["retry"] * 3
    suspect = attempts.take_suspect()
    assert (suspect.unit.name, suspect.deaths) == ("a", 0)
    attempts.put_back([suspect])
    assert attempts.suspects == 3


def test_three_deaths_alone_end_a_unit(attempts, events):
    attempts.died(attempts.take(2), "in company")
    for i in range(3):
        task = attempts.take_suspect()
        while task.unit.name != "a":
            attempts.settle(task, Attempt(marker={}))
            task = attempts.take_suspect()
        attempts.died([task], f"boom {i}")
    assert events[-1].kind == "failed"
    assert events[-1].message == "quarantined: 3 workers died of it; the last time boom 2"
    assert [(e.unit.name, e.kind) for e in events if e.kind != "retry"] == [("b", "done"), ("a", "failed")]


def test_a_suspect_that_raises_an_error_stays_a_suspect(attempts, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("vlcp_dist.engine.attempts.clock", lambda: now)
    attempts.died(attempts.take(2), "in company")
    attempts.settle(attempts.take_suspect(), Attempt(message="storage"))
    assert attempts.suspects == 1
    now += 1
    attempts.wake()
    assert attempts.suspects == 2
