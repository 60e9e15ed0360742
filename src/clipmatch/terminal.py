"""Pictures in a terminal: which graphics protocol it speaks, and a picture as bytes of that protocol.

In: the environment, the terminal's answer to a question, pictures. Out: a protocol or None; escape codes. Knows nothing
of photographs, files or matches.

    kitty   https://sw.kovidgoyal.net/kitty/graphics-protocol/    kitty, Ghostty
    iterm2  https://iterm2.com/documentation-images.html          iTerm2, WezTerm
    sixel   DEC, VT330/VT340 Programmer Reference Manual, 1988    xterm, foot, Konsole, Windows Terminal, some tmux

Written out here because no kept library speaks all three with the Python and Pillow versions of this package.
"""

from __future__ import annotations

import io
import os
import re
import struct
import sys
from base64 import b64encode
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Protocol: TypeAlias = Literal["kitty", "iterm2", "sixel"]

COLUMNS, ROWS = 40, 10  # cells that a picture fills at most
CELL = (10, 20)  # pixels, where the terminal does not tell; those of the VT340
KITTY_TERMS = ("xterm-kitty", "xterm-ghostty")
PROGRAMS: dict[str, Protocol] = {
    "kitty": "kitty",
    "ghostty": "kitty",
    "iTerm.app": "iterm2",
    "iTerm2": "iterm2",
    "WezTerm": "iterm2",
}
CHUNK = 4096  # bytes of base64 in one escape code of kitty's
PATIENCE = 1.0  # seconds; every terminal answers, but perhaps from far away
ASK_ATTRIBUTES = "\x1b[c"  # primary device attributes
ATTRIBUTES = re.compile(rb"\x1b\[\?(\d+)((?:;\d+)*)c")  # conformance level, then extensions; 4 is sixel
RUN = re.compile(r"(.)\1{3,}")


# Which protocol -----------------------------------------------------------------------------------------------------


def find_protocol() -> Protocol | None:
    """The protocol of the terminal that stdout goes to; None if it has none, or stdout is no terminal.

    Known terminals are told by the environment; others are asked for sixel, if stdin is the terminal too.
    """
    if not sys.stdout.isatty():
        return None
    return named_protocol(os.environ) or ("sixel" if speaks_sixel() else None)


def named_protocol(environment: Mapping[str, str]) -> Protocol | None:
    """What the environment says of the terminal.

    TERM is set by the terminal itself; the other variables are also inherited by a terminal that was started from
    another one, so the one that most terminals set goes first. LC_TERMINAL comes through ssh. tmux and screen pass
    neither kitty's nor iTerm2's codes on.
    """
    term = environment.get("TERM", "")
    if environment.get("TMUX") or term.startswith(("screen", "tmux")):
        return None
    if term in KITTY_TERMS:
        return "kitty"
    inherited = "kitty" if "KITTY_WINDOW_ID" in environment else ""
    return PROGRAMS.get(environment.get("TERM_PROGRAM") or environment.get("LC_TERMINAL") or inherited)


def speaks_sixel() -> bool:
    """Ask the terminal what it can do; keys that are pressed in that moment are lost."""
    try:
        import termios
        import tty
    except ImportError:  # Windows
        return False
    if not sys.stdin or not sys.stdin.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        return False
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    try:
        tty.setcbreak(keyboard, termios.TCSANOW)  # the answer comes at once, and is not echoed
        sys.stdout.write(ASK_ATTRIBUTES)
        sys.stdout.flush()
        answer = read_answer(keyboard)
    finally:
        termios.tcsetattr(keyboard, termios.TCSANOW, before)
    return has_sixel(answer)


def read_answer(keyboard: int) -> bytes:
    """What the terminal sends until the answer is complete or nothing more comes."""
    from select import select

    answer = b""
    while not ATTRIBUTES.search(answer) and select([keyboard], [], [], PATIENCE)[0]:
        more = os.read(keyboard, 64)
        if not more:  # the terminal has gone
            break
        answer += more
    return answer


def has_sixel(answer: bytes) -> bool:
    """Whether 4 is among the extensions of an answer to `ASK_ATTRIBUTES`."""
    found = ATTRIBUTES.search(answer)
    return found is not None and b"4" in found[2].split(b";")


# Pictures -> escape codes -------------------------------------------------------------------------------------------


def picture_box() -> tuple[int, int]:
    """Width and height in pixels of `COLUMNS` x `ROWS` cells of this terminal."""
    try:
        from fcntl import ioctl
        from termios import TIOCGWINSZ

        rows, columns, width, height = struct.unpack("4H", ioctl(sys.stdout.fileno(), TIOCGWINSZ, bytes(8)))
        cell = (width // columns, height // rows)
    except (ImportError, OSError, ZeroDivisionError):  # Windows; no terminal; one without a size
        cell = (0, 0)
    return (COLUMNS * (cell[0] or CELL[0]), ROWS * (cell[1] or CELL[1]))


def encode(image: Image.Image, protocol: Protocol) -> bytes:
    """RGB picture that fits `picture_box` -> the bytes that show it at the cursor; a line break must follow."""
    return ENCODERS[protocol](image)


def as_kitty(image: Image.Image) -> bytes:
    """A PNG file in chunks, shown in its own size; without answers (q=2), which would end up on the prompt."""
    data = b64encode(file_bytes(image, "PNG"))
    codes, keys = [], b"a=T,f=100,q=2,"
    for start in range(0, len(data), CHUNK):
        more = int(start + CHUNK < len(data))
        codes.append(b"\x1b_G%sm=%d;%s\x1b\\" % (keys, more, data[start : start + CHUNK]))
        keys = b""  # belong to the first chunk alone
    return b"".join(codes)


def as_iterm2(image: Image.Image) -> bytes:
    """A JPEG file in one escape code, with its size in cells: its pixels may be half a screen's pixel."""
    wide = image.width * ROWS * CELL[1] > image.height * COLUMNS * CELL[0]
    size = f"width={COLUMNS}" if wide else f"height={ROWS}"  # the other follows
    data = file_bytes(image, "JPEG")
    return f"\x1b]1337;File=inline=1;size={len(data)};{size}:".encode() + b64encode(data) + b"\a"


def as_sixel(image: Image.Image) -> bytes:
    """At most 256 colours, in bands of six rows; each colour of a band is drawn over the whole band."""
    paletted = image.quantize(256)
    colours = np.array(paletted.getpalette(), np.uint16).reshape(-1, 3)
    places = np.asarray(paletted)  # [h, w]
    parts = [f'\x1bP0;1q"1;1;{image.width};{image.height}']  # 1: what is not drawn stays; square pixels
    parts += ["#{};2;{};{};{}".format(i, *(rgb * 100 + 127) // 255) for i, rgb in enumerate(colours)]  # percent
    bands = [sixel_band(places[top : top + 6]) for top in range(0, image.height, 6)]
    return ("".join(parts) + "-".join(bands) + "\x1b\\").encode("ascii")


def sixel_band(places: NDArray[np.uint8]) -> str:
    """Places in the palette [up to 6, w] -> a line of sixels for each of the c colours in it."""
    colours, which = np.unique(places, return_inverse=True)
    bits = np.zeros((len(colours), places.shape[1]), np.uint8)  # [c, w]
    for row, line in enumerate(which.reshape(places.shape)):
        bits[line, np.arange(len(line))] |= 1 << row  # the upper pixel of a sixel is its lowest bit
    sixels = [line.tobytes().decode("ascii").rstrip("?") for line in bits + 63]  # ? draws nothing
    short = [RUN.sub(lambda run: f"!{len(run[0])}{run[1]}", line) for line in sixels]
    return "$".join(f"#{colour}{line}" for colour, line in zip(colours, short, strict=True))


def file_bytes(image: Image.Image, kind: str) -> bytes:
    """A picture as a file of that kind."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


ENCODERS: dict[Protocol, Callable[[Image.Image], bytes]] = {
    "kitty": as_kitty,
    "iterm2": as_iterm2,
    "sixel": as_sixel,
}
