"""Things and backgrounds of a drawn scene: silhouettes, colours, textures.

In: names, boxes in pixels and a seeded `random.Random`. Out: strokes on a Pillow image. Knows nothing of scenes,
captions or files.
"""

from __future__ import annotations

import colorsys
import math
import random

import numpy as np
from PIL import Image, ImageDraw

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom, y downwards
Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (218, 28, 36),
    "orange": (250, 130, 10),
    "yellow": (255, 224, 32),
    "green": (22, 140, 50),
    "blue": (28, 78, 220),
    "purple": (124, 40, 170),
    "pink": (255, 130, 190),
    "black": (24, 24, 28),
}
GROUNDS: dict[str, tuple[Colour, Colour]] = {  # top and bottom of a gradient, paler than any thing but for the night
    "plain": ((252, 252, 250), (240, 240, 238)),
    "night": ((14, 18, 56), (40, 46, 100)),
    "grass": ((196, 224, 150), (150, 194, 104)),
    "sea": ((186, 226, 238), (120, 188, 214)),
    "desert": ((246, 230, 192), (222, 192, 140)),
    "wall": ((206, 158, 138), (192, 140, 120)),
}


def _arc(start: float, end: float, x: float = 0, y: float = 0, rx: float = 1, ry: float = 1) -> list[Point]:
    """Points on an ellipse from one angle to another, in degrees, both included."""
    angles = [math.radians(start + (end - start) * step / 32) for step in range(33)]
    return [(x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles]


def _star() -> list[Point]:
    corners = [(1.0 if k % 2 == 0 else 0.45, math.radians(36 * k - 90)) for k in range(10)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in corners]


def _heart() -> list[Point]:
    turns = [2 * math.pi * step / 48 for step in range(48)]
    return [
        (16 * math.sin(t) ** 3, 5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t) - 13 * math.cos(t))
        for t in turns
    ]


_HOUSE = [(0.1, 1), (0.1, 0.5), (0, 0.5), (0.5, 0), (1, 0.5), (0.9, 0.5), (0.9, 1), (0.62, 1), (0.62, 0.66)]
_FIR = [(0.5, 0), (0.8, 0.42), (0.64, 0.42), (1, 0.82), (0.6, 0.82), (0.6, 1)]  # right half; mirrored for the left
SILHOUETTES: dict[str, list[list[Point]]] = {  # outline first, then holes; any unit, since boxes give the size
    "circle": [_arc(0, 350)],
    "square": [[(0, 0), (1, 0), (1, 1), (0, 1)]],
    "triangle": [[(0.5, 0), (1, 0.9), (0, 0.9)]],
    "star": [_star()],
    "heart": [_heart()],
    "ring": [_arc(0, 360), _arc(0, 360, rx=0.5, ry=0.5)],
    "moon": [_arc(51, 309) + _arc(283, 77, x=0.45, rx=0.8, ry=0.8)],
    "fish": [[*_arc(25, 335, ry=0.78), (1.4, -0.72), (1.25, 0), (1.4, 0.72)]],
    "house": [[*_HOUSE, (0.38, 0.66), (0.38, 1)]],
    "tree": [_FIR + [(1 - x, y) for x, y in reversed(_FIR[1:])]],
}
TILT = {"square": 5, "house": 5, "tree": 5}  # degrees at most, 12 for the rest: further, and a square is a diamond


def aspect(shape: str) -> float:
    """Width over height of a shape that stands upright."""
    xs, ys = zip(*SILHOUETTES[shape][0], strict=True)
    return float((max(xs) - min(xs)) / (max(ys) - min(ys)))


def draw_thing(image: Image.Image, shape: str, fill: Colour, edge: Colour, box: Box, rng: random.Random) -> None:
    """A filled shape with an outline, a little tilted, that touches all four sides of the box and stays inside it."""
    draw, line = ImageDraw.Draw(image), max(2, round(image.width * 0.014))
    angle = math.radians(rng.uniform(-1, 1) * TILT.get(shape, 12))
    rim = line / 2 + 1
    contours = _fit(_turn(SILHOUETTES[shape], angle), (box[0] + rim, box[1] + rim, box[2] - rim, box[3] - rim))
    draw.polygon([point for contour in contours for point in [*contour, contours[0][-1]]], fill=fill)
    for contour in contours:
        draw.line([*contour, *contour[:2]], fill=edge, width=line, joint="curve")


def edge_of(fill: Colour, ground: str) -> Colour:
    """The outline's colour: light in the dark, a dark shade of the filling elsewhere."""
    return (236, 236, 226) if ground == "night" else (fill[0] // 4, fill[1] // 4, fill[2] // 4)


def _turn(contours: list[list[Point]], angle: float) -> list[list[Point]]:
    c, s = math.cos(angle), math.sin(angle)
    return [[(c * x - s * y, s * x + c * y) for x, y in contour] for contour in contours]


def _fit(contours: list[list[Point]], box: Box) -> list[list[Point]]:
    """Scale and shift so that the outline touches all four sides of the box, in pixels."""
    xs, ys = zip(*contours[0], strict=True)
    x0, y0 = min(xs), min(ys)
    x_scale, y_scale = (box[2] - box[0]) / (max(xs) - x0), (box[3] - box[1]) / (max(ys) - y0)
    return [[(box[0] + (x - x0) * x_scale, box[1] + (y - y0) * y_scale) for x, y in contour] for contour in contours]


def shade(colour: Colour, rng: random.Random) -> Colour:
    """The colour with a little jitter in hue, saturation and brightness: never so much that its name changes."""
    h, s, v = colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))
    h, s, v = (h + rng.uniform(-0.012, 0.012)) % 1, s * rng.uniform(0.92, 1), min(1, v * rng.uniform(0.93, 1.07))
    r, g, b = colorsys.hsv_to_rgb(h, s, v)
    return round(r * 255), round(g * 255), round(b * 255)


def draw_ground(name: str, side: int, rng: random.Random) -> Image.Image:
    """A background of side x side pixels: a gradient, and marks too faint to be taken for a thing."""
    gain = rng.uniform(0.96, 1.03)
    top, bottom = (np.asarray(colour) * gain for colour in GROUNDS[name])
    ramp = np.linspace(0, 1, side)[:, None]
    column = np.clip(top * (1 - ramp) + bottom * ramp, 0, 255).astype(np.uint8)  # [side, 3]
    image = Image.fromarray(np.repeat(column[:, None], side, axis=1))
    draw, unit = ImageDraw.Draw(image), side / 64
    if name == "night":
        _night(draw, side, unit, rng)
    elif name == "grass":
        _grass(draw, side, unit, rng)
    elif name == "sea":
        _waves(draw, unit, rng, (232, 246, 250), height=1, length=11, gap=8)
    elif name == "desert":
        _waves(draw, unit, rng, (206, 170, 116), height=2.5, length=44, gap=13)
    elif name == "wall":
        _bricks(draw, side, unit, rng)
    return image


def _night(draw: ImageDraw.ImageDraw, side: int, unit: float, rng: random.Random) -> None:
    for _ in range(16):
        x, y = rng.uniform(0, side), rng.uniform(0, side)
        draw.ellipse((x, y, x + unit, y + unit), fill=(200, 200, 170))


def _grass(draw: ImageDraw.ImageDraw, side: int, unit: float, rng: random.Random) -> None:
    for _ in range(70):
        x, y, lean = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(-unit, unit)
        draw.line((x, y, x + lean, y - 3 * unit), fill=(118, 168, 80), width=round(unit * 0.6))


def _waves(
    draw: ImageDraw.ImageDraw, unit: float, rng: random.Random, mark: Colour, height: float, length: float, gap: float
) -> None:
    shift = rng.uniform(0, 8)
    for row in range(-1, 9):
        base, phase = row * gap + shift, rng.uniform(0, 6.3)
        wave = [
            (x * unit, (base + height * math.sin(2 * math.pi * x / length + phase)) * unit) for x in range(0, 66, 2)
        ]
        draw.line(wave, fill=mark, width=round(unit * 0.7))


def _bricks(draw: ImageDraw.ImageDraw, side: int, unit: float, rng: random.Random) -> None:
    shift, mortar = rng.uniform(0, 8), (226, 196, 180)
    for row in range(-1, 9):
        y = (row * 8 + shift) * unit
        draw.line((0, y, side, y), fill=mortar, width=round(unit))
        for brick in range(5):
            x = (brick * 16 + (row % 2) * 8 + shift - 8) * unit
            draw.line((x, y, x, y + 8 * unit), fill=mortar, width=round(unit))
