"""Work done ahead: in order, never more than allowed, and not gone on with once it is of no use."""

import threading

import pytest

from vlcp_dist.data.threads import ahead


def test_results_come_in_order_and_only_so_many_are_begun():
    begun, lock = [], threading.Lock()

    def square(i: int) -> int:
        with lock:
            begun.append(i)
        return i * i

    for i, result in enumerate(ahead(square, range(50), threads=3, most=5)):
        assert result == i * i
        assert max(begun) <= i + 5
    assert sorted(begun) == list(range(50))


def test_two_items_are_in_work_at_once():
    both = threading.Barrier(2, timeout=30)
    assert list(ahead(lambda _: both.wait() >= 0, range(4), threads=2, most=2)) == [True] * 4


def test_an_error_comes_at_its_turn_and_ends_the_work():
    done = []

    def third_fails(i: int) -> int:
        if i == 2:
            raise OSError("no")
        done.append(i)
        return i

    before = threading.active_count()
    results = ahead(third_fails, range(1000), threads=1, most=4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(OSError, match="no"):
        next(results)
    assert len(done) <= 6 and threading.active_count() == before


def test_who_stops_early_leaves_no_threads():
    before = threading.active_count()
    results = ahead(str, range(1000), threads=2, most=4)
    assert next(results) == "0"
    results.close()
    assert threading.active_count() == before
