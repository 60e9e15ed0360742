"""How well a picture shows what was asked, and in which direction it would show it better.

In: a model (a checkpoint folder of ours, or a CLIP of transformers), prompts, pictures. Out: unit rows, losses and
scores through which gradients reach the pixels. Knows nothing of generators.

Letters: n pictures, b pictures or views, k views of one picture, t prompts, d embedding width, h side of a picture and
s side of what the model sees, in pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clipmatch.embedder import Embedder, TorchEmbedder
from clipmatch.errors import ClipmatchError
from clipmatch.generation.cutouts import cutouts
from clipmatch.generation.prompts import Prompt
from clipmatch.model import unit
from clipmatch.modelfolder import (
    CONFIG,
    EMBEDDED,
    EMBEDDED_NAME,
    WEIGHTS,
    find_folder,
    find_local,
    hub_config,
    is_hub_name,
    kind_of,
)
from clipmatch.pretrained import PretrainedEmbedder, load_pretrained

JUDGED = 16  # views that a score is the mean over
JUDGE_SEED = 0  # of those views: the same ones for every picture, or the luckiest views would win


class Targets(NamedTuple):
    """What a picture should resemble: unit rows [t, d], and weights [t] that add up to 1 without their signs."""

    rows: Tensor
    weights: Tensor


class Guide:
    """A frozen model that says how well pictures show what prompts ask for.

    size: the side s, in pixels, of the pictures that it sees. fingerprint: of the model.
    """

    def __init__(self, embedder: TorchEmbedder | PretrainedEmbedder):
        self.embedder = embedder
        embedder.model.requires_grad_(False)
        self.fingerprint, self.device = embedder.fingerprint, embedder.device
        seen = embedder.transform.config
        self.size = seen.size
        self.mean, self.std = (
            torch.tensor(values, device=self.device).view(3, 1, 1) for values in (seen.mean, seen.std)
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """Pictures [b, 3, h, h] in 0..1 -> unit rows [b, d], with gradients."""
        if pixels.shape[-1] != self.size:
            pixels = nn.functional.interpolate(pixels, size=self.size, mode="bilinear", antialias=True)
        values = (pixels - self.mean) / self.std  # [b, 3, s, s]
        if isinstance(self.embedder, TorchEmbedder):
            return self.embedder.model.encode_image(values)
        features: Tensor = self.embedder.model.get_image_features(pixel_values=values).pooler_output
        return unit(features)

    def targets(self, prompts: tuple[Prompt, ...]) -> Targets:
        """Prompts -> what a picture should resemble. Raises ClipmatchError when a picture can't be read."""
        rows, weights = rows_of(self.embedder, prompts)
        return Targets(*(torch.from_numpy(values).to(self.device) for values in (rows, weights)))

    def loss(
        self, pictures: Tensor, targets: Targets, generator: torch.Generator, count: int = 16, flip: bool = True
    ) -> Tensor:
        """Pictures [n, 3, h, h] in 0..1 -> how far `count` random views of each are from the targets, summed; scalar.

        flip: whether views are mirrored too.
        """
        losses = []
        for picture in pictures[:, None]:  # [1, 3, h, h]
            rows = self.encode(cutouts(picture, count, self.size, generator, flip))  # [k, d]
            losses.append((spherical_distance(rows, targets.rows).mean(dim=0) * targets.weights).sum())
        return torch.stack(losses).sum()

    @torch.no_grad()
    def score(self, pictures: Tensor, targets: Targets) -> Tensor:
        """Pictures [n, 3, h, h] in 0..1 -> their weighted cosines [n] with the targets, in -1..1.

        The mean over the whole picture and views of it, the same for all; none is mirrored.
        """
        scores = []
        for picture in pictures[:, None]:  # [1, 3, h, h]
            generator = torch.Generator().manual_seed(JUDGE_SEED)
            views = cutouts(picture, JUDGED, self.size, generator, flip=False)
            rows = torch.cat([self.encode(picture), self.encode(views)])  # [1 + k, d]
            scores.append((rows @ targets.rows.T).mean(dim=0) @ targets.weights)
        return torch.stack(scores)


def rows_of(embedder: Embedder, prompts: tuple[Prompt, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Prompts -> unit rows [t, d], and weights [t] that add up to 1 without their signs.

    Raises ClipmatchError when a picture can't be read.
    """
    texts = [prompt.text for prompt in prompts if prompt.image is None]
    images = [prompt.image for prompt in prompts if prompt.image is not None]
    found = embedder.embed_images(images, progress=False)
    if found.failures:
        raise ClipmatchError(f"The picture {found.failures[0].path} can't be read: {found.failures[0].reason}.")
    of_text, of_image = iter(embedder.embed_texts(texts)), iter(found.rows)
    rows = np.stack([next(of_text if prompt.image is None else of_image) for prompt in prompts])
    weights = np.array([prompt.weight for prompt in prompts], np.float32)
    return rows, weights / np.abs(weights).sum()


def spherical_distance(rows: Tensor, targets: Tensor) -> Tensor:
    """Unit rows [b, d] and [t, d] -> half the squared angles [b, t] between them, in radians squared.

    Unlike the cosine it pulls harder the further away a picture is.
    """
    half_chord = (rows[:, None] - targets[None]).norm(dim=-1) / 2  # [b, t]
    distances: Tensor = half_chord.clamp(max=1 - 1e-6).asin().square() * 2  # at 1 the slope is infinite
    return distances


def load_guide(name: str | Path, device: str | None = None) -> Guide:
    """A model by name -> a guide: a model folder or training run of ours with PyTorch weights, a hub repository of one,
    or a CLIP of transformers (folder or hub name).

    device: "cpu", "cuda", ...; None takes the fastest. Raises ClipmatchError if there is no such model, or it has
    graphs for ONNX Runtime alone, through which no gradient flows.
    """
    local = find_local(name)
    config = local / CONFIG if local else hub_config(str(name)) if is_hub_name(name) else None
    if config and kind_of(config) == "transformers":
        return Guide(load_pretrained(str(local or name), device))
    folder = EMBEDDED if name == EMBEDDED_NAME else find_folder(name)
    if not (folder / WEIGHTS).is_file():
        raise ClipmatchError(
            f"The model {name} is for ONNX Runtime, which can say how well a picture fits but not how to improve it; "
            "name a model folder with PyTorch weights, such as that of clipmatch train or clipmatch demo --train."
        )
    from clipmatch.checkpoint import load_checkpoint

    embedder = TorchEmbedder(load_checkpoint(folder), device)
    embedder.folder = folder
    return Guide(embedder)
