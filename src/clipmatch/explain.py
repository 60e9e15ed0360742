"""Why a photograph matches a query: where in it, and by which words.

In: a model, a query, an image file. Out: an `Explanation`: a heat map over the picture, and what each word contributes.
Knows nothing of indexes.

Where: a tower of convolutions that is averaged embeds each place too (the output "grid" of its image graph), and the
map is each place's cosine with the query, less that with sentences in general, which takes out what is near to every
sentence. A transformer mixes places: there parts of the picture are blurred in turn, and the map is what that
difference loses (Zeiler and Fergus, ECCV 2014). Which words: the query is asked once without each, and the cosine's
change is the word's part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from clipmatch.embedder import BatchedEmbedder
from clipmatch.errors import ClipmatchError
from clipmatch.preprocess import ImageError, load_image
from clipmatch.query import Query, parse_query
from clipmatch.search import sum_of_terms

CELLS = 8  # along each side, of which parts of the picture are covered in turn
COVERED = 3  # of them, along each side, that are covered at once
BLUR = 1 / 6  # of the side: what covers a part is the picture itself, so far out of focus that no thing can be told
NOTHING = "."  # a sentence that says nothing stands for sentences in general where a model knows none
LEAST = 0.02  # rise of a cosine above the picture's middle that shows as full heat; less is paler
HOT, COLD = (255, 72, 0), (20, 24, 40)  # colours over the hottest and the coldest place
BAR = 22  # pixels of a word's bar, with its gap


@dataclass(frozen=True, eq=False)
class Explanation:
    """Why a photograph matches.

    score: the cosine of picture and query, in -1..1. words: each word of the query with the change of score that it
    makes. heat [h, w]: in 0..1, how much each place shows what is asked. box: left, top, right, bottom of what the map
    covers, in fractions of the picture. photo: the photograph; None: as its file has it.
    """

    path: Path
    query: str
    score: float
    words: tuple[tuple[str, float], ...]
    heat: NDArray[np.float32]
    box: tuple[float, float, float, float]
    photo: Image.Image | None = None

    @property
    def peak(self) -> tuple[float, float]:
        """The hottest place: x and y in fractions of the picture."""
        row, column = np.unravel_index(int(self.heat.argmax()), self.heat.shape)
        left, top, right, bottom = self.box
        x, y = (column + 0.5) / self.heat.shape[1], (row + 0.5) / self.heat.shape[0]
        return left + x * (right - left), top + y * (bottom - top)

    def picture(self, longest: int = 1024) -> Image.Image:
        """The photograph with the heat over it, its longer side at most so many pixels. Raises ClipmatchError if it
        can't be read any more.
        """
        try:
            photo = load_image(self.path, longest) if self.photo is None else self.photo.copy()
        except ImageError as error:
            raise ClipmatchError(str(error)) from error
        photo.thumbnail((longest, longest))
        width, height = photo.size
        left, top, right, bottom = (
            round(part * side) for part, side in zip(self.box, (width, height, width, height), strict=True)
        )
        heat = Image.new("F", photo.size, 0.0)
        size = (max(1, right - left), max(1, bottom - top))
        heat.paste(Image.fromarray(self.heat).resize(size, Image.Resampling.BICUBIC), (left, top))
        warmth = np.clip(np.asarray(heat), 0, 1)[:, :, None]  # [h, w, 1]
        colours = np.asarray(photo, np.float32)
        dimmed = colours * 0.55 + np.array(COLD, np.float32) * 0.25
        shown = dimmed + (colours * 0.6 + np.array(HOT, np.float32) * 0.4 - dimmed) * warmth
        return Image.fromarray(np.clip(shown, 0, 255).astype(np.uint8))

    def save(self, path: str | Path, longest: int = 1024) -> Path:
        """Write the picture, with a bar for each word below it. Raises ClipmatchError if that can't be done."""
        picture = self.picture(longest)
        font: Any = ImageFont.load_default(14)
        below = BAR * (len(self.words) + 1) + 16
        page = Image.new("RGB", (max(picture.width, 360), picture.height + below), "white")
        page.paste(picture, ((page.width - picture.width) // 2, 0))
        draw = ImageDraw.Draw(page)
        line = picture.height + 8
        draw.text((8, line), f"cosine {self.score:.3f}", "black", font)
        start = 20 + max((int(draw.textlength(word, font)) for word, _ in self.words), default=0)
        room = max(page.width - start - 80, 40)
        most = max((abs(change) for _, change in self.words), default=0) or 1.0
        for word, change in self.words:
            line += BAR
            draw.text((8, line), word, "black", font)
            end = start + round(room * abs(change) / most)
            draw.rectangle((start, line + 3, max(end, start + 1), line + BAR - 6), HOT if change > 0 else "#8890a0")
            draw.text((end + 6, line), f"{change:+.3f}", "#444", font)
        try:
            page.save(path)
        except (OSError, ValueError) as error:  # a ValueError is an unknown ending
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise ClipmatchError(f"The picture {path} can't be written ({reason}).") from error
        return Path(path)


def explain(
    embedder: BatchedEmbedder, query: str | Query, image: str | Path, photo: Image.Image | None = None
) -> Explanation:
    """A query and an image file -> why they match, or do not. photo: what `load_image` makes of the file, if it is at
    hand. Raises ClipmatchError if the file can't be read.

    A query that names concepts has to know their directions (`Index.with_concepts`).
    """
    asked, path = parse_query(query) if isinstance(query, str) else query, Path(image)
    try:
        picture = load_image(path, embedder.preprocess.size) if photo is None else photo
    except ImageError as error:
        raise ClipmatchError(str(error)) from error
    rows = asked.vectors(embedder)  # [t, d]
    row = sum_of_terms(asked, rows)
    contrast = row - sentences_in_general(embedder)
    pixels = embedder.transform.pixels(picture)
    whole = embedder.encode_pixels(pixels[None])[0]
    places = embedder.encode_places(pixels[None])
    heat = covered(embedder, pixels, contrast) if places is None else heat_of(places[0], contrast)
    score, words = float(whole @ row), parts_of(embedder, asked, rows, whole)
    return Explanation(path, str(asked), score, words, heat, shown_part(embedder, picture.size), photo)


def parts_of(
    embedder: BatchedEmbedder, query: Query, rows: NDArray[np.float32], picture: NDArray[np.float32]
) -> tuple[tuple[str, float], ...]:
    """Each word of a query's sentences, with what it adds to the cosine with a picture's row [d]; an only word adds
    all of it. rows [t, d]: of the query's terms.
    """
    words = [(number, word) for number, term in enumerate(query.terms) for word in term.text.split()]
    lefts = [
        " ".join(word for other, (owner, word) in enumerate(words) if owner == number and other != at)
        for at, (number, _) in enumerate(words)
    ]
    made = iter(embedder.embed_texts([left for left in lefts if left]))
    whole = float(picture @ sum_of_terms(query, rows))
    found = []
    for (number, word), left in zip(words, lefts, strict=True):
        less, kept = query, rows.copy()
        if left:
            kept[number] = next(made)
        else:
            less, kept = Query(query.terms[:number] + query.terms[number + 1 :]), np.delete(rows, number, axis=0)
        found.append((word, whole - (float(picture @ sum_of_terms(less, kept)) if less.terms else 0.0)))
    return tuple(found)


def sentences_in_general(embedder: BatchedEmbedder) -> NDArray[np.float32]:
    """The row [d] of what sentences have in common: the mean of captions, if a calibration has seen some."""
    if embedder.calibration is not None:
        return np.asarray(embedder.calibration.captions.mean(axis=0), np.float32)
    row: NDArray[np.float32] = embedder.embed_texts([NOTHING])[0]
    return row


def heat_of(places: NDArray[np.float32], row: NDArray[np.float32]) -> NDArray[np.float32]:
    """Unit rows [p, d] of the places of a picture, row by row, and a direction [d] -> heat [h, w]."""
    side = math.isqrt(len(places))
    return warm((places @ row).reshape(side, side))


def covered(embedder: BatchedEmbedder, pixels: NDArray[np.uint8], row: NDArray[np.float32]) -> NDArray[np.float32]:
    """Pixels [s, s, 3] of a picture, and a direction [d] -> heat [h, w], by covering each part in turn.

    Parts reach over the edges, so that each place is covered equally often.
    """
    side = len(pixels)
    edges = np.linspace(0, side, CELLS + 1).round().astype(int)
    blurred = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(side * BLUR)))
    starts = range(1 - COVERED, CELLS)
    parts = [(max(top, 0), top + COVERED, max(left, 0), left + COVERED) for top in starts for left in starts]
    pictures = np.repeat(pixels[None], len(parts) + 1, axis=0)  # the last one is whole
    for picture, (top, bottom, left, right) in zip(pictures, parts, strict=False):
        part = np.s_[edges[top] : edges[min(bottom, CELLS)], edges[left] : edges[min(right, CELLS)]]
        picture[part] = blurred[part]
    lots = range(0, len(pictures), embedder.lot)
    scores = np.concatenate([embedder.encode_pixels(pictures[at : at + embedder.lot]) @ row for at in lots])
    lost = np.zeros((CELLS, CELLS), np.float32)
    for (top, bottom, left, right), score in zip(parts, scores, strict=False):
        lost[top:bottom, left:right] += (scores[-1] - score) / COVERED**2
    return warm(lost)


def warm(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosines of the places [h, w] -> heat in 0..1: none in the colder half, pale where the rest hardly differs."""
    above = values - np.median(values)
    heat: NDArray[np.float32] = np.clip(above / max(float(above.max()), LEAST), 0, 1).astype(np.float32)
    return heat


def shown_part(embedder: BatchedEmbedder, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Of a picture of that width and height, the part that the model sees: left, top, right, bottom in fractions."""
    if embedder.preprocess.fit != "crop":
        return 0.0, 0.0, 1.0, 1.0
    width, height = size
    short = min(width, height)
    x, y = (width - short) / 2 / width, (height - short) / 2 / height
    return x, y, 1 - x, 1 - y
