"""What a training run would do and take, without doing it: `clipmatch train --dry-run`.

In: what `train` takes. Out: a `Plan`, from the settings and a few measured steps on a small part of the pictures.
Writes nothing but features of these few pictures into the cache, where the run itself will find them.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from clipmatch.checkpoint import Checkpoint
from clipmatch.config import DataConfig, ModelConfig, TrainConfig
from clipmatch.data import CaptionedImage, Splits
from clipmatch.errors import ClipmatchError
from clipmatch.features import FeatureTable, cache_root
from clipmatch.model import CLIPModel
from clipmatch.ranks import Ranks
from clipmatch.sources import CachedImages, CachedTexts
from clipmatch.tokenizer import Tokenizer
from clipmatch.trainer import Trainer, shape_of_epoch
from clipmatch.training import read_splits, start_from, state_to_begin_with

SAMPLE = 64  # pictures whose features are computed to see how long that takes
WARM, MEASURED = 1, 3  # steps
BYTES = 1 << 30


@dataclass(frozen=True)
class Part:
    """How many weights a part of the model has, and how many of them learn, at which peak rate."""

    name: str
    weights: int
    learning: int
    rate: float


@dataclass(frozen=True)
class Plan:
    """What a run would do and take: times in seconds, memory and disk in bytes."""

    splits: Splits
    settings: TrainConfig
    parts: tuple[Part, ...]
    device: str
    batch_size: int
    steps_per_epoch: int
    prepare_seconds: float  # towers over all pictures and captions, as far as the cache lacks them
    step_seconds: float
    look_seconds: float  # at dev, once
    memory: int  # peak so far, of the process or of the GPU
    cache: int  # features of frozen towers on disk, those included that are there already

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.steps_per_epoch * self.settings.epochs

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        looks = -(-self.settings.epochs // self.settings.evaluate_every)
        return self.prepare_seconds + self.steps * self.step_seconds + looks * self.look_seconds

    def __str__(self) -> str:
        train, dev = len(self.splits.train), len(self.splits.dev)
        captions = sum(len(row.captions) for row in self.splits.train)
        missing = f", {len(self.splits.missing)} missing" if self.splits.missing else ""
        accumulated = f", {self.settings.accumulate} to a step" if self.settings.accumulate > 1 else ""
        lines = [
            f"data    {train} pictures to train on, {captions} captions; {dev} for dev{missing} ({self.splits.origin})",
            *(describe(part) for part in self.parts),
            f"steps   {self.steps_per_epoch} an epoch, {self.steps} in all; batches of {self.batch_size}{accumulated}",
            f"device  {self.device}",
            f"memory  {self.memory / BYTES:.1f} GB at the most, so far",
            f"disk    {size_in_words(self.cache)} of features of frozen towers, less what is there, in {cache_root()}"
            if self.cache
            else "disk    no features are cached",
            f"time    about {in_words(self.seconds)}: {in_words(self.prepare_seconds)} of preparing (features of "
            f"frozen towers, unless they are cached), {in_words(self.steps * self.step_seconds)} of steps "
            f"({self.step_seconds:.2f} s each)",
        ]
        return "\n".join(lines)


def plan_run(
    data: DataConfig | Splits,
    settings: TrainConfig,
    model: ModelConfig | Checkpoint | str | Path | None = None,
    *,
    tokenizer: Tokenizer | None = None,
) -> Plan:
    """What `train` would do with the same arguments. Raises ClipmatchError where it would."""
    state_to_begin_with(Path(settings.out), resume=False)
    if isinstance(data, DataConfig) and data.stream:
        raise ClipmatchError("--dry-run looks at all captions; leave out --stream, and name a few of the archives.")
    splits = data if isinstance(data, Splits) else read_splits(data, Ranks(settings.device))
    checkpoint = start_from(model, tokenizer)
    batch_size, _, steps = shape_of_epoch(len(splits.train), settings)
    few = Splits(repeat(splits.train[:SAMPLE], batch_size), splits.dev[:SAMPLE], splits.origin)
    with tempfile.TemporaryDirectory() as place:
        began = time.perf_counter()
        short = replace(settings, out=place, epochs=settings.accumulate * (WARM + MEASURED))
        trainer = Trainer(checkpoint, few, short, None, progress=False)
        prepare = time.perf_counter() - began
        step_seconds, look_seconds = measure(trainer)
    seen = min(SAMPLE, len(splits.train)) + len(few.dev)
    looked = max(1, len(few.dev))
    return Plan(
        splits=splits,
        settings=settings,
        parts=parts_of(checkpoint.model, settings),
        device=f"{trainer.device}; {trainer.precision.reason}",
        batch_size=batch_size,
        steps_per_epoch=steps,
        prepare_seconds=prepare * (len(splits.train) * settings.views + len(splits.dev)) / seen / settings.views,
        step_seconds=step_seconds * settings.accumulate,
        look_seconds=look_seconds * len(splits.dev) / looked,
        memory=peak_memory(trainer.device),
        cache=cache_size(trainer, splits),
    )


def repeat(rows: Sequence[CaptionedImage], count: int) -> tuple[CaptionedImage, ...]:
    """The same rows over and over, until there are so many: a batch costs what it costs, whatever is in it."""
    return tuple(itertools.islice(itertools.cycle(rows), count))


def measure(trainer: Trainer) -> tuple[float, float]:
    """Seconds of a batch's step, and of a look at dev."""
    trainer.model.train()
    # A run may have fewer batches than are measured, or look for similar pictures before it has so many.
    batches, times = itertools.chain.from_iterable(trainer.loader() for _ in itertools.repeat(None)), []
    for _ in range(WARM + MEASURED):
        began = time.perf_counter()
        trainer.take_step(batches, WARM + MEASURED)
        times.append(time.perf_counter() - began)
    began = time.perf_counter()
    trainer.measure_dev()
    return sum(times[WARM:]) / MEASURED, time.perf_counter() - began


def cache_size(trainer: Trainer, splits: Splits) -> int:
    """Bytes of the features that a run on all pictures and captions keeps on disk; copies lie there once."""
    images, texts, size = trainer.pairs.images, trainer.pairs.texts, 0
    if isinstance(images, CachedImages):
        size += row_size(images.table) * (len(splits.train) * trainer.settings.views + len(splits.dev))
    if isinstance(texts, CachedTexts):
        captions = {caption for row in (*splits.train, *splits.dev) for caption in row.captions}
        size += row_size(texts.table) * len(captions)
    return size


def row_size(table: FeatureTable) -> int:
    """Bytes of one picture's or caption's features."""
    return int(np.prod(table.rows.shape[1:])) * table.rows.itemsize


def parts_of(model: CLIPModel, settings: TrainConfig) -> tuple[Part, ...]:
    """The towers, and all the rest: the heads."""
    image, text = model.image_encoder.backbone, model.text_encoder.backbone
    towers = {id(value) for tower in (image, text) for value in tower.parameters()}
    heads = [value for value in model.parameters() if id(value) not in towers]
    return (
        part("image tower", image.parameters(), settings.rate_image),
        part("text tower", text.parameters(), settings.rate_text),
        part("heads", heads, settings.rate_heads),
    )


def part(name: str, parameters: Iterable[nn.Parameter], rate: float) -> Part:
    """Counted."""
    values = list(parameters)
    learning = sum(value.numel() for value in values if value.requires_grad)
    return Part(name, sum(value.numel() for value in values), learning, rate)


def describe(one: Part) -> str:
    """A part, in a line."""
    if not one.weights:
        return f"learn   nothing of the {one.name}, which stays an ONNX graph"
    rate = f", peak rate {one.rate:g}" if one.learning else ""
    return f"learn   {one.learning / 1e6:.2f} of {one.weights / 1e6:.2f} million weights of the {one.name}{rate}"


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU if there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def size_in_words(size: int) -> str:
    """Bytes, to the unit that fits."""
    return f"{size / BYTES:.1f} GB" if size >= BYTES / 2 else f"{size / (1 << 20):.1f} MB"


def in_words(seconds: float) -> str:
    """A time to one or two digits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
