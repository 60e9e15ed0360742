"""Who may ask a server of photographs, and what browsers may do with its answers.

In: the head of a request. Out: the reason why it is refused, or nothing; headers for every answer. Knows nothing of
photographs.

Without a token it answers only to names of this computer: a strange page whose name is made to lead here (DNS
rebinding) asks under its own. With one, whoever does not know it gets nothing. A strange page in the same browser may
neither change anything nor have pictures: its requests carry its origin, or lack what only our page can send.
"""

from __future__ import annotations

import secrets
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "clipmatch_token"
OWN_HEADER = "x-clipmatch"  # a strange page can't send it without being asked for leave
LOCAL = frozenset(("localhost", "127.0.0.1", "::1"))
LARGEST = 32 << 20  # bytes of a request
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        request = Request(scope)
        answer = greeting(request, self.token) or refusal(request, self.token) or self.app
        await answer(scope, receive, send_with_headers)


def greeting(request: Request, token: str | None) -> Response | None:
    """The answer to /?token=..., which puts the right token into a cookie and leads to the page without it."""
    given = request.query_params.get("token")
    if token is None or given is None or request.url.path != "/" or not same(given, token):
        return None
    answer = RedirectResponse("./", 303)  # there may be a proxy that adds a folder
    answer.set_cookie(
        COOKIE, token, max_age=365 * 86400, httponly=True, samesite="lax", secure=request.url.scheme == "https"
    )
    return answer


def refusal(request: Request, token: str | None) -> Response | None:
    """Why a request is not answered; None if it is."""
    if token is None and host_of(request) not in LOCAL:
        return refuse(403, "Without a token this server answers only to the names of its own computer.")
    if token is not None and not any(same(given, token) for given in given_tokens(request)):
        sentence = "The token is missing or wrong; open the address that clipmatch serve has printed."
        return refuse(401, sentence, {"WWW-Authenticate": "Bearer"})
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


def given_tokens(request: Request) -> list[str]:
    """Tokens in the header and in the cookie."""
    kind, _, value = request.headers.get("authorization", "").partition(" ")
    header = [value.strip()] if kind.lower() == "bearer" else []
    return header + ([request.cookies[COOKIE]] if COOKIE in request.cookies else [])


def same(given: str, token: str) -> bool:
    """Whether two tokens are equal, in a time that does not tell how much of them is."""
    return secrets.compare_digest(given.encode("utf-8", "replace"), token.encode("utf-8", "replace"))


def is_strange(request: Request) -> bool:
    """Whether another site's page asks. Following its link to our page is no harm; all else is refused."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        return True
    other = request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
    return other and request.headers.get("sec-fetch-mode") != "navigate"


def media_type(request: Request) -> str:
    """The content type without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def too_large(request: Request) -> Response | None:
    """The refusal of a request that is too large, or does not say how large it is; None if it is neither."""
    length = request.headers.get("content-length")
    if length is None and "transfer-encoding" in request.headers:
        return refuse(411, "Say how long the request is.")
    if length is not None and (not length.isdecimal() or int(length) > LARGEST):
        return refuse(413, f"That is too large; {LARGEST >> 20} MB are the limit.")
    return None
