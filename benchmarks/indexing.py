"""How quickly photographs become an index: files a second, beside the bare encoder and rclip.

    python benchmarks/indexing.py --data DIR [--files 2000] [--rounds 3] [--rclip PATH] [--captions PATH --split FILE]

DIR holds photographs. Three sets of files are made of them: as they are, 1 to 4 megapixels, and 4 megapixels each
(upscaled, JPEG of quality 90). In turns, for each set:

    clipmatch index      the whole process, Python's start included, into a fresh index
    bare, together       the image graph alone on pixels in memory, 64 at a time, each picture shared out to all cores
    bare, each           the same, 8 at a time on each core, which is the quickest that was found
    rclip                the whole process, into a fresh database, with fewer files; it asks one query at the end

The graph is run without the outputs that an index has no use for. Then the same graph in float32, and with captions the
recall of both. At the end, vectors in the index are compared with those of files embedded one by one.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from common import CLIPMATCH, in_turns, machine, machine_line, ratio, run, table, timed, write_json
from graphs import write_float
from peers import find_rclip, rclip_home
from photographs import SIZES, describe, photograph_set

from clipmatch.crawl import list_images
from clipmatch.data import load_captions, select_part
from clipmatch.embedder import LOT, asked_for_only, embedded_folder, load_model, open_session
from clipmatch.evaluation import evaluate
from clipmatch.modelfolder import IMAGE_GRAPH
from clipmatch.preprocess import load_image
from clipmatch.runtime import usable_cores
from clipmatch.store import Store

TOGETHER = 64  # pictures at once where all cores share them
IN_MEMORY = 256  # pictures that the bare encoder goes round in
COMPARED = 50  # vectors that are computed once more


class Bare:
    """A graph on pixels [n, s, s, 3] that are in memory, `count` pictures a call."""

    def __init__(self, graph, pixels, count, together):
        size = TOGETHER if together else LOT
        self.session = open_session(graph, None if together else 1)
        self.threads = 1 if together else usable_cores()
        starts = [start % len(pixels) for start in range(0, count, size)]
        self.batches = [pixels[start : start + size] for start in starts]

    def __call__(self):
        """Pictures a second."""
        count = sum(map(len, self.batches))
        with ThreadPoolExecutor(self.threads) as pool:
            return count / timed(lambda: list(pool.map(self.embed, self.batches)))

    def embed(self, batch):
        self.session.run(["embedding"], {"pixels": batch}, asked_for_only())


def index_whole(folder, files, scratch):
    """`clipmatch index` into a fresh index -> files a second, peak memory in MB."""
    for old in scratch.glob("photos.sqlite*"):
        old.unlink()
    done = run([CLIPMATCH, "index", folder, "--index", scratch / "photos.sqlite"])
    return files / done.seconds, done.peak_mb


def rclip_whole(rclip, folder, files, scratch):
    """rclip into a fresh database -> files a second, peak memory in MB."""
    home = scratch / "rclip"
    shutil.rmtree(home, ignore_errors=True)
    done = run([rclip, "two dogs in the snow"], {"RCLIP_DATADIR": str(rclip_home(home))}, folder)
    return files / done.seconds, done.peak_mb


def measure_set(size, options, model, rclip, scratch):
    """The figures of a set of files."""
    folder = photograph_set(options.data, size, options.files)
    files = list_images(folder)
    graph = embedded_folder() / IMAGE_GRAPH
    pixels = np.stack(
        [model.transform.pixels(load_image(path, model.transform.config.size)) for path in files[:IN_MEMORY]]
    )
    cases = {
        "clipmatch index": lambda: index_whole(folder, len(files), scratch),
        "bare, together": Bare(graph, pixels, len(files), together=True),
        "bare, each": Bare(graph, pixels, len(files), together=False),
    }
    if rclip:
        few = photograph_set(options.data, size, options.rclip_files)
        cases["rclip"] = lambda: rclip_whole(rclip, few, len(list_images(few)), scratch)
    print(f"{size}: {len(files)} files", file=sys.stderr)
    found = in_turns(cases, options.rounds)
    peaks = {name: max(peak for _, peak in found[name]) for name in ("clipmatch index", "rclip") if name in found}
    rates = {name: [value[0] if name in peaks else value for value in values] for name, values in found.items()}
    ours = rates["clipmatch index"]
    return {
        **describe(folder),
        "files_per_second": rates,
        "peak_mb": peaks,
        "ours_to": {name: ratio(ours, values) for name, values in rates.items() if name != "clipmatch index"},
        "difference": compare(model, scratch / "photos.sqlite", len(files)),
    }


def compare(model, path, count):
    """The index in `path` against files embedded one by one: the largest 1 - cosine, also to files decoded in full."""
    with Store.open(path) as store:
        photos = dict(store.photos())
        _, numbers, rows = store.vectors()
    if len(rows) != count:
        raise RuntimeError(f"{count} files gave {len(rows)} vectors")
    chosen = np.linspace(0, count - 1, min(COMPARED, count)).astype(int)
    found = {"one by one": [], "decoded in full": []}
    for place in chosen:
        for name, side in (("one by one", model.transform.config.size), ("decoded in full", None)):
            image = load_image(photos[int(numbers[place])].path, side)
            found[name].append(1 - float(rows[place] @ model.encode_pixels(model.transform.pixels(image)[None])[0]))
    return {name: max(values) for name, values in found.items()}


def float_model(folder):
    """The embedded model in float32, as a model folder."""
    folder.mkdir()
    for path in embedded_folder().iterdir():
        if path.name != IMAGE_GRAPH and path.is_file():
            (folder / path.name).symlink_to(path)
    write_float(embedded_folder() / IMAGE_GRAPH, folder / IMAGE_GRAPH)
    return folder


def measure_float(options, model, scratch):
    """8-bit against float32 weights of the same graph: pictures a second, and with captions how well they find."""
    folder = photograph_set(options.data, "as they are", options.files)
    files = list_images(folder)[:IN_MEMORY]
    pixels = np.stack([model.transform.pixels(load_image(path, model.transform.config.size)) for path in files])
    folders = {"8 bits": embedded_folder(), "float32": float_model(scratch / "float")}
    cases = {name: Bare(path / IMAGE_GRAPH, pixels, options.files, together=False) for name, path in folders.items()}
    rates = in_turns(cases, options.rounds)
    result = {"pictures_per_second": rates, "ratio": ratio(rates["8 bits"], rates["float32"])}
    if options.captions:
        captions = load_captions(options.captions)
        rows = select_part(captions, options.split) if options.split else captions
        for name, path in folders.items():
            found = evaluate(load_model(path), rows)
            result[f"recall, {name}"] = {f"recall@{k}": found.text_to_image[f"recall@{k}"] for k in (1, 5, 10)}
    return result


def show(result):
    rows = []
    for size, found in result["sets"].items():
        title = f"{size} ({found['mean_megapixels']:.2f} MP, {found['mean_bytes'] / 1e3:.0f} kB)"
        for name, rates in found["files_per_second"].items():
            peak = f"{found['peak_mb'][name]:.0f} MB" if name in found["peak_mb"] else ""
            to = f"{found['ours_to'][name]:.2f}" if name in found["ours_to"] else ""
            rows.append([title, name, f"{statistics.median(rates):.1f}", to, peak])
        if "rclip" not in found["files_per_second"]:
            rows.append([title, "rclip", "not installed", "", ""])
    print(machine_line(result["machine"]))
    print(table(["files", "", "files/s", "clipmatch index / this", "peak memory"], rows))
    for size, found in result["sets"].items():
        parts = ", ".join(f"{name} {value:.1e}" for name, value in found["difference"].items())
        print(f"largest 1 - cosine, {size}: {parts}")
    if weights := result.get("weights"):
        print()
        rows = []
        for name, rates in weights["pictures_per_second"].items():
            recall = weights.get(f"recall, {name}", {})
            rows.append([name, f"{statistics.median(rates):.1f}", *(f"{100 * value:.1f}" for value in recall.values())])
        ks = [key.replace("recall", "R") for key in weights.get("recall, 8 bits", {})]
        print(table(["weights", "pictures/s", *ks], rows))
        print(f"8 bits / float32: {weights['ratio']:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--rclip-files", type=int, default=400, help="it is slow")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rclip", type=Path, metavar="PATH", help="its executable; installed into the cache otherwise")
    parser.add_argument("--no-rclip", action="store_true")
    parser.add_argument("--captions", type=Path, metavar="PATH", help="captions to measure recall with")
    parser.add_argument("--split", type=Path, metavar="FILE", help="the part of them")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = load_model()
    rclip = None if options.no_rclip else find_rclip(options.rclip)
    result = {"machine": machine("onnxruntime", "pillow", "numpy"), "sets": {}}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["CLIPMATCH_INDEX"] = str(Path(scratch) / "none.sqlite")  # the person's own index is left alone
        for size in options.sizes:
            result["sets"][size] = measure_set(size, options, model, rclip, Path(scratch))
        result["weights"] = measure_float(options, model, Path(scratch))
    show(result)
    write_json(options.json, result)


if __name__ == "__main__":
    main()
