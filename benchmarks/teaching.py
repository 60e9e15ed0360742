"""What ticks and examples teach: precision among the first 20, before and after.

    python benchmarks/teaching.py --data DIR [--split FILE] [--json FILE]

DIR holds captioned pictures. A picture shows a concept if at least two of its captions say so, in the words below.

    words          the concept's name as a query
    ticks          the query again, refined by ticks on the first eight right ones among its first 40 matches and by
                   crosses on the first eight wrong ones; the ticked and crossed are left out of both counts
    taught         no words: a concept taught by eight pictures that show it, drawn at random (mean of `--draws`); they
                   are left out of the count. Leave-one-out is the precision that `clipmatch teach` prints for them.
"""

import argparse
import re
import statistics
from pathlib import Path

import numpy as np
from common import machine, machine_line, table, write_json

from clipmatch.data import load_captions, select_part
from clipmatch.embedder import load_model
from clipmatch.teaching import OTHERS, learn, leave_one_out

CONCEPTS = {
    "a dog running": r"\bdogs?\b.*\b(run|race)",
    "a man riding a bicycle": r"\b(bike|bicycle|biker|cyclist)s?\b",
    "snow": r"\bsnow",
    "rock climbing": r"\bclimb",
    "a beach": r"\bbeach\b",
    "skateboarding": r"\bskateboard",
    "a girl in pink": r"\bpink\b",
    "two dogs playing": r"\btwo (\w+ )?dogs|\bdogs play",
    "a crowd": r"\bcrowd",
}
TICKS = 8
LOOKED_AT = 40
FIRST = 20


def precision(scores, shows, left_out):
    """Of the first 20, some pictures left out, the share that show the concept."""
    scores = scores.copy()
    scores[left_out] = -np.inf
    return float(shows[np.argsort(-scores)[:FIRST]].mean())


def measure(rows, query, shows, draws):
    """One concept: unit rows [n, d], its query's [d], and which pictures show it [n] -> its figures."""
    none = np.empty((0, rows.shape[1]), np.float32)
    rest = rows[np.random.default_rng(0).choice(len(rows), min(OTHERS, len(rows)), replace=False)]
    first = np.argsort(-(rows @ query))[:LOOKED_AT]
    liked, disliked = first[shows[first]][:TICKS], first[~shows[first]][:TICKS]
    ticked = np.concatenate([liked, disliked])
    found = {
        "pictures": int(shows.sum()),
        "words": precision(rows @ query, shows, ticked),
        "ticks": precision(rows @ learn(rows[liked], rows[disliked], rest, query), shows, ticked),
    }
    taught, held = [], []
    for draw in range(draws):
        examples = np.random.default_rng(draw).choice(np.flatnonzero(shows), TICKS, replace=False)
        taught.append(precision(rows @ learn(rows[examples], none, rest), shows, examples))
        held.append(leave_one_out(rows[examples], none, rest))
    return {**found, "taught": statistics.mean(taught), "leave_one_out": statistics.mean(held)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--split", type=Path, metavar="FILE", help="the part that is searched; all if not given")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, data = load_model(), load_captions(options.data)
    chosen = (select_part(data, options.split) if options.split else data).rows
    rows = model.embed_images([row.path for row in chosen]).rows
    found = {}
    for name, pattern in CONCEPTS.items():
        said = [sum(bool(re.search(pattern, caption.lower())) for caption in row.captions) for row in chosen]
        shows = np.array(said) >= 2
        if shows.sum() > TICKS:
            found[name] = measure(rows, model.embed_texts([name])[0], shows, options.draws)
    kinds = ("words", "ticks", "taught", "leave_one_out")
    found["mean"] = {"pictures": "", **{kind: statistics.mean(row[kind] for row in found.values()) for kind in kinds}}
    on = machine("numpy", "onnxruntime")
    print(machine_line(on))
    print(f"precision among the first {FIRST} of {len(rows):,} pictures")
    cells = [[name, row["pictures"], *(f"{row[kind]:.2f}" for kind in kinds)] for name, row in found.items()]
    print(table(["concept", "pictures", "words", "ticks", "taught", "leave-one-out"], cells))
    write_json(options.json, {"machine": on, "gallery": len(rows), "concepts": found})


if __name__ == "__main__":
    main()
