"""What a run says of itself: lines on stderr, log.jsonl, TensorBoard, and a clean answer to Ctrl-C.

In: rows of figures. Out: files in the run's folder that grow with it. Knows nothing of models or data.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from clipmatch.atomic import atomic_file
from clipmatch.data import CaptionSet
from clipmatch.errors import ClipmatchError, unwritable
from clipmatch.output import one_line
from clipmatch.runtime import is_first_process

LOG, LOCK = "log.jsonl", ".lock"


def note(text: str) -> None:
    """A line on stderr that does not break the progress bar; of several processes, the first speaks for all."""
    if is_first_process():
        tqdm.write(text, file=sys.stderr)


def note_quirks(captions: CaptionSet) -> None:
    """What was repaired, dropped or missing in a caption file, counted, with the first of each."""
    for what, notes in (("repaired", captions.repaired), ("dropped", captions.dropped)):
        if notes:
            first = notes[0]
            text = f"{captions.source}: {len(notes)} {first.unit}s {what}, the first: {first.place} ({first.text})"
            note(one_line(text))
    if captions.missing:
        count, first_name = len(captions.missing), captions.missing[0]
        note(one_line(f"{captions.source}: {count} images do not exist, the first: {first_name}"))


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks the loop to stop after the step in flight; a second one stops at once."""
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        note("stopping after this step (Ctrl-C again: at once)")

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not the main thread: signals are somebody else's
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


class RunLog:
    """log.jsonl and TensorBoard, written as the run goes; without a folder, rows are only remembered."""

    def __init__(self, out: Path | None, history: list[dict[str, Any]]):
        self.history, self.out = history, out or Path()
        self.file = self.board = None
        if out is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = out / LOG
        with writing(out):
            with atomic_file(path) as draft:  # a run that is killed here keeps its log
                draft.write_text("".join(json.dumps(row) + "\n" for row in history), encoding="utf-8")
            last = history[-1]["step"] if history else 0
            self.excepthook, threading.excepthook = threading.excepthook, self.in_thread
            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=last + 1)  # type: ignore[no-untyped-call]
            self.file = path.open("a", encoding="utf-8")

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file and self.board:
            threading.excepthook = self.excepthook
            for part in (self.file, self.board):
                with suppress(OSError):  # of a full disk, which was told when a row was written
                    part.close()  # type: ignore[no-untyped-call]

    def in_thread(self, failed: Any) -> None:
        """TensorBoard writes in a thread of its own; what the disk says there it says again where rows are written."""
        if not isinstance(failed.exc_value, OSError):
            self.excepthook(failed)

    def step(self, row: dict[str, Any]) -> None:
        """A step's figures."""
        self.write(row)
        for name in ("loss", "learning_rate", "gradient_norm", "logit_scale", "pairs_per_second"):
            self.plot(f"train/{name}", row[name], row["step"])

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch's figures."""
        self.write(row)
        for direction, figures in row.get("dev", {}).items():
            for k in (1, 5, 10):
                self.plot(f"dev/{direction}_recall@{k}", figures[f"recall@{k}"], row["step"])

    def plot(self, name: str, value: float | None, step: int) -> None:
        """A point of a curve."""
        if self.board is not None and value is not None:
            with writing(self.out):
                self.board.add_scalar(name, value, step)  # type: ignore[no-untyped-call]

    def write(self, row: dict[str, Any]) -> None:
        """Append one line."""
        self.history.append(row)
        if self.file:
            with writing(self.out):
                self.file.write(json.dumps(row) + "\n")
                self.file.flush()

    def to_disk(self) -> None:
        """Wait until the disk has all rows: before a save that counts on them."""
        if self.file:
            with writing(self.out):
                os.fsync(self.file.fileno())


def read_history(run: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's log.jsonl."""
    path = Path(run) / LOG
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:  # what follows was cut off
        try:
            rows.append(json.loads(line))
        except ValueError:  # a power cut can leave zeros where a line was to be
            break
    return rows


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Context: whatever can't be written into a run's folder, in one sentence."""
    try:
        yield
    except OSError as error:
        raise unwritable(f"The run in {out}", error, "see that its folder can be written") from error


@contextmanager
def one_run(out: Path) -> Iterator[None]:
    """Context: for as long as one process trains into a folder, no other does; it is made if it is not there.

    Raises ClipmatchError if another does, or the folder can't be written. The lock goes with its process.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(out / LOCK)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ClipmatchError(f"Another clipmatch is training in {out}; wait for it, or choose another --out.") from None
    except OSError as error:
        raise unwritable(f"The folder {out}", error, "choose another --out") from error
    try:
        yield
    finally:
        lock.release()
