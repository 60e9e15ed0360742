"""How to train a VQGAN and a prior: every setting, said once; and where the demo leaves what it trains.

In: keyword arguments or a JSON object. Out: checked, immutable configs. Knows nothing of PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clipmatch.config import require
from clipmatch.modelfolder import find_local

DEMO = Path("clipmatch-demo")  # where clipmatch demo leaves its models, if not told otherwise
GUIDE, GENERATOR = "guide", "generator"  # their folders in it
MOST_SEED = 2**31 - 1


def find_demo(folder: str) -> str | None:
    """The demo's guide or generator, if it was made here."""
    return str(DEMO / folder) if find_local(DEMO / folder) else None


@dataclass(frozen=True)
class VQConfig:
    """How to train. size: side in pixels; perceptual: a model whose image tower says what looks alike."""

    size: int = 64
    codes: int = 1024
    code_width: int = 16
    channels: tuple[int, ...] = (64, 128)
    layers: int = 1
    patch: int = 4
    steps: int = 10_000
    batch_size: int = 32
    rate: float = 1e-3
    commitment: float = 0.25  # weight of the pull on the encoder towards the codes
    perceptual: str | None = None
    perceptual_weight: float = 0.5
    adversarial: float = 0.0  # weight of a patch discriminator, which joins in at a third of the steps; 0: none
    flip: bool = True  # mirror half of the pictures
    precision: str | None = None
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("size", "codes", "code_width", "layers", "patch", "steps", "batch_size", "rate"):
            require(getattr(self, name) > 0, f"{name} must be positive", getattr(self, name))
        object.__setattr__(self, "channels", tuple(self.channels))  # JSON brings lists
        factor = self.patch * 2 ** (len(self.channels) - 1)
        require(self.size % factor == 0, f"size must be a multiple of {factor} pixels, a code's side", self.size)
        require(all(width % 8 == 0 for width in self.channels), "channels must be multiples of 8", self.channels)
        require(self.adversarial >= 0, "adversarial must not be negative", self.adversarial)
        require(0 <= self.seed <= MOST_SEED, f"seed must lie in 0..{MOST_SEED}", self.seed)


@dataclass(frozen=True)
class PriorTraining:
    """How to train. width, layers: of the transformer, whose heads follow from its width."""

    width: int = 192
    layers: int = 6
    local_width: int = 64
    steps: int = 10_000
    batch_size: int = 64
    rate: float = 1e-3
    weight_decay: float = 0.03
    unprompted: float = 0.1  # share of the pictures that are learnt without a prompt, for classifier-free guidance
    captioned: float = 0.7  # share of the prompts that are captions, where there are any; the rest are pictures
    noise: float = 0.5  # length of the noise on a picture's unit row, at most
    precision: str | None = None
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "rate", "width", "layers", "local_width"):
            require(getattr(self, name) > 0, f"{name} must be positive", getattr(self, name))
        for name in ("unprompted", "captioned"):
            require(0 <= getattr(self, name) <= 1, f"{name} must lie in 0..1", getattr(self, name))
        require(self.noise >= 0, "noise must not be negative", self.noise)
        require(0 <= self.seed <= MOST_SEED, f"seed must lie in 0..{MOST_SEED}", self.seed)

    @property
    def heads(self) -> int:
        """As many as divide the width into parts of 32 numbers or somewhat more."""
        return next(heads for heads in range(max(1, self.width // 32), 0, -1) if self.width % heads == 0)
