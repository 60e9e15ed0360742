"""Paintings over HTTP: a prompt -> previews as it is painted, then the picture and the photographs nearest to it.

In: a guide and a generator by name, questions. Out: an iterator over events, which end with the finished painting. One
picture is painted at a time; whoever leaves stops his own. Needs the extra `generate`, and loads it with the first
painting. Knows nothing of indexes.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import TYPE_CHECKING

from clipmatch.errors import ClipmatchError
from clipmatch.wire import PaintEvent, PaintQuestion, data_url

if TYPE_CHECKING:
    from torch import Tensor

    from clipmatch.generation.optimise import Progress
    from clipmatch.generation.painter import Painted, Painter

PAUSE = 0.25  # seconds between two previews
MOST = 8  # paintings under way or waiting: the last of them waits for minutes already


class Studio:
    """A guide and a generator, loaded when first asked for, and the one thread that paints."""

    def __init__(self, guide: str, generator: str):
        self.guide, self.generator = guide, generator
        self._painter: Painter | None = None
        self._thread = ThreadPoolExecutor(1, "studio")
        self._asked = 0  # paintings that somebody waits for
        self._paints, self._closed = False, threading.Event()

    async def paint(self, question: PaintQuestion) -> AsyncGenerator[PaintEvent | Painted, None]:
        """Previews while it is painted, at last the best picture. Whoever came first is served first.

        Closing the iterator stops the painting. Raises ClipmatchError for what can't be painted, or if too many wait.
        """
        if self._asked == MOST:
            raise ClipmatchError(f"{MOST} paintings are under way or waiting already; try again when one is done.")
        loop, previews, left = asyncio.get_running_loop(), asyncio.Queue[PaintEvent | None](), threading.Event()
        last = 0.0

        def on_step(progress: Progress, steps: int) -> None:
            nonlocal last
            if time.monotonic() - last < PAUSE:
                return
            image = preview_of(progress.pictures[0])
            loop.call_soon_threadsafe(previews.put_nowait, PaintEvent(step=progress.step, steps=steps, image=image))
            last = time.monotonic()

        self._asked += 1
        work = loop.run_in_executor(self._thread, self._paint, question, on_step, left.is_set)
        work.add_done_callback(lambda _: previews.put_nowait(None))
        try:
            yield PaintEvent(step=0, steps=question.steps)
            while (preview := await previews.get()) is not None:
                yield preview
            if (painted := work.result()) is not None:
                yield painted
        finally:
            self._asked -= 1
            left.set()

    def _paint(
        self, question: PaintQuestion, on_step: Callable[[Progress, int], None], stop: Callable[[], bool]
    ) -> Painted | None:
        if stop() or self._closed.is_set():  # left while others were served
            return None
        self._paints = True
        try:
            return self._painted(question, on_step, lambda: stop() or self._closed.is_set())
        finally:
            self._paints = False

    def _painted(
        self, question: PaintQuestion, on_step: Callable[[Progress, int], None], stop: Callable[[], bool]
    ) -> Painted:
        from clipmatch.generation.painter import PaintConfig, load_painter

        if self._painter is None:
            self._painter = load_painter(self.guide, self.generator, device="cpu")
        config = PaintConfig(question.prompt, n=question.n, steps=question.steps, seed=question.seed, pictures=False)
        steps = self._painter.steps_of(config)
        painted, _ = self._painter.paint(config, lambda progress: on_step(progress, steps), stop)
        return painted[0]

    def close(self) -> bool:
        """End the thread after the step that is under way -> whether none is."""
        self._closed.set()
        self._thread.shutdown(wait=False, cancel_futures=True)
        return not self._paints


def file_of(painted: Painted) -> bytes:
    """A painting as a PNG that says how it was made."""
    from clipmatch.generation.picture import write_png

    buffer = BytesIO()
    write_png(buffer, painted.picture, painted.facts)
    return buffer.getvalue()


def preview_of(picture: Tensor) -> str:
    """A picture [3, h, w] in 0..1 as an address that holds it: a JPEG, which is small."""
    from clipmatch.generation.picture import to_image

    buffer = BytesIO()
    to_image(picture).save(buffer, "jpeg", quality=90)
    return data_url(buffer.getvalue(), "image/jpeg")
