"""Peak memory and time of a step of one large batch, whole and in chunks (`--chunk`, gradient caching).

    python benchmarks/gradient_cache.py [--batch 1024] [--chunks 256 64 16] [--json FILE]

A small ViT and a small DistilBERT, random weights, learn as a whole on drawn scenes in float32 on the CPU; no dropout,
so that loss and gradients can be compared. Each setting is a process of its own, whose peak resident memory is taken
(Linux, macOS). Prints a table.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from clipmatch.checkpoint import Checkpoint
from clipmatch.config import ModelConfig, PreprocessConfig, TrainConfig
from clipmatch.data import load_captions, split_captions
from clipmatch.demo_train import learn_tokenizer
from clipmatch.model import CLIPModel
from clipmatch.preprocess import Transform
from clipmatch.runtime import seed_everything, usable_cores
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
        "before_training_mb": before,
        "step_s": batch / max(step["pairs_per_second"] for step in steps),
        "loss": steps[0]["loss"],
        "gradient_norm": steps[0]["gradient_norm"],
    }


def measure_alone(folder, batch, chunk):
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--batch", str(batch), "--alone", str(folder), "--chunks", str(chunk)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def table(batch, rows):
    lines = [
        "| batch | chunk | peak memory | of which for the step | a step | loss | gradient norm |",
        "|" + "---|" * 7,
    ]
    for row in rows:
        own = row["peak_mb"] - row["before_training_mb"]
        cells = [f"{batch:,}", row["chunk"] or "whole", f"{row['peak_mb']:,.0f} MB", f"{own:,.0f} MB"]
        cells += [f"{row['step_s']:.1f} s", f"{row['loss']:.5f}", f"{row['gradient_norm']:.5f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--chunks", type=int, nargs="+", default=[256, 64, 16])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(measure(arguments.alone, arguments.batch, arguments.chunks[0] or None)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = generate(Path(scratch) / "scenes", n_train=arguments.batch, n_dev=16, size=64, progress=False)
        learn_tokenizer(split_captions(load_captions(folder)).train).save(folder / "tokenizer.json")
        rows = [measure_alone(folder, arguments.batch, chunk) for chunk in (0, *arguments.chunks)]
    print(table(arguments.batch, rows))
    if arguments.json:
        machine = {"cpu": platform.machine(), "cores": usable_cores()}
        arguments.json.write_text(
            json.dumps({"machine": machine, "batch": arguments.batch, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
