"""Questions of clients -> answers of an index, and pictures of its photographs.

In: questions as they came over the wire, an index or its `Service`. Out: answers for the wire. What of the files may be
shown is asked of exposure.py, what is decoded goes through decoder.py. Knows nothing of addresses.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from numpy.typing import NDArray

from clipmatch.decoder import SENT
from clipmatch.desk import CHANGED, Service
from clipmatch.embedder import BatchedEmbedder, Embedder
from clipmatch.errors import ClipmatchError
from clipmatch.exposure import NOT_SHOWN, View
from clipmatch.imageformats import SUFFIXES
from clipmatch.index import Index
from clipmatch.photo import Photo
from clipmatch.preprocess import ImageError
from clipmatch.query import Query, Term, terms_of
from clipmatch.renditions import FULL, SHOWN, Kind, keep, kept
from clipmatch.studio import Studio, file_of
from clipmatch.wire import (
    Answer,
    ConceptRow,
    Finished,
    Listing,
    MatchRow,
    PaintEvent,
    PaintQuestion,
    Question,
    Status,
    Why,
    answer_of,
    clean,
    data_url,
    photo_row,
    photo_values,
)

if TYPE_CHECKING:
    from clipmatch.generation.painter import Painted

NEAREST = 12  # photographs that are shown beside a painting
EXPLAINED = 1280  # pixels of the longer side of a picture with its heat
PART = 1 << 18  # bytes of a file that are sent at once

# What there is ------------------------------------------------------------------------------------------------------


def view_of(service: Service, index: Index) -> View:
    """An index as clients see it now."""
    return service.exposure.of(index.store.roots())


def status_of(service: Service, index: Index) -> Status:
    """What is served."""
    bound = index.store.model
    name = bound.name if bound and bound.name else "the one that comes with clipmatch"
    return Status(
        photos=len(index),
        paints=service.studio is not None,
        model=name if service.exposure.originals else Path(name).name,
        calibrated=index.calibration is not None,
        folders=list(view_of(service, index).folders()),
    )


def find(service: Service, index: Index, question: Question, row: NDArray[np.float32] | None = None) -> Answer:
    """The answer to a question; row [d]: the picture that was sent with it."""
    view = view_of(service, index)
    asked, ticked = query_of(index, question, row), bool(question.liked or question.disliked)
    request = question.request(view.folders(), sentence=asked is not None and asked.is_text and not ticked)
    if ticked:
        liked, disliked = paths_of(index, question.liked), paths_of(index, question.disliked)
        matches = index.refine(asked, liked, disliked, request)
    elif asked is None:
        raise ClipmatchError("The query is empty; type what the photograph shows.")
    else:
        matches = index.answer(asked, request)
    return answer_of(index.store, matches, question.size, view.named)


async def find_by(service: Service, embedder: Embedder, row: NDArray[np.float32], question: Question) -> Answer:
    """What matches the row [d] of a picture that was embedded by a model, if that is still the index's."""

    def ask(index: Index) -> Answer:
        if index.embedder is not embedder:
            raise ClipmatchError(CHANGED)
        return find(service, index, question, row)

    return await service.desk.ask(ask)


def query_of(index: Index, question: Question, row: NDArray[np.float32] | None) -> Query | None:
    """What is asked for, apart from ticks; None if nothing is.

    Not by `parse_query`: to it a sentence may be the name of a file, and clients have no say in which files are read.
    """
    terms = []
    if text := question.query.strip():
        terms += terms_of(text)
    if question.like is not None:
        photo = index.store.photo(question.like)
        alike = index.store.vector(photo.digest)
        if alike is None:  # without it the file would be read, wherever it lies
            raise KeyError(question.like)
        terms.append(Term("", photo.path, row=alike))
    if row is not None:
        terms.append(Term("", Path("the picture"), row=row))
    return Query(tuple(terms)) if terms else None


def browse(service: Service, index: Index, listing: Listing) -> Answer:
    """All photographs that pass, the newest first."""
    view = view_of(service, index)
    where = listing.where.filter(view.folders())
    with index.store.snapshot():
        numbers = index.store.newest(where, listing.size, (listing.page - 1) * listing.size)
        photos = zip(numbers, index.store.photos_of(numbers), strict=True)
        rows = [MatchRow(**photo_values(number, photo, view.named)) for number, photo in photos]
        count = index.store.count(where)
    more = listing.page * listing.size < count
    return Answer(matches=rows, best=None, searched=count, vetoed=0, more=more)


def concept_rows(service: Service, index: Index) -> list[ConceptRow]:
    """All that were taught."""
    return [concept_row(service, index, concept) for concept in index.concepts()]


def concept_row(service: Service, index: Index, concept: Any) -> ConceptRow:
    """A concept, with the first of its examples that is still there."""
    numbers = index.store.numbers_of(concept.examples)
    number = next((numbers[path] for path in concept.examples if path in numbers), None)
    cover = None if number is None else photo_row(number, index.store.photo(number), view_of(service, index).named)
    return ConceptRow(
        name=concept.name,
        precision=concept.precision,
        examples=len(concept.examples),
        others=len(concept.others),
        cover=cover.thumb if cover else None,
    )


def paths_of(index: Index, numbers: list[int]) -> list[Path]:
    """The files of photographs."""
    return [photo.path for photo in index.store.photos_of(numbers)]


def shown_paths(service: Service, index: Index, numbers: list[int]) -> list[Path]:
    """The same, to be read. Raises ImageError for one that may not be shown."""
    view, paths = view_of(service, index), paths_of(index, numbers)
    for path in paths:
        if view.root_of(path) is None:
            raise ImageError(path, NOT_SHOWN)
    return paths


# Pictures -----------------------------------------------------------------------------------------------------------


async def picture(service: Service, number: int, kind: Kind, request: Request) -> Response:
    """A picture of a photograph; or the file itself, if it may be had and browsers know its format; or word that the
    client has it already.
    """

    def at_hand() -> Response | None:
        with view.open(photo) as source:
            head = freshness(photo, kind.name, source.same, request)
            if not source.same:
                return None
            if request.headers.get("if-none-match") == head["ETag"]:
                return Response(status_code=304, headers=head)
            if kind == FULL and view.originals and source.file and (form := shown_as(photo)):
                return whole(source.file, photo, form, request)
            data = kept(photo.digest, kind)
            return None if data is None else Response(data, media_type=kind.media_type, headers=head)

    def drawn() -> Response:
        with view.open(photo) as source:
            data = kept(photo.digest, kind) if source.same else None  # by now: several may have waited for it
            if data is None:
                data = service.decoders.draw(photo.path, kind, source.read())
                if source.same:
                    keep(photo.digest, kind, data)
            return Response(data, media_type=kind.media_type, headers=freshness(photo, kind.name, source.same, request))

    photo, view = await service.desk.ask(lambda index: (index.store.photo(number), view_of(service, index)))
    answer = await asyncio.to_thread(at_hand)
    return await service.compute(drawn, request) if answer is None else answer


def shown_as(photo: Photo) -> str | None:
    """The media type of a file that browsers show as it is."""
    return SHOWN.get(photo.path.suffix.lower())


def whole(file: IO[bytes], photo: Photo, media_type: str, request: Request) -> Response:
    """An open file as it is, through a descriptor of its own."""
    head = freshness(photo, "file", True, request)
    if request.headers.get("if-none-match") == head["ETag"]:
        return Response(status_code=304, headers=head)
    head["Content-Length"] = str(os.fstat(file.fileno()).st_size)
    again = os.fdopen(os.dup(file.fileno()), "rb")  # what reads it closes it

    def parts() -> Iterator[bytes]:
        with again:
            left = int(head["Content-Length"])
            while left and (part := again.read(min(PART, left))):
                left -= len(part)
                yield part

    return StreamingResponse(parts(), media_type=media_type, headers=head)


def tag(photo: Photo, kind: str) -> str:
    """The name of a picture's content."""
    return f'"{photo.digest[:32]}-{kind}"'


def freshness(photo: Photo, kind: str, same: bool, request: Request) -> dict[str, str]:
    """How long a picture stays good: for ever, if its address names the content that was indexed."""
    if not same:
        return {"Cache-Control": "no-store"}
    named = request.query_params.get("v") == photo.digest[:16]
    lasting = "private, max-age=31536000, immutable" if named else "private, no-cache"
    return {"Cache-Control": lasting, "ETag": tag(photo, kind)}


def embed(service: Service, embedder: Embedder, data: bytes, suffix: str) -> NDArray[np.float32]:
    """The bytes of a picture file -> its unit row [d]. suffix: of its name, by which RAW files are told."""
    path = Path("picture").with_suffix(suffix if suffix in SUFFIXES else "")

    def read(path: Path, min_size: int | None) -> Any:
        return service.decoders.read(path, min_size, data, SENT)

    found = embedder.embed_images([path], progress=False, read=read)
    if found.failures:
        raise ClipmatchError(f"That picture can't be read: {found.failures[0].reason}.")
    row: NDArray[np.float32] = found.rows[0]
    return row


def why(service: Service, query: Query, photo: Photo, view: View) -> Why:
    """The explanation of a match, with its picture."""
    from clipmatch.explain import explain

    embedder = cast(BatchedEmbedder, service.embedder)  # as all that `load_model` gives are
    with view.open(photo) as source:
        shown = service.decoders.read(photo.path, max(EXPLAINED, embedder.preprocess.size), source.read())
    found = explain(embedder, query, photo.path, shown)
    buffer = BytesIO()
    found.picture(EXPLAINED).convert("RGB").save(buffer, "jpeg", quality=85)
    image = data_url(buffer.getvalue(), "image/jpeg")
    return Why(image=image, words=[(word, float(change)) for word, change in found.words], score=float(found.score))


# Paintings ----------------------------------------------------------------------------------------------------------


async def painting(service: Service, studio: Studio, question: PaintQuestion) -> AsyncIterator[str]:
    """The lines of an answer to a prompt."""
    try:
        async with aclosing(studio.paint(question)) as events:
            async for event in events:
                told = event if isinstance(event, PaintEvent) else await finished(service, event)
                yield told.model_dump_json() + "\n"
    except ClipmatchError as error:
        yield json.dumps({"detail": clean(service.exposure.told(str(error)))}) + "\n"


async def finished(service: Service, painted: Painted) -> Finished:
    """A painting, beside the photographs that the index finds nearest to it."""
    data = await asyncio.to_thread(file_of, painted)
    embedder = service.embedder
    row = await asyncio.to_thread(embed, service, embedder, data, ".png")
    found = await find_by(service, embedder, row, Question(size=NEAREST))
    image = data_url(data, "image/png")
    return Finished(image=image, score=painted.score, seed=int(painted.facts["seed"]), nearest=found.matches)
