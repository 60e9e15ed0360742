"""A query -> the photographs that match it, best first.

In: a sentence, a model, a folder of images. Out: `Match` rows, which draw themselves as a grid in a notebook. Knows
nothing of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipmatch.embedder import Embedder, Failure, load_model
from clipmatch.errors import ClipmatchError
from clipmatch.index import embed_remembered, list_images


@dataclass(frozen=True)
class Match:
    """A photograph and the cosine, in -1..1, of its embedding with the query's."""

    path: Path
    score: float


class Matches(list[Match]):
    """Matches, best first. In a notebook they show as a grid of pictures. failures: images that could not be read."""

    def __init__(self, query: str, matches: Sequence[Match], failures: Sequence[Failure] = ()):
        super().__init__(matches)
        self.query = query
        self.failures = list(failures)

    def _repr_png_(self) -> bytes | None:
        import io

        from clipmatch.report import match_grid

        if not self:
            return None
        buffer = io.BytesIO()
        match_grid(self.query, self).savefig(buffer, format="png", dpi=80, bbox_inches="tight")
        return buffer.getvalue()


def find_matches(
    query: str,
    model: Embedder | str | Path | None = None,
    images: str | Path | Sequence[str | Path] = ".",
    top_k: int = 9,
    progress: bool = True,
) -> Matches:
    """The `top_k` images that match a sentence best.

    model: a loaded model, or the name of one as for `load_model`; None: the one that comes with clipmatch. images: a
    folder (searched with its subfolders) or a list of files. Each image is embedded once and remembered; a bad one is
    left out and listed in the result's `failures`.
    Raises ClipmatchError when the query is empty, the folder has no pictures or none of them can be read.
    """
    if not query.strip():
        raise ClipmatchError("The query is empty; type what the photograph shows.")
    if top_k < 1:
        raise ClipmatchError(f"top_k is {top_k}; ask for at least one match.")
    paths = list_images(images) if isinstance(images, str | Path) else [Path(path) for path in images]
    if not paths:
        raise ClipmatchError("The list of images is empty; name at least one.")
    embedder = load_model(model) if model is None or isinstance(model, str | Path) else model
    gallery = embed_remembered(embedder, paths, progress)
    if not gallery.paths:
        raise ClipmatchError(f"None of the {len(paths)} images can be read; the first: {gallery.failures[0].reason}.")
    scores = gallery.rows @ embedder.embed_texts([query])[0]  # [n]
    best = np.argsort(-scores, kind="stable")[:top_k]
    return Matches(query, [Match(gallery.paths[i], float(scores[i])) for i in best], gallery.failures)
