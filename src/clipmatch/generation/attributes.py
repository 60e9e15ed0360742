"""What a drawn scene shows, read from its pixels: a classifier for each of its attributes.

In: scenes of `clipmatch.scenes` and their pictures. Out: labels, a small network trained on real pictures, and whether
another picture shows what a caption names. Knows nothing of generators or of models that match text.

Letters: b pictures, a attributes (10: background, layout, and count, size, colour, shape of each of two groups).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipmatch.drawing import COLOURS, GROUNDS
from clipmatch.generation.looptools import adamw, generator_for, run_steps
from clipmatch.generation.pixelstore import batch_rows, picture_batch
from clipmatch.modelfolder import WEIGHTS
from clipmatch.runtime import choose_device, choose_precision, seed_draws, seed_everything
from clipmatch.scenes import CONVERSE, GROUND_WORDS, SHAPE_WORDS, SIZE_WORDS, Group, Scene

LAYOUTS = (None, "left of", "above")
OF_GROUP: dict[str, tuple[Any, ...]] = {
    "count": (1, 2, 3, 4),
    "size": tuple(SIZE_WORDS),
    "colour": tuple(COLOURS),
    "shape": tuple(SHAPE_WORDS),
}
CHOICES: dict[str, tuple[Any, ...]] = {  # attribute -> what it may be
    "background": tuple(GROUNDS),
    "layout": LAYOUTS,
    **{f"{name} {group}": values for group in (1, 2) for name, values in OF_GROUP.items()},
}
ABSENT = -100  # label of what is not there; PyTorch's cross-entropy passes over it
STEPS, BATCH, RATE = 2500, 64, 2e-3


def ordered(scene: Scene) -> tuple[tuple[Group, ...], str | None]:
    """The groups and their relation, told from the left or from above: the same for both ways to say it."""
    if scene.relation in ("right of", "below"):
        return scene.groups[::-1], CONVERSE[scene.relation]
    return scene.groups, scene.relation


def labels_of(scene: Scene) -> NDArray[np.int64]:
    """A scene -> what it shows, as numbers [a] in the order of `CHOICES`; `ABSENT` for a second group that is not."""
    groups, relation = ordered(scene)
    values: dict[str, Any] = {"background": scene.background, "layout": relation}
    for number, group in enumerate(groups, start=1):
        values |= {f"{name} {number}": getattr(group, name) for name in OF_GROUP}
    found = [choices.index(values[name]) if name in values else ABSENT for name, choices in CHOICES.items()]
    return np.array(found)


def named_in(caption: str, scene: Scene) -> NDArray[np.bool_]:
    """Which attributes [a] of the scene its caption names: a caption may leave out a size or the background."""
    groups, _ = ordered(scene)
    named: NDArray[np.bool_] = labels_of(scene) != ABSENT
    names = list(CHOICES)
    named[names.index("background")] = any(words in caption for words in GROUND_WORDS[scene.background])
    for number, group in enumerate(groups, start=1):
        sizes = "|".join(SIZE_WORDS[group.size])
        nouns = "|".join(word for pair in SHAPE_WORDS[group.shape] for word in pair)
        said = rf"\b({sizes}) ({group.colour} ({nouns})|({nouns}) in {group.colour})\b"
        named[names.index(f"size {number}")] = re.search(said, caption) is not None
    return named


class AttributeNet(nn.Module):
    """Convolutions, then a linear layer that knows the places, then one for each attribute."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in ((3, 32, 2), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(128, 48, 1), nn.Flatten(), nn.Dropout(0.2))
        self.join = nn.Sequential(nn.LazyLinear(512), nn.ReLU(), nn.Dropout(0.2))
        self.heads = nn.ModuleList(nn.Linear(512, len(choices)) for choices in CHOICES.values())

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """[b, 3, 64, 64] in -1..1 -> logits of each attribute, [b, its choices]."""
        joined = self.join(self.layers(pictures))
        return [head(joined) for head in self.heads]


class AttributeLearner:
    """The network and the scenes that it learns from; see `run_steps`. dev: pictures and labels it does not see."""

    def __init__(
        self,
        pixels: NDArray[np.uint8],
        labels: NDArray[np.int64],
        dev: tuple[NDArray[np.uint8], NDArray[np.int64]],
        seed: int,
    ):
        self.pixels, self.labels, self.dev, self.seed = pixels, torch.from_numpy(labels), dev, seed
        self.device = choose_device()
        self.precision = choose_precision(self.device)
        self.net = AttributeNet().to(self.device)
        self.net(torch.zeros(2, 3, *pixels.shape[1:3], device=self.device))  # the linear layer learns its width
        self.parts: dict[str, nn.Module] = {"attributes": self.net}
        self.optimizers: dict[str, Any] = {"attributes": adamw(self.net, RATE, decay=0.05)}

    def step(self, number: int) -> dict[str, float]:
        """One batch, shifted by some pixels, more or less blurred and with a little noise -> its loss: so that edges
        which a generator paints softer than they are drawn do not count as another shape.
        """
        draws = generator_for(self.seed, number)
        rows = batch_rows(len(self.pixels), BATCH, number, self.seed)
        seed_draws(self.seed * 1_000_003 + number, self.device)  # of dropout
        pictures = picture_batch(self.pixels, rows)
        padded = nn.functional.pad(pictures, (2, 2, 2, 2), mode="replicate")
        left, top = torch.randint(5, (2,), generator=draws).tolist()
        side = pictures.shape[-1]
        pictures = padded[..., top : top + side, left : left + side]
        blurred = nn.functional.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False)
        pictures = pictures.lerp(blurred, torch.rand((len(rows), 1, 1, 1), generator=draws))
        pictures = pictures + torch.randn(pictures.shape, generator=draws) * 0.05
        labels = self.labels[rows].to(self.device)  # [b, a]
        with torch.autocast(self.device.type, self.precision.dtype, enabled=self.precision.dtype is not None):
            logits = self.net(pictures.to(self.device))
        parts = [nn.functional.cross_entropy(made.float(), labels[:, at]) for at, made in enumerate(logits)]
        loss = torch.stack(parts).sum()
        optimizer = self.optimizers["attributes"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return {"loss": float(loss.detach())}

    def look(self, number: int) -> dict[str, Any]:
        """How often each attribute of the held-out pictures is read rightly."""
        return accuracies(read_attributes(self.net, self.dev[0]), self.dev[1], self.dev[1] != ABSENT)


def train_attributes(
    train: tuple[NDArray[np.uint8], NDArray[np.int64]],
    dev: tuple[NDArray[np.uint8], NDArray[np.int64]],
    out: Path,
    seed: int = 0,
    progress: bool = True,
    steps: int = STEPS,
) -> bool:
    """Pictures uint8 [n, s, s, 3] and labels [n, a] -> whether the network in `out` is finished.

    Goes on with a run that was begun there.
    """
    seed_everything(seed)
    learner = AttributeLearner(*train, dev, seed)
    begun = (out / "last").exists()
    finished = run_steps(learner, out, steps, {}, resume=begun, look_every=steps // 5, progress=progress)
    save_file(learner.net.state_dict(), out / WEIGHTS)
    return finished


def load_attributes(folder: Path) -> AttributeNet:
    """The network of `train_attributes`, in eval mode."""
    net = AttributeNet()
    net.load_state_dict(load_file(folder / WEIGHTS))
    return net.eval()


@torch.no_grad()
def read_attributes(net: AttributeNet, pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Pictures uint8 [n, s, s, 3] -> the number of each attribute's likeliest choice [n, a]."""
    net.eval()
    device = next(net.parameters()).device
    found = []
    for start in range(0, len(pixels), 256):
        rows = np.arange(start, min(start + 256, len(pixels)))
        logits = net(picture_batch(pixels, rows).to(device))
        found.append(torch.stack([made.argmax(dim=1) for made in logits], dim=1).cpu())
    net.train()
    return torch.cat(found).numpy()


def accuracies(read: NDArray[np.int64], labels: NDArray[np.int64], asked: NDArray[np.bool_]) -> dict[str, float]:
    """What was read and what should be there, [n, a], and which of it was asked for -> accuracy of each attribute over
    the pictures of which it was asked, and "all": of pictures with everything right that was asked.
    """
    right = read == labels
    figures = {name: float(right[asked[:, at], at].mean()) for at, name in enumerate(CHOICES) if asked[:, at].any()}
    return {**figures, "all": float((right | ~asked).all(axis=1).mean())}
