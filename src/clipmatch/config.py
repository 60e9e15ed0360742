"""Every setting, said once: frozen dataclasses that go to JSON beside the weights and come back.

In: keyword arguments or a JSON object. Out: a checked, immutable config. Knows nothing of PyTorch, files or the
command line.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, TypeVar

from clipmatch.errors import ClipmatchError, reason_of

Config = TypeVar("Config")

DEFAULT_IMAGE_TOWER = "google/vit-base-patch16-224"
DEFAULT_TEXT_TOWER = "distilbert-base-uncased"
LARGEST_SIDE = 4096  # pixels; of each picture so many in square are held as float32, which are 200 MB
MAX_DIM = 1 << 16  # numbers of an embedding: more is a mistake or an attack
INIT_LOGIT_SCALE = 1 / 0.07  # CLIP's start
LOSSES = ("softmax", "sigmoid", "hinge")


@dataclass(frozen=True)
class PreprocessConfig:
    """How a picture becomes numbers. The defaults are those of google/vit-base-patch16-224."""

    size: int = 224  # pixels, square
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of channel values in 0..1
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resample: str = "bilinear"  # or "bicubic", "lanczos"
    fit: str = "stretch"  # whole picture onto the square; "crop": shorter side to size, then the centre

    def __post_init__(self) -> None:
        require(self.size > 0, "size must be positive", self.size)
        require(self.size <= LARGEST_SIDE, f"size must be at most {LARGEST_SIDE}", self.size)
        require(self.resample in ("bilinear", "bicubic", "lanczos"), "unknown resample", self.resample)
        require(self.fit in ("stretch", "crop"), "fit must be stretch or crop", self.fit)
        object.__setattr__(self, "mean", tuple(self.mean))  # JSON brings lists
        object.__setattr__(self, "std", tuple(self.std))
        for values in (self.mean, self.std):
            good = len(values) == 3 and all(isinstance(value, int | float) and abs(value) < 1e6 for value in values)
            require(good, "mean and std must be three numbers each", values)
        require(all(self.std), "std must not be zero", self.std)


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. A tower is a hub name or a local folder (pretrained), or a Hugging Face config as a dict
    (`{"model_type": "vit", "hidden_size": 128, ...}`: no pretrained weights).
    """

    image_tower: str | dict[str, Any] = DEFAULT_IMAGE_TOWER
    text_tower: str | dict[str, Any] = DEFAULT_TEXT_TOWER
    image_pooling: str = "cls"  # the class token; "mean", "cls+mean", "mean+max": of the patch tokens, side by side
    text_pooling: str = "cls"  # the first token; "mean": average over real (unpadded) tokens
    embed_dim: int = 256
    dropout: float = 0.1  # in the projection heads
    feature_dropout: float = 0.1  # on what the towers give to the heads; frozen features overfit soon without it
    max_length: int = 64  # text tokens, the two special ones included
    init_logit_scale: float = INIT_LOGIT_SCALE
    max_logit_scale: float = 100.0  # CLIP's clamp: beyond it training destabilises

    def __post_init__(self) -> None:
        poolings = ("cls", "mean", "cls+mean", "mean+max")
        require(self.image_pooling in poolings, f"image_pooling must be one of {poolings}", self.image_pooling)
        require(self.text_pooling in poolings[:2], f"text_pooling must be one of {poolings[:2]}", self.text_pooling)
        require(self.max_length >= 3, "max_length must leave room for a word between two marks", self.max_length)
        require(0 < self.embed_dim <= MAX_DIM, f"embed_dim must be positive, and at most {MAX_DIM}", self.embed_dim)
        for rate in (self.dropout, self.feature_dropout):
            require(0 <= rate < 1, "dropout must be in [0, 1)", rate)


@dataclass(frozen=True)
class DataConfig:
    """Which captioned pictures, and which of them are for choices (dev) rather than for learning (train)."""

    captions: str
    images: str | None = None  # None: the folder beside the caption file that holds the pictures
    format: str | None = None  # None: recognised
    train_split: str | None = None  # files with one image name a line; None: the official ones if they are there,
    dev_split: str | None = None  # else a fraction of the images, chosen by a hash of their names
    dev_fraction: float = 0.1
    stream: bool = False  # WebDataset archives: read as a model learns from them; of all pictures nothing is kept

    def __post_init__(self) -> None:
        require(0 < self.dev_fraction < 1, "dev_fraction must lie between 0 and 1", self.dev_fraction)


@dataclass(frozen=True)
class TrainConfig:
    """How to train. An epoch passes over every picture once, each with one of its captions drawn at random."""

    out: str  # folder of the run: best/ and last/ (model folders), log.jsonl, tensorboard/, train.json
    epochs: int = 30
    batch_size: int = 256
    tune_image: int | str = "none"  # "none": heads only, on cached features; k: the last k blocks too; "all"
    tune_text: int | str = "none"
    lora: int = 0  # rank of the updates that tuned towers learn in place of their weights (LoRA); 0: the weights
    rate_heads: float = 1e-3  # peak learning rates
    rate_image: float = 3e-5  # towers come pretrained and need small steps
    rate_text: float = 5e-5
    weight_decay: float = 0.1  # not on norms, biases and logit scale
    loss: str = "softmax"  # CLIP's; "sigmoid": SigLIP's; "hinge": VSE++'s, of the hardest negatives alone
    hard_negatives: float = 0.0  # share of each batch that are neighbours of its other pictures
    mine_every: int = 1  # epochs between looks at who is whose neighbour
    mixup: float = 0.0  # Beta parameter by which cached features of pairs are mixed; 0: not at all
    warmup: float = 0.05  # fraction of all steps with rising rate; a cosine to zero follows
    clip_norm: float = 1.0
    average: float = 0.0  # of the weights over the steps, exponential with this decay, is measured and kept; 0: none
    concepts: str | None = None  # a file of `clipmatch.concepts`, learnt beside the pairs
    concept_weight: float = 0.3  # of their loss
    concept_batch: int = 100  # concepts a batch
    teachers: tuple[str, ...] = ()  # models whose likings are learnt beside the pairs: folders or hub names
    teacher_weight: float = 0.6  # of their part of the pairs' loss
    views: int = 1  # cached views of each picture: the plain one and views - 1 augmented ones
    augment: bool = False  # live augmentation, when the image tower is trained as a whole
    flip: bool = True  # mirror in augmented views; wrong for captions with "left" and "right"
    adversarial: float = 0.0  # how far pictures are changed for the worse, for a model that guides: levels of 255, rms
    accumulate: int = 1  # batches a step; each batch has its own negatives
    chunk: int | None = None  # pairs that pass the towers at a time; the loss sees the whole batch all the same
    gradient_checkpointing: bool = False  # less memory, a third more time
    evaluate_every: int = 1  # epochs between looks at dev
    patience: int | None = None  # looks at dev without a better recall before stopping; None: run to the end
    precision: str | None = None  # None: chosen from the device, reason printed
    device: str | None = None
    workers: int | None = None  # processes that decode pictures; None: chosen from the cores
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "evaluate_every", "views", "mine_every"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        for name in ("tune_image", "tune_text"):
            value = getattr(self, name)
            good = value in ("none", "all") or (isinstance(value, int) and value > 0)
            require(good, f"{name} must be none, all or a number of blocks", value)
        require(self.lora >= 0, "lora must not be negative", self.lora)
        tuned = self.tune_image != "none" or self.tune_text != "none"
        require(not self.lora or tuned, "lora needs a tower to tune (tune_image, tune_text)", self.lora)
        require(self.batch_size > 1, "batch_size must be at least 2: a pair needs negatives", self.batch_size)
        for name in ("rate_heads", "rate_image", "rate_text", "clip_norm"):
            require(getattr(self, name) > 0, f"{name} must be positive", getattr(self, name))
        object.__setattr__(self, "teachers", tuple(self.teachers))  # JSON brings lists
        require(0 <= self.teacher_weight <= 1, "teacher_weight must be in [0, 1]", self.teacher_weight)
        require(self.loss in LOSSES, f"loss must be one of {LOSSES}", self.loss)
        require(0 <= self.hard_negatives < 1, "hard_negatives must be in [0, 1)", self.hard_negatives)
        require(self.chunk is None or self.chunk >= 1, "chunk must be at least 1", self.chunk)
        require(0 <= self.adversarial < 256, "adversarial must lie in 0..255", self.adversarial)
        whole = self.chunk is None or not self.adversarial
        require(whole, "adversarial wants the whole batch at once; leave out chunk", self.chunk)
        require(self.mixup >= 0, "mixup must not be negative", self.mixup)
        if self.mixup:
            cached = self.tune_image == self.tune_text == "none"
            require(cached, "mixup mixes cached features; it needs tune_image and tune_text none", self.mixup)
            require(not self.teachers, "teachers know nothing of mixed pairs; leave out mixup or them", self.mixup)
        require(0 <= self.average < 1, "average must be in [0, 1)", self.average)
        require(self.weight_decay >= 0, "weight_decay must not be negative", self.weight_decay)
        require(self.seed >= 0, "seed must not be negative", self.seed)
        require(self.workers is None or self.workers >= 0, "workers must not be negative", self.workers)
        if self.tune_image == "all":
            require(self.views == 1, "views are of cached pictures; with tune_image all use augment", self.views)
        else:
            require(not self.augment, "augment needs tune_image all; cached pictures have views", self.augment)
            require(not self.adversarial, "adversarial needs tune_image all: it changes pictures", self.adversarial)
        require(0 <= self.warmup < 1, "warmup must be in [0, 1)", self.warmup)
        require(self.patience is None or self.patience >= 1, "patience must be at least 1", self.patience)


def require(condition: bool, what: str, value: object) -> None:
    """Raise a `ClipmatchError` that names the setting's rule and the value that breaks it."""
    if not condition:
        raise ClipmatchError(f"Bad setting: {what} (got {value!r}).")


def to_json(config: Any) -> dict[str, Any]:
    """A config dataclass -> plain JSON types."""
    return dataclasses.asdict(config)


def from_json(kind: type[Config], values: dict[str, Any]) -> Config:
    """A JSON object -> config of the given kind. An unknown key is a typo and the error names its likely meaning."""
    if not isinstance(values, dict):
        raise ClipmatchError(f"The settings of {kind.__name__} must be an object (got {reason_of(values)}).")
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}."
            raise ClipmatchError(f"Unknown setting {key!r} for {kind.__name__}; {hint}")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:  # such as a word where there should be a number
        raise ClipmatchError(f"Bad setting of {kind.__name__}: {reason_of(error)}.") from error
