"""What goes over the wire between the server and its clients: questions and answers as JSON.

In: photographs and matches of an index. Out: plain models, from which FastAPI makes the description at /openapi.json.
Knows nothing of HTTP. A photograph's path is shown, never taken: clients name photographs by their numbers.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from datetime import date, datetime, time
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from clipmatch.output import printable
from clipmatch.photo import Photo
from clipmatch.search import Match, Matches, Request
from clipmatch.storage import PhotoStore
from clipmatch.store import Filter

LONGEST = 1000  # characters of a query
MANY = 500  # photographs that may be ticked or crossed
DAY = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
Named: TypeAlias = "Callable[[Path], str]"


def a_day(value: Any) -> Any:
    """A text that is a day as the description has it; Pydantic also takes moments, and seconds since 1970."""
    if not isinstance(value, date) and not (isinstance(value, str) and DAY.fullmatch(value)):
        raise PydanticCustomError("day", "Input should be a day, such as 2023-06-15")
    return value


# Of each kind what JSON has of it: Pydantic also takes true and "1" for numbers, and 1 and "yes" for true.
Whole: TypeAlias = Annotated[int, Field(strict=True)]
Part: TypeAlias = Annotated[float, Field(strict=True)]
Truth: TypeAlias = Annotated[bool, Field(strict=True)]
Day: TypeAlias = Annotated[date, BeforeValidator(a_day)]
Id: TypeAlias = Annotated[int, Field(strict=True, ge=0, lt=1 << 53)]  # the number of a photograph
# A camera's clock knows no zone, which the form that OpenAPI calls "date-time" has to have.
Moment: TypeAlias = Annotated[datetime, WithJsonSchema({"type": "string", "title": "ISO 8601, without a zone"})]
EITHER = {"anyOf": [{"type": "string"}, {"type": "number"}]}
PAIR = WithJsonSchema({"type": "array", "minItems": 2, "maxItems": 2, "items": EITHER})  # as older tools read it too


class Strict(BaseModel):
    """A question; a key that is not known is a typo, and the answer says so."""

    model_config = ConfigDict(extra="forbid")


class Where(Strict):
    """Which photographs take part. before: itself left out. min_side: pixels. min_size: bytes. folder: as in status."""

    after: Day | None = None
    before: Day | None = None
    camera: str | None = Field(default=None, max_length=LONGEST)
    min_side: Whole | None = Field(default=None, ge=1, lt=1 << 53)
    min_size: Whole | None = Field(default=None, ge=1, lt=1 << 53)
    has_caption: Truth = False
    folder: str | None = Field(default=None, max_length=10 * LONGEST)

    def filter(self, folders: Mapping[str, Path]) -> Filter:
        """The same for an index with these folders, by name. Raises KeyError for a folder that is none of them."""
        return Filter(
            folders=(folders[self.folder],) if self.folder else (),
            after=datetime.combine(self.after, time()) if self.after else None,
            before=datetime.combine(self.before, time()) if self.before else None,
            camera=self.camera or None,
            min_side=self.min_side,
            min_size=self.min_size,
            has_caption=self.has_caption,
        )


class Listing(Strict):
    """Which photographs to list, and which page of them."""

    where: Where = Where()
    page: Whole = Field(default=1, ge=1, le=2000)
    size: Whole = Field(default=60, ge=1, le=200)


class Question(Listing):
    """What to search for: a sentence, the number of a photograph that is alike, ticked and crossed ones; or several.

    exclude: what must not be shown. min_confidence: is of use for sentences alone. hybrid: words of captions and file
    names count too.
    """

    query: str = Field(default="", max_length=LONGEST)
    like: Id | None = None
    liked: list[Id] = Field(default=[], max_length=MANY)
    disliked: list[Id] = Field(default=[], max_length=MANY)
    exclude: list[str] = Field(default=[], max_length=20)
    min_confidence: Part | None = Field(default=None, ge=0, le=1)
    hybrid: Truth = False

    def request(self, folders: Mapping[str, Path], sentence: bool) -> Request:
        """How to search for it. sentence: whether that is one and nothing else."""
        return Request(
            exclude=tuple(text.strip() for text in self.exclude if text.strip()),
            where=self.where.filter(folders),
            top_k=self.size,
            page=self.page,
            min_confidence=self.min_confidence if sentence else None,
            hybrid=self.hybrid and sentence,
        )


class Lesson(Strict):
    """A concept to learn: its name, with or without "@", and numbers of photographs that show it, or do not."""

    name: str = Field(max_length=100)
    liked: list[Id] = Field(min_length=1, max_length=MANY)
    disliked: list[Id] = Field(default=[], max_length=MANY)


class NewName(Strict):
    """What a concept is to be called."""

    name: str = Field(max_length=100)


class WhyQuestion(Strict):
    """The photograph that is to be explained, and the sentence."""

    id: Id
    query: str = Field(min_length=1, max_length=LONGEST)


class PaintQuestion(Strict):
    """What to paint: as `clipmatch generate` takes it, but for files.

    steps: None for as many as are worth taking. n: how many are tried; the best is sent.
    """

    prompt: str = Field(min_length=1, max_length=LONGEST)
    seed: Whole = Field(default=0, ge=0, lt=1 << 31)
    steps: Whole | None = Field(default=None, ge=0, le=1000)
    n: Whole = Field(default=1, ge=1, le=16)


class Problem(BaseModel):
    """What went wrong, in a sentence."""

    detail: str


class PaintEvent(BaseModel):
    """A painting on its way. steps: planned, once that is known. image: as it is after that step, as a data URL."""

    step: int
    steps: int | None
    image: str | None = None


class PhotoRow(BaseModel):
    """A photograph. size: bytes. width, height: pixels, upright. moment: when it was taken, or its file was written.

    thumb, full: where its pictures are, seen from the page.
    """

    id: int
    name: str
    path: str
    size: int
    width: int
    height: int
    taken: Moment | None
    moment: Moment
    camera: str | None
    caption: str | None
    thumb: str
    full: str


class MatchRow(PhotoRow):
    """A photograph that matches. duplicates: how many near-duplicates are stacked below it."""

    score: float | None = None
    confidence: float | None = None
    duplicates: int = 0


class Answer(BaseModel):
    """A page of matches. best: the best one, if its confidence was too low to be listed. more: there may be a page."""

    matches: list[MatchRow]
    best: MatchRow | None
    searched: int
    vetoed: int
    more: bool


class Finished(BaseModel):
    """A painting: a PNG as a data URL, its score by the guide, its seed, and the photographs nearest to it."""

    image: str
    score: float
    seed: int
    nearest: list[MatchRow]


class Status(BaseModel):
    """What is served. paints: whether there is a generator."""

    photos: int
    paints: bool
    model: str
    calibrated: bool
    folders: list[str]


class ConceptRow(BaseModel):
    """A concept that was taught. precision: by leaving out each example once. cover: a picture of an example."""

    name: str
    precision: float | None
    examples: int
    others: int
    cover: str | None


class Why(BaseModel):
    """image: the photograph with the heat over it, as a data URL. words: what each adds to the score."""

    image: str
    words: list[Annotated[tuple[str, float], PAIR]]
    score: float


class Statistics(BaseModel):
    """What the collection is made of; lists are pairs of a value and how many photographs have it."""

    photos: int
    bytes: int
    captions: int
    failed: int
    years: list[Annotated[tuple[str, int], PAIR]]
    cameras: list[Annotated[tuple[str, int], PAIR]]
    formats: list[Annotated[tuple[str, int], PAIR]]


def photo_values(number: int, photo: Photo, named: Named) -> dict[str, Any]:
    """The values of a `PhotoRow`. named: the path as clients may see it."""
    data, version = photo.metadata, photo.digest[:16]
    return {
        "id": number,
        "name": printable(photo.path.name),
        "path": named(photo.path),
        "size": photo.stamp.size,
        "width": max(data.width, 1),
        "height": max(data.height, 1),
        "taken": data.taken,
        "moment": data.taken or datetime.fromtimestamp(photo.stamp.mtime / 1e9),
        "camera": clean(data.camera),
        "caption": clean(data.caption),
        "thumb": f"api/photos/{number}/thumb?v={version}",
        "full": f"api/photos/{number}/full?v={version}",
    }


def clean(text: str | None) -> str | None:
    """Text that UTF-8 can hold."""
    return text and text.encode("utf-8", "replace").decode()


def data_url(data: bytes, media_type: str) -> str:
    """A file as an address that holds it."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def photo_row(number: int, photo: Photo, named: Named) -> PhotoRow:
    """A photograph of the index."""
    return PhotoRow(**photo_values(number, photo, named))


def match_row(numbers: Mapping[Path, int], match: Match | None, named: Named) -> MatchRow | None:
    """A match; None if its photograph has just left the index."""
    number = numbers.get(match.path) if match else None
    if match is None or match.photo is None or number is None:
        return None
    return MatchRow(
        **photo_values(number, match.photo, named),
        score=match.score,
        confidence=match.confidence,
        duplicates=len(match.duplicates),
    )


def answer_of(store: PhotoStore, matches: Matches, size: int, named: Named) -> Answer:
    """A page of matches, of which `size` were asked for."""
    shown = matches or [matches.best] * (matches.best is not None)
    numbers = store.numbers_of(match.path for match in shown if match)
    rows = [row for match in matches if (row := match_row(numbers, match, named))]
    best = None if matches else match_row(numbers, matches.best, named)
    return Answer(matches=rows, best=best, searched=matches.searched, vetoed=matches.vetoed, more=len(matches) == size)
