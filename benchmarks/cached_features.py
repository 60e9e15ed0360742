"""An epoch of head training: cached features against a loop that embeds every picture with the frozen towers again.

    python benchmarks/cached_features.py [--pictures 512] [--rounds 3] [--json FILE]

Both train the same heads on the same frozen towers (ViT-S/16 and six-layer DistilBERT shapes, random weights: speed
does not depend on them) with the same batches, in float32, in one process, taking turns. Prints a table and the ratio.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from clipmatch.checkpoint import Checkpoint
from clipmatch.config import ModelConfig, PreprocessConfig, TrainConfig
from clipmatch.data import load_captions, split_captions
from clipmatch.demo_train import learn_tokenizer
from clipmatch.loss import contrastive_loss
from clipmatch.model import CLIPModel
from clipmatch.preprocess import Transform, load_image
from clipmatch.runtime import cpu_features, usable_cores
from clipmatch.scenes import generate
from clipmatch.trainer import Trainer

BATCH = 64


def build(tokenizer):
    config = ModelConfig(
        image_tower={"model_type": "vit", "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
        text_tower={"model_type": "distilbert", "vocab_size": tokenizer.vocab_size, "dim": 384, "hidden_dim": 1536},
    )
    # The fingerprint of a loaded model: heads on random towers are refused otherwise, and rightly so.
    return Checkpoint(CLIPModel(config), tokenizer, Transform(PreprocessConfig()), fingerprint="benchmark")


def plain_epoch(checkpoint, rows, optimizer):
    """The loop of a tutorial: decode, embed with frozen towers, step the heads."""
    model = checkpoint.model
    for start in range(0, len(rows) // BATCH * BATCH, BATCH):
        batch = rows[start : start + BATCH]
        pixels = checkpoint.transform([load_image(row.path) for row in batch], return_tensors="pt")["pixel_values"]
        tokens = checkpoint.tokenizer([row.captions[0] for row in batch], max_length=64, return_tensors="pt")
        with torch.no_grad():
            images = model.image_encoder.features(pixels)
            texts = model.text_encoder.features(tokens["input_ids"], tokens["attention_mask"])
        loss = contrastive_loss(model.project_image(images), model.project_text(texts), model.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def machine():
    features = cpu_features()
    widest = next((name for name in ("avx512_bf16", "avx512f", "avx2") if name in features), "?")
    return {"cpu": platform.machine(), "cores": usable_cores(), "widest": widest, "torch": torch.__version__}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["CLIPMATCH_CACHE"] = scratch
        folder = generate(Path(scratch) / "scenes", n_train=arguments.pictures, n_dev=16, progress=False)
        splits = split_captions(load_captions(folder))
        tokenizer = learn_tokenizer(splits.train)
        checkpoint = build(tokenizer)
        settings = TrainConfig(out=f"{scratch}/run", epochs=1000, batch_size=BATCH, precision="float32")
        began = time.perf_counter()
        trainer = Trainer(checkpoint, splits, settings, None, progress=False)
        first = time.perf_counter() - began
        batches = iter(trainer.loader())
        plain, cached = [], []
        for _ in range(arguments.rounds):
            began = time.perf_counter()
            plain_epoch(checkpoint, splits.train, trainer.optimizer)
            plain.append(time.perf_counter() - began)
            began = time.perf_counter()
            for _ in range(trainer.steps_per_epoch):
                trainer.take_step(batches, 10**6)
            cached.append(time.perf_counter() - began)
    ratios = [slow / fast for slow, fast in zip(plain, cached, strict=True)]
    result = {
        "machine": machine(),
        "pictures": arguments.pictures,
        "plain_epoch_s": statistics.median(plain),
        "cached_epoch_s": statistics.median(cached),
        "filling_the_cache_s": first,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }
    print(f"{result['machine']}")
    print(f"embedding each epoch  {result['plain_epoch_s']:8.3f} s an epoch of {arguments.pictures} pairs")
    print(f"cached features       {result['cached_epoch_s']:8.3f} s (filled once in {first:.1f} s)")
    print(f"ratio                 {result['ratio']:8.0f} (each round: {', '.join(f'{r:.0f}' for r in ratios)})")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
