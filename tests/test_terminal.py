"""Pictures in a terminal: the bytes are decoded again, and a pseudo-terminal answers as real ones do."""

import io
import os
import re
import subprocess
import sys
from base64 import b64decode

import numpy as np
import pytest
from PIL import Image
from pseudoterminal import ASK, Terminal

from clipmatch.terminal import as_iterm2, as_kitty, as_sixel, has_sixel, named_protocol

LOOK = "from clipmatch.terminal import find_protocol, picture_box; print(find_protocol(), *picture_box())"


@pytest.fixture
def picture():
    """97 x 50 pixels, no multiple of six high, with noise in it that no format compresses."""
    noise = np.random.default_rng(0).integers(0, 256, (50, 97, 3), dtype=np.uint8)
    noise[:20] = (255, 128, 0)
    return Image.fromarray(noise)


# Which protocol


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-kitty", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),  # through ssh
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "xterm-256color"}, None),
        ({}, None),
        # started from another terminal, whose variables are still there
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "vscode", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "vscode", "LC_TERMINAL": "iTerm2"}, None),
        ({"TERM": "xterm-kitty", "TERM_PROGRAM": "iTerm.app"}, "kitty"),
        # what lies between passes nothing on
        ({"TERM": "tmux-256color", "TMUX": "/tmp/tmux,1,0", "TERM_PROGRAM": "tmux", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "screen", "LC_TERMINAL": "iTerm2"}, None),
    ],
)
def test_protocol_by_environment(environment, protocol):
    assert named_protocol(environment) == protocol


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"\x1b[?63;1;2;4;6;9;15;22c", True),  # xterm -ti vt340
        (b"\x1b[?62;4c", True),
        (b"\x1b[?64;1;2;6;9;15;16;17;18;21;22;28c", False),  # xterm
        (b"\x1b[?4;6c", False),  # a VT132: the first number is the kind of terminal
        (b"\x1b[?62;14;24c", False),
        (b"q\x1b[?62;4c", True),  # a key was pressed meanwhile
        (b"", False),
    ],
)
def test_sixel_by_the_answer_of_the_terminal(answer, expected):
    assert has_sixel(answer) is expected


def test_a_terminal_is_asked_and_its_answer_is_not_shown():
    written = Terminal(b"\x1b[?62;4;22c", (20, 80, 1600, 600)).run(LOOK)
    assert written == ASK + b"sixel 800 300\n"  # cells of 20 x 30 pixels


def test_a_terminal_that_says_no():
    assert Terminal(b"\x1b[?62;22c").run(LOOK) == ASK + b"None 400 200\n"


def test_a_terminal_that_says_nothing():
    assert Terminal().run(LOOK) == ASK + b"None 400 200\n"


def test_a_known_terminal_is_not_asked():
    assert Terminal(TERM="xterm-kitty").run(LOOK) == b"kitty 400 200\n"
    assert Terminal(TERM_PROGRAM="iTerm.app").run(LOOK) == b"iterm2 400 200\n"


def test_what_can_not_answer_is_not_asked():
    assert Terminal(b"\x1b[?62;4c", TERM="dumb").run(LOOK) == b"None 400 200\n"
    assert Terminal(b"\x1b[?62;4c").run(LOOK, stdin=subprocess.DEVNULL) == b"None 400 200\n"


def test_a_pipe_is_no_terminal():
    environment = {**os.environ, "TERM": "xterm-kitty", "KITTY_WINDOW_ID": "1"}
    done = subprocess.run([sys.executable, "-c", LOOK], env=environment, capture_output=True, check=True)
    assert done.stdout == b"None 400 200\n"


# Pictures


def test_kitty_gets_the_picture_in_chunks(picture):
    codes = re.findall(rb"\x1b_G([^;]*);([^\x1b]*)\x1b\\", as_kitty(picture))
    assert b"".join(b"\x1b_G%s;%s\x1b\\" % code for code in codes) == as_kitty(picture)  # and nothing else
    keys, chunks = zip(*codes, strict=True)
    assert len(chunks) > 2
    assert keys == (b"a=T,f=100,q=2,m=1", *[b"m=1"] * (len(keys) - 2), b"m=0")
    assert {len(chunk) for chunk in chunks[:-1]} == {4096}
    shown = Image.open(io.BytesIO(b64decode(b"".join(chunks))))
    assert shown.format == "PNG"
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(picture))


@pytest.mark.parametrize(
    ("size", "limit"), [((300, 200), b"height=10"), ((400, 100), b"width=40"), ((90, 200), b"height=10")]
)
def test_iterm2_gets_a_file_and_its_size_in_cells(size, limit):
    code = as_iterm2(Image.new("RGB", size, (200, 0, 0)))
    length, cells, data = re.fullmatch(rb"\x1b\]1337;File=inline=1;size=(\d+);(\S+):(\S+)\a", code).groups()
    assert cells == limit
    assert int(length) == len(b64decode(data))
    shown = Image.open(io.BytesIO(b64decode(data)))
    assert (shown.format, shown.size) == ("JPEG", size)
    assert shown.getpixel((5, 5)) == pytest.approx((200, 0, 0), abs=2)


def decode_sixel(code):
    """The bytes of `as_sixel` -> RGB [h, w, 3], by the rules of the VT340's manual."""
    width, height, body = re.fullmatch(rb'\x1bP0;1q"1;1;(\d+);(\d+)(.*)\x1b\\', code, re.DOTALL).groups()
    pixels = np.full((int(height) + 6, int(width), 3), -1)
    palette, x, y = {}, 0, 0
    token = rb"#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|(\$)|(-)|(?:!(\d+))?([?-~])"
    assert re.fullmatch(rb"(?:%s)*" % token, body)
    for number, r, g, b, colour, start, down, count, sixel in re.findall(token, body):
        if number:
            palette[number] = [round(int(percent) * 2.55) for percent in (r, g, b)]
        elif colour:
            ink = palette[colour]
        elif start or down:
            x, y = 0, y + 6 * bool(down)
        else:
            end = x + int(count or 1)
            for bit in range(6):
                if (ord(sixel) - 63) >> bit & 1:
                    pixels[y + bit, x:end] = ink
            x = end
    assert (pixels[int(height) :] == -1).all()  # nothing is drawn below it
    return pixels[: int(height)]


def test_sixels_draw_the_picture(picture):
    shown = decode_sixel(as_sixel(picture))
    np.testing.assert_allclose(shown, np.asarray(picture.quantize(256).convert("RGB")), atol=2)  # percent are coarser
    np.testing.assert_allclose(shown[:20], np.broadcast_to((255, 128, 0), (20, 97, 3)), atol=4)


def test_sixels_of_one_colour_are_short():
    code = as_sixel(Image.new("RGB", (100, 12), (255, 0, 0)))
    assert code.startswith(b'\x1bP0;1q"1;1;100;12#0;2;100;0;0')
    assert code.endswith(b"#0!100~-#0!100~\x1b\\")
