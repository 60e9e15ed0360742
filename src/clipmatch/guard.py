"""Who may ask a server of photographs, and what browsers may do with its answers.

In: the head of a request. Out: the reason why it is refused, or nothing; headers for every answer. Knows nothing of
photographs.

Without a token it answers only to names of this computer: a strange page whose name is made to lead here (DNS
rebinding) asks under its own. With one, whoever does not know it gets nothing, and may not guess often. A strange page
in the same browser may neither change anything nor have pictures: its requests carry its origin, or lack what only our
page can send. Whoever asks too much or too slowly is put off (limits.py).
"""

from __future__ import annotations

import asyncio
import math
import secrets
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clipmatch.limits import (
    BURST,
    IN_FLIGHT,
    LARGEST,
    QUESTION,
    RATE,
    WRONG_BURST,
    WRONG_RATE,
    NotTaken,
    Rates,
    client_of,
    hurried,
    send_in_time,
)

COOKIE = "clipmatch_token"
OWN_HEADER = "x-clipmatch"  # a strange page can't send it without being asked for leave
LOCAL = frozenset(("localhost", "127.0.0.1", "::1"))
WITH_PICTURE = "/api/search-image"  # the one request that may be large
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    ),
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class Guard:
    """ASGI middleware that refuses what should not be answered, and adds `HEADERS` to every answer."""

    def __init__(self, app: ASGIApp, token: str | None = None):
        self.app, self.token = app, token
        self.rates, self.wrong = Rates(RATE, BURST), Rates(WRONG_RATE, WRONG_BURST)
        self.in_flight = 0  # bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send_in_time(send, message)

        request = Request(scope)
        if answer := self.refusal(request) or greeting(request, self.token):
            await answer(scope, receive, send_with_headers)
            return
        size = size_of(request)
        self.in_flight += size
        try:
            await self.app(scope, hurried(receive), send_with_headers)
        except NotTaken:  # without its end the answer ends with the connection
            pass
        except asyncio.CancelledError:  # by the server, whose end does not wait for this
            if not begun:
                await refuse(503, "The server has ended.")(scope, receive, send_with_headers)
        finally:
            self.in_flight -= size

    def refusal(self, request: Request) -> Response | None:
        """Why a request is not answered; None if it is."""
        client = client_of(request)
        if wait := self.rates.wait(client) or self.wrong.wait(client):
            return refuse(429, "That is too often; wait a little.", {"Retry-After": str(math.ceil(wait))})
        self.rates.count(client)
        if self.token is not None and not knows(request, self.token):
            for _ in tokens_of(request):
                self.wrong.count(client)
            sentence = "The token is missing or wrong; open the address that clipmatch serve has printed."
            return refuse(401, sentence, {"WWW-Authenticate": "Bearer"})
        if self.in_flight + size_of(request) > IN_FLIGHT:
            return refuse(503, "Too much is being sent at once; try again.", {"Retry-After": "5"})
        return refusal(request, self.token)


def greeting(request: Request, token: str | None) -> Response | None:
    """The answer to /?token=..., which puts the right token into a cookie and leads to the page without it."""
    given = in_address(request)
    if token is None or given is None or not same(given, token):
        return None
    answer = RedirectResponse("./", 303)  # there may be a proxy that adds a folder
    answer.set_cookie(
        COOKIE, token, max_age=365 * 86400, httponly=True, samesite="lax", secure=request.url.scheme == "https"
    )
    return answer


def refusal(request: Request, token: str | None) -> Response | None:
    """Why a request of somebody who may ask is not answered; None if it is."""
    if token is None and host_of(request) not in LOCAL:
        return refuse(403, "Without a token this server answers only to the names of its own computer.")
    if is_strange(request):
        return refuse(403, "Other pages may not ask this server.")
    if request.method in ("GET", "HEAD", "OPTIONS", "DELETE"):  # browsers ask for leave before they send the last
        return None
    if OWN_HEADER not in request.headers and media_type(request) != "application/json":
        return refuse(415, "Send JSON, with the content type application/json.")
    return too_large(request)


def refuse(status: int, sentence: str, headers: dict[str, str] | None = None) -> Response:
    """An answer that says no."""
    return JSONResponse({"detail": sentence}, status, headers)


def host_of(request: Request) -> str:
    """The name that the client has asked for, without the port."""
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""


def tokens_of(request: Request) -> list[str]:
    """Tokens in the header, in the cookie, and in the address that opens the page."""
    kind, _, value = request.headers.get("authorization", "").partition(" ")
    found = [value.strip() if kind.lower() == "bearer" else None, request.cookies.get(COOKIE), in_address(request)]
    return [token for token in found if token is not None]


def in_address(request: Request) -> str | None:
    """The token of /?token=..."""
    return request.query_params.get("token") if request.url.path == "/" else None


def knows(request: Request, token: str) -> bool:
    """Whether a request comes with the token."""
    return any(same(given, token) for given in tokens_of(request))


def same(given: str, token: str) -> bool:
    """Whether two tokens are equal, in a time that does not tell how much of them is."""
    return secrets.compare_digest(given.encode("utf-8", "replace"), token.encode("utf-8", "replace"))


def is_strange(request: Request) -> bool:
    """Whether another site's page asks. Following its link to our page is no harm; all else is refused."""
    origin = request.headers.get("origin")
    try:
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            return True
    except ValueError:  # such as http://[
        return True
    other = request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
    return other and request.headers.get("sec-fetch-mode") != "navigate"


def media_type(request: Request) -> str:
    """The content type without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def size_of(request: Request) -> int:
    """The bytes of a request's body that will be read, as it says; more than may be are refused."""
    length = request.headers.get("content-length", "")
    return min(int(length), LARGEST) if request.method == "POST" and length.isdecimal() and len(length) < 20 else 0


def too_large(request: Request) -> Response | None:
    """The refusal of a request that is too large, or does not say how large it is; None if it is neither."""
    length = request.headers.get("content-length")
    most = LARGEST if request.url.path == WITH_PICTURE else QUESTION
    if length is None and "transfer-encoding" in request.headers:
        return refuse(411, "Say how long the request is.")
    if length is not None and (not length.isdecimal() or len(length) > 19 or int(length) > most):
        return refuse(413, f"That is too large; {most >> 20} MB are the limit.")
    return None
