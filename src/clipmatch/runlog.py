"""What a run says of itself: lines on stderr, log.jsonl, TensorBoard, and a clean answer to Ctrl-C.

In: rows of figures. Out: files in the run's folder that grow with it. Knows nothing of models or data.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from clipmatch.data import CaptionSet


def note(text: str) -> None:
    """A line on stderr that does not break the progress bar."""
    tqdm.write(text, file=sys.stderr)


def note_quirks(captions: CaptionSet) -> None:
    """What was repaired, dropped or missing in a caption file, counted, with the first of each."""
    for what, notes in (("repaired", captions.repaired), ("dropped", captions.dropped)):
        if notes:
            first = notes[0]
            note(f"{captions.source}: {len(notes)} {first.unit}s {what}, the first: {first.place} ({first.text})")
    if captions.missing:
        note(f"{captions.source}: {len(captions.missing)} images do not exist, the first: {captions.missing[0]}")


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
    """log.jsonl and TensorBoard, written as the run goes."""

    def __init__(self, out: Path, history: list[dict[str, Any]]):
        from torch.utils.tensorboard import SummaryWriter

        self.history = history
        self.file = (out / "log.jsonl").open("w", encoding="utf-8")
        for row in history:
            self.file.write(json.dumps(row) + "\n")
        last = history[-1]["step"] if history else 0
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=last + 1)  # type: ignore[no-untyped-call]

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.board.close()  # type: ignore[no-untyped-call]

    def step(self, row: dict[str, Any]) -> None:
        """A step's figures."""
        self.write(row)
        for name in ("loss", "learning_rate", "gradient_norm", "logit_scale", "pairs_per_second"):
            if row[name] is not None:
                self.board.add_scalar(f"train/{name}", row[name], row["step"])  # type: ignore[no-untyped-call]

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch's figures."""
        self.write(row)
        for direction, figures in row.get("dev", {}).items():
            for k in (1, 5, 10):
                self.board.add_scalar(f"dev/{direction}_recall@{k}", figures[f"recall@{k}"], row["step"])  # type: ignore[no-untyped-call]

    def write(self, row: dict[str, Any]) -> None:
        """Append one line."""
        self.history.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()


def read_history(run: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's log.jsonl."""
    path = Path(run) / "log.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
