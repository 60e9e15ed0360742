"""Work on many things at once, with results in order and a bound on how much is under way.

In: a function, what it is to be called with, a pool of threads. Out: its results. Knows nothing of pictures or models.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from typing import Protocol, TypeVar

GRACE = 5.0  # seconds for what is under way when it is given up

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
                yield first_of(waiting)
        while waiting:
            yield first_of(waiting)
    finally:
        for future in waiting:
            future.cancel()
        # A thread that computes when Python ends may take the process down with it; one that hangs does not.
        wait((future for future in waiting if not future.cancelled()), GRACE)


def first_of(waiting: deque[Future[R]]) -> R:
    """The first result, when it is there; until then it is among those that are waited for."""
    found = waiting[0].result()
    waiting.popleft()
    return found
