"""Many things at once: results in order, a bound on what is under way, errors where they belong."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from clipmatch import pipeline
from clipmatch.patience import Crew
from clipmatch.pipeline import in_order


def test_results_come_in_the_order_of_the_items():
    with ThreadPoolExecutor(4) as pool:
        waits = [0.05, 0.0, 0.03, 0.01, 0.0, 0.02]
        found = list(in_order(lambda wait: (time.sleep(wait), wait)[1], waits, pool, ahead=8))
    assert found == waits


def test_no_more_is_taken_than_is_allowed_ahead():
    taken = []

    def items():
        for number in range(10):
            taken.append(number)
            yield number

    with ThreadPoolExecutor(2) as pool:
        results = in_order(lambda number: number, items(), pool, ahead=3)
        assert next(results) == 0
        assert taken == [0, 1, 2, 3]
        assert next(results) == 1
        assert taken == [0, 1, 2, 3, 4]


def test_work_goes_on_while_the_caller_is_busy():
    done = threading.Event()

    def work(number):
        if number == 1:
            done.set()
        return number

    with ThreadPoolExecutor(1) as pool:
        results = in_order(work, range(3), pool, ahead=2)
        assert next(results) == 0
        assert done.wait(5)  # nobody has asked for 1 yet


def test_the_first_error_in_order_is_raised_and_the_rest_is_dropped():
    begun = []

    def work(number):
        begun.append(number)
        time.sleep(0.01)
        if number in (1, 2):
            raise ValueError(number)
        return number

    with ThreadPoolExecutor(1) as pool:
        results = in_order(work, range(100), pool, ahead=50)
        assert next(results) == 0
        with pytest.raises(ValueError, match="1"):
            next(results)
    assert len(begun) < 20


def test_what_hangs_is_not_waited_for_when_it_is_over(monkeypatch):
    monkeypatch.setattr(pipeline, "GRACE", 0.1)
    event = threading.Event()
    results = in_order(lambda number: number and event.wait(30), range(3), Crew(2), ahead=2)
    assert next(results) == 0
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < 5
    event.set()


def test_what_was_waited_for_at_an_interrupt_is_done_too(monkeypatch):
    begun, done = threading.Event(), threading.Event()

    def work(_):
        begun.set()
        time.sleep(0.1)
        done.set()

    class Interrupted(Crew):
        def look_after(self):
            assert begun.wait(5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(in_order(work, range(1), Interrupted(1), ahead=1))
    assert done.is_set()


def test_nobody_is_at_work_when_it_is_over():
    begun, done = threading.Event(), threading.Event()

    def work(number):
        if number:
            begun.set()
            time.sleep(0.1)
            done.set()
        return number

    results = in_order(work, range(2), Crew(2), ahead=1)
    assert next(results) == 0
    assert begun.wait(5)
    results.close()
    assert done.is_set()
