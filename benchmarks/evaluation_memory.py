"""Ranks of 25,000 captions among 5,000 pictures and back (COCO's 5K test): time and peak memory, beside the obvious.

    python benchmarks/evaluation_memory.py [--pictures 5000] [--rounds 3] [--json FILE]

Unit rows of 256 numbers, five captions a picture, each near to its own; one picture in a hundred is a copy of another,
so that there are ties. `clipmatch` is `clipmatch.evaluation.retrieval_ranks`; `whole matrix, sorted` makes all scores
(to the same rounding) and sorts them both ways; `clip_benchmark` is that package's `zeroshot_retrieval`, which needs it
and PyTorch, and computes recall@1, @5 and @10 alone. Each is a process of its own, in turns: seconds are those of the
call, without imports; the peak is that of the whole process. Prints a table; ends with an error if the ranks of the
first two differ anywhere.
"""

import argparse
import json
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
from common import in_turns, machine, machine_line, ratio, run, table, write_json

from clipmatch.evaluation import recall_at_k, retrieval_ranks

WIDTH, CAPTIONS = 256, 5
RECALLS = (1, 5, 10)
BATCH = 64  # pictures a batch, which clip_benchmark then goes through the scores by


def make_rows(pictures, rng):
    """-> unit rows of pictures [n, d] and captions [5 n, d], float32, and whose each caption is [5 n]."""
    images = rng.normal(size=(pictures, WIDTH)).astype(np.float32)
    copies = rng.choice(pictures, (2, max(1, pictures // 100)), replace=False)
    images[copies[0]] = images[copies[1]]
    owner = rng.permutation(np.repeat(np.arange(pictures), CAPTIONS))
    texts = images[owner] + 4 * rng.normal(size=(len(owner), WIDTH)).astype(np.float32)
    return unit(images), unit(texts), owner


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def sorted_ranks(images, texts, owner):
    """The definition of `retrieval_ranks` on the whole matrix: sort, and see how many do not lie below."""
    scores = (texts.astype(np.float64) @ images.astype(np.float64).T).astype(np.float32)  # [m, n]
    own = scores[np.arange(len(scores)), owner]
    ordered = np.sort(scores, axis=1)
    text_ranks = [len(row) - np.searchsorted(row, mine) for row, mine in zip(ordered, own, strict=True)]
    best = np.full(len(images), -np.inf, np.float32)
    np.maximum.at(best, owner, own)
    scores[np.arange(len(scores)), owner] = -np.inf  # a picture's captions do not compete with each other
    ordered = np.sort(scores.T, axis=1)
    image_ranks = [1 + len(row) - np.searchsorted(row, mine) for row, mine in zip(ordered, best, strict=True)]
    return np.array(text_ranks), np.array(image_ranks)


def peer_recalls(images, texts, owner):
    """-> recalls both ways, by clip_benchmark, from rows in the place of its model's."""
    import torch
    from clip_benchmark.metrics import zeroshot_retrieval

    class Rows:
        """A model that is given rows and gives them back."""

        encode_image = encode_text = staticmethod(lambda rows: rows)

    zeroshot_retrieval.tqdm = lambda batches: batches
    order = np.argsort(owner, kind="stable").reshape(-1, CAPTIONS)  # the captions of each picture
    batches = [
        (torch.from_numpy(images[start : start + BATCH]), order[start : start + BATCH].tolist())
        for start in range(0, len(images), BATCH)
    ]
    found = zeroshot_retrieval.evaluate(
        Rows, batches, lambda chosen: torch.from_numpy(texts[chosen]), "cpu", amp=False, recall_k_list=list(RECALLS)
    )
    return [[found[f"{kind}_retrieval_recall@{k}"] for k in RECALLS] for kind in ("image", "text")]


WAYS = {"clipmatch": retrieval_ranks, "whole matrix, sorted": sorted_ranks, "clip_benchmark": peer_recalls}


def measure(folder, way):
    """In this process -> seconds and recalls; ranks go into the folder."""
    rows = [np.load(folder / f"{name}.npy") for name in ("images", "texts", "owner")]
    if way == "clip_benchmark":
        import clip_benchmark.metrics.zeroshot_retrieval  # noqa: F401  (before the clock starts)
    began = time.perf_counter()
    found = WAYS[way](*rows)
    seconds = time.perf_counter() - began
    if way != "clip_benchmark":
        np.save(folder / f"{way}.npy", np.concatenate(found))
        found = [[recall_at_k(ranks, k) for k in RECALLS] for ranks in found]
    return {"seconds": seconds, "text_to_image": found[0], "image_to_text": found[1]}


def measure_alone(folder, way):
    """The same in a process of its own, with its peak."""
    process = run([sys.executable, __file__, "--alone", folder, "--way", way])
    return {**json.loads(process.stdout), "peak_mb": process.peak_mb}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(measure(arguments.alone, arguments.way)))
        return
    ways = [way for way in WAYS if way != "clip_benchmark" or find_spec("clip_benchmark")]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = make_rows(arguments.pictures, np.random.default_rng(0))
        for name, values in zip(("images", "texts", "owner"), rows, strict=True):
            np.save(folder / f"{name}.npy", values)
        found = in_turns({way: lambda way=way: measure_alone(folder, way) for way in ways}, arguments.rounds)
        differing = sum(np.load(folder / "clipmatch.npy") != np.load(folder / "whole matrix, sorted.npy"))
    seconds = {way: [row["seconds"] for row in found[way]] for way in ways}
    lines = {
        way: {
            "seconds": median(seconds[way]),
            "times_clipmatch": ratio(seconds[way], seconds["clipmatch"]),
            "peak_mb": max(row["peak_mb"] for row in found[way]),
            **{direction: found[way][0][direction] for direction in ("text_to_image", "image_to_text")},
        }
        for way in ways
    }
    on = machine("numpy", "torch", "clip-benchmark")
    print(machine_line(on))
    cells = [
        [
            way,
            f"{line['seconds']:.2f} s",
            f"{line['times_clipmatch']:.2f}",
            f"{line['peak_mb']:,.0f} MB",
            *(" / ".join(f"{100 * recall:.2f}" for recall in line[way]) for way in ("text_to_image", "image_to_text")),
        ]
        for way, line in lines.items()
    ]
    header = ["", "time", "times clipmatch's", "peak of the process", "text to image R@1 / 5 / 10", "image to text"]
    print(table(header, cells))
    size = {"pictures": arguments.pictures, "captions": CAPTIONS * arguments.pictures, "width": WIDTH}
    write_json(arguments.json, {"machine": on, **size, "rounds": found, "ways": lines, "ranks_that_differ": differing})
    if differing:
        sys.exit(f"{differing} ranks differ from those of the sorted matrix.")
    print(f"all {6 * arguments.pictures:,} ranks equal those of the sorted matrix")


if __name__ == "__main__":
    main()
