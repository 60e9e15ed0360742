"""An index over HTTP, and the page that asks it.

In: an index file. Out: a FastAPI application: `/api/...` (described at /openapi.json, in short at /docs) and the page
in `web/`. Clients name photographs by number. Who may ask is decided in guard.py, how much in limits.py, what of the
files is shown in exposure.py; what answers is in answers.py. Needs the extra `serve`.
"""

from __future__ import annotations

import asyncio
import mimetypes
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi import Path as Segment
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from clipmatch import answers
from clipmatch.desk import GONE, Service
from clipmatch.embedder import Embedder
from clipmatch.errors import ClipmatchError
from clipmatch.exposure import Exposure, View
from clipmatch.generation.prompts import parse_prompts
from clipmatch.guard import Guard
from clipmatch.index import Index
from clipmatch.limits import CONNECTIONS, PromptProtocol
from clipmatch.photo import Photo
from clipmatch.preprocess import ImageError
from clipmatch.query import Query, terms_of
from clipmatch.renditions import FULL, SHOWN, THUMB, forget_unwanted
from clipmatch.studio import Studio
from clipmatch.wire import (
    Answer,
    ConceptRow,
    Lesson,
    Listing,
    NewName,
    PaintQuestion,
    PhotoRow,
    Problem,
    Question,
    Statistics,
    Status,
    Why,
    WhyQuestion,
    clean,
    photo_row,
)

PAGE = Path(__file__).parent / "web"
GROUPS = 500  # of near-duplicates that are listed
VALUES = 30  # cameras and formats that are listed
PARTING = 3  # seconds that requests under way may still take


def make_app(
    index_path: str | Path | None = None,
    model: str | Path | Embedder | None = None,
    token: str | None = None,
    studio: Studio | None = None,
    exposure: Exposure | None = None,
) -> FastAPI:
    """The application for an index file; None: the one that `clipmatch index` makes, which may still be empty.

    token: who does not know it gets no answer. Without one only names of this computer are answered to, so serve it
    on a loopback address. studio: paints, if there is one. exposure: what of the photographs' files is shown; None: all
    below the folders that the index keeps up with, and with a token without what cameras note in them. Raises
    ClipmatchError if there is no such index, or the model is not its own.
    """
    with Index.open(index_path, model, create=index_path is None) as index:
        path, embedder = index.store.path, index.embedder
        _ = index.calibration  # a damaged one is told now

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = Service(path, embedder, studio, exposure or Exposure(originals=token is None))
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


class OrderlyServer(uvicorn.Server):
    """Uvicorn's, which lets go of the index after a second Ctrl-C too."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing new, give what is under way its time, and end."""
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()


def server_of(app: FastAPI) -> uvicorn.Server:
    """What serves it, with limits on connections and on the time that they take."""
    config = uvicorn.Config(
        app,
        http=PromptProtocol,
        ws="none",
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=PARTING,
    )
    return OrderlyServer(config)


# Errors: {"detail": a sentence} --------------------------------------------------------------------------------------


async def tell(request: Request, error: Any) -> Response:
    """A problem that the person can mend; a picture that is gone or can't be read."""
    if isinstance(error, ImageError):
        return JSONResponse({"detail": f"The photograph can't be shown: {clean(error.reason)}."}, GONE)
    exposure: Exposure = request.app.state.service.exposure
    return JSONResponse({"detail": clean(exposure.told(str(error)))}, 400)


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

PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The question makes no sense, or can't be answered"},
    401: {"model": Problem, "description": "The token is missing or wrong"},
    403: {"model": Problem, "description": "Asked by another page, or under a strange name"},
    404: {"model": Problem, "description": "It is not, or no longer, in the index; or its file can't be shown"},
    411: {"model": Problem, "description": "The request does not say how long it is"},
    413: {"model": Problem, "description": "The request is too large"},
    415: {"model": Problem, "description": "The request is of another kind"},
    422: {"model": Problem, "description": "The question is not of the form that is described"},
    429: {"model": Problem, "description": "Asked too often"},
    503: {"model": Problem, "description": "Too much to do; try again"},
}
api = APIRouter(prefix="/api", responses=PROBLEMS)


def pictures(*media_types: str) -> dict[int | str, dict[str, Any]]:
    """The description of an answer that is a picture, or word that the client has it already."""
    content = {media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in media_types}
    return {200: {"content": content, "description": "The picture"}, 304: {"description": "It is the one named"}}


async def find_service(request: Request) -> Service:
    """What the endpoints share."""
    service: Service = request.app.state.service
    return service


Shared = Annotated[Service, Depends(find_service)]
Number = Annotated[int, Segment(ge=0, lt=1 << 53)]  # of a photograph


@api.get("/status")
async def status(service: Shared) -> Status:
    """What is served."""
    return await service.desk.ask(lambda index: answers.status_of(service, index))


@api.post("/search")
async def search(question: Question, service: Shared) -> Answer:
    """The photographs that match, best first."""
    return await service.desk.ask(lambda index: answers.find(service, index, question))


@api.post("/search-image")
async def search_image(
    image: Annotated[UploadFile, File()], question: Annotated[str, Form()], service: Shared, request: Request
) -> Answer:
    """The same, by a picture that is sent: a form with `image` and, as JSON, `question`."""
    asked = Question.model_validate_json(question)
    data, suffix, embedder = await image.read(), Path(image.filename or "").suffix.lower(), service.embedder
    row = await service.compute(lambda: answers.embed(service, embedder, data, suffix), request)
    return await answers.find_by(service, embedder, row, asked)


@api.get("/photos/{number}/similar")
async def similar(number: Number, service: Shared, page: int = 1, size: int = 24) -> Answer:
    """Photographs like one of them, the nearest first."""
    question = Question(like=number, page=page, size=size)
    return await service.desk.ask(lambda index: answers.find(service, index, question))


@api.post("/browse")
async def browse(listing: Listing, service: Shared) -> Answer:
    """All photographs, the newest first."""
    return await service.desk.ask(lambda index: answers.browse(service, index, listing))


@api.post("/explain")
async def explain(question: WhyQuestion, service: Shared, request: Request) -> Why:
    """Where in a photograph, and through which words, a sentence matches."""

    def ask(index: Index) -> tuple[Query, Photo, View]:
        asked = Query(tuple(terms_of(question.query.strip())))
        return index.with_concepts(asked), index.store.photo(question.id), answers.view_of(service, index)

    query, photo, view = await service.desk.ask(ask)
    return await service.compute(lambda: answers.why(service, query, photo, view), request)


@api.post("/paint", response_class=StreamingResponse, responses={200: {"content": {"application/x-ndjson": {}}}})
async def paint(question: PaintQuestion, service: Shared) -> StreamingResponse:
    """Paint a sentence: lines of JSON, `PaintEvent`s and at last `Finished`, or {"detail": what went wrong}."""
    if service.studio is None:
        raise HTTPException(GONE, "This server has no generator; see clipmatch serve --help.")
    parse_prompts(question.prompt, pictures=False)  # what can't be painted is told at once
    return StreamingResponse(answers.painting(service, service.studio, question), media_type="application/x-ndjson")


@api.get("/concepts")
async def concepts(service: Shared) -> list[ConceptRow]:
    """What was taught."""
    return await service.desk.ask(lambda index: answers.concept_rows(service, index))


@api.post("/concepts", status_code=201)
async def teach(lesson: Lesson, service: Shared) -> ConceptRow:
    """Learn a concept from photographs."""

    def ask(index: Index) -> ConceptRow:
        liked, disliked = (answers.shown_paths(service, index, ids) for ids in (lesson.liked, lesson.disliked))
        return answers.concept_row(service, index, index.teach(lesson.name, liked, disliked))

    return await service.back.ask(ask)


@api.patch("/concepts/{name:path}")
async def rename_concept(name: str, new: NewName, service: Shared) -> list[ConceptRow]:
    """Give a concept another name."""

    def ask(index: Index) -> list[ConceptRow]:
        index.rename_concept(name, new.name)
        return answers.concept_rows(service, index)

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
        named = answers.view_of(service, index).named
        return [[photo_row(numbers[photo.path], photo, named) for photo in group] for group in groups]

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

    def ask(index: Index) -> PhotoRow:
        return photo_row(number, index.store.photo(number), answers.view_of(service, index).named)

    return await service.desk.ask(ask)


@api.get("/photos/{number}/thumb", response_class=Response, responses=pictures("image/webp"))
async def thumb(number: Number, service: Shared, request: Request) -> Response:
    """A small picture of a photograph."""
    return await answers.picture(service, number, THUMB, request)


@api.get("/photos/{number}/full", response_class=Response, responses=pictures(*SHOWN.values()))
async def full(number: Number, service: Shared, request: Request) -> Response:
    """The photograph: the file itself, or a JPEG of it if browsers don't know its format, or the file is not shown."""
    return await answers.picture(service, number, FULL, request)
