"""Picture files of anybody -> pixels, or small pictures, in processes that can be killed.

In: the bytes of a file. Out: an RGB picture, or the bytes of a drawn one; `ImageError` for what can't be decoded, takes
too long, or wants too much memory. Knows nothing of HTTP or models.

Decoders are a million lines of C that read what strangers write. Here one that hangs, eats memory or crashes costs a
process of its own, which has no index, no token and no open file, may write none, and is started anew. Both sides speak
through pipes: a line of JSON, then bytes; nothing that would be run.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import IO, TYPE_CHECKING, Any

from clipmatch.errors import ClipmatchError
from clipmatch.renditions import Kind, draw, kind_named
from clipmatch.runtime import usable_cores

if TYPE_CHECKING:
    from PIL.Image import Image

PATIENCE = 20.0  # seconds that a picture may take
MEMORY = 4 << 30  # bytes of addresses: 200 million pixels with transparency, and what they are turned into
MOST = 4  # processes, of about 60 MB each
SENT = 64_000_000  # pixels of a picture that is sent: more than the cameras of telephones have, the largest excepted


class Decoder:
    """A process that decodes one picture at a time; started with the first, and anew after its end."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._late = False

    def ask(self, task: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        """A task and the bytes of a file -> the answer's head and bytes. Raises ValueError with the reason."""
        process, self._late = self._running(), False
        assert process.stdin is not None
        assert process.stdout is not None
        timer = Timer(PATIENCE, self._kill_late)
        timer.start()
        try:
            send(process.stdin, task, data)
            head, found = receive(process.stdout)
        except (OSError, ValueError, EOFError):
            self.close()
            why = f"it takes more than {PATIENCE:.0f} seconds" if self._late else "its decoder has crashed"
            raise ValueError(why) from None
        finally:
            timer.cancel()
        if "reason" in head:
            raise ValueError(head["reason"])
        return head, found

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            try:
                self._process = start()
            except OSError as error:
                raise ValueError(f"no process can be started to decode it ({error.strerror})") from error
        return self._process

    def _kill_late(self) -> None:
        self._late = True
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]


class Decoders:
    """A few of them. May be used by several threads, which wait for their turn."""

    def __init__(self) -> None:
        self._all = [Decoder() for _ in range(min(MOST, usable_cores()))]
        self._free: queue.SimpleQueue[Decoder] = queue.SimpleQueue()
        for decoder in self._all:
            self._free.put(decoder)

    def read(self, path: Path, min_size: int | None, data: bytes, most: int | None = None) -> Image:
        """As `load_image`. Raises ImageError."""
        from PIL import Image

        head, found = self._ask({"do": "read", "min_size": min_size, "most": most}, path, data)
        return Image.frombuffer("RGB", tuple(head["size"]), found, "raw", "RGB", 0, 1)

    def draw(self, path: Path, kind: Kind, data: bytes) -> bytes:
        """As `draw(path, kind, data)`. Raises ImageError."""
        return self._ask({"do": "draw", "kind": kind.name}, path, data)[1]

    def _ask(self, task: dict[str, Any], path: Path, data: bytes) -> tuple[dict[str, Any], bytes]:
        from clipmatch.preprocess import ImageError

        with self._turn() as decoder:
            try:
                return decoder.ask({**task, "suffix": path.suffix}, data)
            except ValueError as error:
                raise ImageError(path, str(error)) from error

    @contextmanager
    def _turn(self) -> Iterator[Decoder]:
        decoder = self._free.get()
        try:
            yield decoder
        finally:
            self._free.put(decoder)

    def close(self) -> None:
        """End the processes, also those that are at work."""
        for decoder in self._all:
            decoder.close()


def send(pipe: IO[bytes], head: dict[str, Any], data: bytes) -> None:
    """Write a line of JSON, then bytes."""
    pipe.write(json.dumps({**head, "bytes": len(data)}).encode() + b"\n")
    pipe.write(data)
    pipe.flush()


def receive(pipe: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """What `send` wrote. Raises EOFError if it ends before, ValueError for anything else."""
    head: dict[str, Any] = json.loads(pipe.readline(1 << 16) or "null")
    if not isinstance(head, dict):
        raise EOFError
    data = pipe.read(int(head["bytes"]))
    if len(data) != head["bytes"]:
        raise EOFError
    return head, data


# The other side of the pipes -----------------------------------------------------------------------------------------


def start() -> subprocess.Popen[bytes]:
    """A process that decodes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if "TOKEN" not in name}
    environment["PYTHONSAFEPATH"] = "1"  # or Python would take modules from where the server was started
    return subprocess.Popen(
        [sys.executable, "-m", "clipmatch.decoder"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd=sys.prefix,  # likewise, where Python is older than 3.11
    )


def confine() -> None:
    """Take from this process what decoding does without; Windows has no such limits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which closes the pipe
    with contextlib.suppress(ImportError):
        import resource

        for what, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
            with contextlib.suppress(ValueError, OSError):  # macOS knows the first by name only
                resource.setrlimit(what, (most, most))


def answer(task: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    """Do what is asked."""
    from clipmatch.preprocess import load_image

    path = Path("picture" + task["suffix"])
    try:
        if task["do"] == "draw":
            return {}, draw(path, kind_named(task["kind"]), data)
        image = load_image(path, task["min_size"], data, task["most"])
    except ClipmatchError as error:
        return {"reason": getattr(error, "reason", str(error))}, b""
    except MemoryError:
        return {"reason": "not enough memory"}, b""
    return {"size": image.size}, image.tobytes()


def main() -> None:
    """Answer until the pipe is closed."""
    confine()
    pipe, out = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # whatever a library prints
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            send(out, *answer(*receive(pipe)))


if __name__ == "__main__":
    main()
