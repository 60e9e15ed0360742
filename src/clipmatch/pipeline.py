"""Work on many things at once, with results in order and a bound on how much is under way.

In: a function, what it is to be called with, a pool of threads. Out: its results. Knows nothing of pictures or models.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(
    work: Callable[[T], R], items: Iterable[T], pool: ThreadPoolExecutor, ahead: int | None = None
) -> Iterator[R]:
    """`map(work, items)` by the threads of a pool, at most `ahead` items (twice the threads, if not given) in advance.

    Items are taken, and results given, in the thread of the caller; while it is busy the pool works on. The first
    exception in the order of the items is raised, and what has not begun by then is dropped.
    """
    most = ahead or 2 * pool._max_workers
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
