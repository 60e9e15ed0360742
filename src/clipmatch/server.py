"""An index over HTTP, and the page that asks it.

In: an index file. Out: a FastAPI application: `/api/...` (described at /openapi.json, in short at /docs) and the page
in `web/`. Only photographs of the index are ever read, and clients name them by number. Needs the extra `serve`.

SQLite's connections belong to threads, so the index is open in two of them that share the model: one answers, the other
does what may take long. The index may change meanwhile: each question sees it as it is then. If it changes over to
another model, the server follows; if another file takes its place, that is opened.
"""

from __future__ import annotations

import asyncio
import json
import mimetypes
import tempfile
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi import Path as Segment
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from numpy.typing import NDArray
from pydantic import ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from clipmatch.archive import locate
from clipmatch.embedder import BatchedEmbedder, Embedder, load_model
from clipmatch.errors import ClipmatchError
from clipmatch.generation.prompts import parse_prompts
from clipmatch.guard import Guard
from clipmatch.imageformats import SUFFIXES
from clipmatch.index import Index
from clipmatch.output import printable
from clipmatch.photo import Photo
from clipmatch.preprocess import ImageError
from clipmatch.query import Query, Term, terms_of
from clipmatch.remote import is_remote
from clipmatch.renditions import FULL, SHOWN, THUMB, Kind, forget_unwanted, is_unchanged, render
from clipmatch.runtime import usable_cores
from clipmatch.store import OtherModel
from clipmatch.studio import Studio, file_of
from clipmatch.wire import (
    Answer,
    ConceptRow,
    Finished,
    Lesson,
    Listing,
    MatchRow,
    NewName,
    PaintEvent,
    PaintQuestion,
    PhotoRow,
    Question,
    Statistics,
    Status,
    Why,
    WhyQuestion,
    answer_of,
    clean,
    data_url,
    photo_row,
    photo_values,
)

if TYPE_CHECKING:
    from clipmatch.generation.painter import Painted

Result = TypeVar("Result")

PAGE = Path(__file__).parent / "web"
GROUPS = 500  # of near-duplicates that are listed
NEAREST = 12  # photographs that are shown beside a painting
VALUES = 30  # cameras and formats that are listed
GONE = 404
CHANGED = "The index was changed over to another model just now; ask again."


class Desk:
    """An index and the one thread that asks it."""

    def __init__(self, path: Path | str, service: Service):
        self._path, self._service = path, service
        self._thread = ThreadPoolExecutor(1, "index")
        self._index: Index | None = None
        self._file: tuple[int, int] | None = None

    async def ask(self, question: Callable[[Index], Result]) -> Result:
        """What the index answers. Raises HTTPException if a photograph is not, or no longer, in it."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._answer, question)

    def _answer(self, question: Callable[[Index], Result]) -> Result:
        index = self._opened()
        try:
            return question(index)
        except OtherModel as error:
            self._service.follow(index)
            self._close()
            raise ClipmatchError(CHANGED) from error
        except KeyError as error:
            raise HTTPException(GONE, f"{error.args[0]!r} is not in the index; it may have changed.") from error

    def close(self) -> None:
        """Let go of the file."""
        self._thread.submit(self._close)
        self._thread.shutdown()

    def _opened(self) -> Index:
        """The index that lies there now: to go on with one that was moved away or replaced could damage it."""
        file = file_at(self._path)
        if self._index is not None and file != self._file:
            self._close()
        if self._index is None:
            self._index, self._file = Index.open(self._path, self._service.embedder, create=False), file
        return self._index

    def _close(self) -> None:
        if self._index is not None:
            self._index.close()
            self._index = None


class Service:
    """What the endpoints share: two desks, the model, and turns for what keeps a core busy."""

    def __init__(self, path: Path | str, embedder: Embedder, studio: Studio | None):
        self.embedder, self.studio = embedder, studio
        self.desk, self.back = Desk(path, self), Desk(path, self)
        self.turns = asyncio.Semaphore(usable_cores())
        self._following = Lock()

    def follow(self, index: Index) -> None:
        """Load the model that the index was changed over to. Raises ClipmatchError if it can't be loaded."""
        with self._following:
            bound = index.store.model
            if bound and bound.fingerprint != self.embedder.fingerprint:
                self.embedder = load_model(bound.name)

    async def find_by(self, embedder: Embedder, row: NDArray[np.float32], question: Question) -> Answer:
        """What matches the row [d] of a picture that was embedded by a model, if that is still the index's."""

        def ask(index: Index) -> Answer:
            if index.embedder is not embedder:
                raise ClipmatchError(CHANGED)
            return find(index, question, row)

        return await self.desk.ask(ask)

    async def compute(self, work: Callable[[], Result], request: Request) -> Result:
        """Do something in a thread when it is its turn, unless the client has gone by then."""
        async with self.turns:
            if await request.is_disconnected():
                raise HTTPException(499, "The client has gone.")
            return await asyncio.to_thread(work)

    def close(self) -> None:
        """Let go of the files."""
        self.desk.close()
        self.back.close()
        if self.studio is not None:
            self.studio.close()


def make_app(
    index_path: str | Path | None = None,
    model: str | Path | Embedder | None = None,
    token: str | None = None,
    studio: Studio | None = None,
) -> FastAPI:
    """The application for an index file; None: the one that `clipmatch index` makes, which may still be empty.

    token: who does not know it gets no answer. Without one only names of this computer are answered to, so serve it
    on a loopback address. studio: paints, if there is one. Raises ClipmatchError if there is no such index, or the
    model is not its own.
    """
    with Index.open(index_path, model, create=index_path is None) as index:
        path, embedder = index.store.path, index.embedder
        _ = index.calibration  # a damaged one is told now

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = Service(path, embedder, studio)
        tidying = asyncio.create_task(asyncio.to_thread(forget_unwanted))  # nobody has to wait for it
        yield
        await tidying
        app.state.service.close()

    app = FastAPI(title="clipmatch", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.include_router(api)
    app.add_api_route("/docs", listing, include_in_schema=False)
    app.add_api_route("/backend.js", backend, include_in_schema=False)
    mimetypes.add_type("text/javascript", ".js")  # Windows may know another
    app.mount("/", StaticFiles(directory=PAGE, html=True))
    app.add_middleware(Guard, token=token)
    app.add_exception_handler(ClipmatchError, tell)
    app.add_exception_handler(RequestValidationError, tell_invalid)
    app.add_exception_handler(ValidationError, tell_invalid)
    app.add_exception_handler(StarletteHTTPException, tell_status)
    app.add_exception_handler(Exception, tell_bug)
    return app


# Errors: {"detail": a sentence} --------------------------------------------------------------------------------------


async def tell(request: Request, error: Any) -> Response:
    """A problem that the person can mend; a picture that is gone or can't be read."""
    if isinstance(error, ImageError):
        return JSONResponse({"detail": f"The photograph can't be shown: {clean(error.reason)}."}, GONE)
    return JSONResponse({"detail": clean(str(error))}, 400)


async def tell_invalid(request: Request, error: Any) -> Response:
    """A question that is not of the form that is described."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body") or "the request"
    return JSONResponse({"detail": clean(f"{place}: {first['msg']}.")}, 422)


async def tell_status(request: Request, error: Any) -> Response:
    """What Starlette and the endpoints raise."""
    return JSONResponse({"detail": clean(str(error.detail))}, error.status_code, error.headers)


async def tell_bug(request: Request, error: Any) -> Response:
    """Anything else; its traceback is in the log."""
    return JSONResponse({"detail": "The server has failed; its terminal says why."}, 500)


# Page and description -----------------------------------------------------------------------------------------------


async def backend() -> Response:
    """The page's way to this server."""
    return FileResponse(PAGE / "server.js", media_type="text/javascript")


async def listing(request: Request) -> Response:
    """The endpoints in a few lines."""
    lines = [
        f"{method.upper():7}{path:32}{about['summary']}"
        for path, methods in request.app.openapi()["paths"].items()
        for method, about in methods.items()
    ]
    return PlainTextResponse("\n".join(["The API of clipmatch; /openapi.json has all of it.", "", *lines, ""]))


# API ----------------------------------------------------------------------------------------------------------------

api = APIRouter(prefix="/api")


async def find_service(request: Request) -> Service:
    """What the endpoints share."""
    service: Service = request.app.state.service
    return service


Shared = Annotated[Service, Depends(find_service)]
Number = Annotated[int, Segment(ge=0, lt=1 << 63)]  # of a photograph


@api.get("/status")
async def status(service: Shared) -> Status:
    """What is served."""

    def ask(index: Index) -> Status:
        bound = index.store.model
        name = bound.name if bound and bound.name else "the one that comes with clipmatch"
        folders = [printable(root) for root in root_paths(index)]
        calibrated = index.calibration is not None
        paints = service.studio is not None
        return Status(photos=len(index), paints=paints, model=name, calibrated=calibrated, folders=folders)

    return await service.desk.ask(ask)


@api.post("/search")
async def search(question: Question, service: Shared) -> Answer:
    """The photographs that match, best first."""
    return await service.desk.ask(lambda index: find(index, question))


@api.post("/search-image")
async def search_image(
    image: Annotated[UploadFile, File()], question: Annotated[str, Form()], service: Shared, request: Request
) -> Answer:
    """The same, by a picture that is sent: a form with `image` and, as JSON, `question`."""
    asked = Question.model_validate_json(question)
    data, suffix, embedder = await image.read(), Path(image.filename or "").suffix.lower(), service.embedder
    row = await service.compute(lambda: embed(embedder, data, suffix), request)
    return await service.find_by(embedder, row, asked)


@api.get("/photos/{number}/similar")
async def similar(number: Number, service: Shared, page: int = 1, size: int = 24) -> Answer:
    """Photographs like one of them, the nearest first."""
    question = Question(like=number, page=page, size=size)
    return await service.desk.ask(lambda index: find(index, question))


@api.post("/browse")
async def browse(listing: Listing, service: Shared) -> Answer:
    """All photographs, the newest first."""

    def ask(index: Index) -> Answer:
        where = listing.where.filter(root_paths(index))
        with index.store.snapshot():
            numbers = index.store.newest(where, listing.size, (listing.page - 1) * listing.size)
            photos = zip(numbers, index.store.photos_of(numbers), strict=True)
            rows = [MatchRow(**photo_values(number, photo)) for number, photo in photos]
            count = index.store.count(where)
        more = listing.page * listing.size < count
        return Answer(matches=rows, best=None, searched=count, vetoed=0, more=more)

    return await service.desk.ask(ask)


@api.post("/explain")
async def explain(question: WhyQuestion, service: Shared, request: Request) -> Why:
    """Where in a photograph, and through which words, a sentence matches."""

    def ask(index: Index) -> tuple[Query, Photo]:
        asked = Query(tuple(terms_of(question.query.strip())))
        return index.with_concepts(asked), index.store.photo(question.id)

    query, photo = await service.desk.ask(ask)
    return await service.compute(lambda: why(service.embedder, query, photo), request)


@api.post("/paint")
async def paint(question: PaintQuestion, service: Shared) -> StreamingResponse:
    """Paint a sentence: lines of JSON, `PaintEvent`s and at last `Finished`, or {"detail": what went wrong}."""
    if service.studio is None:
        raise HTTPException(GONE, "This server has no generator; see clipmatch serve --help.")
    parse_prompts(question.prompt, pictures=False)  # what can't be painted is told at once
    return StreamingResponse(painting(service, service.studio, question), media_type="application/x-ndjson")


@api.get("/concepts")
async def concepts(service: Shared) -> list[ConceptRow]:
    """What was taught."""
    return await service.desk.ask(lambda index: [concept_row(index, concept) for concept in index.concepts()])


@api.post("/concepts", status_code=201)
async def teach(lesson: Lesson, service: Shared) -> ConceptRow:
    """Learn a concept from photographs."""

    def ask(index: Index) -> ConceptRow:
        liked, disliked = paths_of(index, lesson.liked), paths_of(index, lesson.disliked)
        return concept_row(index, index.teach(lesson.name, liked, disliked))

    return await service.back.ask(ask)


@api.patch("/concepts/{name:path}")
async def rename_concept(name: str, new: NewName, service: Shared) -> list[ConceptRow]:
    """Give a concept another name."""

    def ask(index: Index) -> list[ConceptRow]:
        index.rename_concept(name, new.name)
        return [concept_row(index, concept) for concept in index.concepts()]

    return await service.back.ask(ask)


@api.delete("/concepts/{name:path}", status_code=204)
async def forget_concept(name: str, service: Shared) -> None:
    """Forget a concept."""
    await service.back.ask(lambda index: index.forget_concept(name))


@api.get("/duplicates")
async def duplicates(service: Shared) -> list[list[PhotoRow]]:
    """Groups of near-duplicates, the largest first."""

    def ask(index: Index) -> list[list[PhotoRow]]:
        groups = index.duplicates()[:GROUPS]
        numbers = index.store.numbers_of(photo.path for group in groups for photo in group)
        return [[photo_row(numbers[photo.path], photo) for photo in group] for group in groups]

    return await service.back.ask(ask)


@api.get("/statistics")
async def statistics(service: Shared) -> Statistics:
    """What the collection is made of."""

    def ask(index: Index) -> Statistics:
        tally = index.store.tally()
        failed = len(index.store.failures())
        return Statistics(
            **{**tally, "cameras": tally["cameras"][:VALUES], "formats": tally["formats"][:VALUES]}, failed=failed
        )

    return await service.back.ask(ask)


@api.get("/photos/{number}", summary="A photograph")
async def photo(number: Number, service: Shared) -> PhotoRow:
    """What is known of a photograph."""
    return await service.desk.ask(lambda index: photo_row(number, index.store.photo(number)))


@api.get("/photos/{number}/thumb", response_class=Response)
async def thumb(number: Number, service: Shared, request: Request) -> Response:
    """A small picture of a photograph."""
    found = await service.desk.ask(lambda index: index.store.photo(number))
    return await picture(service, found, THUMB, request)


@api.get("/photos/{number}/full", response_class=Response)
async def full(number: Number, service: Shared, request: Request) -> Response:
    """The photograph: the file itself, or a JPEG of it if browsers don't know its format."""
    found = await service.desk.ask(lambda index: index.store.photo(number))
    media_type = SHOWN.get(found.path.suffix.lower())
    here = locate(found.path) is None and not is_remote(found.path)
    if media_type is not None and here and await asyncio.to_thread(is_unchanged, found):
        return FileResponse(found.path, media_type=media_type, headers=freshness(found, "file", True, request))
    return await picture(service, found, FULL, request)


# How they do it -----------------------------------------------------------------------------------------------------


async def picture(service: Service, photo: Photo, kind: Kind, request: Request) -> Response:
    """A picture of a photograph, or word that the client has it already."""
    if request.headers.get("if-none-match") == tag(photo, kind.name) and await asyncio.to_thread(is_unchanged, photo):
        return Response(status_code=304, headers=freshness(photo, kind.name, True, request))
    data, same = await service.compute(lambda: render(photo, kind), request)
    return Response(data, media_type=kind.media_type, headers=freshness(photo, kind.name, same, request))


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


def find(index: Index, question: Question, row: NDArray[np.float32] | None = None) -> Answer:
    """The answer to a question; row [d]: the picture that was sent with it."""
    asked, ticked = query_of(index, question, row), bool(question.liked or question.disliked)
    request = question.request(root_paths(index), sentence=asked is not None and asked.is_text and not ticked)
    if ticked:
        liked, disliked = paths_of(index, question.liked), paths_of(index, question.disliked)
        matches = index.refine(asked, liked, disliked, request)
    elif asked is None:
        raise ClipmatchError("The query is empty; type what the photograph shows.")
    else:
        matches = index.answer(asked, request)
    return answer_of(index.store, matches, question.size)


def query_of(index: Index, question: Question, row: NDArray[np.float32] | None) -> Query | None:
    """What is asked for, apart from ticks; None if nothing is.

    Not by `parse_query`: to it a sentence may be the name of a file, and clients have no say in which files are read.
    """
    terms = []
    if text := question.query.strip():
        terms += terms_of(text)
    if question.like is not None:
        photo = index.store.photo(question.like)
        terms.append(Term("", photo.path, row=index.store.vector(photo.digest)))
    if row is not None:
        terms.append(Term("", Path("the picture"), row=row))
    return Query(tuple(terms)) if terms else None


def embed(embedder: Embedder, data: bytes, suffix: str) -> NDArray[np.float32]:
    """The bytes of a picture file -> its unit row [d]. suffix: of its name, by which RAW files are told."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"picture{suffix if suffix in SUFFIXES else ''}"
        path.write_bytes(data)
        found = embedder.embed_images([path], progress=False)
    if found.failures:
        raise ClipmatchError(f"That picture can't be read: {found.failures[0].reason}.")
    row: NDArray[np.float32] = found.rows[0]
    return row


async def painting(service: Service, studio: Studio, question: PaintQuestion) -> AsyncIterator[str]:
    """The lines of an answer to a prompt."""
    try:
        async with aclosing(studio.paint(question)) as events:
            async for event in events:
                told = event if isinstance(event, PaintEvent) else await finished(service, event)
                yield told.model_dump_json() + "\n"
    except ClipmatchError as error:
        yield json.dumps({"detail": clean(str(error))}) + "\n"


async def finished(service: Service, painted: Painted) -> Finished:
    """A painting, beside the photographs that the index finds nearest to it."""
    data = await asyncio.to_thread(file_of, painted)
    embedder = service.embedder
    row = await asyncio.to_thread(embed, embedder, data, ".png")
    found = await service.find_by(embedder, row, Question(size=NEAREST))
    image = data_url(data, "image/png")
    return Finished(image=image, score=painted.score, seed=int(painted.facts["seed"]), nearest=found.matches)


def why(embedder: Embedder, query: Query, photo: Photo) -> Why:
    """The explanation of a match, with its picture."""
    from clipmatch.explain import explain

    found = explain(cast(BatchedEmbedder, embedder), query, photo.path)  # as all that `load_model` gives are
    buffer = BytesIO()
    found.picture(1280).convert("RGB").save(buffer, "jpeg", quality=85)
    image = data_url(buffer.getvalue(), "image/jpeg")
    return Why(image=image, words=[(word, float(change)) for word, change in found.words], score=float(found.score))


def file_at(path: Path | str) -> tuple[int, int] | None:
    """Which file or folder lies there; None of an address, or if there is none."""
    try:
        found = None if isinstance(path, str) else path.stat()
    except OSError:
        return None
    return found and (found.st_dev, found.st_ino)


def root_paths(index: Index) -> list[Path]:
    """The folders that the index keeps up with."""
    return [root.path for root in index.store.roots()]


def paths_of(index: Index, numbers: list[int]) -> list[Path]:
    """The files of photographs."""
    return [photo.path for photo in index.store.photos_of(numbers)]


def concept_row(index: Index, concept: Any) -> ConceptRow:
    """A concept, with the first of its examples that is still there."""
    numbers = index.store.numbers_of(concept.examples)
    number = next((numbers[path] for path in concept.examples if path in numbers), None)
    return ConceptRow(
        name=concept.name,
        precision=concept.precision,
        examples=len(concept.examples),
        others=len(concept.others),
        cover=None if number is None else photo_row(number, index.store.photo(number)).thumb,
    )
