"""How much of a server a client may have: requests a second, bytes at once, time for a head and a body.

In: requests as ASGI hands them on, connections as uvicorn does. Out: seconds to wait, or a connection that is closed.
Knows nothing of photographs, or of who may ask (guard.py).

The figures are far above what a page asks for, and far below what makes a computer slow: ten telephones that scroll
through thousands of pictures stay below all of them.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.types import Message, Receive, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    from starlette.requests import Request

CONNECTIONS = 512  # at once, six of each browser; one more is answered 503
CLIENTS = 4096  # whose rates are remembered
RATE, BURST = 200.0, 1000.0  # requests a second of one client in the long run, and at once
WRONG_RATE, WRONG_BURST = 1 / 3, 20.0  # wrong tokens: 20 at once, then one in three seconds
HEAD_SECONDS = 10.0  # for the head of a request
BODY_SECONDS = 60.0  # for its body
SEND_SECONDS = 60.0  # for a client to take the next part of an answer
LARGEST = 32 << 20  # bytes of a picture that is sent ...
QUESTION = 1 << 20  # ... and of any other request
IN_FLIGHT = 8 * LARGEST  # bytes of all requests that are being read and answered


class NotTaken(Exception):
    """A client does not read what it has asked for."""


@dataclass
class Bucket:
    """What a client may still do at a time."""

    left: float
    at: float


class Rates:
    """How often each client does something: `burst` times at once, and `rate` times a second from then on."""

    def __init__(self, rate: float, burst: float):
        self.rate, self.burst = rate, burst
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def wait(self, client: str) -> float:
        """The seconds until the client may do it again; 0: now."""
        return max(0.0, (1 - self._bucket(client).left) / self.rate)

    def count(self, client: str) -> None:
        """The client has done it."""
        self._bucket(client).left -= 1

    def _bucket(self, client: str) -> Bucket:
        now = time.monotonic()
        bucket = self._buckets.setdefault(client, Bucket(self.burst, now))
        bucket.left, bucket.at = min(self.burst, bucket.left + (now - bucket.at) * self.rate), now
        self._buckets.move_to_end(client)
        if len(self._buckets) > CLIENTS:
            self._buckets.popitem(last=False)
        return bucket


def client_of(request: Request) -> str:
    """Who asks: an address; of IPv6 the network, for each client has all of its addresses."""
    host = request.client.host if request.client else ""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:  # a socket in the file system
        return host
    if isinstance(address, ipaddress.IPv6Address):
        return str(address.ipv4_mapped or ipaddress.IPv6Network((address, 64), strict=False))
    return host


def hurried(receive: Receive) -> Receive:
    """The same, but a body that is not there in time ends as if the client had left."""
    end, whole = time.monotonic() + BODY_SECONDS, False

    async def receive_in_time() -> Message:
        nonlocal whole
        if whole:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
        except asyncio.TimeoutError:
            return {"type": "http.disconnect"}
        whole = not message.get("more_body", False)
        return message

    return receive_in_time


async def send_in_time(send: Send, message: Message) -> None:
    """Send a part of an answer. Raises NotTaken if the client does not take it."""
    try:
        await asyncio.wait_for(send(message), SEND_SECONDS)
    except asyncio.TimeoutError:
        raise NotTaken from None


class PromptProtocol(H11Protocol):
    """Uvicorn's protocol, with an end to connections on which no request comes, or one byte at a time."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client has come."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """A client has said something."""
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._stop_waiting()
        elif self.cycle is None or self.cycle.response_complete:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """A client has gone."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
