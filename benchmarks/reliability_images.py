"""Bad pictures, given to every command that reads pictures: what becomes of each.

    python benchmarks/reliability_images.py [--rounds index evaluate train serve] [--no-bombs] [--json FILE]

The pictures are those of `badimages`, among them some that are written, replaced or removed while they are read. A
file is tried if a command is given it; it has survived if it was embedded, and is listed if the command names it with a
reason. It is lost if neither holds, if it had to be embedded and was not, or had to be refused and was not. Beside
that: the largest difference between a vector and that of the same picture without bad neighbours, seconds, and the peak
memory of the largest command so far.

    index      clipmatch index, while other files change, of which those count that it has come across; then once more,
               in peace
    evaluate   clipmatch evaluate on captions that name every file
    train      clipmatch train --towers compact, the same
    serve      clipmatch serve: both renditions of every photograph in the index, and a search by every file, sent
"""

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from badimages import BAD, EITHER, GOOD, Case, encoded, make_corpus, scene
from common import machine, machine_line, table, write_json

from clipmatch.embedder import load_model
from clipmatch.index import Index
from clipmatch.output import printable

ROUNDS = ("index", "evaluate", "train", "serve")
PATIENCE = 300  # seconds for a command, 60 for an answer of the server
CLIPMATCH = (sys.executable, "-m", "clipmatch.cli")
NOTED = """
import os, sys
from clipmatch import cli, ingest

place, compare = sys.argv.pop(1), ingest.compare

def noted(*given):
    found = compare(*given)
    with open(place, "wb") as file:
        file.write(bytes(1).join(os.fsencode(item.path) for item in found.fresh))
    return found

ingest.compare = noted
cli.main()
"""  # clipmatch, with a file that says which files its walk has found: one that goes before is none of its business


@dataclass
class Round:
    """What became of the files given to a command. lost: by name, with the reason."""

    tried: int = 0
    survived: int = 0
    listed: int = 0
    lost: dict[str, str] = field(default_factory=dict)
    difference: float = 0.0
    seconds: float = 0.0
    peak_mb: float = 0.0
    kinds: dict[str, list[int]] = field(default_factory=dict)  # tried, survived, listed

    def judge(self, case: Case, survived: bool, reason: str | None, root: Path) -> None:
        """Count a file."""
        name = printable(case.path.relative_to(root))
        listed = reason is not None
        self.tried, self.survived, self.listed = self.tried + 1, self.survived + survived, self.listed + listed
        before = self.kinds.get(case.kind, [0, 0, 0])
        self.kinds[case.kind] = [before[0] + 1, before[1] + survived, before[2] + listed]
        if survived == listed:
            self.lost[f"{name} ({case.kind})"] = "embedded and listed" if survived else "neither embedded nor listed"
        elif case.fate == GOOD and not survived:
            self.lost[name] = f"a good picture, refused: {reason}"
        elif case.fate == BAD and survived:
            self.lost[name] = "a bad picture, embedded"

    def judge_all(self, cases: Sequence[Case], stderr: str, file: Path, root: Path) -> dict[Path, np.ndarray]:
        """Count files by what an update has said, and what is in the index then -> their vectors."""
        told, rows = reasons(stderr), embedded(file, cases)
        for case in cases:
            self.judge(case, case.path in rows, told.get(printable(case.path)), root)
        return rows


def embedded(file: Path, cases: Sequence[Case]) -> dict[Path, np.ndarray]:
    """The vectors that an index has of some files."""
    with Index.open(file) as opened:
        return opened.store.rows_of([case.path for case in cases])


def call(*arguments: object, program: Sequence[object] = CLIPMATCH) -> tuple[str, str, float, float]:
    """Run clipmatch -> stdout, stderr, seconds, and the peak memory in MB of the largest command so far."""
    start = time.perf_counter()
    done = subprocess.run(
        [*map(str, [*program, *arguments])], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    if done.returncode or "Traceback" in done.stderr:
        raise SystemExit(f"clipmatch {arguments[0]} ended with {done.returncode}: {done.stderr[-3000:]}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    return done.stdout, done.stderr, time.perf_counter() - start, peak


def reasons(stderr: str) -> dict[str, str]:
    """The files that a command has listed, and why."""
    return dict(re.findall(r"^  (.+?\.\w+): (.+)$", stderr, re.MULTILINE))


@contextmanager
def restless(folder: Path):
    """Files that grow, go, and are replaced for as long as this lasts -> their cases."""
    folder.mkdir()
    paths = [folder / f"{name}_{number}.jpg" for name in ("grows", "goes", "swaps") for number in range(8)]
    pictures = [encoded(scene(seed, (640, 480)), "JPEG", quality=95) for seed in (200, 201)]
    for path in paths:
        path.write_bytes(pictures[0])
    over = threading.Event()

    def disturb() -> None:
        turn = 0
        while not over.wait(0.002):
            turn += 1
            path = paths[turn % len(paths)]
            if path.name.startswith("grows"):
                size = turn * 999 % len(pictures[0])
                path.write_bytes(pictures[0][:size])
            elif path.name.startswith("goes") and path.exists():
                path.unlink()
            else:
                path.write_bytes(pictures[turn // len(paths) % 2])

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        yield paths
    finally:
        over.set()
        thread.join()
        for number, path in enumerate(paths):
            path.write_bytes(pictures[number % 2])


def index(root: Path, cases: list[Case], file: Path) -> Round:
    """`clipmatch index`, twice."""
    place, noted = root / "restless", file.with_name("noted")
    with restless(place) as paths:
        _, stderr, first, _ = call("index", root, "--index", file, program=(sys.executable, "-c", NOTED, noted))
    met = [Path(os.fsdecode(name)) for name in noted.read_bytes().split(b"\0")]
    found = Round()
    found.judge_all([Case(path, "while it changes", EITHER) for path in paths if path in met], stderr, file, root)
    _, stderr, second, found.peak_mb = call("index", root, "--index", file)
    found.seconds = first + second
    cases = cases + [Case(path, "restless", GOOD) for path in paths]
    rows = found.judge_all(cases, stderr, file, root)
    good = [case.path for case in cases if case.fate == GOOD and case.path in rows]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of odd EXIF data
        alone = load_model().embed_images(good, progress=False)
    found.difference = float(max(np.abs(rows[p] - row).max() for p, row in zip(alone.paths, alone.rows, strict=True)))
    return found


def captioned(root: Path, cases: list[Case], place: Path) -> Path:
    """A file of captions for all files of the corpus. A byte that is not UTF-8 is half a character in JSON, too."""
    lines = [
        json.dumps({"image": str(case.path.relative_to(root)), "caption": f"A {case.kind} picture, number {number} ."})
        for number, case in enumerate(cases)
    ]
    captions = place / "captions.jsonl"
    captions.write_text("".join(f"{line}\n" for line in lines))
    return captions


def by_captions(root: Path, cases: list[Case], place: Path, *command: object) -> Round:
    """A command that reads captions and lists what it could not read."""
    captions = captioned(root, cases, place)
    stdout, stderr, seconds, peak = call(*command, "--captions", captions, "--images", root)
    told, found = reasons(stderr), Round(seconds=seconds, peak_mb=peak)
    for case in cases:
        name = printable(case.path.relative_to(root))
        reason = told.get(printable(case.path)) or told.get(name)
        found.judge(case, reason is None, reason, root)
    if command[0] == "evaluate" and (measured := json.loads(stdout)["images"]) != found.survived:
        found.lost["in all"] = f"{measured} pictures were measured"
    return found


def serve(root: Path, cases: list[Case], file: Path) -> Round:
    """`clipmatch serve`: every photograph's pictures, and every file sent to search by."""
    command = [*CLIPMATCH, "serve", "--index", str(file), "--port", "0"]
    start, found = time.perf_counter(), Round()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = re.search(r"http://\S+/", process.stdout.readline())[0]
            photos = listed_photos(address)
            with ThreadPoolExecutor(4) as pool:
                shown = pool.map(lambda path: ask(address + path), photos)
                for path, (status, answer) in zip(photos, shown, strict=True):
                    found.judge(
                        Case(root / path, "photograph shown", GOOD), status == 200, detail(status, answer), root
                    )
                sent = [case for case in cases if case.path.is_file() and case.path.stat().st_size < 30 << 20]
                for case, (status, answer) in zip(sent, pool.map(lambda case: send(address, case), sent), strict=True):
                    found.judge(as_sent(case), status == 200, detail(status, answer), root)
            ask(f"{address}api/status")
        finally:
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
    if process.returncode or "Traceback" in stderr:
        raise SystemExit(f"clipmatch serve ended with {process.returncode}: {stderr[-3000:]}")
    found.seconds = time.perf_counter() - start
    found.peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    return found


def as_sent(case: Case) -> Case:
    """A file, and what is to become of it when it is sent: fewer pixels are taken than of the owner's own pictures, but
    of a JPEG file, which is decoded small.
    """
    return replace(case, fate=BAD) if case.kind == "large" and case.path.suffix != ".jpg" else case


def listed_photos(address: str) -> list[str]:
    """The addresses of all pictures of photographs."""
    found, page, more = [], 1, True
    while more:
        asked = json.dumps({"page": page, "size": 200}).encode()
        _, answer = ask(f"{address}api/browse", asked, "application/json")
        values = json.loads(answer)
        found += [row[kind] for row in values["matches"] for kind in ("thumb", "full")]
        more, page = values["more"], page + 1
    return found


def ask(address: str, data: bytes | None = None, kind: str = "") -> tuple[int, bytes]:
    """A question to the server -> status and answer."""
    request = urllib.request.Request(address, data, {"Content-Type": kind, "X-Clipmatch": "1"} if data else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def send(address: str, case: Case) -> tuple[int, bytes]:
    """A search by a file."""
    edge = b"--edge-of-a-part"
    name = b'"picture%s"' % os.fsencode(case.path.suffix)
    body = edge + b'\r\nContent-Disposition: form-data; name="question"\r\n\r\n{}\r\n' + edge
    body += b'\r\nContent-Disposition: form-data; name="image"; filename=' + name + b"\r\n\r\n"
    body += case.path.read_bytes() + b"\r\n" + edge + b"--\r\n"
    return ask(f"{address}api/search-image", body, "multipart/form-data; boundary=edge-of-a-part")


def detail(status: int, answer: bytes) -> str | None:
    """Why the server refuses; None where it does not, or has failed."""
    return json.loads(answer)["detail"] if 400 <= status < 500 else None


def measure(rounds, bombs):
    """Make the corpus and give it to the commands."""
    result = {"machine": machine("clipmatch", "pillow", "numpy", "onnxruntime"), "rounds": {}}
    with tempfile.TemporaryDirectory() as place:
        root, file = Path(place) / "corpus", Path(place) / "photos.sqlite"
        cases = make_corpus(root, bombs)
        result["corpus"] = dict(Counter(case.kind for case in cases))
        for name in rounds:
            if name in ("index", "serve"):
                found = index(root, cases, file) if name == "index" else serve(root, cases, file)
            else:
                out = ("train", "--towers", "compact", "--out", Path(place) / "run", "--epochs", 1, "--batch-size", 64)
                found = by_captions(
                    root, cases, Path(place), *(("evaluate", "--json", "-") if name == "evaluate" else out)
                )
            result["rounds"][name] = vars(found)
            print(f"{name}: {found.tried} tried, {len(found.lost)} lost", file=sys.stderr)
    return result


def show(result):
    """The tables, and what was lost."""
    rows = [
        (name, found["tried"], found["survived"], found["listed"], len(found["lost"]),
         found["difference"] if name == "index" else "",
         round(found["seconds"]), round(found["peak_mb"]))
        for name, found in result["rounds"].items()
    ]  # fmt: skip
    print(machine_line(result["machine"]))
    print(table(["command", "tried", "survived", "listed", "lost", "difference", "seconds", "peak MB"], rows))
    kinds = next(iter(result["rounds"].values()))["kinds"]
    print("\n" + table(["kind", "tried", "survived", "listed"], [(kind, *counts) for kind, counts in kinds.items()]))
    for name, found in result["rounds"].items():
        for path, why in found["lost"].items():
            print(f"LOST by {name}: {path}: {why}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", nargs="+", choices=ROUNDS, default=ROUNDS, help="serve needs the index of index")
    parser.add_argument("--no-bombs", dest="bombs", action="store_false", help="without the largest pictures")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = measure(options.rounds, options.bombs)
    show(result)
    write_json(options.json, result)


if __name__ == "__main__":
    main()
