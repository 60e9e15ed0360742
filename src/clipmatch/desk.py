"""An index that a server asks: its threads, its model, and what has to wait for its turn.

In: an index file, questions. Out: answers, or `HTTPException` for what is not there and what can't be done now. Knows
nothing of addresses or of the form of answers.

SQLite's connections belong to threads, so the index is open in two of them that share the model: one answers, the other
does what may take long. The index may change meanwhile: each question sees it as it is then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fastapi import HTTPException, Request

from clipmatch.decoder import Decoders
from clipmatch.embedder import Embedder
from clipmatch.exposure import Exposure
from clipmatch.index import Index
from clipmatch.runtime import usable_cores

if TYPE_CHECKING:
    from clipmatch.studio import Studio

Result = TypeVar("Result")

GONE, LEFT, BUSY = 404, 499, 503
WAITING = 400  # questions that wait for one thread, or pictures for their turn; one more is told to come again


class Desk:
    """An index and the one thread that asks it."""

    def __init__(self, path: Path | str, embedder: Embedder):
        self._path, self._embedder = path, embedder
        self._thread = ThreadPoolExecutor(1, "index")
        self._index: Index | None = None
        self._waiting = 0

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
        if self._index is None:
            self._index = Index.open(self._path, self._embedder)
        try:
            return question(self._index)
        except KeyError as error:
            raise HTTPException(GONE, f"{error.args[0]!r} is not in the index; it may have changed.") from error

    def close(self) -> None:
        """Let go of the file."""
        self._thread.submit(self._close)
        self._thread.shutdown()

    def _close(self) -> None:
        if self._index is not None:
            self._index.close()


class Service:
    """What the endpoints share: two desks, the model, decoders, and turns for what keeps a core busy."""

    def __init__(self, path: Path | str, embedder: Embedder, studio: Studio | None, exposure: Exposure):
        self.embedder, self.studio, self.exposure = embedder, studio, exposure
        self.desk, self.back = Desk(path, embedder), Desk(path, embedder)
        self.decoders = Decoders()
        self.turns = asyncio.Semaphore(usable_cores())
        self._waiting = 0

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

    def close(self) -> None:
        """Let go of the files, and of what is under way."""
        self.decoders.close()
        self.desk.close()
        self.back.close()
        if self.studio is not None:
            self.studio.close()


def busy() -> HTTPException:
    """What to raise when too many wait."""
    return HTTPException(BUSY, "The server has too much to do; try again.", {"Retry-After": "2"})
