"""The command that serves an index in the browser. Parse, call, print.

In: the words of the command line. Out: the address on stdout; then answers over HTTP until Ctrl-C.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import ipaddress
import os
import secrets
import shlex
import socket
import sys
from typing import TYPE_CHECKING

import click

from clipmatch.cli_photos import index_option, model_option
from clipmatch.errors import ClipmatchError
from clipmatch.output import printable
from clipmatch.storage import default_index, exists, open_store, place_of

if TYPE_CHECKING:
    from fastapi import FastAPI

    from clipmatch.exposure import Exposure
    from clipmatch.store import Root
    from clipmatch.studio import Studio

PORT = 8765
INSTALL = 'The page needs a few packages more; install them with: pip install "clipmatch[serve]"'
PAINTING = 'Painting needs a few packages more; install them with: pip install "clipmatch[generate]"'


@click.command("serve")
@index_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 for all.")
@click.option(
    "--port", default=PORT, type=click.IntRange(0, 65535), show_default=True, help="0 takes any that is free."
)
@click.option(
    "--token",
    envvar="CLIPMATCH_TOKEN",
    help="Answer only to those who know it; beyond this computer there is always one, drawn if not given.",
)
@click.option(
    "--originals",
    is_flag=True,
    help="With a token: give out the files themselves, with the places in them, and the names of folders.",
)
@click.option(
    "--show",
    metavar="DIR",
    multiple=True,
    help="Show files of this folder, of an index that was made elsewhere; may be repeated.",
)
@click.option("--open", "open_page", is_flag=True, help="Open the page in your browser.")
@click.option("--generator", metavar="NAME", help="VQGAN or BigGAN that paints in the page; see clipmatch generate.")
@click.option("--guide", metavar="NAME", help="Model that guides it.")
@model_option
def serve_command(
    index_file: str | None,
    host: str,
    port: int,
    token: str | None,
    originals: bool,
    show: tuple[str, ...],
    open_page: bool,
    generator: str | None,
    guide: str | None,
    model: str | None,
) -> None:
    """Search the index in your browser, until Ctrl-C.

    Only this computer can see the page, unless --host says otherwise; whoever opens it from elsewhere needs the token
    in the address that is printed, and sees pictures without what cameras note in their files. The same index can be
    kept up to date meanwhile: clipmatch index --watch

    With --guide and --generator, or after clipmatch demo --generate in this folder, the page also paints.
    """
    try:
        from clipmatch.server import make_app, server_of
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("clipmatch"):
            raise
        raise ClipmatchError(INSTALL) from error
    if token is not None and not token.strip():
        raise ClipmatchError("The token is empty; give one that is hard to guess, or none.")
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(18)
    with listen(host, port) as server:
        shown = exposure_of(index_file, show, originals or token is None)
        app = make_app(index_file, model, token, studio_of(guide, generator), shown)
        address = address_of(host, server.getsockname()[1], token)
        click.echo(f"clipmatch is at {printable(address)}\nCtrl-C ends it.")
        if open_page:
            click.launch(address)
        with contextlib.suppress(KeyboardInterrupt):  # which is how it is meant to end
            server_of(app).run(sockets=[server])
        end(app)


def end(app: FastAPI) -> None:
    """End the process, also while a long question to the index is under way.

    Such a question only reads; and should it keep a concept, that is one transaction, which is there or not.
    """
    service = getattr(app.state, "service", None)  # there is none if the start failed
    if service is not None and not service.close():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def exposure_of(index_file: str | None, show: tuple[str, ...], originals: bool) -> Exposure:
    """What may be shown: files below folders that were indexed here, or are named now. Tells which are not."""
    from clipmatch.exposure import Exposure
    from clipmatch.leave import given
    from clipmatch.remote import absolute

    place = place_of(index_file or default_index())
    named = frozenset(absolute(folder) for folder in show)

    def allowed(root: Root) -> bool:
        return bool({root.path, *root.path.parents} & (named | given(place)))

    if exists(place):
        with open_store(place) as store:
            for root in store.roots():
                if not allowed(root):
                    click.echo(f"{printable(root.path)} was not indexed here, so its files are not shown.", err=True)
                    click.echo(f"To show them: --show {shlex.quote(str(root.path))}", err=True)
    return Exposure(allowed, originals)


def studio_of(guide: str | None, generator: str | None) -> Studio | None:
    """What paints in the page: the models named, else those of the demo, if they are there and can be used.

    Raises ClipmatchError if one is named without the other, or what they need is not installed.
    """
    from clipmatch.generation.settings import GENERATOR, GUIDE, find_demo
    from clipmatch.studio import Studio

    named = guide is not None or generator is not None
    if guide is None and generator is None:
        guide, generator = find_demo(GUIDE), find_demo(GENERATOR)
    if guide is None or generator is None:
        if named:
            raise ClipmatchError("To paint takes both a --guide and a --generator; name both.")
        return None
    if importlib.util.find_spec("diffusers") is None:
        if named:
            raise ClipmatchError(PAINTING)
        return None
    return Studio(guide, generator)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this computer alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may lead anywhere
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections. Raises ClipmatchError if the address can't be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ClipmatchError(
                f"Port {port} is in use; name another with --port, or take any that is free with --port 0."
            ) from error
        raise ClipmatchError(
            f"{printable(host)}, port {port}, can't be listened at ({error.strerror or error}); see --host and --port."
        ) from error


def address_of(host: str, port: int, token: str | None) -> str:
    """What to type in a browser."""
    from urllib.parse import quote

    everywhere = host in ("0.0.0.0", "::")  # nosec B104
    name = socket.gethostname() if everywhere else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/" + (f"?token={quote(token, safe='')}" if token else "")
