"""Files that are waited for only so long: on a disk of the network that is gone, or with a decoder that finds no end.

In: a function that reads a file. Out: what it returns or raises, or TimeoutError. Knows nothing of pictures.

A thread can't be ended from outside. So what may hang is done in a thread beside that of the caller, who goes on
without it when the time is over. What is left alone so is not waited for when the process ends.
"""

from __future__ import annotations

import errno
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from threading import Condition, Thread, current_thread
from typing import Any, TypeVar

from clipmatch.errors import ClipmatchError

LIMIT = 60.0  # seconds for a file to be decoded, or for the next part of it to come
MOST = 16  # files that hang at once: beyond that it is their disk

T = TypeVar("T")
R = TypeVar("R")


class Aside(Thread):
    """A thread that does one thing after another for others.

    since: when the time began that it has for it; infinity while it waits for its turn. alone: nobody waits for it.
    """

    def __init__(self) -> None:
        super().__init__(name="aside", daemon=True)
        self.tasks: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[Any]] | None] = SimpleQueue()
        self.since, self.alone = math.inf, False
        self.start()

    def run(self) -> None:
        """Do what comes, until nothing is to come."""
        while task := self.tasks.get():
            work, answers = task
            try:
                answers.put((work(), None))
            except BaseException as error:
                answers.put((None, error))
            del task, work, answers  # what was made is not kept until the next comes


idle: deque[Aside] = deque()
hanging: list[Aside] = []


def patiently(work: Callable[[], T]) -> T:
    """What a function returns or raises; its work is done in another thread.

    Raises TimeoutError if it takes more than `LIMIT` seconds, and ClipmatchError if `MOST` files do at once. Called by
    what is done so already, it only counts anew: whoever waits for that does so for this.
    """
    if isinstance(current_thread(), Aside):
        count_anew()
        return work()
    aside, answers = next_aside(), SimpleQueue[Any]()
    aside.since = time.monotonic()
    aside.tasks.put((work, answers))
    try:
        made, error = answer_of(aside, answers)
    except BaseException:  # Ctrl-C as well
        leave_alone(aside)
        raise
    idle.append(aside)
    if error is not None:
        try:
            raise error
        finally:
            del error  # which would keep this frame, and this frame it
    return made  # type: ignore[no-any-return]


def one_by_one(work: Callable[[T], R], items: Sequence[T], late: Callable[[T], R]) -> list[R]:
    """What a function makes of each of some items; of those that take too long what `late` makes of them.

    To pass on work takes time too, where other threads are busy; so all of it is passed on at once.
    """
    found: list[R] = []
    while len(found) < len(items):
        made: list[R] = []
        try:
            patiently(partial(do_all, work, items[len(found) :], made))
            found += made
        except TimeoutError:
            found += made
            found += map(late, items[len(found) : len(found) + 1])  # none, if it was done just now
    return found


def do_all(work: Callable[[T], R], items: Sequence[T], made: list[R]) -> None:
    """Add what a function makes of each item, as long as somebody waits for it."""
    for item in items:
        if getattr(current_thread(), "alone", False):
            return
        count_anew()
        made.append(work(item))


def answer_of(aside: Aside, answers: SimpleQueue[Any]) -> Any:
    """What a thread has made, and the error if there was one. Raises TimeoutError."""
    while (left := aside.since + LIMIT - time.monotonic()) > 0:
        with suppress(Empty):
            return answers.get(timeout=min(left, LIMIT))
    raise TimeoutError(errno.ETIMEDOUT, too_long())


def too_long() -> str:
    """The reason for going on without a file."""
    return f"it takes more than {LIMIT:g} seconds"


def next_aside() -> Aside:
    """A thread that has nothing to do. Those from before a fork are none any more."""
    with suppress(IndexError):
        while True:
            if (aside := idle.pop()).is_alive():
                return aside
    return Aside()


def leave_alone(aside: Aside) -> None:
    """Go on without a thread, which ends with what it does. Raises ClipmatchError if there are many."""
    aside.alone = True
    aside.tasks.put(None)
    hanging[:] = [*(other for other in hanging if other.is_alive()), aside]
    if len(hanging) >= MOST:
        raise ClipmatchError(
            f"{len(hanging)} files have been read for more than {LIMIT:g} seconds each, and still are; see whether "
            "the disk they are on answers, and start it again."
        )


def count_anew() -> None:
    """Whoever is waited for has got on: from now on it has its time once more."""
    if isinstance(aside := current_thread(), Aside):
        aside.since = time.monotonic()


class Turn:
    """A lock. The time that it is waited for does not count; a thread that was left alone has lost it."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._holder: Thread | None = None

    def __enter__(self) -> None:
        thread = current_thread()
        if isinstance(thread, Aside):
            thread.since = math.inf
        with self._changed:
            while self._holder is not None and self._holder.is_alive() and not getattr(self._holder, "alone", False):
                self._changed.wait(1)  # a thread that is left alone gives no sign
            self._holder = thread
        count_anew()

    def __exit__(self, *_: object) -> None:
        with self._changed:
            if self._holder is current_thread():
                self._holder = None
                self._changed.notify()
