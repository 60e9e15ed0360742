"""Training from nothing in minutes, offline: draw scenes, train, evaluate, search, report.

In: a folder and a seed. Out: that folder with pictures, run and report. Uses the same functions as a run on real
photographs; only the towers are small and start from random weights.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from clipmatch.config import ModelConfig, TrainConfig
from clipmatch.data import CaptionedImage, Splits, load_captions, split_captions
from clipmatch.errors import ClipmatchError
from clipmatch.scenes import generate
from clipmatch.tokenizer import Tokenizer

SIZE = 64  # pixels of a scene
QUERY_COUNT = 4


def small_model(vocab_size: int) -> ModelConfig:
    """A ViT and a DistilBERT small enough to learn from scratch in minutes on a CPU."""
    return ModelConfig(
        image_tower={
            "model_type": "vit",
            "image_size": SIZE,
            "patch_size": 8,
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 512,
        },
        text_tower={
            "model_type": "distilbert",
            "vocab_size": vocab_size,
            "max_position_embeddings": 64,
            "dim": 128,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 512,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        image_pooling="mean",
        text_pooling="mean",
        max_length=40,
        feature_dropout=0.0,
        dropout=0.0,  # every picture is seen a few times only: there is nothing to overfit yet
    )


def small_settings(out: Path, seed: int = 0, epochs: int = 11, **changes: Any) -> TrainConfig:
    """Training settings for the small model: everything learns, at one rate."""
    rate = 1e-3
    return TrainConfig(
        **{
            "out": str(out),
            "epochs": epochs,
            "batch_size": 125,  # small batches learn more from each picture here
            "tune_image": "all",
            "tune_text": "all",
            "rate_heads": rate,
            "rate_image": rate,
            "rate_text": rate,
            "weight_decay": 0.05,
            "evaluate_every": 3,
            "seed": seed,
            **changes,
        }
    )


def learn_tokenizer(rows: Sequence[CaptionedImage], vocab_size: int = 400) -> Tokenizer:
    """A WordPiece vocabulary learnt from captions, in BERT's manner: [CLS] words [SEP]."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))  # nosec B106
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=specials, show_progress=False)
    backend.train_from_iterator((caption for row in rows for caption in row.captions), trainer)
    marks = [(mark, backend.token_to_id(mark)) for mark in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    return Tokenizer(backend)


def run_training_demo(out: Path, seed: int = 0) -> str:
    """Run everything, or what is left of an interrupted run -> the text to print."""
    from clipmatch.checkpoint import load_checkpoint
    from clipmatch.embedder import TorchEmbedder
    from clipmatch.evaluation import evaluate, recall_table
    from clipmatch.index import find_matches
    from clipmatch.modelfolder import write_json
    from clipmatch.report import write_demo_report
    from clipmatch.runlog import read_history

    began = time.perf_counter()
    folder = generate(out / "scenes", size=SIZE, seed=seed)
    splits = split_captions(load_captions(folder))
    finished = train_small(out / "run", splits, seed)
    if not finished:
        raise ClipmatchError("The demo was stopped; the same command goes on where it was.")
    embedder = TorchEmbedder(load_checkpoint(out / "run"))
    evaluation = evaluate(embedder, splits.dev)
    write_json(out / "evaluation.json", evaluation.to_json())
    gallery = [row.path for row in splits.dev]
    queries = sample_queries(splits.dev)
    results = [(query, find_matches(query, embedder, gallery, top_k=5, progress=False)) for query in queries]
    weights = sum(value.numel() for value in embedder.model.parameters())
    facts = {
        "pictures to train on": f"{len(splits.train):,}",
        "held-out pictures": f"{len(splits.dev):,}, none of whose contents occurs in training",
        "weights": f"{weights / 1e6:.1f} million, trained from scratch",
        "time": f"{time.perf_counter() - began:.0f} s for drawing, training and measuring",
    }
    report = write_demo_report(evaluation, read_history(out / "run"), results, out / "report.html", facts)
    lines = [recall_table(evaluation.to_json()), ""]
    for query, matches in results:
        lines += [f'"{query}"', *(f"  {match.score:.3f}  {match.path}" for match in matches[:3])]
    return "\n".join([*lines, "", f"report: {report}", f"model:  {out / 'run' / 'best'}"])


def sample_queries(rows: Sequence[CaptionedImage]) -> list[str]:
    """The first captions of evenly spaced pictures: each query has an exact answer among them."""
    return [rows[place * len(rows) // QUERY_COUNT].captions[0] for place in range(QUERY_COUNT)]


def train_small(run: Path, splits: Splits, seed: int, model: ModelConfig | Path | None = None, **changes: Any) -> bool:
    """Train the small model (or another, or on from a model folder), or go on with an unfinished run of the same
    settings; False if Ctrl-C stopped it.
    """
    from clipmatch.training import train

    settings = small_settings(run, seed, **changes)
    going_on = is_unfinished(run, settings)
    if going_on:
        print(f"going on with the run in {run}", file=sys.stderr)
    elif is_demo(run):
        shutil.rmtree(run)
    tokenizer = learn_tokenizer(splits.train)
    model = model or small_model(tokenizer.vocab_size)
    return train(splits, settings, model, tokenizer=tokenizer, resume=going_on).finished


def is_demo(run: Path) -> bool:
    """Whether a folder holds an earlier demo's run, which a new one may replace."""
    try:
        return bool(json.loads((run / "train.json").read_text())["data"] is None)
    except (OSError, ValueError, KeyError):
        return False


def is_unfinished(run: Path, settings: TrainConfig) -> bool:
    """Whether a run of exactly these settings stopped before its last step."""
    from clipmatch.config import from_json
    from clipmatch.runstate import find_state

    try:
        plan = json.loads((run / "train.json").read_text())
        state = find_state(run)
    except (OSError, ValueError, ClipmatchError):
        return False
    same = from_json(TrainConfig, plan["settings"]) == settings  # as settings: JSON has no tuples
    return state is not None and bool(same and state["step"] < state["total"])
