"""WebDataset archives that are read while a model learns from them, by each process its share.

In: tar archives of captioned pictures. Out: what `sources` makes of a table of all pictures, without that table: of an
archive only the number of its pictures is kept, and the names, places and captions of those in use. Knows nothing of
losses or logs.

An epoch lines up the archives in an order of its own and cuts the line into LANES stretches. A batch takes the next few
pictures of each stretch, so that a process whose part of a batch are some lanes reads some archives from front to back.
Which pictures a batch holds is a function of (seed, epoch) and the batch size: not of the number of processes, so that
a run has the same steps with any number of them, and goes on with another.
"""

from __future__ import annotations

import errno
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor, nn
from tqdm import tqdm

from clipmatch.archive import contents, read_at
from clipmatch.checkpoint import Checkpoint
from clipmatch.config import DataConfig, TrainConfig
from clipmatch.data import SURROGATE, CaptionedImage, Splits, content_hash, hash_fraction, split_word
from clipmatch.errors import ClipmatchError
from clipmatch.folders import has_shards, image_root, list_shards, sample_captions, sample_picture, samples_of, split_of
from clipmatch.model import CLIPModel
from clipmatch.patience import patiently
from clipmatch.preprocess import ImageError, Transform, load_image
from clipmatch.ranks import Ranks
from clipmatch.runlog import note
from clipmatch.sources import EpochBatches, LiveImages, PairDataset, draw
from clipmatch.tokenizer import Tokenizer

LANES = 32  # archives that a batch draws from; processes above this number share some
WINDOW = 1024  # pictures of a lane that are shuffled among themselves: some 100 MB of one archive
DEV_PICTURES = 5000  # of archives held out, at which no further one is
CAPTION_BITS = 16  # of a caption's number, below that of its picture


class Sample(NamedTuple):
    """A picture in an archive: where its bytes are, and its captions."""

    name: str
    offset: int
    size: int
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Shard:
    """An archive: its size in bytes, how many captioned pictures it holds, and why it may hold more."""

    path: Path
    size: int
    pictures: int
    problem: str | None = None


def read_shard(path: Path) -> tuple[tuple[Sample, ...], str | None]:
    """The captioned pictures of an archive, by its headers and captions alone, and what is wrong with it, if anything.

    Raises OSError.
    """
    found, samples = contents(path), []
    for members in samples_of(found.members).values():
        picture = sample_picture(members)
        captions = [SURROGATE.sub("\ufffd", caption).strip() for caption in sample_captions(path, members)]
        kept = tuple(caption for caption in captions if caption)[: 1 << CAPTION_BITS]
        if picture and kept:
            samples.append(Sample(picture.name, picture.offset, picture.size, kept))
    return tuple(samples), found.problem


def count_shard(path: Path) -> Shard:
    """How many pictures an archive holds; one that can't be read holds none."""
    try:
        samples, problem = read_shard(path)
        return Shard(path, path.stat().st_size, len(samples), problem)
    except OSError as error:
        return Shard(path, 0, 0, error.strerror or "can't be read")


class ShardRows(Sequence[CaptionedImage]):
    """The pictures of archives by number, in the order of the archives.

    What was read of an archive is kept while it is of use to a process that reads so many lanes.
    """

    def __init__(self, shards: Sequence[Shard], lanes: int = LANES):
        self.shards = tuple(shards)
        # In each lane a window and what else is in the archives that it begins and ends in.
        self.keep = lanes * (WINDOW + 2 * max((shard.pictures for shard in shards), default=0))  # pictures
        self.first: NDArray[np.int64] = np.cumsum([0, *(shard.pictures for shard in shards)])  # [s + 1]
        self.read: OrderedDict[int, tuple[Sample, ...]] = OrderedDict()

    def __len__(self) -> int:
        return int(self.first[-1])

    @overload
    def __getitem__(self, item: int) -> CaptionedImage: ...
    @overload
    def __getitem__(self, item: slice) -> tuple[CaptionedImage, ...]: ...
    def __getitem__(self, item: int | slice) -> CaptionedImage | tuple[CaptionedImage, ...]:
        if isinstance(item, slice):
            return tuple(self[at] for at in range(*item.indices(len(self))))
        if not 0 <= item < len(self):
            raise IndexError(item)
        shard, sample = self.sample(item)
        return CaptionedImage(shard.path / sample.name, sample.captions)

    def sample(self, item: int) -> tuple[Shard, Sample]:
        """A picture and its archive. Raises OSError, also if the archive is no longer what it was."""
        number = int(np.searchsorted(self.first, item, side="right")) - 1
        shard = self.shards[number]
        if number not in self.read:
            samples = read_shard(shard.path)[0]
            if len(samples) != shard.pictures:
                raise OSError(errno.ESTALE, "its archive has changed during the run", str(shard.path))
            while self.read and sum(map(len, self.read.values())) + len(samples) > self.keep:
                self.read.popitem(last=False)
            self.read[number] = samples
        self.read.move_to_end(number)
        return shard, self.read[number][item - int(self.first[number])]

    @property
    def content_hash(self) -> str:
        """16 hex digits that change with the name, size or count of any archive, and with nothing else."""
        lines = sorted(f"{shard.path.name} {shard.size} {shard.pictures}" for shard in self.shards)
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def hash_of(rows: Sequence[CaptionedImage]) -> str:
    """What tells whether a run has still the pictures and captions that it began with."""
    return rows.content_hash if isinstance(rows, ShardRows) else content_hash(rows)


# Which archives


def stream_splits(data: DataConfig, ranks: Ranks) -> Splits:
    """Archives -> those to learn from, by their counts, and the pictures of those held out.

    Each process counts its share of the archives. Held out are those whose names say so (`val-00.tar`, `dev/00.tar`);
    if none does, so many whole archives as `dev_fraction` of the pictures fill, up to DEV_PICTURES.
    Raises ClipmatchError, in all processes, if there are no archives, or too few.
    """
    source = Path(data.captions).expanduser()
    if data.images or data.format or data.train_split or data.dev_split:
        raise ClipmatchError(
            "Streamed archives bring pictures and captions, and are in one part as a whole, so --images, --format, "
            "--train-split and --dev-split would be idle; leave them out."
        )
    if not has_shards(source, ".tar"):
        raise ClipmatchError(f"{source} is no WebDataset, which --stream reads: give .tar archives, or leave it out.")
    paths = list_shards(source, ".tar")
    own = paths[ranks.number :: ranks.count]
    counted = [count_shard(path) for path in tqdm(own, "counting", unit="tar", disable=not ranks.is_first, leave=False)]
    shards = sorted((shard for part in ranks.of_all(counted) for shard in part), key=lambda shard: str(shard.path))
    note_problems(source, shards)
    train, dev, origin = divide([shard for shard in shards if shard.pictures], image_root(source), data.dev_fraction)
    if not train or not dev:
        raise ClipmatchError(
            f"{source} has {len(train)} archives to learn from and {len(dev)} for dev; give two or more, of which "
            "one can be held out."
        )
    lanes = min(LANES, -(-LANES // ranks.count) + 1)  # a part of a batch may begin within one
    return Splits(ShardRows(train, lanes), ShardRows(dev)[:], origin)


def note_problems(source: Path, shards: Sequence[Shard]) -> None:
    """Say how many archives are not whole, and what is wrong with the first."""
    bad = [shard for shard in shards if shard.problem]
    if bad:
        note(f"{source}: {len(bad)} archives are not whole, the first: {bad[0].path.name} ({bad[0].problem})")


def divide(shards: Sequence[Shard], root: Path, fraction: float) -> tuple[list[Shard], list[Shard], str]:
    """Archives to learn from, archives held out, and in words why these."""
    parts = {shard.path: split_word(split_of(shard.path.relative_to(root).as_posix())) for shard in shards}
    dev = [shard for shard in shards if parts[shard.path] == "dev"]
    train = [shard for shard in shards if parts[shard.path] not in ("dev", "test")]
    if dev:
        return train, dev, f"{len(train)} archives streamed, {len(dev)} held out by their names"
    wanted = min(DEV_PICTURES, fraction * sum(shard.pictures for shard in train))
    for shard in sorted(train, key=lambda shard: hash_fraction(shard.path.name)):
        if dev and sum(held.pictures for held in dev) >= wanted:
            break
        dev.append(shard)
    train = [shard for shard in train if shard not in dev]
    return train, dev, f"{len(train)} archives streamed, {len(dev)} held out by a hash of their names"


def refuse_tables(settings: TrainConfig) -> None:
    """Raise ClipmatchError for settings that need something of every picture at hand."""
    wanted = {
        "--teacher": settings.teachers,
        "--hard-negatives": settings.hard_negatives,
        "--mixup": settings.mixup,
        "--views": settings.views > 1,
    }
    if needy := [name for name, value in wanted.items() if value]:
        raise ClipmatchError(
            f"{needy[0]} needs something of every picture at hand, and --stream keeps nothing; leave one of them out."
        )


# Pictures and captions of a batch


def stream_pairs(rows: ShardRows, checkpoint: Checkpoint, settings: TrainConfig, seed: int) -> StreamedPairs:
    """What a run draws from archives. Raises ClipmatchError for settings that need more than a batch at a time."""
    refuse_tables(settings)
    images = StreamedImages(rows, checkpoint.transform, settings.augment, settings.flip, seed)
    texts = StreamedTexts(rows, checkpoint.tokenizer, checkpoint.model.config.max_length)
    return StreamedPairs(images, texts, seed)


class StreamedBatches(EpochBatches):
    """The batches of all epochs: each the next pictures of every lane, lane after lane."""

    def __init__(self, rows: ShardRows, batch_size: int, epochs: int, seed: int, start: int, part: tuple[int, int]):
        super().__init__(len(rows), batch_size, epochs, seed, start, part=part)
        self.rows = rows
        lanes = min(LANES, batch_size)
        self.shares = [len(share) for share in np.array_split(np.arange(batch_size), lanes)]  # of a batch
        self.starts = np.cumsum([0, *self.shares])[:-1] * self.per_epoch  # of the lanes, in the epoch's line

    def batch(self, epoch: int, place: int) -> NDArray[np.int64]:
        """The numbers of a batch's pictures [b]."""
        spots = np.concatenate([start + self.spots(epoch, lane, place) for lane, start in enumerate(self.starts)])
        order = self.order_of(epoch)
        counts = np.diff(self.rows.first)[order]
        ends = np.cumsum(counts)
        which = np.searchsorted(ends, spots, side="right")  # archive of each, in the epoch's order
        items: NDArray[np.int64] = self.rows.first[order[which]] + spots - (ends - counts)[which]
        return items

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The archives as an epoch lines them up [s]."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.rows.shards))

    def spots(self, epoch: int, lane: int, place: int) -> NDArray[np.int64]:
        """Where in a lane the pictures are that it gives to a batch: all pictures of a window in random order, then
        those of the next.
        """
        share = self.shares[lane]
        numbers = np.arange(place * share, (place + 1) * share)
        spots = np.empty_like(numbers)
        for window in np.unique(numbers // WINDOW).tolist():
            start, own = window * WINDOW, numbers // WINDOW == window
            size = min(WINDOW, share * self.per_epoch - start)
            order = np.random.default_rng([self.seed, epoch, lane, window]).permutation(size)
            spots[own] = start + order[numbers[own] - start]
        return spots


class StreamedImages(LiveImages):
    """Pictures out of archives, decoded each time."""

    def __init__(self, rows: ShardRows, transform: Transform, augment: bool, flip: bool, seed: int):
        super().__init__((), transform, augment, flip, seed)
        self.rows, self.kept, self.decodes = rows, None, True

    def load(self, item: int, min_size: int) -> Image:
        """One picture, decoded. Raises ImageError."""
        path = Path("an archive")
        try:
            shard, sample = self.rows.sample(item)
            path = shard.path / sample.name
            data = patiently(partial(read_at, shard.path, sample.offset, sample.size))
        except OSError as error:
            raise ImageError(Path(error.filename or path), error.strerror or "can't be read") from error
        return load_image(path, min_size, data)

    def features(self, model: CLIPModel, batch: Tensor) -> Tensor:
        """Pixels, uint8 [b, s, s, 3] -> [b, h]."""
        with as_it_learns(model.image_encoder.backbone):
            return super().features(model, batch)


class StreamedTexts:
    """Captions out of archives; number n is that of picture n >> CAPTION_BITS with the number of the rest."""

    def __init__(self, rows: ShardRows, tokenizer: Tokenizer, max_length: int):
        self.rows, self.tokenizer, self.max_length = rows, tokenizer, max_length

    def fetch(self, captions: Sequence[int]) -> tuple[Tensor, ...]:
        """Ids and mask [b, t]."""
        rest = (1 << CAPTION_BITS) - 1
        texts = [self.rows.sample(number >> CAPTION_BITS)[1].captions[number & rest] for number in captions]
        tokens = self.tokenizer(texts, padding=True, max_length=self.max_length, return_tensors="pt")
        return tokens["input_ids"], tokens["attention_mask"]

    def encode(self, model: CLIPModel, batch: tuple[Tensor, ...]) -> Tensor:
        """Ids and mask [b, t] -> [b, d]."""
        with as_it_learns(model.text_encoder.backbone):
            features = model.text_encoder.features(*batch)
        return model.project_text(features)


class StreamedPairs(PairDataset):
    """(epoch, picture) -> that picture with the caption drawn for it in that epoch."""

    images: StreamedImages

    def __init__(self, images: StreamedImages, texts: StreamedTexts, seed: int):
        super().__init__(images, texts, images.rows.first, seed)

    def batches(self, batch_size: int, epochs: int, seed: int, start: int, **chosen: Any) -> EpochBatches:
        """Which pictures make up the batches from number `start` on; chosen: the part of a process, for nothing of a
        picture is known beforehand.
        """
        return StreamedBatches(self.images.rows, batch_size, epochs, seed, start, chosen["part"])

    def draw_caption(self, epoch: int, item: int) -> int:
        """The number of the caption that a picture gets in an epoch."""
        count = len(self.images.rows.sample(item)[1].captions)
        return (item << CAPTION_BITS) + int(draw(self.seed, epoch, item, 1).integers(count))


def as_it_learns(backbone: nn.Module) -> torch.set_grad_enabled:
    """Context: a tower that stays frozen computes as it is used, without dropout and gradients."""
    learns = any(value.requires_grad for value in backbone.parameters())
    if not learns:
        backbone.eval()
    return torch.set_grad_enabled(learns and torch.is_grad_enabled())
