"""Work on many things at once, with results in order and a bound on how much is under way.

In: a function, what it is to be called with, a pool of threads. Out: its results. Knows nothing of pictures or models.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Pool(Protocol):
    """Threads: a `ThreadPoolExecutor`, or a `Crew`."""

    def submit(self, work: Callable[[T], R], item: T, /) -> Future[R]:
        """What will be made of an item."""
        ...


def in_order(work: Callable[[T], R], items: Iterable[T], pool: Pool, ahead: int) -> Iterator[R]:
    """`map(work, items)` by the threads of a pool, at most `ahead` items in advance.

    Items are taken, and results given, in the thread of the caller; while it is busy the pool works on. The first
    exception in the order of the items is raised, what has not begun by then is dropped, and what has is waited for.
    """
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        for future in waiting:  # a thread that is at work when Python ends may take the process down with it
            with suppress(Exception):
                future.result()
