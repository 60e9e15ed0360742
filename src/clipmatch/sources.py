"""What the training loop draws pictures and captions from: cached features, cached hidden states or files.

In: which rows of the data an epoch asks for. Out: a batch of arrays, and how a model turns each into unit vectors.
Every random choice (caption, view, augmentation) is a function of (seed, epoch, picture) alone, so that a resumed run
draws what an unbroken one would have drawn. Knows nothing of losses, optimisers or logs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from clipmatch.checkpoint import Checkpoint
from clipmatch.config import TrainConfig
from clipmatch.data import CaptionedImage
from clipmatch.errors import ClipmatchError, Failure
from clipmatch.features import FeatureTable, image_features, text_features
from clipmatch.mining import gather_neighbours
from clipmatch.model import CLIPModel
from clipmatch.preprocess import ImageError, Transform, load_image
from clipmatch.runtime import Precision
from clipmatch.tokenizer import Tokenizer

PLAIN = -1  # the epoch number that asks for unaugmented pictures
DEV_BATCH = 128
SAMPLE = 10_000  # rows that tell the scale of features
MEMORY_LIMIT = 1 << 30  # bytes of decoded pictures that are kept rather than decoded anew each epoch


class ImageSource(Protocol):
    """Pictures by number."""

    decodes: bool  # whether fetching costs enough for worker processes to pay

    def fetch(self, items: Sequence[int], epoch: int) -> tuple[Tensor, list[bool], list[Failure]]:
        """Items -> a tensor of those that can be used, which of them these are, and why not the others."""
        ...

    def features(self, model: CLIPModel, batch: Tensor) -> Tensor:
        """A fetched tensor -> pooled features [b, h], what the model's image head takes."""
        ...


class CachedImages:
    """Features or hidden states of a frozen image tower (`clipmatch.features.image_features`)."""

    decodes = False

    def __init__(self, table: FeatureTable, last_blocks: int, seed: int):
        self.table, self.last_blocks, self.seed = table, last_blocks, seed

    def fetch(self, items: Sequence[int], epoch: int) -> tuple[Tensor, list[bool], list[Failure]]:
        """One cached view of each item."""
        views = 1 if epoch == PLAIN else len(self.table.places)
        chosen = [int(draw(self.seed, epoch, item).integers(views)) if views > 1 else 0 for item in items]
        places = self.table.places[chosen, list(items)]
        used = places >= 0
        rows = np.asarray(self.table.rows[places[used]], np.float32)
        return torch.from_numpy(rows), used.tolist(), []

    def sample(self) -> NDArray[np.float16]:
        """Plain features of up to SAMPLE items [k, h], to learn their scale from."""
        return sample_rows(self.table, self.table.places[0])

    def features(self, model: CLIPModel, batch: Tensor) -> Tensor:
        """Features [b, h] as they are, or hidden states [b, t, h] through the last blocks -> [b, h]."""
        return model.image_encoder.features_from(batch, self.last_blocks) if self.last_blocks else batch


class LiveImages:
    """Picture files, decoded each time (or once, where they fit in memory and are not augmented)."""

    def __init__(self, paths: Sequence[Path], transform: Transform, augment: bool, flip: bool, seed: int):
        self.paths, self.transform, self.seed = list(paths), transform, seed
        self.augment, self.flip = augment, flip
        fits = len(self.paths) * transform.config.size**2 * 3 <= MEMORY_LIMIT
        self.kept: dict[int, NDArray[np.uint8]] | None = {} if fits and not augment else None
        self.decodes = self.kept is None

    def fetch(self, items: Sequence[int], epoch: int) -> tuple[Tensor, list[bool], list[Failure]]:
        """Pixels of the items that can be read, uint8 [b, s, s, 3]: a quarter of what they take as numbers."""
        pixels, used, failures = [], [], []
        for item in items:
            try:
                pixels.append(self.read(item, epoch))
                used.append(True)
            except ImageError as error:
                failures.append(Failure(Path(error.path), error.reason))
                used.append(False)
        size = self.transform.config.size
        return torch.from_numpy(np.array(pixels, np.uint8).reshape(-1, size, size, 3)), used, failures

    def read(self, item: int, epoch: int) -> NDArray[np.uint8]:
        """One picture, uint8 [s, s, 3]. Raises ImageError."""
        if self.kept is not None and item in self.kept:
            return self.kept[item]
        size = self.transform.config.size
        if self.augment and epoch != PLAIN:
            image = self.load(item, size * 2)  # a crop of it is still sharp
            rng = draw(self.seed, epoch, item)
            return self.transform.pixels(self.transform.augment(image, rng, flip=self.flip))
        pixels = self.transform.pixels(self.load(item, size))
        if self.kept is not None:
            self.kept[item] = pixels
        return pixels

    def load(self, item: int, min_size: int) -> Image:
        """One picture, decoded. Raises ImageError."""
        return load_image(self.paths[item], min_size)

    def features(self, model: CLIPModel, batch: Tensor) -> Tensor:
        """Pixels, uint8 [b, s, s, 3] -> [b, h]."""
        return model.image_encoder.features(self.transform.normalise_tensor(batch))


class TextSource(Protocol):
    """Captions by number, over all pictures."""

    def fetch(self, captions: Sequence[int]) -> tuple[Tensor, ...]:
        """Numbers -> the tensors that `encode` wants."""
        ...

    def encode(self, model: CLIPModel, batch: tuple[Tensor, ...]) -> Tensor:
        """Fetched tensors -> unit vectors [b, d]."""
        ...


class CachedTexts:
    """Pooled features of a frozen text tower (`clipmatch.features.text_features`)."""

    def __init__(self, table: FeatureTable):
        self.table = table

    def fetch(self, captions: Sequence[int]) -> tuple[Tensor, ...]:
        """Features [b, h]."""
        places = self.table.places[list(captions)]
        return (torch.from_numpy(np.asarray(self.table.rows[places], np.float32)),)

    def sample(self) -> NDArray[np.float16]:
        """Features of up to SAMPLE captions [k, h]."""
        return sample_rows(self.table, self.table.places)

    def encode(self, model: CLIPModel, batch: tuple[Tensor, ...]) -> Tensor:
        """Features [b, h] -> [b, d]."""
        return model.project_text(batch[0])


class LiveTexts:
    """Token ids, made once; each batch is cut to its longest caption."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, max_length: int):
        tokens = tokenizer(list(texts), padding=True, max_length=max_length, return_tensors="np")
        self.ids: NDArray[np.int32] = tokens["input_ids"].astype(np.int32)  # [m, t]
        self.lengths: NDArray[np.int64] = tokens["attention_mask"].sum(axis=1)  # [m]

    def fetch(self, captions: Sequence[int]) -> tuple[Tensor, ...]:
        """Ids and mask [b, t]."""
        chosen = list(captions)
        lengths = self.lengths[chosen]
        longest = int(lengths.max(initial=1))
        ids = self.ids[chosen, :longest].astype(np.int64)
        mask = (np.arange(longest) < lengths[:, None]).astype(np.int64)
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def encode(self, model: CLIPModel, batch: tuple[Tensor, ...]) -> Tensor:
        """Ids and mask [b, t] -> [b, d]."""
        return model.encode_text(*batch)


@dataclass(frozen=True, eq=False)
class Batch:
    """b pairs: row i of images belongs to row i of texts. image_ids, text_ids [b]: numbers of picture, caption."""

    images: Tensor
    texts: tuple[Tensor, ...]
    image_ids: Tensor
    text_ids: Tensor
    failures: list[Failure]

    def split(self, size: int) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
        """Images and texts, `size` pairs at a time."""
        texts = zip(*(torch.split(values, size) for values in self.texts), strict=True)
        return list(zip(torch.split(self.images, size), texts, strict=True))


def mix_pairs(batch: Batch, strength: float) -> Batch:
    """Cached features of b pairs -> of b pairs each of which is mixed with another, picture and caption alike (mixup,
    Zhang et al. 2018, between layers as in Verma et al. 2019).

    strength: of the Beta distribution that the shares come from; the larger, the more even. Each keeps half of its own
    or more, so that it is still the pair that its number says. Draws from PyTorch's own randomness.
    """
    count = len(batch.image_ids)
    own = torch.distributions.Beta(strength, strength).sample((count, 1))  # [b, 1]
    own, partner = torch.maximum(own, 1 - own), torch.randperm(count)

    def mix(features: Tensor) -> Tensor:
        return own * features + (1 - own) * features[partner]

    return replace(batch, images=mix(batch.images), texts=tuple(map(mix, batch.texts)))


class PairDataset(torch.utils.data.Dataset[Any]):
    """(epoch, picture) -> that picture with the caption drawn for it in that epoch, fetched a batch at a time."""

    def __init__(self, images: ImageSource, texts: TextSource, first_caption: NDArray[np.int64], seed: int):
        self.images, self.texts, self.seed = images, texts, seed
        self.first_caption = first_caption  # [n + 1]: picture i has captions first_caption[i] .. first_caption[i + 1]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Batch:
        epoch = keys[0][0]
        items = [item for _, item in keys]
        images, used, failures = self.images.fetch(items, epoch)
        items = [item for item, good in zip(items, used, strict=True) if good]
        captions = [self.draw_caption(epoch, item) for item in items]
        return Batch(images, self.texts.fetch(captions), torch.tensor(items), torch.tensor(captions), failures)

    def batches(self, batch_size: int, epochs: int, seed: int, start: int, **chosen: Any) -> EpochBatches:
        """Which pictures make up the batches from number `start` on; chosen: as for `EpochBatches`."""
        return EpochBatches(len(self.first_caption) - 1, batch_size, epochs, seed, start, **chosen)

    def draw_caption(self, epoch: int, item: int) -> int:
        """The number of the caption that a picture gets in an epoch."""
        first, end = self.first_caption[item], self.first_caption[item + 1]
        return int(draw(self.seed, epoch, item, 1).integers(first, end))


class DevSet:
    """Captioned pictures to measure on: each picture plain, with all its captions."""

    def __init__(self, rows: Sequence[CaptionedImage], images: ImageSource, texts: TextSource):
        self.images, self.texts = images, texts
        self.count = len(rows)
        self.failures: list[Failure] = []  # pictures that the latest `embed` could not read
        self.owners = np.repeat(np.arange(len(rows)), [len(row.captions) for row in rows])  # [m]

    def embed(
        self, model: CLIPModel, device: torch.device
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        """Model in eval mode -> image rows [n, d], text rows [m, d], image of each text [m], for readable pictures.

        Raises ClipmatchError when no picture can be read.
        """
        rows, readable, self.failures = embed_pictures(self.images, self.count, model, device)
        if not readable.any():
            raise ClipmatchError("None of the dev pictures can be read; check the image folder.")
        captions = np.flatnonzero(readable[self.owners])
        texts = [
            self.encode_texts(model, captions[start : start + DEV_BATCH], device)
            for start in range(0, len(captions), DEV_BATCH)
        ]
        place = np.cumsum(readable) - 1  # a picture's number among the readable ones
        return rows[readable].numpy(), torch.cat(texts).numpy(), place[self.owners[captions]]

    def encode_texts(self, model: CLIPModel, captions: NDArray[np.int64], device: torch.device) -> Tensor:
        """Caption numbers [b] -> unit vectors [b, d] on the CPU."""
        batch = self.texts.fetch(captions.tolist())
        return self.texts.encode(model, tuple(value.to(device) for value in batch)).cpu()


def embed_pictures(
    images: ImageSource, count: int, model: CLIPModel, device: torch.device, progress: bool = False
) -> tuple[Tensor, NDArray[np.bool_], list[Failure]]:
    """Model in eval mode -> unit vectors of `count` plain pictures [n, d] on the CPU (zero for those that can't be
    read), which can be read [n], and why not the others.
    """
    rows, readable, failures = torch.zeros(count, model.config.embed_dim), np.zeros(count, bool), []
    starts = range(0, count, DEV_BATCH)
    for start in tqdm(starts, desc="looking at pictures", unit="batch", leave=False, disable=not progress):
        pixels, used, failed = images.fetch(range(start, min(start + DEV_BATCH, count)), PLAIN)
        failures += failed
        readable[start : start + len(used)] = used
        if any(used):
            own = model.project_image(images.features(model, pixels.to(device))).cpu()
            rows[start : start + len(used)][torch.tensor(used)] = own
    return rows, readable, failures


@dataclass(frozen=True)
class Sources:
    """Chooses where pictures and captions come from: cached features where a tower (or its lower part) stays frozen,
    files and token ids where it learns.
    """

    checkpoint: Checkpoint
    settings: TrainConfig
    seed: int  # of views and captions
    image_blocks: int  # last blocks of the image tower that learn; 0: none, or all
    precision: Precision
    device: torch.device
    progress: bool

    def pairs(self, rows: Sequence[CaptionedImage]) -> tuple[PairDataset, list[Failure]]:
        """Rows to learn from, and the pictures already found unreadable."""
        from clipmatch.streaming import ShardRows, stream_pairs  # here: it builds upon this module

        if isinstance(rows, ShardRows):
            return stream_pairs(rows, self.checkpoint, self.settings, self.seed), []
        images, failures = self.images(rows, self.settings.views, self.settings.augment)
        first = np.cumsum([0, *(len(row.captions) for row in rows)])
        return PairDataset(images, self.texts(rows), first, self.seed), failures

    def dev_set(self, rows: Sequence[CaptionedImage]) -> tuple[DevSet, list[Failure]]:
        """Rows to measure on."""
        images, failures = self.images(rows, 1, False)
        return DevSet(rows, images, self.texts(rows)), failures

    def images(self, rows: Sequence[CaptionedImage], views: int, augment: bool) -> tuple[ImageSource, list[Failure]]:
        """The picture source that fits what is to be trained."""
        paths, settings = [row.path for row in rows], self.settings
        encoder = self.checkpoint.model.image_encoder
        if settings.tune_image == "all" or (self.image_blocks and not encoder.splittable):
            return LiveImages(paths, self.checkpoint.transform, augment, settings.flip, self.seed), []
        encoder.eval()  # dropout inside a frozen tower would be frozen into the cache
        table, failures = image_features(
            self.checkpoint,
            paths,
            precision=self.precision,
            device=self.device,
            last_blocks=self.image_blocks,
            views=views,
            flip=settings.flip,
            progress=self.progress,
        )
        return CachedImages(table, self.image_blocks, self.seed), failures

    def texts(self, rows: Sequence[CaptionedImage]) -> TextSource:
        """The caption source that fits what is to be trained."""
        model, texts = self.checkpoint.model, [caption for row in rows for caption in row.captions]
        if self.settings.tune_text != "none":
            return LiveTexts(texts, self.checkpoint.tokenizer, model.config.max_length)
        model.text_encoder.eval()
        table = text_features(
            self.checkpoint, texts, precision=self.precision, device=self.device, progress=self.progress
        )
        return CachedTexts(table)


class EpochBatches(torch.utils.data.Sampler[list[tuple[int, int]]]):
    """The batches of all epochs from a given one on: shuffled by (seed, epoch), the last short batch dropped.

    neighbours [n, k]: so that `share` of each batch are neighbours of the rest (`clipmatch.mining`). part: of each
    batch, the part of that number (from 0) of so many.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        epochs: int,
        seed: int,
        start: int = 0,
        *,
        neighbours: NDArray[np.int32] | None = None,
        share: float = 0.0,
        part: tuple[int, int] = (0, 1),
    ):
        self.count, self.batch_size, self.epochs, self.seed, self.start = count, batch_size, epochs, seed, start
        self.neighbours, self.share, self.part = neighbours, share, part
        self.per_epoch = max(1, count // batch_size)
        self.ordered: tuple[int, NDArray[np.int64]] | None = None  # the latest epoch and its order

    def __len__(self) -> int:
        return self.per_epoch * self.epochs - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        number_of_part, parts = self.part
        for number in range(self.start, self.per_epoch * self.epochs):
            epoch, place = divmod(number, self.per_epoch)
            batch = np.array_split(self.batch(epoch, place), parts)[number_of_part]
            yield [(epoch, int(item)) for item in batch]

    def batch(self, epoch: int, place: int) -> NDArray[np.int64]:
        """The pictures of a batch, by its place in the epoch [b]."""
        return self.order_of(epoch)[place * self.batch_size : (place + 1) * self.batch_size]

    def order_of(self, epoch: int) -> NDArray[np.int64]:
        """`order`, which is drawn once an epoch."""
        if self.ordered is None or self.ordered[0] != epoch:
            self.ordered = epoch, self.order(epoch)
        return self.ordered[1]

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The pictures of an epoch, batch after batch."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        if self.neighbours is None:
            return order
        return gather_neighbours(order, self.neighbours, self.batch_size, self.share)


def sample_rows(table: FeatureTable, places: NDArray[np.int64]) -> NDArray[np.float16]:
    """Rows spread evenly over the usable places."""
    usable = places[places >= 0]
    return table.rows[usable[:: max(1, len(usable) // SAMPLE)]]


def draw(seed: int, epoch: int, item: int, purpose: int = 0) -> np.random.Generator:
    """The random generator of one picture in one epoch."""
    return np.random.default_rng([seed, epoch, item, purpose])
