"""Files that are waited for only so long: on a disk of the network that is gone, or with a decoder that finds no end.

In: a function that reads a file. Out: what it returns or raises, or TimeoutError. Knows nothing of pictures.

A thread can't be ended from outside. So what may hang is done in a thread beside that of the caller, who goes on
without it when the time is over. What is left alone so is not waited for when the process ends. To pass on work takes
time too where the cores are busy: what reads much does so by a `Crew`, whose threads do all of it.
"""

from __future__ import annotations

import errno
import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from threading import Condition, Lock, Thread, current_thread
from typing import Any, TypeVar

from clipmatch.errors import ClipmatchError

LIMIT = 60.0  # seconds for a file to be decoded, or for the next part of it to come
MOST = 16  # files that hang at once: beyond that it is their disk

T = TypeVar("T", bound=Hashable)
R = TypeVar("R")
W = TypeVar("W")


class Aside(Thread):
    """A thread that does one thing after another for others.

    since: when the time began that it has for it; infinity where it may take as long as it likes. at: which of several
    things it is at. alone: nobody waits for it.
    """

    def __init__(self, tasks: SimpleQueue[Job[Any] | None] | None = None) -> None:
        super().__init__(name="aside", daemon=True)
        self.tasks = SimpleQueue[Job[Any] | None]() if tasks is None else tasks
        self.since, self.alone = math.inf, False
        self.at: Hashable = None
        self.job: Job[Any] | None = None
        self.start()

    def run(self) -> None:
        """Do what comes, until nothing is to come or nobody waits for it."""
        while not self.alone and (job := self.tasks.get()):
            job.do(self)
            del job  # what was made is not kept until the next comes


class Job(Future[R]):
    """What a thread is to do for another one. aside: that thread, from when on it is known."""

    def __init__(self, work: Callable[[], R]) -> None:
        super().__init__()
        self.work = work
        self.aside: Aside | None = None
        self.given_up: frozenset[Hashable] = frozenset()  # of several things to do, those that have hung

    def do(self, aside: Aside) -> None:
        """Do it in this thread, if it was not called off."""
        if not self.running() and not self.set_running_or_notify_cancel():
            return
        self.aside, aside.job = aside, self
        made, error = None, None
        try:
            made = self.work()
        except BaseException as problem:
            error = problem
        aside.since = math.inf  # before anyone hears of it, who may then have more for this thread
        with turn:
            aside.job = None
            if aside.alone:  # somebody else does it again
                return
            if error is None:
                self.set_result(made)  # type: ignore[arg-type]
            else:
                self.set_exception(error)
        del made, error  # an error would keep this frame, and this frame it

    def hangs(self) -> bool:
        """Wait until it is done, or its time is over."""
        while not self.done():
            left = self.aside.since + LIMIT - time.monotonic() if self.aside else LIMIT
            if left <= 0:
                return True
            wait([self], min(left, LIMIT))
        return False


turn = Lock()  # to say that something is done, or that nobody waits for it
idle: deque[Aside] = deque()
hanging: list[Aside] = []


def patiently(work: Callable[[], R]) -> R:
    """What a function returns or raises; its work is done in another thread.

    Raises TimeoutError if it takes more than `LIMIT` seconds, and ClipmatchError if `MOST` files do at once. Called by
    what is done so already, it only counts anew: whoever waits for that does so for this.
    """
    if isinstance(current_thread(), Aside):
        count_anew()
        return work()
    aside, job = next_aside(), Job(work)
    aside.since, job.aside = time.monotonic(), aside
    aside.tasks.put(job)
    try:
        if job.hangs():
            raise TimeoutError(errno.ETIMEDOUT, too_long())
    except BaseException:  # Ctrl-C as well
        leave_alone(aside)
        aside.tasks.put(None)
        raise
    idle.append(aside)
    try:
        return job.result()
    finally:
        del job  # an error would keep this frame, and this frame it


def one_by_one(work: Callable[[T], R], items: Sequence[T], late: Callable[[T], R]) -> list[R]:
    """What a function makes of each of some items; of those that take too long what `late` makes of them."""
    found: list[R] = []
    if isinstance(current_thread(), Aside):
        do_all(work, items, late, found)
        return found
    while len(found) < len(items):
        made: list[R] = []
        try:
            patiently(partial(do_all, work, items[len(found) :], late, made))
            found += made
        except TimeoutError:
            found += made
            found += map(late, items[len(found) : len(found) + 1])  # none, if it was done just now
    return found


def do_all(work: Callable[[T], R], items: Sequence[T], late: Callable[[T], R], made: list[R]) -> None:
    """Add what is made of each item, as long as somebody waits for it. Called in an `Aside`."""
    aside = current_thread()
    assert isinstance(aside, Aside)
    assert aside.job
    for aside.at in items:
        if aside.alone:
            return
        count_anew()
        made.append(late(aside.at) if aside.at in aside.job.given_up else work(aside.at))
    aside.since = math.inf


class Crew:
    """Threads that do what is passed to them, as those of a `ThreadPoolExecutor` do, and may hang in `one_by_one`.

    One that does is left alone, another takes its place, and all that it had to do is done again but for what it hung
    at. Whoever waits for anything looks after all of them.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.begin()

    def begin(self) -> None:
        """Start the threads."""
        self.tasks = SimpleQueue[Job[Any] | None]()
        self.asides = [Aside(self.tasks) for _ in range(self.size)]
        weakref.finalize(self, dismiss, self.tasks, self.size)

    def submit(self, work: Callable[[W], R], item: W) -> Future[R]:
        """What will be made of an item. To wait for it raises ClipmatchError if `MOST` files hang at once."""
        if not any(aside.is_alive() for aside in self.asides):  # in a process that was forked
            self.begin()
        job = CrewJob(self, partial(work, item))
        self.tasks.put(job)
        return job

    def look_after(self) -> float:
        """Go on without those that hang -> seconds until the next one may."""
        now = time.monotonic()
        for aside in list(self.asides):
            if aside.since + LIMIT <= now:
                self.replace(aside)
        return min(aside.since for aside in self.asides) + LIMIT - now

    def replace(self, aside: Aside) -> None:
        """Put another thread in the place of one that hangs, and what that had to do at the end of what is to do."""
        with turn:
            job = aside.job
            if job is None or job.done() or aside not in self.asides or aside.since + LIMIT > time.monotonic():
                return  # it goes on just now, or somebody else has replaced it
            aside.alone = True
            job.given_up |= {aside.at}
            self.asides[self.asides.index(aside)] = Aside(self.tasks)
            self.tasks.put(job)
        leave_alone(aside)


def dismiss(tasks: SimpleQueue[Job[Any] | None], size: int) -> None:
    """End as many threads, when they have done what is to do."""
    for _ in range(size):
        tasks.put(None)


class CrewJob(Job[R]):
    """What a crew is to do."""

    def __init__(self, crew: Crew, work: Callable[[], R]) -> None:
        super().__init__(work)
        self.crew = crew

    def result(self, timeout: float | None = None) -> R:
        """As of a `Future`, but it is waited for patiently."""
        while not self.done():
            wait([self], min(self.crew.look_after(), LIMIT / 8))  # another thread may have begun meanwhile
        return super().result(timeout)


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
    with turn:
        aside.alone = True
        hanging[:] = [*(other for other in hanging if other.is_alive()), aside]
        many = len(hanging) >= MOST
    if many:
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
