"""Work ahead of its taker: order, bounds, errors."""

import threading

import pytest

from vlcp_dist.data.prefetch import Ahead


def test_results_come_in_order_and_little_is_begun_ahead():
    begun = []

    def double(x):
        begun.append(x)
        return 2 * x

    with Ahead(double, range(20), threads=3, most=4) as results:
        assert next(results) == 0
        assert max(begun, default=0) < 4
        assert list(results) == [2 * x for x in range(1, 20)]
    assert results.waited >= 0 and next(results, None) is None


def test_time_in_which_the_taker_stands_still_is_counted():
    ready = threading.Event()
    with Ahead(lambda _: ready.wait(), range(1), threads=1, most=1) as results:
        timer = threading.Timer(0.05, ready.set)
        timer.start()
        assert list(results) == [True]
    assert results.waited >= 0.02


def test_an_error_is_raised_where_its_result_is_taken_and_no_thread_stays():
    before = threading.active_count()

    def fail(x):
        if x == 2:
            raise ValueError("item 2")
        return x

    with pytest.raises(ValueError, match="item 2"), Ahead(fail, range(9), threads=2, most=3) as results:
        for x in results:
            assert x < 2
    assert threading.active_count() == before


def test_two_items_are_in_work_at_once():
    both = threading.Barrier(2, timeout=30)
    with Ahead(lambda _: both.wait() >= 0, range(4), threads=2, most=2) as results:
        assert list(results) == [True] * 4
