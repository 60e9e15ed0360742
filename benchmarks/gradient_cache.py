"""Peak memory and time of a step of one large batch, whole and in chunks (`--chunk`, gradient caching).

    python benchmarks/gradient_cache.py [--batch 1024] [--chunks 256 128 64 40 32 16] [--rounds 3] [--json FILE]
                                        [--plot FILE.png]

A small ViT (64 pixels, 192 wide, 4 layers) and a small DistilBERT (192 wide, 2 layers), random weights, learn as a
whole on drawn scenes in float32 on the CPU; no dropout, so that loss and gradients can be compared. Each setting is a
process of its own, in turns, that takes three steps. "for the step" is how far its peak resident memory rises above
what it was when the model, its optimiser (still without state) and the tokens were ready: batch, activations, loss,
gradients and the optimiser's state. The time is that of the faster of the second and third step; the first one also
reads the pictures. Prints a table (Linux, macOS).
"""

import argparse
import json
import platform
import resource
import sys
import tempfile
from pathlib import Path
from statistics import median

from common import in_turns, machine, machine_line, ratio, run, table, write_json

from clipmatch.checkpoint import Checkpoint
from clipmatch.config import ModelConfig, PreprocessConfig, TrainConfig
from clipmatch.data import load_captions, split_captions
from clipmatch.demo_train import learn_tokenizer
from clipmatch.model import CLIPModel
from clipmatch.preprocess import Transform
from clipmatch.runtime import seed_everything
from clipmatch.scenes import generate
from clipmatch.tokenizer import Tokenizer
from clipmatch.trainer import Trainer

STEPS = 3
WIDTH = 192


def build(tokenizer):
    vit = {"model_type": "vit", "image_size": 64, "patch_size": 16, "hidden_size": WIDTH, "num_hidden_layers": 4}
    bert = {"model_type": "distilbert", "vocab_size": tokenizer.vocab_size, "dim": WIDTH, "n_layers": 2, "n_heads": 3}
    config = ModelConfig(
        image_tower={**vit, "num_attention_heads": 3, "intermediate_size": 4 * WIDTH},
        text_tower={**bert, "hidden_dim": 4 * WIDTH, "dropout": 0.0, "attention_dropout": 0.0},
        dropout=0.0,
        feature_dropout=0.0,
    )
    return Checkpoint(CLIPModel(config), tokenizer, Transform(PreprocessConfig(size=64)))


def peak():
    """Of this process, in megabytes."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (1e6 if platform.system() == "Darwin" else 1e3)


def measure(folder, batch, chunk):
    """A few steps in this process -> figures."""
    splits = split_captions(load_captions(folder))
    seed_everything(0)
    settings = TrainConfig(
        out=str(folder / "run"), batch_size=batch, chunk=chunk, tune_image="all", tune_text="all", epochs=STEPS,
        precision="float32", device="cpu", workers=0,
    )  # fmt: skip
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    trainer = Trainer(build(tokenizer), splits, settings, None, progress=False)
    trainer.model.train()
    batches = iter(trainer.loader())
    before = peak()
    steps = [trainer.take_step(batches, 10**6) for _ in range(STEPS)]
    return {
        "chunk": chunk,
        "peak_mb": peak(),
        "step_mb": peak() - before,
        "step_s": batch / max(step["pairs_per_second"] for step in steps[1:]),
        "loss": steps[0]["loss"],
        "gradient_norm": steps[0]["gradient_norm"],
    }


def measure_alone(folder, batch, chunk):
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--batch", batch, "--alone", folder, "--chunks", chunk]
    return json.loads(run(list(map(str, command))).stdout)


def summary(found):
    """Rounds by chunk (0: whole) -> a row for each: medians, the largest peak, and how they compare with the whole."""
    rows = []
    for chunk, rounds in found.items():
        seconds, whole = ([row["step_s"] for row in found[key]] for key in (chunk, 0))
        memory, whole_memory = (max(row["step_mb"] for row in found[key]) for key in (chunk, 0))
        rows.append(
            {
                **rounds[0],
                "peak_mb": max(row["peak_mb"] for row in rounds),
                "step_mb": memory,
                "step_s": median(seconds),
                "times_as_long": ratio(seconds, whole),
                "share_of_memory": memory / whole_memory,
                "rounds": rounds,
            }
        )
    return rows


def plot(rows, path):
    """Time and memory against the size of a chunk, as parts of the whole batch's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chunked = rows[1:]
    sizes = [row["chunk"] for row in chunked]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), dpi=100, layout="constrained")
    left.plot(sizes, [row["times_as_long"] for row in chunked], "o-")
    left.axhline(1.4, color="grey", linestyle="--", linewidth=1)
    left.set(title="time of a step, whole batch = 1", ylim=(0, None))
    right.plot(sizes, [row["share_of_memory"] for row in chunked], "o-", color="tab:orange")
    right.axhline(0.1, color="grey", linestyle="--", linewidth=1)
    right.set(title="memory for the step, whole batch = 1", ylim=(0, None))
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("pairs a chunk")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--chunks", type=int, nargs="+", default=[256, 128, 64, 40, 32, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--alone", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(measure(arguments.alone, arguments.batch, arguments.chunks[0] or None)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = generate(Path(scratch) / "scenes", n_train=arguments.batch, n_dev=16, size=64, progress=False)
        learn_tokenizer(split_captions(load_captions(folder)).train).save(folder / "tokenizer.json")
        cases = {
            chunk: lambda chunk=chunk: measure_alone(folder, arguments.batch, chunk) for chunk in (0, *arguments.chunks)
        }
        rows = summary(in_turns(cases, arguments.rounds))
    on = machine("torch", "transformers")
    print(machine_line(on))
    header = ["chunk", "a step", "times as long", "for the step", "of the whole's", "process", "loss", "gradient norm"]
    cells = [
        [
            row["chunk"] or f"whole ({arguments.batch:,})", f"{row['step_s']:.1f} s", f"{row['times_as_long']:.2f}",
            f"{row['step_mb']:,.0f} MB", f"{100 * row['share_of_memory']:.1f} %", f"{row['peak_mb']:,.0f} MB",
            f"{row['loss']:.5f}", f"{row['gradient_norm']:.5f}",
        ]
        for row in rows
    ]  # fmt: skip
    print(table(header, cells))
    write_json(arguments.json, {"machine": on, "batch": arguments.batch, "rows": rows})
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
