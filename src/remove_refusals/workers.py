"""Threads that work on several tensors at once, each on a core of its own."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

LEAST_MEMORY = 64 << 20
"""Below this a worker's slices would be so small that it crawls."""

# What the plan, the headers and the records take comes out of the budget too.
_FOR_WORKERS = 0.75


def default_jobs() -> int:
    """How many files are worked on at once if nothing is said: more than four add nothing but load on the disk."""
    return min(4, os.cpu_count() or 1)


def shares(memory: int, jobs: int | None, n_tasks: int) -> tuple[int, int]:
    """Divide memory among workers.

    Args:
        memory: How many bytes may be held in all.
        jobs: How many workers are wanted; None for `default_jobs`.
        n_tasks: How many there is work for.

    Returns:
        The number of workers, fewer where the memory is too small for so many, and the bytes of each.
    """
    count = max(1, min(jobs or default_jobs(), memory // LEAST_MEMORY, n_tasks))
    return count, int(memory * _FOR_WORKERS) // count


@contextmanager
def workers(jobs: int) -> Iterator[ThreadPoolExecutor]:
    """Give threads that compute on one core each, since there are several of them."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                yield pool
            finally:
                # What has not begun is not waited for when something fails.
                pool.shutdown(cancel_futures=True)
    finally:
        # The last setting holds for threads that are made later, too.
        torch.set_num_threads(threads)
