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
    """A photograph and the cosine, in -1..1, of its embedding with the query's.

    confidence: the probability, in 0..1, that it is what the query describes; None if the model is not calibrated.
    """

    path: Path
    score: float
    confidence: float | None = None


class Matches(list[Match]):
    """Matches, best first. In a notebook they show as a grid of pictures.

    failures: images that could not be read. best: the best match, also if its confidence was too low to be listed.
    """

    def __init__(
        self, query: str, matches: Sequence[Match], failures: Sequence[Failure] = (), best: Match | None = None
    ):
        super().__init__(matches)
        self.query = query
        self.failures = list(failures)
        self.best = best or (matches[0] if matches else None)

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
    min_confidence: float | None = None,
) -> Matches:
    """The `top_k` images that match a sentence best: by confidence if the model is calibrated, else by cosine.

    Confidence allows for images that are near to every sentence, so it is the better order (benchmarks/confidence.py).

    model: a loaded model, or the name of one as for `load_model`; None: the one that comes with clipmatch. images: a
    folder (searched with its subfolders) or a list of files. Each image is embedded once and remembered; a bad one is
    left out and listed in the result's `failures`. min_confidence: leave out those that are less probable than this;
    the result may be empty.
    Raises ClipmatchError when the query is empty, the folder has no pictures, none of them can be read, or confidence
    is asked of a model that was never evaluated.
    """
    if not query.strip():
        raise ClipmatchError("The query is empty; type what the photograph shows.")
    if top_k < 1:
        raise ClipmatchError(f"top_k is {top_k}; ask for at least one match.")
    paths = list_images(images) if isinstance(images, str | Path) else [Path(path) for path in images]
    if not paths:
        raise ClipmatchError("The list of images is empty; name at least one.")
    embedder = load_model(model) if model is None or isinstance(model, str | Path) else model
    calibration = getattr(embedder, "calibration", None)
    if calibration is None and min_confidence is not None:
        raise ClipmatchError(
            "This model is not calibrated, so it knows no confidence; run clipmatch evaluate with it once, on "
            "captioned pictures that it was not trained on."
        )
    gallery = embed_remembered(embedder, paths, progress)
    if not gallery.paths:
        raise ClipmatchError(f"None of the {len(paths)} images can be read; the first: {gallery.failures[0].reason}.")
    row = embedder.embed_texts([query])[0]
    scores = gallery.rows @ row  # [n]
    chances = calibration.probabilities(row, gallery.rows) if calibration else None
    order = np.argsort(-scores, kind="stable") if chances is None else np.lexsort((-scores, -chances))
    found = [
        Match(gallery.paths[i], float(scores[i]), None if chances is None else float(chances[i])) for i in order[:top_k]
    ]
    sure = [match for match in found if min_confidence is None or (match.confidence or 0.0) >= min_confidence]
    return Matches(query, sure, gallery.failures, found[0])
