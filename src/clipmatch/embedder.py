"""Photographs and sentences -> unit vectors, behind one small interface, by PyTorch or ONNX Runtime.

In: the name of a model; image paths or strings. Out: float32 rows of length 1, and the files that could not be read.
Knows nothing of captions, ranks or stores. PyTorch is imported only for a model that needs it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from clipmatch.calibration import Calibration
from clipmatch.config import INIT_LOGIT_SCALE, MAX_DIM, PreprocessConfig, from_json, require
from clipmatch.errors import ClipmatchError, Failure, reason_of
from clipmatch.modelfolder import (
    CALIBRATION,
    CONFIG,
    EMBEDDED,
    EMBEDDED_NAME,
    IMAGE_GRAPH,
    LOG_SCALE,
    TEXT_GRAPH,
    TOKENIZER,
    WEIGHTS,
    find_folder,
    find_local,
    hub_config,
    is_hub_name,
    kind_of,
    read_config,
)
from clipmatch.runtime import choose_device, choose_precision, reuse_memory, usable_cores
from clipmatch.session import asked_for_only, open_session, output_shape
from clipmatch.tokenizer import Tokenizer

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from PIL.Image import Image

    from clipmatch.checkpoint import Checkpoint
    from clipmatch.patience import Crew
    from clipmatch.preprocess import Transform

BATCH = 64
LOT = 8  # pictures that a core takes through an ONNX graph at once: they stay in its cache
INSTALL = 'pip install "clipmatch[train]"'

EncodePixels: TypeAlias = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
ReadImage: TypeAlias = "Callable[[Path, int | None], Image]"  # as `load_image`
EncodeStrings: TypeAlias = Callable[[list[str]], NDArray[np.float32]]


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

    def embed_images(
        self, paths: Sequence[str | Path], progress: bool = True, read: ReadImage | None = None
    ) -> ImageEmbeddings:
        """Paths -> unit rows for those that can be read; a bad file is a `Failure`, never an exception.

        read: how a file becomes a picture, with the size below which neither side may fall, if not by `load_image`;
        called from threads.
        """
        ...

    def embed_texts(self, texts: Sequence[str], progress: bool = False) -> NDArray[np.float32]:
        """M strings -> [m, d] unit rows."""
        ...


class BatchedEmbedder(ABC):
    """What embedders share: each core reads some files and takes them through the model; bad ones become failures.

    A subclass sets `fingerprint`, `dim` and `preprocess`, and computes `encode_pixels` and `encode_strings`. folder:
    the model folder that it was loaded from, if there is one. name: what `load_model` loads it by, from any directory;
    None for the one that comes with clipmatch. logit_scale: the factor between cosine and logit that it was trained
    with. lot: pictures encoded at once. Threads may share an embedder.
    """

    fingerprint: str
    dim: int
    preprocess: PreprocessConfig
    folder: Path | None = None
    logit_scale: float = INIT_LOGIT_SCALE
    name: str | None = None
    lot: int = BATCH

    @cached_property
    def transform(self) -> Transform:
        """What makes its pixels of a picture; a query in words does without it."""
        from clipmatch.preprocess import Transform

        return Transform(self.preprocess)

    @cached_property
    def calibration(self) -> Calibration | None:
        """How sure its cosines make; None for a model that was never evaluated. Raises ClipmatchError if damaged."""
        if self.folder is None or not (self.folder / CALIBRATION).is_file():
            return None
        return Calibration.load(self.folder, self.fingerprint)

    @abstractmethod
    def encode_pixels(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [b, s, s, 3], as `transform.pixels` makes them -> unit rows [b, d]."""

    @abstractmethod
    def encode_strings(self, texts: list[str]) -> NDArray[np.float32]:
        """B strings -> unit rows [b, d]."""

    def encode_places(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32] | None:
        """uint8 [b, s, s, 3] -> unit rows [b, p, d] of the p places of each picture, row by row; None if a place alone
        means nothing to the model.
        """
        return None

    def embed_images(
        self, paths: Sequence[str | Path], progress: bool = True, read: ReadImage | None = None
    ) -> ImageEmbeddings:
        """Paths -> unit rows [n, d] for those that can be read."""
        return self.map_images(self.encode_pixels, (self.dim,), paths, progress, read)

    def embed_texts(self, texts: Sequence[str], progress: bool = False) -> NDArray[np.float32]:
        """M strings -> [m, d] unit rows."""
        return self.map_texts(self.encode_strings, (self.dim,), texts, progress)

    def map_images(
        self,
        encode: EncodePixels,
        shape: tuple[int, ...],
        paths: Sequence[str | Path],
        progress: bool,
        read: ReadImage | None = None,
    ) -> ImageEmbeddings:
        """Paths -> what `encode` makes of their pixels, a row of `shape` for each file that can be read."""
        from tqdm import tqdm

        from clipmatch.pipeline import in_order

        files, failures, rows = [], [], []

        def work(part: list[Path]) -> tuple[PixelBatch, NDArray[np.float32] | None]:
            batch = read_batch(part, self.transform, read)
            return batch, encode(batch.pixels) if batch.paths else None

        size = max(1, min(self.lot, -(-len(paths) // usable_cores())))  # a few pictures are for all cores too
        with tqdm(total=len(paths), desc="images", unit="img", disable=not progress or len(paths) < BATCH) as bar:
            lots = parts([Path(path) for path in paths], size)
            for batch, made in in_order(work, lots, self.crew, 2 * self.crew.size):
                failures += batch.failures
                if made is not None:
                    files += batch.paths
                    rows.append(made)
                bar.update(len(batch.paths) + len(batch.failures))
        return ImageEmbeddings(stack(rows, shape), files, failures)

    @cached_property
    def crew(self) -> Crew:
        """A thread for each core."""
        from clipmatch.patience import Crew

        return Crew(usable_cores())

    def map_texts(
        self, encode: EncodeStrings, shape: tuple[int, ...], texts: Sequence[str], progress: bool
    ) -> NDArray[np.float32]:
        """M strings -> [m, *shape]: what `encode` makes of them, in batches."""
        starts: Iterable[int] = range(0, len(texts), BATCH * 4)
        if progress and len(texts) > 8 * BATCH * 4:
            from tqdm import tqdm  # a query does without it

            starts = tqdm(starts, desc="texts", unit="batch")
        return stack([encode(list(texts[start : start + BATCH * 4])) for start in starts], shape)


class TorchEmbedder(BatchedEmbedder):
    """An `Embedder` around a PyTorch checkpoint."""

    def __init__(self, checkpoint: Checkpoint, device: str | None = None, precision: str | None = None):
        self.checkpoint = checkpoint
        self.fingerprint, self.preprocess = checkpoint.fingerprint, checkpoint.transform.config
        reuse_memory()
        self.device = choose_device(device)
        self.precision = choose_precision(self.device, precision or "float32")
        self.model = checkpoint.model.to(self.device).eval()
        self.dim, self.logit_scale = self.model.config.embed_dim, float(self.model.logit_scale.detach())
        self._turn = Lock()  # PyTorch takes all cores, or the GPU, for one batch; other threads read files meanwhile

    def encode_pixels(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [b, s, s, 3] -> unit rows [b, d]."""
        import torch

        return self._run(self.model.encode_image, torch.from_numpy(self.transform.normalise(pixels)))

    def encode_places(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32] | None:
        """uint8 [b, s, s, 3] -> unit rows [b, p, d]."""
        import torch

        if not self.model.has_places:
            return None
        return self._run(self.model.encode_places, torch.from_numpy(self.transform.normalise(pixels)))

    def encode_strings(self, texts: list[str]) -> NDArray[np.float32]:
        """B strings -> unit rows [b, d]."""
        tokens = self.checkpoint.tokenizer(
            texts, padding=True, max_length=self.model.config.max_length, return_tensors="pt"
        )
        return self._run(self.model.encode_text, tokens["input_ids"], tokens["attention_mask"])

    def _run(self, encode: Any, *inputs: Any) -> NDArray[np.float32]:
        import torch

        dtype = self.precision.dtype
        with self._turn, torch.inference_mode(), torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            rows: NDArray[np.float32] = encode(*(value.to(self.device) for value in inputs)).float().cpu().numpy()
        return rows


class OnnxEmbedder(BatchedEmbedder):
    """An `Embedder` around a folder with image.onnx and text.onnx: no PyTorch, on the CPU.

    A graph is read when it is first needed, so a search among remembered pictures loads the text side alone. Each core
    embeds pictures of its own: that is quicker than to share out the work on each of them.
    Raises ClipmatchError when the folder is incomplete or its files don't fit together.
    """

    folder: Path
    lot = LOT

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._opening = {name: Lock() for name in (IMAGE_GRAPH, TEXT_GRAPH)}  # several threads may want one at once
        values = read_config(self.folder)
        try:
            self.dim, self.max_length = int(values["model"]["embed_dim"]), int(values["model"]["max_length"])
            require(0 < self.dim <= MAX_DIM, f"embed_dim must be positive, and at most {MAX_DIM}", self.dim)
            self.preprocess = from_json(PreprocessConfig, values["preprocess"])
        except (ClipmatchError, LookupError, TypeError, ValueError) as error:
            raise self._damaged(error) from error
        for name in (IMAGE_GRAPH, TEXT_GRAPH, TOKENIZER):
            if not (self.folder / name).is_file():
                raise self._damaged(f"it has no {name}")
        self.about: dict[str, Any] = values.get("about", {})
        try:
            self.logit_scale = math.exp(self.about.get(LOG_SCALE, math.log(INIT_LOGIT_SCALE)))
        except (OverflowError, TypeError) as error:
            raise self._damaged(f"{CONFIG} says {LOG_SCALE} {self.about[LOG_SCALE]!r}") from error
        self.fingerprint = values["fingerprint"]

    def encode_pixels(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [b, s, s, 3] -> unit rows [b, d]."""
        return self.run_image(pixels, "embedding")

    def encode_places(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32] | None:
        """uint8 [b, s, s, 3] -> unit rows [b, p, d]."""
        names = [output.name for output in self.image_session.get_outputs()]
        return self.run_image(pixels, "grid") if "grid" in names else None

    def encode_strings(self, texts: list[str]) -> NDArray[np.float32]:
        """B strings -> unit rows [b, d]."""
        return self.run_text(texts, "embedding")

    def run_image(self, pixels: NDArray[np.uint8], output: str) -> NDArray[np.float32]:
        """uint8 [b, s, s, 3] -> the graph's output of that name: "embedding" [b, d], "features" [b, h], "grid"
        [b, p, d] (of each place in the picture, where the graph has it).
        """
        return self._run(self.image_session, output, {"pixels": pixels})

    def run_text(self, texts: list[str], output: str) -> NDArray[np.float32]:
        """B strings -> the graph's output of that name: "embedding" [b, d] or "features" [b, h]."""
        tokens = self.tokenizer(texts, padding=True, max_length=self.max_length, return_tensors="np")
        return self._run(self.text_session, output, tokens)

    def features_of_images(
        self, paths: Sequence[str | Path], output: str = "features", progress: bool = True
    ) -> ImageEmbeddings:
        """Paths -> rows of the image graph's output of that name, for the files that can be read."""
        shape = output_shape(self.image_session, output)
        return self.map_images(lambda pixels: self.run_image(pixels, output), shape, paths, progress)

    def features_of_texts(
        self, texts: Sequence[str], output: str = "features", progress: bool = False
    ) -> NDArray[np.float32]:
        """M strings -> rows of the text graph's output of that name."""
        shape = output_shape(self.text_session, output)
        return self.map_texts(lambda batch: self.run_text(batch, output), shape, texts, progress)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the text graph."""
        try:
            return Tokenizer.from_file(self.folder / TOKENIZER)
        except ClipmatchError as error:
            raise self._damaged(error) from error

    @property
    def image_session(self) -> InferenceSession:
        """The image graph, ready to be run by several threads, each on a core of its own."""
        with self._opening[IMAGE_GRAPH]:
            return self._image_session

    @cached_property
    def _image_session(self) -> InferenceSession:
        side = self.transform.config.size
        session = self._open(IMAGE_GRAPH, ["pixels"], threads=1)
        found = session.get_inputs()[0].shape[1:]
        if found != [side, side, 3]:
            raise self._damaged(f"{IMAGE_GRAPH} takes pictures of {found}, {CONFIG} says {[side, side, 3]}")
        return session

    @property
    def text_session(self) -> InferenceSession:
        """The text graph, ready to run."""
        with self._opening[TEXT_GRAPH]:
            return self._text_session

    @cached_property
    def _text_session(self) -> InferenceSession:
        return self._open(TEXT_GRAPH, ["input_ids", "attention_mask"])

    def _open(self, name: str, inputs: list[str], threads: int | None = None) -> InferenceSession:
        """A graph of the folder, checked for its inputs and the width of its embedding."""
        try:
            session = open_session(self.folder / name, threads)
        except Exception as error:  # ONNX Runtime has a dozen kinds, without a common base
            raise self._damaged(error) from error
        found = [value.name for value in session.get_inputs()]
        if found != inputs:
            raise self._damaged(f"{name} takes {', '.join(found)} instead of {', '.join(inputs)}")
        width = output_shape(session, "embedding")
        if width != (self.dim,):
            numbers = " x ".join(map(str, width))
            raise self._damaged(f"{name} gives embeddings of {numbers} numbers, {CONFIG} says {self.dim}")
        return session

    def _run(self, session: InferenceSession, output: str, inputs: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        """One output of a graph; inputs by name."""
        try:
            rows: NDArray[np.float32] = session.run([output], inputs, asked_for_only())[0]
        except Exception as error:  # such as a token that the graph has no vector for
            raise self._damaged(error) from error
        return rows

    def _damaged(self, why: object) -> ClipmatchError:
        return ClipmatchError(f"The model folder {self.folder} is damaged ({reason_of(why)}); copy or export it again.")


# Loading


def load_model(
    name: str | Path | None = None, device: str | None = None, precision: str | None = None
) -> BatchedEmbedder:
    """A model by name -> something that embeds.

    name: None or "embedded" for the model that comes with clipmatch; a model folder, a training run's folder, or a hub
    repository of one; a Hugging Face folder or hub name of a CLIP-like model ("openai/clip-vit-base-patch32"). device:
    "cpu", "cuda", ...; None takes the fastest. precision: "float32" (the default: exact and the same everywhere),
    "bfloat16", "float16". A folder with ONNX graphs runs on the CPU without PyTorch unless another device or precision
    is asked for.
    Raises ClipmatchError if there is no such model, or it needs PyTorch and that is not installed.
    """
    if name is None or name == EMBEDDED_NAME:
        return load_folder(embedded_folder(), device, precision)
    found = find_local(name)
    embedder = load_named(str(name), found, device, precision)
    embedder.name = str(found.absolute() if found else name)
    return embedder


def load_named(name: str, folder: Path | None, device: str | None, precision: str | None) -> BatchedEmbedder:
    """A model in a local folder, or on the hub if that is None."""
    config = folder / CONFIG if folder else hub_config(name) if is_hub_name(name) else None
    if config and kind_of(config) == "transformers":
        from clipmatch.pretrained import load_pretrained

        return load_pretrained(str(folder or name), device, precision)
    try:
        return load_folder(find_folder(name), device, precision)
    except ModuleNotFoundError as error:
        raise ClipmatchError(
            f"The model {name} needs the package {error.name}; install it with: {INSTALL}, or make a copy that runs "
            f"without it where it is installed: clipmatch export {name} --out DIR"
        ) from error


def load_folder(folder: Path, device: str | None, precision: str | None) -> BatchedEmbedder:
    """A model folder of clipmatch's own -> by ONNX if it has the graphs and they can do what is asked, else PyTorch."""
    plain = device in (None, "cpu") and precision in (None, "float32")
    if (folder / IMAGE_GRAPH).is_file() and (plain or not (folder / WEIGHTS).is_file()):
        if not plain:
            raise ClipmatchError(
                f"The model in {folder} is for ONNX Runtime, which computes on the CPU with the model's own numbers; "
                "leave out the device and the precision, or name a model folder with PyTorch weights."
            )
        return OnnxEmbedder(folder)
    from clipmatch.checkpoint import load_checkpoint

    embedder = TorchEmbedder(load_checkpoint(folder), device, precision)
    embedder.folder = folder
    return embedder


def embedded_folder() -> Path:
    """The folder of the model that comes with clipmatch. Raises ClipmatchError if this installation has none."""
    if not (EMBEDDED / IMAGE_GRAPH).is_file():
        raise ClipmatchError(
            "This installation of clipmatch lacks the embedded model; name a model (on the command line by --model)."
        )
    return EMBEDDED


def missing_training_extra(error: ModuleNotFoundError) -> ClipmatchError:
    """The sentence for a core installation that is asked for what needs PyTorch."""
    install = INSTALL.replace("train", "generate") if error.name == "diffusers" else INSTALL
    return ClipmatchError(f"This needs the package {error.name}; install it with: {install}")


# Reading files


@dataclass(frozen=True, eq=False)
class PixelBatch:
    """Decoded pictures, uint8 [b, s, s, 3], and what could not be decoded."""

    pixels: NDArray[np.uint8]
    paths: list[Path]
    failures: list[Failure]


def read_batches(
    paths: list[Path], transform: Transform, size: int = BATCH, read: ReadImage | None = None
) -> Iterator[PixelBatch]:
    """Decode files in threads, some batches ahead of the consumer, in order. A bad file ends up in `failures`."""
    from clipmatch.patience import Crew
    from clipmatch.pipeline import in_order

    crew = Crew(usable_cores())
    yield from in_order(lambda part: read_batch(part, transform, read), parts(paths, size), crew, 2 * crew.size)


def read_batch(paths: list[Path], transform: Transform, read: ReadImage | None) -> PixelBatch:
    """Decode some files; a bad one ends up in `failures`."""
    from clipmatch.patience import one_by_one, too_long
    from clipmatch.preprocess import ImageError, load_image

    open_image = read or load_image

    def decode(path: Path) -> NDArray[np.uint8] | Failure:
        try:
            return transform.pixels(open_image(path, transform.config.size))
        except ImageError as error:
            return Failure(path, error.reason)
        except MemoryError:  # as it was made small
            return Failure(path, "not enough memory")

    made = one_by_one(decode, paths, lambda path: Failure(path, too_long()))
    failures = [found for found in made if isinstance(found, Failure)]
    pixels = [found for found in made if not isinstance(found, Failure)]
    good = [path for path, found in zip(paths, made, strict=True) if not isinstance(found, Failure)]
    return PixelBatch(np.stack(pixels) if pixels else np.empty(0, np.uint8), good, failures)


def parts(paths: list[Path], size: int) -> Iterator[list[Path]]:
    """A list, `size` at a time."""
    return (paths[start : start + size] for start in range(0, len(paths), size))


def stack(rows: list[NDArray[np.float32]], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Batches of rows -> one array [n, *shape], also when there are none."""
    return np.concatenate(rows) if rows else np.zeros((0, *shape), np.float32)
