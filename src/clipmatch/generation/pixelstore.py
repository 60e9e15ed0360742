"""Pictures for training, decoded once: files -> squares of pixels in one file, and batches of them.

In: paths of pictures, a side in pixels. Out: uint8 [n, s, s, 3] that stay on disk until they are needed, so memory does
not grow with the number of pictures (the file does: n * s * s * 3 bytes). Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from clipmatch.atomic import atomic_file
from clipmatch.config import PreprocessConfig
from clipmatch.embedder import read_batches
from clipmatch.errors import ClipmatchError, Failure
from clipmatch.preprocess import Transform
from clipmatch.runlog import note

PIXELS = "pixels.bin"


def decode_pictures(paths: Sequence[Path], size: int, file: Path, progress: bool = True) -> list[Path]:
    """Write the square in the middle of each picture, size x size pixels, to `file` -> the files that could be read.

    Raises ClipmatchError when none can.
    """
    transform = Transform(PreprocessConfig(size=size, fit="crop", resample="bicubic"))
    good, failures = list[Path](), list[Failure]()
    file.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(paths), desc="reading", unit="img", disable=not progress)
    with bar, atomic_file(file) as draft, draft.open("wb") as target:
        for batch in read_batches(list(paths), transform):
            target.write(batch.pixels.tobytes())
            good += batch.paths
            failures += batch.failures
            bar.update(len(batch.paths) + len(batch.failures))
    if not good:
        first = failures[0]
        raise ClipmatchError(f"None of the {len(paths)} pictures can be read; the first, {first.path}: {first.reason}.")
    if failures:
        note(f"{len(failures)} pictures can't be read, the first: {failures[0].path} ({failures[0].reason})")
    return good


def open_pixels(file: Path, size: int) -> NDArray[np.uint8]:
    """The pictures of a file that `decode_pictures` wrote: uint8 [n, s, s, 3], read as they are needed."""
    return np.memmap(file, np.uint8, mode="r").reshape(-1, size, size, 3)


def picture_batch(pixels: NDArray[np.uint8], rows: NDArray[np.int64]) -> Tensor:
    """uint8 [n, s, s, 3], the numbers of b of them -> float32 [b, 3, s, s] in -1..1."""
    chosen = torch.from_numpy(np.ascontiguousarray(pixels[rows]))
    return chosen.permute(0, 3, 1, 2).float() / 127.5 - 1


def batch_rows(count: int, size: int, step: int, seed: int) -> NDArray[np.int64]:
    """Which of `count` pictures the step's batch holds: all of them once an epoch, in an order that the seed decides.

    The last batch of an epoch is filled up with the first pictures of its order.
    """
    batches = -(-count // size)
    epoch, place = divmod(step, batches)
    order = np.random.default_rng((seed, epoch)).permutation(count)
    return np.resize(order, batches * size)[place * size : (place + 1) * size]
