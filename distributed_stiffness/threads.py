"""Compiled loops on as many threads as torch has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def in_threads(
    work: Callable[[slice], None], n: int, *, at_least: int = 1, at_most: int | None = None
) -> None:
    """Do the work of n rows, an equal share on each of as many threads as torch has.

    Args:
        work: for some rows; a loop that holds no lock while it runs.
        n: rows.
        at_least: rows that are worth a thread, whose start takes a tenth of a millisecond.
        at_most: rows that are done at a time.
    """
    threads = torch.get_num_threads()
    size = max(at_least, -(-n // threads))
    size = min(size, at_most or size)
    parts = [slice(start, min(start + size, n)) for start in range(0, n, size)]
    if threads < 2 or len(parts) < 2:
        for part in parts:
            work(part)
    else:
        list(_pool(threads).map(work, parts))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that wait for work: to begin new ones takes as long as a small loop."""
    return ThreadPoolExecutor(threads, thread_name_prefix="compiled")
