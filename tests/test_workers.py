"""Threads for several tensors at once: what is left undone when one fails, and what each may hold."""

import threading

import pytest
import torch

from remove_refusals.models.checkpoint import LEAST_MEMORY, shares, workers


def test_what_has_not_begun_is_dropped_when_something_fails():
    begun, gate = [], threading.Event()

    def work(number):
        begun.append(number)
        if number == 0:
            raise ValueError("the first fails")
        gate.wait(10)

    def fail():
        with workers(2) as pool:
            first, others = pool.map(work, [0, 1]), pool.map(work, range(2, 50))
            threading.Timer(0.05, gate.set).start()
            list(first)
            list(others)

    with pytest.raises(ValueError, match="the first fails"):
        fail()
    # The two threads may have taken one more each before the failure was seen.
    assert len(begun) <= 4


def test_the_number_of_threads_is_as_it_was_afterwards():
    before = torch.get_num_threads()
    with workers(2) as pool:
        assert set(pool.map(lambda _: torch.get_num_threads(), range(8))) == {1}
    assert torch.get_num_threads() == before


def test_memory_is_shared_among_fewer_workers_when_it_is_small():
    assert shares(4 * LEAST_MEMORY, 8, 100)[0] == 4
    assert shares(1, 8, 100)[0] == 1
    assert shares(1 << 40, 8, 3)[0] == 3
    count, share = shares(1 << 30, 4, 100)
    assert count * share <= 1 << 30
