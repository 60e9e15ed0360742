"""What an index says, which may come from a stranger: what makes sense, and what does not.

In: values as they were read from a store. Out: the same, or ValueError and its like, which `making_sense` puts into one
sentence. Knows nothing of SQLite or Lance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipmatch.errors import ClipmatchError
from clipmatch.photo import Photo, Stamp
from clipmatch.teaching import Concept

DIGEST = 64  # digits of a SHA-256
ROUNDED = 0.01  # by which the length of a unit row may differ from 1, above what numbers of 16 bits round off
SENSELESS = (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError)


@contextmanager
def making_sense(path: Path | str | None = None) -> Iterator[None]:
    """What can't be made of stored values, in one sentence."""
    try:
        yield
    except SENSELESS as error:
        where = f"The index {path}" if path else "The index"
        raise ClipmatchError(f"{where} is damaged ({error}); delete it and index the folders again.") from error


def require(condition: bool, otherwise: str) -> None:
    """Raise ValueError that says what is wrong, unless a condition holds."""
    if not condition:
        raise ValueError(otherwise)


def check_path(path: Path) -> Path:
    """A path that a file or folder could have."""
    require(bool(path.parts) and "\0" not in str(path), "a path is none")
    return path


def check_stamp(stamp: Stamp) -> Stamp:
    """The stamp of a file."""
    require(all(isinstance(value, int) for value in vars(stamp).values()), "a size or a time is no whole number")
    return stamp


def check_photo(photo: Photo) -> Photo:
    """A photograph whose values are of the right kinds already."""
    check_path(photo.path)
    check_stamp(photo.stamp)
    data = photo.metadata
    require(len(photo.digest) == DIGEST and set(photo.digest) <= set("0123456789abcdef"), "a content is none")
    require(data.width > 0 and data.height > 0, "a photograph has no pixels")
    require(all(place is None or math.isfinite(place) for place in (data.latitude, data.longitude)), "a place is none")
    require(isinstance(photo.picture_hash, int), "a picture hash is missing")
    return photo


def check_rows(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Unit rows [n, d], or one [d]: their products are taken for cosines, so others would come before all, or after."""
    require(bool(are_unit(rows).all()), "a vector is not of length 1")
    return rows


def are_unit(rows: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which of some rows [n, d] are of length 1 [n]; of one [d] whether it is."""
    squares = np.einsum("...d,...d->...", rows, rows)  # in one pass, which takes no longer than a look at each number
    fine: NDArray[np.bool_] = np.abs(np.sqrt(squares) - 1) <= ROUNDED  # no comparison with NaN is true
    return fine


def check_concept(model: str, concept: Concept, width: int | None) -> tuple[str, Concept]:
    """A concept, and the fingerprint of the model that it was taught to. width: of that model's rows, if known."""
    require(isinstance(model, str) and isinstance(concept.name, str), "a concept has no name or no model")
    require(concept.row.shape == (width or concept.row.size,), f"the vector of @{concept.name} has another length")
    require(isinstance(concept.precision, float | None), f"the precision of @{concept.name} is no number")
    require(bool(are_unit(concept.row)), f"the vector of @{concept.name} is not of length 1")
    for path in (*concept.examples, *concept.others):
        check_path(path)
    return model, concept


def check_failure(stamp: Stamp, reason: str) -> tuple[Stamp, str]:
    """Why a file could not be used."""
    require(isinstance(reason, str), "a reason is no text")
    return check_stamp(stamp), reason


def check_labels(counts: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """How many there are of each of some names."""
    require(all(isinstance(label, str) for label, _ in counts), "a name is no text")
    return list(counts)
