"""What the training loop draws pictures and captions from: cached features, cached hidden states or files.

In: which rows of the data an epoch asks for. Out: a batch of arrays, and how a model turns each into unit vectors.
Every random choice (caption, view, augmentation) is a function of (seed, epoch, picture) alone, so that a resumed run
draws what an unbroken one would have drawn. Knows nothing of losses, optimisers or logs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipmatch.embedder import Failure
from clipmatch.features import FeatureTable
from clipmatch.model import CLIPModel
from clipmatch.preprocess import ImageError, Tokenizer, Transform, load_image

PLAIN = -1  # the epoch number that asks for unaugmented pictures
MEMORY_LIMIT = 1 << 30  # bytes of decoded pictures that are kept rather than decoded anew each epoch


class ImageSource(Protocol):
    """Pictures by number."""

    def fetch(self, items: Sequence[int], epoch: int) -> tuple[Tensor, list[bool], list[Failure]]:
        """Items -> a tensor of those that can be used, which of them these are, and why not the others."""
        ...

    def encode(self, model: CLIPModel, batch: Tensor) -> Tensor:
        """A fetched tensor -> unit vectors [b, d]."""
        ...


class CachedImages:
    """Features or hidden states of a frozen image tower (`clipmatch.features.image_features`)."""

    def __init__(self, table: FeatureTable, last_blocks: int, seed: int):
        self.table, self.last_blocks, self.seed = table, last_blocks, seed

    def fetch(self, items: Sequence[int], epoch: int) -> tuple[Tensor, list[bool], list[Failure]]:
        """One cached view of each item."""
        views = len(self.table.places)
        chosen = [0 if epoch == PLAIN else int(draw(self.seed, epoch, item).integers(views)) for item in items]
        places = self.table.places[chosen, list(items)]
        used = places >= 0
        rows = np.asarray(self.table.rows[places[used]], np.float32)
        return torch.from_numpy(rows), used.tolist(), []

    def encode(self, model: CLIPModel, batch: Tensor) -> Tensor:
        """Features [b, h] or hidden states [b, t, h] -> [b, d]."""
        encoder = model.image_encoder
        return model.project_image(encoder.features_from(batch, self.last_blocks) if self.last_blocks else batch)


class LiveImages:
    """Picture files, decoded each time (or once, where they fit in memory and are not augmented)."""

    def __init__(self, paths: Sequence[Path], transform: Transform, augment: bool, flip: bool, seed: int):
        self.paths, self.transform, self.seed = list(paths), transform, seed
        self.augment, self.flip = augment, flip
        fits = len(self.paths) * transform.config.size**2 * 3 <= MEMORY_LIMIT
        self.kept: dict[int, NDArray[np.uint8]] | None = {} if fits and not augment else None

    def fetch(self, items: Sequence[int], epoch: int) -> tuple[Tensor, list[bool], list[Failure]]:
        """Pixels [b, 3, s, s] of the items that can be read."""
        pixels, used, failures = [], [], []
        for item in items:
            try:
                pixels.append(self.read(item, epoch))
                used.append(True)
            except ImageError as error:
                failures.append(Failure(self.paths[item], error.reason))
                used.append(False)
        size = self.transform.config.size
        square = np.array(pixels, np.uint8).reshape(-1, size, size, 3)
        return torch.from_numpy(self.transform.normalise(square)), used, failures

    def read(self, item: int, epoch: int) -> NDArray[np.uint8]:
        """One picture, uint8 [s, s, 3]. Raises ImageError."""
        if self.kept is not None and item in self.kept:
            return self.kept[item]
        size = self.transform.config.size
        if self.augment and epoch != PLAIN:
            image = load_image(self.paths[item], min_size=size * 2)  # a crop of it is still sharp
            rng = draw(self.seed, epoch, item)
            return self.transform.pixels(self.transform.augment(image, rng, flip=self.flip))
        pixels = self.transform.pixels(load_image(self.paths[item], min_size=size))
        if self.kept is not None:
            self.kept[item] = pixels
        return pixels

    def encode(self, model: CLIPModel, batch: Tensor) -> Tensor:
        """Pixels [b, 3, s, s] -> [b, d]."""
        return model.encode_image(batch)


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
    """b pairs: row i of images belongs to row i of texts. image_ids [b]: the picture's number."""

    images: Tensor
    texts: tuple[Tensor, ...]
    image_ids: Tensor
    failures: list[Failure]


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
        texts = self.texts.fetch([self.draw_caption(epoch, item) for item in items])
        return Batch(images, texts, torch.tensor(items), failures)

    def draw_caption(self, epoch: int, item: int) -> int:
        """The number of the caption that a picture gets in an epoch."""
        first, end = self.first_caption[item], self.first_caption[item + 1]
        return int(draw(self.seed, epoch, item, 1).integers(first, end))


class EpochBatches(torch.utils.data.Sampler[list[tuple[int, int]]]):
    """The batches of all epochs from a given step on: shuffled by (seed, epoch), the last short batch dropped."""

    def __init__(self, count: int, batch_size: int, epochs: int, seed: int, start: int = 0):
        self.count, self.batch_size, self.epochs, self.seed, self.start = count, batch_size, epochs, seed, start
        self.per_epoch = max(1, count // batch_size)

    def __len__(self) -> int:
        return self.per_epoch * self.epochs - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in range(self.start, self.per_epoch * self.epochs):
            epoch, place = divmod(number, self.per_epoch)
            if place == 0 or number == self.start:
                order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            yield [(epoch, int(item)) for item in order[place * self.batch_size : (place + 1) * self.batch_size]]


def draw(seed: int, epoch: int, item: int, purpose: int = 0) -> np.random.Generator:
    """The random generator of one picture in one epoch."""
    return np.random.default_rng([seed, epoch, item, purpose])
