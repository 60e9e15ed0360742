"""An index that a server asks: its threads, its model, and what has to wait for its turn.

In: an index file, questions. Out: answers, or `HTTPException` for what is not there and what can't be done now. Knows
nothing of addresses or of the form of answers.

SQLite's connections belong to threads, so the index is open in two of them that share the model: one answers, the other
does what may take long. The index may change meanwhile: each question sees it as it is then. If it changes over to
another model, the server follows; if another file takes its place, or is copied onto it, that is opened. One that can't
be written here is read as a file that nobody changes (storefile.py); if somebody does, while a question is answered,
it is asked once more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

from fastapi import HTTPException, Request

from clipmatch.decoder import Decoders
from clipmatch.embedder import Embedder, load_model
from clipmatch.errors import ClipmatchError
from clipmatch.exposure import Exposure
from clipmatch.index import Index
from clipmatch.runtime import usable_cores
from clipmatch.store import OtherModel

if TYPE_CHECKING:
    from clipmatch.studio import Studio

Result = TypeVar("Result")

GONE, LEFT, BUSY = 404, 499, 503
CHANGED = "The index was changed over to another model just now; ask again."
UNSTEADY = "The index is being changed by another computer or program; ask again."
LEAVE = 0.5  # seconds that a question which has begun may still take, once nobody waits for its answer
TRIES = 3  # that a question has, if the index changes each time
WAITING = 400  # questions that wait for one thread, or pictures for their turn; one more is told to come again


class Desk:
    """An index and the one thread that asks it."""

    def __init__(self, path: Path | str, service: Service):
        self._path, self._service = path, service
        self._thread = ThreadPoolExecutor(1, "index")
        self._index: Index | None = None
        self._file: tuple[int, ...] | None = None
        self._waiting = 0
        self._closing: Future[None] | None = None

    async def ask(self, question: Callable[[Index], Result]) -> Result:
        """What the index answers. Raises HTTPException if a photograph is not, or no longer, in it, or many wait."""
        if self._waiting >= WAITING:
            raise busy()
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._answer, question)
        finally:
            self._waiting -= 1

    def _answer(self, question: Callable[[Index], Result]) -> Result:
        for _ in range(TRIES):
            index = self._opened()
            try:
                answer = self._asked(index, question)
            except (ClipmatchError, HTTPException):
                if self._holds(index):
                    raise
            else:
                if self._holds(index):
                    return answer
        raise ClipmatchError(UNSTEADY)

    def _asked(self, index: Index, question: Callable[[Index], Result]) -> Result:
        try:
            return question(index)
        except OtherModel as error:
            self._service.follow(index)
            self._close()
            raise ClipmatchError(CHANGED) from error
        except KeyError as error:
            raise HTTPException(GONE, f"{error.args[0]!r} is not in the index; it may have changed.") from error

    def close(self, patience: float = LEAVE) -> bool:
        """Let go of the file once the question that has begun is answered -> whether it was within so many seconds."""
        if self._closing is None:
            self._closing = self._thread.submit(self._close)
            self._thread.shutdown(wait=False)
        return not wait([self._closing], patience).not_done

    def _holds(self, index: Index) -> bool:
        """Whether what was read is of one moment: SQLite sees to that, unless it takes the file for unchanging."""
        return not index.store.unchanging or file_at(self._path) == self._file

    def _opened(self) -> Index:
        """The index that lies there now: to go on with one that was moved away or replaced could damage it."""
        file = file_at(self._path)
        if file != self._file:
            self._close()
        if self._index is None:
            self._index, self._file = Index.open(self._path, self._service.embedder, create=False), file
        return self._index

    def _close(self) -> None:
        if self._index is not None:
            self._index.close()
            self._index = None


class Service:
    """What the endpoints share: two desks, the model, decoders, and turns for what keeps a core busy."""

    def __init__(self, path: Path | str, embedder: Embedder, studio: Studio | None, exposure: Exposure):
        self.embedder, self.studio, self.exposure = embedder, studio, exposure
        self.desk, self.back = Desk(path, self), Desk(path, self)
        self.decoders = Decoders()
        self.turns = asyncio.Semaphore(usable_cores())
        self._waiting = 0
        self._following = Lock()

    def follow(self, index: Index) -> None:
        """Load the model that the index was changed over to. Raises ClipmatchError if it can't be loaded."""
        with self._following:
            bound = index.store.model
            if bound and bound.fingerprint != self.embedder.fingerprint:
                self.embedder = load_model(bound.name)

    async def compute(self, work: Callable[[], Result], request: Request) -> Result:
        """Do something in a thread when it is its turn, unless the client has gone by then, or many wait."""
        if self._waiting >= WAITING:
            raise busy()
        self._waiting += 1
        try:
            async with self.turns:
                if await request.is_disconnected():
                    raise HTTPException(LEFT, "The client has gone.")
                return await asyncio.to_thread(work)
        finally:
            self._waiting -= 1

    def close(self) -> bool:
        """Let go of the files, and of what is under way -> whether all has ended; else a thread reads on for a while.

        May be called again.
        """
        self.decoders.close()
        ended = [desk.close() for desk in (self.desk, self.back)]
        if self.studio is not None:
            ended.append(self.studio.close())
        return all(ended)


def file_at(path: Path | str) -> tuple[int, ...] | None:
    """Which file or folder lies there (device, number), its size and time; None of an address, or if there is none."""
    try:
        found = None if isinstance(path, str) else path.stat()
    except OSError:
        return None
    return found and (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def busy() -> HTTPException:
    """What to raise when too many wait."""
    return HTTPException(BUSY, "The server has too much to do; try again.", {"Retry-After": "2"})
