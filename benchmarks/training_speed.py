"""Pairs a second and peak memory of training: heads, the text tower, everything; beside three other ways to do it.

    python benchmarks/training_speed.py [--peers PYTHON] [--steps 3] [--rounds 3] [--json FILE]

The model is the same in each: ViT-S/16 at 224 pixels (384 wide, 12 layers, 6 heads), a DistilBERT of 6 layers (384
wide, 12 heads), random weights (speed does not depend on them), heads of 256. So are the JPEG files, which are decoded
by the same code, the batch, the captions, cut to the longest of a batch, the loss, AdamW and the clipping of gradients;
each way reads, attends and optimises as it does if it is left alone. `tutorial` is the loop of a plain PyTorch
tutorial, frozen towers without gradients. `Trainer` is that of transformers, `sentence-transformers` the trainer of
that package, where PYTHON, an interpreter that has it beside what clipmatch needs, is given (this one otherwise). A
measurement is a process of its own, in turns: a step to get warm, then `steps` whose median counts, batch and all (of
heads, epochs on cached features). The peak is that of the whole process. Prints a table.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from common import in_turns, machine, machine_line, ratio, run, table, write_json
from torch import nn

from clipmatch.checkpoint import Checkpoint
from clipmatch.config import ModelConfig, PreprocessConfig, TrainConfig
from clipmatch.data import load_captions, split_captions
from clipmatch.demo_train import learn_tokenizer
from clipmatch.loss import contrastive_loss
from clipmatch.model import CLIPModel
from clipmatch.preprocess import Transform, load_image
from clipmatch.runtime import cpu_features, seed_everything
from clipmatch.scenes import generate
from clipmatch.tokenizer import Tokenizer
from clipmatch.trainer import Trainer

TASKS = {"heads": ("none", "none"), "text": ("none", "all"), "full": ("all", "all")}  # what of image and text learns
NAMES = {"heads": "heads alone", "text": "text tower and heads", "full": "everything"}
RATE, DECAY, CLIP = 1e-4, 0.1, 1.0
WARM = 1
EPOCHS = 20  # on cached features, for each step that is measured elsewhere


def build(folder, small):
    """The model that all train."""
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    vit, bert = ({"hidden_size": 384, "intermediate_size": 1536}, {"dim": 384, "hidden_dim": 1536, "n_layers": 6})
    size = 224
    if small:
        vit, bert = ({"hidden_size": 24, "intermediate_size": 96}, {"dim": 24, "hidden_dim": 96, "n_layers": 1})
        vit["num_hidden_layers"], size = 2, 32
    config = ModelConfig(
        image_tower={"model_type": "vit", "image_size": size, "num_attention_heads": 6, **vit},
        text_tower={"model_type": "distilbert", "vocab_size": tokenizer.vocab_size, "n_heads": 12, **bert},
    )
    seed_everything(0)
    # The fingerprint of a loaded model: frozen random towers are refused otherwise, and rightly so.
    return Checkpoint(CLIPModel(config), tokenizer, Transform(PreprocessConfig(size=size)), fingerprint="benchmark")


# Each way: a checkpoint and what to train -> seconds of each step, after WARM


def clipmatch(checkpoint, folder, task, arguments):
    os.environ["CLIPMATCH_CACHE"] = str(folder / "cache")
    image, text = TASKS[task]
    settings = TrainConfig(
        out=str(folder / "run"), epochs=10**6, batch_size=arguments.batch, tune_image=image, tune_text=text,
        precision=arguments.precision, device="cpu", clip_norm=CLIP, weight_decay=DECAY,
        rate_heads=RATE, rate_image=RATE, rate_text=RATE,
    )  # fmt: skip
    trainer = Trainer(checkpoint, split_captions(load_captions(folder)), settings, None, progress=False)
    trainer.model.train()
    batches = iter(trainer.loader())
    count = arguments.steps * (EPOCHS * trainer.steps_per_epoch if task == "heads" else 1)
    return step_times((trainer.take_step(batches, 10**9) for _ in range(WARM + count)), WARM)


def tutorial(checkpoint, folder, task, arguments):
    model, pairs = checkpoint.model, Pairs(checkpoint, folder)
    freeze(model, task)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=RATE, weight_decay=DECAY)
    loader = torch.utils.data.DataLoader(pairs, arguments.batch, shuffle=True, collate_fn=pairs.collate)
    model.train()

    def embed(tower, learns, *inputs):
        with torch.set_grad_enabled(learns != "none"):
            return tower.features(*inputs)

    def step(batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bfloat16"):
            images = embed(model.image_encoder, TASKS[task][0], batch["pixel_values"])
            texts = embed(model.text_encoder, TASKS[task][1], batch["input_ids"], batch["attention_mask"])
            images, texts = model.project_image(images), model.project_text(texts)
        loss = contrastive_loss(images, texts, model.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning, CLIP)
        optimizer.step()
        return loss.item()

    return step_times((step(batch) for batch in islice(loader, WARM + arguments.steps)), WARM)


class WithLoss(nn.Module):
    """The model as the trainer of transformers wants it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, input_ids, attention_mask):
        images, texts = self.model.encode_image(pixel_values), self.model.encode_text(input_ids, attention_mask)
        return {"loss": contrastive_loss(images, texts, self.model.logit_scale)}


def transformers_trainer(checkpoint, folder, task, arguments):
    import transformers

    freeze(checkpoint.model, task)
    pairs, clock = Pairs(checkpoint, folder), step_clock()
    settings = transformers.TrainingArguments(**peer_settings(folder, arguments), remove_unused_columns=False)
    transformers.Trainer(
        WithLoss(checkpoint.model), settings, pairs.collate, train_dataset=pairs, callbacks=[clock]
    ).train()
    return clock.seconds()


def sentence_transformers(checkpoint, folder, task, arguments):
    import datasets
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.modules import InputModule
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    freeze(checkpoint.model, task)
    pairs, clock = Pairs(checkpoint, folder), step_clock()

    class Towers(InputModule):
        """File names and captions -> unit vectors."""

        def __init__(self):
            super().__init__()
            self.model = checkpoint.model

        def preprocess(self, inputs, prompt=None, **rest):
            return pairs.pixels(inputs) if inputs[0].endswith(".jpg") else pairs.tokens(inputs)

        def forward(self, features):
            if "pixel_values" in features:
                return {**features, "sentence_embedding": self.model.encode_image(features["pixel_values"])}
            rows = self.model.encode_text(features["input_ids"], features["attention_mask"])
            return {**features, "sentence_embedding": rows}

        def save(self, *rest, **options):
            pass

    model = SentenceTransformer(modules=[Towers()], device="cpu")
    data = [{"image": str(row.path), "caption": row.captions[0]} for row in pairs.rows]
    loss = MultipleNegativesRankingLoss(
        model, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )
    settings = SentenceTransformerTrainingArguments(**peer_settings(folder, arguments))
    SentenceTransformerTrainer(model, settings, datasets.Dataset.from_list(data), loss=loss, callbacks=[clock]).train()
    return clock.seconds()


WAYS = {
    "clipmatch": clipmatch,
    "tutorial": tutorial,
    "Trainer": transformers_trainer,
    "sentence-transformers": sentence_transformers,
}


# What the others share


class Pairs(torch.utils.data.Dataset):
    """A picture and its first caption."""

    def __init__(self, checkpoint, folder):
        self.checkpoint = checkpoint
        self.rows = split_captions(load_captions(folder)).train

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        return self.rows[number]

    def pixels(self, paths):
        size = self.checkpoint.transform.config.size
        return self.checkpoint.transform([load_image(Path(path), min_size=size) for path in paths], return_tensors="pt")

    def tokens(self, texts):
        return self.checkpoint.tokenizer(list(texts), padding=True, max_length=64, return_tensors="pt")

    def collate(self, rows):
        return {**self.pixels([row.path for row in rows]), **self.tokens([row.captions[0] for row in rows])}


def freeze(model, task):
    for encoder, learns in zip((model.image_encoder, model.text_encoder), TASKS[task], strict=True):
        encoder.backbone.requires_grad_(learns != "none")


def peer_settings(folder, arguments):
    """Of the trainers of transformers and sentence-transformers."""
    return {
        "output_dir": str(folder / "peer"), "per_device_train_batch_size": arguments.batch, "use_cpu": True,
        "max_steps": WARM + arguments.steps, "learning_rate": RATE, "weight_decay": DECAY, "max_grad_norm": CLIP,
        "lr_scheduler_type": "constant", "bf16": arguments.precision == "bfloat16", "report_to": "none",
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip


def step_clock():
    """A callback that notes when steps end."""
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        def __init__(self):
            self.ends = []

        def on_step_end(self, *rest, **options):
            self.ends.append(time.perf_counter())

        def seconds(self):
            return [b - a for a, b in zip(self.ends[WARM - 1 :], self.ends[WARM:], strict=False)]

    return StepClock()


def step_times(steps, warm):
    """Go through an iterable of steps -> the seconds of each after the first `warm`."""
    ends = [time.perf_counter() for _ in steps]
    return [b - a for a, b in zip(ends[warm - 1 :], ends[warm:], strict=False)]


# The measurement


def measure_alone(folder, task, way, arguments, precision):
    """In a process of its own -> pairs a second and its peak."""
    python = arguments.peers if way == "sentence-transformers" else sys.executable
    command = [python, __file__, "--alone", folder, "--task", task, "--way", way, "--precision", precision]
    command += ["--batch", str(arguments.batch), "--steps", str(arguments.steps)]
    process = run([*command, *(["--small"] if arguments.small else [])])
    seconds = json.loads(process.stdout.splitlines()[-1])
    return {"pairs_a_second": arguments.batch / median(seconds), "peak_mb": process.peak_mb}


def has(python, package):
    """Whether an interpreter has a package, and which version."""
    ask = f"from importlib.metadata import version; print(version({package!r}))"
    try:
        return run([python, "-c", ask]).stdout.strip()
    except RuntimeError:
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="tiny towers, to see that it runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="float32", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        checkpoint = build(arguments.alone, arguments.small)
        print(json.dumps(WAYS[arguments.way](checkpoint, arguments.alone, arguments.task, arguments)))
        return
    on = machine("torch", "transformers") | {"sentence-transformers": has(arguments.peers, "sentence-transformers")}
    ways = [way for way in WAYS if way != "sentence-transformers" or on[way]]
    settings = [(task, "float32") for task in arguments.tasks]
    bfloat16 = bool({"amx_bf16", "avx512_bf16"} & cpu_features())
    if bfloat16 and "full" in arguments.tasks:
        settings.append(("full", "bfloat16"))
    with tempfile.TemporaryDirectory() as scratch:
        count = arguments.batch * (WARM + arguments.steps)
        folder = generate(Path(scratch) / "scenes", n_train=count, n_dev=16, size=256, progress=False)
        learn_tokenizer(split_captions(load_captions(folder)).train).save(folder / "tokenizer.json")
        found = {}
        for task, precision in settings:
            cases = {
                way: lambda way=way, task=task, precision=precision: measure_alone(
                    folder, task, way, arguments, precision
                )
                for way in ways
            }
            found[task, precision] = in_turns(cases, arguments.rounds)
    rows = []
    for (task, precision), by_way in found.items():
        speeds = {way: [row["pairs_a_second"] for row in by_way[way]] for way in ways}
        for way in ways:
            figures = {"pairs_a_second": median(speeds[way]), "peak_mb": max(row["peak_mb"] for row in by_way[way])}
            figures["clipmatch_is_faster_by"] = ratio(speeds["clipmatch"], speeds[way])
            rows.append({"task": task, "precision": precision, "way": way, **figures, "rounds": by_way[way]})
    print(machine_line(on))
    header = ["what learns", "numbers", "way", "pairs a second", "clipmatch's are times as many", "peak of the process"]
    cells = [
        [
            NAMES[row["task"]], row["precision"], row["way"], f"{row['pairs_a_second']:,.1f}",
            f"{row['clipmatch_is_faster_by']:.2f}", f"{row['peak_mb']:,.0f} MB",
        ]
        for row in rows
    ]  # fmt: skip
    print(table(header, cells))
    if not bfloat16:
        print("bfloat16 was not measured: this CPU has neither AVX512-BF16 nor AMX-BF16")
    size = {"batch": arguments.batch, "steps": arguments.steps, "small": arguments.small}
    write_json(arguments.json, {"machine": on, **size, "bfloat16_measured": bfloat16, "rows": rows})


if __name__ == "__main__":
    main()
