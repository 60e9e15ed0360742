"""What a person asks for -> terms: sentences, example pictures and taught concepts, each with its weight.

In: the words of a command line, or a string. Out: a `Query`, and its terms' vectors. Knows nothing of indexes.

    "two dogs in the snow"          a sentence
    "@rex on a beach"               a concept that was taught, and a sentence
    photo.jpg                       an example: photographs like this one
    "at night" photo.jpg            both at once
    "dog:2" "snow"                  weights; 1 if not given
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipmatch.embedder import Embedder
from clipmatch.errors import ClipmatchError
from clipmatch.imageformats import is_image_name

WEIGHT = re.compile(r"(?P<what>.*[^\s\d])\s*:(?P<weight>\d+(\.\d+)?)", re.DOTALL)
MOST_WEIGHT = 1000
NAME = re.compile(r"(?<!\S)@(?P<name>\w+(?:-\w+)*)")  # not the middle of an address


@dataclass(frozen=True)
class Term:
    """A sentence, a picture file that shows what is meant, or the name of a concept; weight > 0.

    row [d]: its unit vector, if it is known; that of a concept is found by `Query.with_concepts`.
    """

    text: str = ""
    image: Path | None = None
    weight: float = 1.0
    row: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    concept: str = ""

    def __str__(self) -> str:
        return str(self.image) if self.image else f"@{self.concept}" if self.concept else self.text

    @property
    def kind(self) -> str:
        """Of what kind its cosines are: "text", "image" or "concept"."""
        return "image" if self.image else "concept" if self.concept else "text"


@dataclass(frozen=True)
class Query:
    """Terms that all should hold."""

    terms: tuple[Term, ...]

    def __str__(self) -> str:
        return " + ".join(str(term) for term in self.terms)

    @property
    def text(self) -> str:
        """The sentences alone."""
        return " ".join(term.text for term in self.terms if term.kind == "text")

    @property
    def is_text(self) -> bool:
        """Whether every term is a sentence."""
        return all(term.kind == "text" for term in self.terms)

    @property
    def is_mixed(self) -> bool:
        """Whether there are terms of several kinds."""
        return len({term.kind for term in self.terms}) > 1

    @property
    def concepts(self) -> list[str]:
        """The names of the concepts whose directions are not known yet."""
        return [term.concept for term in self.terms if term.concept and term.row is None]

    def with_concepts(self, rows: Mapping[str, NDArray[np.float32]]) -> Query:
        """The same with the directions [d] of its concepts, by name. Raises KeyError for one that is missing."""
        return Query(
            tuple(
                replace(term, row=rows[term.concept]) if term.concept and term.row is None else term
                for term in self.terms
            )
        )

    @property
    def weights(self) -> NDArray[np.float32]:
        """The weights [t] of the terms."""
        return np.array([term.weight for term in self.terms], np.float32)

    def vectors(self, embedder: Embedder) -> NDArray[np.float32]:
        """Unit rows [t, d] of the terms. Raises ClipmatchError when an example can't be read."""
        texts = [term.text for term in self.terms if term.kind == "text"]
        images = [term.image for term in self.terms if term.image and term.row is None]
        found = embedder.embed_images(images, progress=False) if images else None
        if found and found.failures:
            raise ClipmatchError(f"The example {found.failures[0].path} can't be read: {found.failures[0].reason}.")
        rows = {"text": iter(embedder.embed_texts(texts) if texts else ()), "image": iter(found.rows if found else ())}
        return np.stack([next(rows[term.kind]) if term.row is None else term.row for term in self.terms])


def parse_query(parts: str | Path | Sequence[str | Path]) -> Query:
    """Strings and paths -> a query.

    A `Path`, and a string that names a picture file which exists, is an example; a lone "+" between terms is for the
    eye. Raises ClipmatchError when nothing is asked, or an example does not exist.
    """
    listed = [parts] if isinstance(parts, str | Path) else list(parts)
    asked = [part for part in listed if isinstance(part, Path) or part.strip() not in ("", "+")]
    terms = [term for part in asked for term in parse_terms(part)]
    if not terms:
        raise ClipmatchError("The query is empty; type what the photograph shows.")
    return Query(tuple(terms))


def parse_terms(part: str | Path) -> list[Term]:
    """One string or path -> its term; of a sentence with concepts in it one for each, and one for the words."""
    if isinstance(part, Path):
        return [example(part, 1.0)]
    what, weight = part.strip(), 1.0
    if not is_picture(what) and (match := WEIGHT.fullmatch(what)):
        what, weight = match["what"].strip(), float(match["weight"])
        if not weight:
            raise ClipmatchError(f"The weight of {what!r} is 0; leave it out, or exclude it with --not.")
        if weight > MOST_WEIGHT:
            raise ClipmatchError(f"The weight of {what!r} is above {MOST_WEIGHT:,}; others would count for nothing.")
    if is_picture(what):
        return [example(Path(what), weight)]
    return terms_of(what, weight)


def terms_of(sentence: str, weight: float = 1.0) -> list[Term]:
    """A sentence, never taken for the name of a file -> a term for each "@name" in it, and one for the other words."""
    concepts = [Term(concept=match["name"], weight=weight) for match in NAME.finditer(sentence)]
    if not concepts:
        return [Term(sentence, None, weight)]
    words = " ".join(NAME.sub(" ", sentence).split()).strip(" ,;")
    return concepts + [Term(words, None, weight)] * bool(re.search(r"\w", words))


def concept_name(name: str) -> str:
    """A concept's name without its "@". Raises ClipmatchError for what could not stand in a query."""
    plain = name.strip().removeprefix("@")
    if not NAME.fullmatch(f"@{plain}"):
        raise ClipmatchError(f"The name {name!r} can't be a concept's; use letters, digits, - and _, such as @rex.")
    return plain


def example(path: Path, weight: float) -> Term:
    """A picture file as a term."""
    path = path.expanduser()
    if not path.is_file():
        raise ClipmatchError(f"The example {path} does not exist; check its name.")
    return Term("", path, weight)


def is_picture(text: str) -> bool:
    """Whether a string names a picture file that exists."""
    try:
        return is_image_name(Path(text).name) and Path(text).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # a sentence can be too long for a name; "~nobody/x.jpg"
        return False
