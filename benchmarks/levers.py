"""What each choice of runs/embedded.sh is worth: short runs that differ from their base in one thing.

    python benchmarks/levers.py RECIPE [--data DIR] [--out DIR] [--json FILE] [--only TEXT]

RECIPE is the folder that runs/embedded.sh has filled (its towers, concepts and stages are where the runs start from);
`--data` that of its pictures. Three sets of runs, as the recipe has three trained stages: heads on frozen towers,
towers tuned from there, and the tuned model taught by others. Measured on dev (recall@1/5/10, percent) and on everyday
photographs of other sources (benchmarks/everyday.py, its dev part). A run that is finished is not repeated.
"""

import argparse
import json
import re
from pathlib import Path

import everyday

from clipmatch.config import DataConfig, ModelConfig, TrainConfig
from clipmatch.data import load_captions, split_captions
from clipmatch.embedder import load_model
from clipmatch.runtime import cache_folder
from clipmatch.training import train

ROOT = Path(__file__).parents[1]
HEADS = {"epochs": 10, "batch_size": 500, "rate_heads": 1e-3}
TUNED = {
    "epochs": 2, "batch_size": 250, "views": 4, "tune_text": "all", "tune_image": 5,
    "rate_heads": 1e-3, "rate_image": 2e-4, "rate_text": 1e-4, "weight_decay": 0.05,
}  # fmt: skip
TAUGHT = {**TUNED, "teacher_weight": 0.7, "rate_heads": 3e-4, "rate_image": 7e-5, "rate_text": 3e-5}  # short: gentle
BOTH = ("tuned", "flickr8k/tuned")

# stage, name, what differs; the first of a stage is its base
RUNS = [
    ("heads", "base", {}),
    ("heads", "without concepts", {"concepts": None}),
    ("heads", "without concepts, average pooling alone", {"concepts": None, "image_pooling": "mean"}),
    ("heads", "no dropout of features", {"feature_dropout": 0.0}),
    ("heads", "batch 125", {"batch_size": 125}),
    ("heads", "batch 1,000", {"batch_size": 1000}),
    ("heads", "averaged weights", {"average": 0.99}),
    ("tuned", "base", {}),
    ("tuned", "without concepts", {"concepts": None}),
    ("tuned", "text tower alone", {"tune_image": "none"}),
    ("tuned", "batch 500", {"batch_size": 500}),
    ("tuned", "one view", {"views": 1}),
    ("taught", "base", {"teachers": BOTH}),
    ("taught", "no teacher", {}),
    ("taught", "taught by itself alone", {"teachers": BOTH[:1]}),
    ("taught", "taught by the transformer alone", {"teachers": BOTH[1:]}),
]  # fmt: skip


def start_of(stage, recipe, changes):
    """What a stage trains: new heads on the towers, or the model of the stage before."""
    if stage != "heads":
        return recipe / {"tuned": "heads", "taught": "tuned"}[stage]
    towers = {
        kind: str(recipe / "towers" / name) for kind, name in (("image_tower", "lite2"), ("text_tower", "minilm"))
    }
    own = {key: value for key, value in changes.items() if key in ("image_pooling", "feature_dropout")}
    return ModelConfig(**towers, **{"image_pooling": "mean+max", "text_pooling": "mean", "feature_dropout": 0.2, **own})


def settings_of(stage, recipe, out, changes):
    base = {"heads": HEADS, "tuned": TUNED, "taught": TAUGHT}[stage]
    values = {"concepts": str(recipe / "concepts.safetensors"), "evaluate_every": 100, **base, **changes}
    for name in ("image_pooling", "feature_dropout"):  # of the model
        values.pop(name, None)
    values["teachers"] = [str(recipe / name) for name in values.get("teachers", ())]
    return TrainConfig(out=str(out), **values)


def run(stage, name, changes, recipe, splits, photographs, out):
    """Train (or go on), measure -> figures in percent."""
    done = out / "figures.json"
    if done.is_file():
        return json.loads(done.read_text())
    resume = (out / "last" / "state.json").is_file()
    result = train(splits, settings_of(stage, recipe, out, changes), start_of(stage, recipe, changes), resume=resume)
    if not result.finished:
        raise SystemExit(130)
    seen = everyday.measure(load_model(result.model), photographs, cache_folder() / "everyday", progress=False)
    figures = {"stage": stage, "name": name}
    for direction in ("text_to_image", "image_to_text"):
        figures[direction] = [100 * result.dev[direction][f"recall@{k}"] for k in (1, 5, 10)]
    figures["everyday"] = [100 * seen["sentences"][f"recall@{k}"]["value"] for k in (1, 5, 10)]
    done.write_text(json.dumps(figures))
    return figures


def table(rows):
    def cell(row, key, base):
        return " / ".join(f"{value:.1f}" for value in row[key]) + (
            "" if row is base else f" ({sum(row[key]) / 3 - sum(base[key]) / 3:+.1f})"
        )

    lines = ["| stage | run | text to image R@1 / 5 / 10 | image to text | everyday |", "|---|---|---|---|---|"]
    base = rows[0]
    for row in rows:
        base = row if row["stage"] != base["stage"] else base
        cells = [cell(row, key, base) for key in ("text_to_image", "image_to_text", "everyday")]
        lines.append("| " + " | ".join([row["stage"], row["name"], *cells]) + " |")
    return "\n".join(lines) + "\n\nPercent; in brackets the mean change of the three recalls from the stage's base."


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "flickr8k")
    parser.add_argument("--out", type=Path, help="folder of the runs; RECIPE/levers if not given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", metavar="STAGE", help="heads, tuned or taught")
    arguments = parser.parse_args()
    out = arguments.out or arguments.recipe / "levers"
    data = DataConfig(
        captions=str(arguments.data / "captions.txt"),
        images=str(arguments.data / "Images"),
        train_split=str(arguments.recipe / "train.txt"),
        dev_split=str(arguments.data / "splits" / "dev.txt"),
    )
    captions = load_captions(data.captions, data.images)
    splits = split_captions(captions, data.train_split, data.dev_split, data.dev_fraction)
    packages, listed = everyday.read_list()
    photographs = [photo for photo in listed if photo.split == "dev"]
    for problem in everyday.collect(photographs, packages, cache_folder() / "everyday"):
        print(problem)
    rows = []
    for stage, name, changes in RUNS:
        if stage.startswith(arguments.only):
            slug = re.sub(r"\W+", "-", f"{stage}-{name}")
            rows.append(run(stage, name, changes, arguments.recipe, splits, photographs, out / slug))
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
