"""Views of a picture: random parts of it, a little turned and tinted, as a model is asked about them.

In: a picture's tensor and a random generator. Out: tensors of the size that the model sees, through which gradients
flow. Knows nothing of models or files.

A model is easily pleased by a pattern that no person would recognise. Such a pattern does not survive being cut,
turned, tinted and blurred by noise, while a thing does (Crowson et al., VQGAN-CLIP, ECCV 2022).
Letters: k views, h the side of the picture, s the side of a view, in pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SHARE = (0.55, 1.0)  # of the picture's side that a view shows
BEYOND = 0.1  # of the picture's half side that a view may reach over the edge, where the picture is mirrored
TURN, SHEAR = math.radians(7), 0.06
TINT, SHADE = 0.06, 0.04  # spread of the factor on each channel, and of what is added to all of them
NOISE = 0.06  # at most; some views have hardly any
FINEST = 1.5  # pixels of the picture for one of a view: more would only alias


def cutouts(picture: Tensor, count: int, size: int, generator: torch.Generator, flip: bool = True) -> Tensor:
    """A picture [1, 3, h, h] in 0..1 -> views [k, 3, s, s], about in 0..1.

    generator: on the CPU, whatever the device of the picture, so that views depend on the seed alone. flip: whether
    half of the views are mirrored.
    """
    picture = nn.functional.interpolate(
        picture, size=min(picture.shape[-1], round(FINEST * size)), mode="bilinear", antialias=True
    )
    frames = random_frames(count, generator, flip).to(picture.device)
    grid = nn.functional.affine_grid(frames, [count, 3, size, size], align_corners=False)  # [k, s, s, 2]
    views = nn.functional.grid_sample(
        picture.expand(count, -1, -1, -1), grid, padding_mode="reflection", align_corners=False
    )  # [k, 3, s, s]
    return tinted(views, generator)


def random_frames(count: int, generator: torch.Generator, flip: bool) -> Tensor:
    """Affine maps [k, 2, 3] from a view's coordinates to the picture's, both from -1 to 1."""
    draws = torch.rand(6, count, generator=generator) * 2 - 1
    share = SHARE[0] + (SHARE[1] - SHARE[0]) * (draws[0] + 1) / 2
    angle, shear = TURN * draws[1], SHEAR * draws[2]
    mirror = torch.where(draws[3] < 0, -1.0, 1.0) if flip else torch.ones(count)
    room = 1 + BEYOND - share  # how far the middle of the view may lie from the picture's
    cos, sin = share * angle.cos(), share * angle.sin()
    rows = [cos * mirror, shear * cos - sin, room * draws[4], sin * mirror, cos, room * draws[5]]
    return torch.stack(rows, dim=1).view(count, 2, 3)


def tinted(views: Tensor, generator: torch.Generator) -> Tensor:
    """Views [k, 3, s, s] -> the same with other colours and noise."""
    count = len(views)
    tint = 1 + TINT * torch.randn(count, 3, 1, 1, generator=generator)
    shade = SHADE * torch.randn(count, 1, 1, 1, generator=generator)
    spread = NOISE * torch.rand(count, 1, 1, 1, generator=generator)
    noise = shade + spread * torch.randn(views.shape, generator=generator)
    return views * tint.to(views.device) + noise.to(views.device)
