"""What can be painted on: latent numbers -> pictures, through which gradients flow.

In: how many pictures and a seed, a picture, or tokens. Out: latents, and the pictures that they stand for. Knows
nothing of prompts or models that judge.

Letters: n pictures, h side of a picture in pixels; k codes in a codebook, c numbers in a code, y side of the grid of
codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipmatch.errors import ClipmatchError
from clipmatch.generation.vqgan import pixels_per_code

if TYPE_CHECKING:
    from diffusers import VQModel

RATE = 0.3  # step of a latent, as a part of the spread of the numbers in the codebook


class Canvas(Protocol):
    """What a generator must do for the optimiser. A canvas serves one painting at a time.

    kind: what it is, in a word. fingerprint: of its weights. facts: what else decides its pictures. side: of a picture,
    in pixels, if none is asked for. tries: how many starts are worth looking at for each picture. rates: step of Adam
    for each latent tensor.
    """

    kind: str
    fingerprint: str
    facts: dict[str, Any]
    side: int
    tries: int
    rates: list[float]

    def start(self, n: int, size: int, seed: int) -> list[Tensor]:
        """Random latents, each [n, ...], for pictures of that size, from the seed alone.

        Raises ClipmatchError for a size that it can't paint.
        """
        ...

    def from_picture(self, image: Image.Image, n: int, size: int, strength: float) -> list[Tensor]:
        """Latents, each [n, ...], of a picture, which is cut to a square.

        strength in 0..1: how far `settle` lets them go from there. Raises ClipmatchError if it can't be done.
        """
        ...

    def paint(self, latents: list[Tensor]) -> Tensor:
        """Latents, each [n, ...] -> pictures [n, 3, h, h] in 0..1."""
        ...

    def settle(self, latents: list[Tensor]) -> None:
        """Put latents back, in place, to where they may be; after each step."""
        ...


class VQCanvas:
    """The decoder of a vector-quantised autoencoder (Esser et al., VQGAN, CVPR 2021), as diffusers has it.

    The latent is a grid of vectors [n, c, y, y], free within the codebook's range. Painting puts the nearest code in
    the place of each; the gradient passes as if that had not been (straight through).
    """

    kind = "VQGAN"
    tries = 1  # a random grid of codes is a texture; none is better than another

    def __init__(self, model: VQModel, fingerprint: str = "", device: torch.device | None = None):
        self.model = model.to(device or torch.device("cpu")).eval().requires_grad_(False)
        self.fingerprint, self.device = fingerprint, self.model.device
        self.facts: dict[str, Any] = {}
        self.codes = self.model.quantize.embedding.weight  # [k, c]
        self.factor = pixels_per_code(model)  # along a side
        self.side = int(self.model.config.sample_size)
        self.rates = [RATE * float(self.codes.std())]
        self.lowest, self.highest = (bound[None, :, None, None] for bound in self.codes.aminmax(dim=0))  # [1, c, 1, 1]
        self.low, self.high = self.lowest, self.highest

    def start(self, n: int, size: int, seed: int) -> list[Tensor]:
        """A grid of random codes for each picture. Raises ClipmatchError for a size between codes."""
        grid = self.grid(size)
        generator = torch.Generator().manual_seed(seed)
        return self.from_tokens(torch.randint(len(self.codes), (n, grid * grid), generator=generator))

    def from_tokens(self, tokens: Tensor, strength: float = 1.0) -> list[Tensor]:
        """Numbers of codes [n, y * y], row by row -> latents; strength: as for `from_picture`."""
        grid = round(tokens.shape[1] ** 0.5)
        latent = self.codes[tokens.to(self.device)]  # [n, y * y, c]
        return self.around(latent.transpose(1, 2).unflatten(2, (grid, grid)).contiguous(), strength)

    def from_picture(self, image: Image.Image, n: int, size: int, strength: float) -> list[Tensor]:
        """The encoder's latent of a picture, n times. Raises ClipmatchError for a size between codes."""
        self.grid(size)
        pixels = as_pixels(image, size).to(self.device)
        with torch.no_grad():
            latent = self.model.encode(pixels * 2 - 1).latents.clamp(self.lowest, self.highest)  # [1, c, y, y]
        return self.around(latent.repeat(n, 1, 1, 1), strength)

    def around(self, latent: Tensor, strength: float) -> list[Tensor]:
        """A latent, the beginning of a painting that may go so far from it."""
        reach = strength * (self.highest - self.lowest)
        self.low = torch.maximum(self.lowest, latent - reach)
        self.high = torch.minimum(self.highest, latent + reach)
        return [latent]

    def paint(self, latents: list[Tensor]) -> Tensor:
        """[n, c, y, y] -> pictures [n, 3, h, h]."""
        pictures: Tensor = self.model.decode(latents[0]).sample / 2 + 0.5
        return pictures + (pictures.clamp(0, 1) - pictures).detach()  # or what is too bright would stay so

    def settle(self, latents: list[Tensor]) -> None:
        """Back into the codebook's range, and to where `strength` lets it be."""
        latents[0].copy_(latents[0].clamp(self.low, self.high))

    def grid(self, size: int) -> int:
        """The side of the grid of codes of a picture. Raises ClipmatchError for a size between codes."""
        if size % self.factor or size < self.factor:
            near = max(1, round(size / self.factor)) * self.factor
            raise ClipmatchError(
                f"This VQGAN paints sides of a multiple of {self.factor} pixels; give --size {near}, say."
            )
        return size // self.factor


def as_pixels(image: Image.Image, size: int) -> Tensor:
    """A picture -> pixels [1, 3, size, size] in 0..1 of the square in its middle."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    square = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box)
    return torch.from_numpy(np.asarray(square, dtype=np.float32) / 255).permute(2, 0, 1)[None]
