"""What each choice of training heads is worth: short runs on cached features that differ from their base in one thing.

    python benchmarks/training_levers.py TOWERS [--data DIR] [--out DIR] [--seeds 2] [--only TEXT] [--json FILE]
        [--markdown FILE]

TOWERS is the folder that runs/flickr8k.sh has filled with towers (its OUT/towers); `--data` that of the pictures. The
base is that recipe's first stage, the heads. Measured on dev (recall@1/5/10, percent), in the mean over the seeds, of
the best model of each run. A run that is finished is not repeated.
"""

import argparse
import json
import re
import statistics
import tempfile
from pathlib import Path

from clipmatch.config import DataConfig, ModelConfig, TrainConfig
from clipmatch.data import load_captions, split_captions
from clipmatch.training import train

ROOT = Path(__file__).parents[1]
BASE = {"epochs": 90, "batch_size": 1000, "evaluate_every": 10}
NOISE = 0.5  # points by which runs differ that differ in the draws of dropout alone, such as those with --chunk
WAYS = ("text_to_image", "image_to_text")

# name, what differs; the first is the base
RUNS = [
    ("base: softmax, batch 1,000, 540 steps", {}),
    ("loss sigmoid", {"loss": "sigmoid"}),
    ("loss hinge", {"loss": "hinge"}),
    ("loss hinge, batch 125", {"loss": "hinge", "batch_size": 125}),
    ("hard negatives 0.25", {"hard_negatives": 0.25}),
    ("hard negatives 0.25, batch 250", {"hard_negatives": 0.25, "batch_size": 250}),
    ("mixup 0.2", {"mixup": 0.2}),
    ("average 0.99", {"average": 0.99}),
    ("batch 250, 2,160 steps", {"batch_size": 250}),
    ("batch 4,000, 90 steps", {"batch_size": 4000}),
    ("batch 4,000, 540 steps", {"batch_size": 4000, "epochs": 540, "evaluate_every": 60}),
    ("chunk 128", {"chunk": 128}),
]


def model_of(towers):
    """As in runs/flickr8k.sh."""
    return ModelConfig(
        image_tower=str(towers / "vit-s14"),
        text_tower=str(towers / "minilm"),
        image_pooling="cls+mean",
        text_pooling="mean",
        dropout=0.2,
        feature_dropout=0.2,
    )


def run(name, changes, seed, towers, splits, out):
    """Train (or go on) -> figures in percent."""
    done = out / "figures.json"
    if done.is_file():
        return json.loads(done.read_text())
    settings = TrainConfig(out=str(out), **{**BASE, **changes}, seed=seed)
    result = train(splits, settings, model_of(towers), resume=(out / "last" / "state.json").is_file(), progress=False)
    if not result.finished:
        raise SystemExit(130)
    figures = {"name": name, "seed": seed, "changes": changes}
    for way in WAYS:
        figures[way] = [100 * result.dev[way][f"recall@{k}"] for k in (1, 5, 10)]
    figures["seconds"] = sum(row["seconds"] for row in result.history if row["kind"] == "epoch")
    done.write_text(json.dumps(figures))
    return figures


def summarise(rows):
    """The runs of one name, over its seeds -> one row: means, and the six recalls' mean for each seed."""
    means = {way: [statistics.mean(values) for values in zip(*(row[way] for row in rows), strict=True)] for way in WAYS}
    scores = {str(row["seed"]): statistics.mean(row[WAYS[0]] + row[WAYS[1]]) for row in rows}
    seconds = statistics.mean(row["seconds"] for row in rows)
    return {"name": rows[0]["name"], "changes": rows[0]["changes"], **means, "mean": scores, "seconds": seconds}


def verdict(row, base):
    """One line: what the change does to the mean of the six recalls, seed by seed against the base."""
    if row is base:
        return "what the others are compared with"
    changes = [value - base["mean"][seed] for seed, value in row["mean"].items()]
    shown = ", ".join(f"{change:+.1f}" for change in changes)
    if min(changes) > NOISE:
        return f"helps ({shown})"
    return f"harms ({shown})" if max(changes) < -NOISE else f"no clear difference ({shown})"


def table(rows):
    lines = [
        "| run | text to image R@1 / 5 / 10 | image to text | training | against the base |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [" / ".join(f"{value:.1f}" for value in row[way]) for way in WAYS]
        lines.append("| " + " | ".join([row["name"], *cells, f"{row['seconds']:.0f} s", verdict(row, rows[0])]) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("towers", type=Path)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "flickr8k")
    parser.add_argument("--out", type=Path, help="folder of the runs; a temporary one if not given")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", default="", metavar="TEXT", help="the base and runs with this in their name")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    data = DataConfig(
        captions=str(arguments.data / "captions.txt"),
        images=str(arguments.data / "Images"),
        train_split=str(arguments.data / "splits" / "train.txt"),
        dev_split=str(arguments.data / "splits" / "dev.txt"),
    )
    captions = load_captions(data.captions, data.images)
    splits = split_captions(captions, data.train_split, data.dev_split, data.dev_fraction)
    out = arguments.out or Path(tempfile.mkdtemp())
    found = {}
    for seed in range(arguments.seeds):  # each seed whole, so that what is there can be compared
        for name, changes in [RUNS[0], *(run for run in RUNS[1:] if arguments.only in run[0])]:
            if seed and "epochs" in changes:
                continue  # six times as long: one seed will do
            slug = re.sub(r"\W+", "-", f"{name}-{seed}")
            found.setdefault(name, []).append(run(name, changes, seed, arguments.towers, splits, out / slug))
            rows = [summarise(rows) for rows in found.values()]
            print(table(rows), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(NOTES + table(rows) + "\n")


NOTES = f"""# What each choice of training heads is worth

Runs of `benchmarks/training_levers.py` on Flickr8k: the first stage of `runs/flickr8k.sh` (heads on cached features of
frozen towers), differing from its base in one thing. Percent on dev (1,000 pictures, 5,000 captions), the mean over
the seeds; in brackets, for each seed, the change of the mean of the six recalls. It helps or harms if every seed says
so by more than {NOISE}: runs with `--chunk`, which have the base's gradients but for other draws of dropout, show that
less is noise. Training: seconds of a run, without embedding and start.

"""


if __name__ == "__main__":
    main()
