"""Photographs and sentences -> unit vectors, behind one small interface.

In: image paths or strings. Out: float32 rows of length 1, and the files that could not be read. Knows nothing of
captions, ranks or stores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from clipmatch.errors import ClipmatchError
from clipmatch.preprocess import ImageError, Transform, load_image
from clipmatch.runtime import choose_device, choose_precision, reuse_memory, usable_cores

if TYPE_CHECKING:
    from clipmatch.checkpoint import Checkpoint

BATCH = 64


@dataclass(frozen=True)
class Failure:
    """A file that could not be used, and why."""

    path: Path
    reason: str


def missing_files(names: Iterable[str]) -> list[Failure]:
    """Names that a caption file lists but the image folder lacks -> failures."""
    return [Failure(Path(name), "does not exist") for name in names]


@dataclass(frozen=True, eq=False)
class ImageEmbeddings:
    """rows [n, d] float32, unit length; paths: the n files they show, in order; failures: the files left out."""

    rows: NDArray[np.float32]
    paths: list[Path]
    failures: list[Failure]


class Embedder(Protocol):
    """What search and evaluation need of a model."""

    fingerprint: str
    dim: int

    def embed_images(self, paths: Sequence[str | Path], progress: bool = True) -> ImageEmbeddings:
        """Paths -> unit rows for those that can be read; a bad file is a `Failure`, never an exception."""
        ...

    def embed_texts(self, texts: Sequence[str], progress: bool = False) -> NDArray[np.float32]:
        """M strings -> [m, d] unit rows."""
        ...


def load_model(folder: str | Path, device: str | None = None, precision: str | None = None) -> TorchEmbedder:
    """A model folder (or a training run's folder, or a hub repository of one) -> something that embeds.

    device: "cpu", "cuda", ...; None takes the fastest. precision: "float32" (the default: exact and the same
    everywhere), "bfloat16", "float16".
    Raises ClipmatchError if the folder is no model, or PyTorch is not installed.
    """
    try:
        from clipmatch.checkpoint import load_checkpoint
    except ModuleNotFoundError as error:
        raise missing_training_extra(error) from error
    return TorchEmbedder(load_checkpoint(folder), device, precision)


def missing_training_extra(error: ModuleNotFoundError) -> ClipmatchError:
    """The sentence for a core installation that meets a PyTorch model."""
    return ClipmatchError(f'This needs the package {error.name}; install it with: pip install "clipmatch[train]"')


class TorchEmbedder:
    """An `Embedder` around a PyTorch checkpoint."""

    def __init__(self, checkpoint: Checkpoint, device: str | None = None, precision: str | None = None):
        self.checkpoint = checkpoint
        self.fingerprint = checkpoint.fingerprint
        reuse_memory()
        self.device = choose_device(device)
        self.precision = choose_precision(self.device, precision or "float32")
        self.model = checkpoint.model.to(self.device).eval()
        self.dim = self.model.config.embed_dim

    def embed_images(self, paths: Sequence[str | Path], progress: bool = True) -> ImageEmbeddings:
        """Paths -> unit rows [n, d] for those that can be read."""
        files, failures, rows = [], [], []
        bar = tqdm(total=len(paths), desc="images", unit="img", disable=not progress or len(paths) < BATCH)
        for batch in read_batches([Path(path) for path in paths], self.checkpoint.transform):
            failures += batch.failures
            if batch.paths:
                files += batch.paths
                rows.append(self._image_rows(batch.pixels))
            bar.update(len(batch.paths) + len(batch.failures))
        bar.close()
        return ImageEmbeddings(stack(rows, self.dim), files, failures)

    def embed_texts(self, texts: Sequence[str], progress: bool = False) -> NDArray[np.float32]:
        """M strings -> [m, d] unit rows."""
        rows = []
        starts = range(0, len(texts), BATCH * 4)
        for start in tqdm(starts, desc="texts", unit="batch", disable=not progress or len(starts) < 8):
            batch = list(texts[start : start + BATCH * 4])
            tokens = self.checkpoint.tokenizer(
                batch, padding=True, max_length=self.model.config.max_length, return_tensors="pt"
            )
            rows.append(self._run(self.model.encode_text, tokens["input_ids"], tokens["attention_mask"]))
        return stack(rows, self.dim)

    def _image_rows(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [b, s, s, 3] -> [b, d]."""
        import torch

        return self._run(self.model.encode_image, torch.from_numpy(self.checkpoint.transform.normalise(pixels)))

    def _run(self, encode: Any, *inputs: Any) -> NDArray[np.float32]:
        import torch

        dtype = self.precision.dtype
        with torch.inference_mode(), torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            rows: NDArray[np.float32] = encode(*(value.to(self.device) for value in inputs)).float().cpu().numpy()
        return rows


@dataclass(frozen=True, eq=False)
class PixelBatch:
    """Decoded pictures, uint8 [b, s, s, 3], and what could not be decoded."""

    pixels: NDArray[np.uint8]
    paths: list[Path]
    failures: list[Failure]


def read_batches(paths: list[Path], transform: Transform, size: int = BATCH) -> Iterator[PixelBatch]:
    """Decode files in threads, a batch ahead of the consumer, in order. A bad file ends up in `failures`."""

    def read(path: Path) -> NDArray[np.uint8] | Failure:
        try:
            return transform.pixels(load_image(path, min_size=transform.config.size))
        except ImageError as error:
            return Failure(path, error.reason)

    def gather(batch: list[Path], results: list[Any]) -> PixelBatch:
        good = [(path, value) for path, value in zip(batch, results, strict=True) if not isinstance(value, Failure)]
        bad = [value for value in results if isinstance(value, Failure)]
        return PixelBatch(np.stack([v for _, v in good]) if good else np.empty(0, np.uint8), [p for p, _ in good], bad)

    batches = [paths[start : start + size] for start in range(0, len(paths), size)]
    with ThreadPoolExecutor(max_workers=usable_cores()) as pool:
        waiting: list[Any] = []
        for number in range(len(batches) + 1):
            if number < len(batches):
                waiting.append([pool.submit(read, path) for path in batches[number]])
            if number > 0:
                yield gather(batches[number - 1], [future.result() for future in waiting.pop(0)])


def stack(rows: list[NDArray[np.float32]], dim: int) -> NDArray[np.float32]:
    """Batches of rows -> one array [n, dim], also when there are none."""
    return np.concatenate(rows) if rows else np.zeros((0, dim), np.float32)
