"""Where the time of indexing goes, a file and a stage at a time, and how far that is from what the machine can do.

    python benchmarks/indexing_profile.py --data DIR [--files 200] [--rounds 3] [--json FILE]

DIR holds photographs; they are taken as they are, and at 4 megapixels. The stages are those of clipmatch.ingest, called
one after the other on one core. Beside them, on all cores: how many float32 multiply-adds a second a large matrix
product reaches and how many bytes a second a large copy moves, and how much of either the image graph's own work takes
up (benchmarks/graphs.py counts it).
"""

import argparse
import hashlib
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from common import machine, machine_line, table, timed, write_json
from graphs import work
from photographs import describe, photograph_set

from clipmatch.crawl import walk
from clipmatch.embedder import LOT, asked_for_only, embedded_folder, load_model, open_session
from clipmatch.index import name_of
from clipmatch.ingest import picture_hash
from clipmatch.metadata import read_metadata, words_beside
from clipmatch.modelfolder import IMAGE_GRAPH
from clipmatch.preprocess import decoded, opened
from clipmatch.runtime import usable_cores
from clipmatch.store import Photo, Store

SIDE = 2048  # of the matrices
LOTS = 4  # one after the other
COPIED = 1 << 28  # bytes: larger than caches
STAGES = ("crawl", "hash", "header", "decode", "resize", "fingerprint", "encode", "write")


class Clock:
    """Seconds by stage."""

    def __init__(self):
        self.seconds = defaultdict(float)

    @contextmanager
    def __call__(self, stage):
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start


def index_slowly(folder, model, session, scratch):
    """Every stage of an update, one after the other -> milliseconds a file for each."""
    clock, side = Clock(), model.transform.config.size
    with clock("crawl"):
        files = list(walk(folder))
    with Store.open(Path(scratch) / "photos.sqlite", create=True) as store:
        store.bind(name_of(model))
        for start in range(0, len(files), LOT):
            photos, pixels = [], []
            for item in files[start : start + LOT]:
                with clock("hash"):
                    digest = hashlib.sha256(item.path.read_bytes()).hexdigest()
                with clock("header"), opened(item.path) as image:
                    beside = words_beside(item.path if item.stamp.sidecar else None)
                    metadata = read_metadata(item.path, image, beside)
                with opened(item.path) as image, clock("decode"):
                    picture = decoded(image, side)
                with clock("resize"):
                    pixels.append(model.transform.pixels(picture))
                with clock("fingerprint"):
                    bits = picture_hash(picture)
                photos.append(Photo(item.path, digest, item.stamp, metadata, bits))
            with clock("encode"):
                rows = session.run(["embedding"], {"pixels": np.stack(pixels)}, asked_for_only())[0]
            with clock("write"):
                store.upsert(photos, model.fingerprint, dict(zip((p.digest for p in photos), rows, strict=True)), {})
    return {stage: 1e3 * clock.seconds[stage] / len(files) for stage in STAGES}


def on_cores(call):
    """Seconds in which a thread for each core makes the call, with the core's number, once."""
    with ThreadPoolExecutor(usable_cores()) as pool:
        return timed(lambda: list(pool.map(call, range(usable_cores()))))


def limits(rounds):
    """The best of some rounds: float32 multiply-adds a second, bytes read and written a second."""
    a, b = np.random.default_rng(0).random((2, SIDE, SIDE), np.float32)
    product = np.empty((SIDE, SIDE), np.float32)  # NumPy takes all cores for it
    sources = [np.ones(COPIED, np.uint8) for _ in range(usable_cores())]
    targets = [np.zeros(COPIED, np.uint8) for _ in sources]
    multiply = min(timed(lambda: np.matmul(a, b, out=product)) for _ in range(rounds + 1))
    copy = min(on_cores(lambda core: np.copyto(targets[core], sources[core])) for _ in range(rounds + 1))
    return {"multiply_adds": SIDE**3 / multiply, "bytes": len(sources) * 2 * COPIED / copy}


def shares(session, model, rounds):
    """The image graph, 8 pictures at a time on each core, against the machine; the best of some rounds."""
    side = model.transform.config.size
    pixels = np.random.default_rng(0).integers(0, 256, (LOT, side, side, 3), np.uint8)

    def call(_):
        for _ in range(LOTS):
            session.run(["embedding"], {"pixels": pixels}, asked_for_only())

    cost, limit = work(embedded_folder() / IMAGE_GRAPH, "embedding", LOT), limits(rounds)
    rate = usable_cores() * LOTS * LOT / min(on_cores(call) for _ in range(rounds + 1))
    used = {"multiply_adds": rate * cost["multiply_adds"], "bytes": rate * cost["megabytes"] * 1e6}
    share = {name: used[name] / limit[name] for name in used}
    return {"work": cost, "pictures_per_second": rate, "limit": limit, "used": used, "share": share}


def show(result):
    print(machine_line(result["machine"]))
    sets, found = result["sets"].values(), result["shares"]
    wholes = [sum(one["milliseconds"].values()) for one in sets]
    rows = []
    for stage in STAGES:
        parts = [(one["milliseconds"][stage], whole) for one, whole in zip(sets, wholes, strict=True)]
        rows.append(
            [stage, *(cell for part, whole in parts for cell in (f"{part:.2f}", f"{100 * part / whole:.0f} %"))]
        )
    rows.append(["all", *(cell for whole in wholes for cell in (f"{whole:.2f}", f"{1e3 / whole:.0f} files/s"))])
    titles = [f"{size} ({one['mean_megapixels']:.2f} MP)" for size, one in result["sets"].items()]
    print(table(["ms a file, one core", *(cell for title in titles for cell in (title, ""))], rows))
    millions, megabytes = found["work"]["multiply_adds"] / 1e6, found["work"]["megabytes"]
    print(f"\nthe image graph: {millions:.0f} million multiply-adds, {megabytes:.1f} MB a picture")
    rows = []
    for name, unit in (("multiply_adds", "G multiply-adds/s, float32"), ("bytes", "GB/s read and written")):
        rows.append([unit, f"{found['limit'][name] / 1e9:.1f}", f"{found['used'][name] / 1e9:.1f}"])
        rows[-1].append(f"{100 * found['share'][name]:.0f} %")
    rate = f"the graph at {found['pictures_per_second']:.0f} pictures/s"
    print(table(["all cores", "the machine", rate, "share of the limit"], rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = load_model()
    session = open_session(embedded_folder() / IMAGE_GRAPH, 1)
    result = {"machine": machine("onnxruntime", "pillow", "numpy"), "sets": {}}
    for size in ("as they are", "4 megapixels"):
        folder = photograph_set(options.data, size, options.files)
        runs = []
        for number in range(options.rounds):
            with tempfile.TemporaryDirectory() as scratch:
                runs.append(index_slowly(folder, model, session, scratch))
            print(f"  {size}: round {number + 1} of {options.rounds}", file=sys.stderr)
        medians = {stage: statistics.median(run[stage] for run in runs) for stage in STAGES}
        result["sets"][size] = {**describe(folder), "milliseconds": medians}
    result["shares"] = shares(session, model, options.rounds)
    show(result)
    write_json(options.json, result)


if __name__ == "__main__":
    main()
