"""Training: a config -> a run folder with the best model, the last state and a log.

    train(data, settings, model) -> Result
    OUT/best/  OUT/last/          model folders; last/ also holds what a resumed run needs
    OUT/splits/                   train.txt and dev.txt: which picture was in which part
    OUT/log.jsonl  OUT/train.json  OUT/tensorboard/

Knows how a run starts and where it lies; the loop itself is in `trainer`.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipmatch.archive import locate
from clipmatch.atomic import atomic_file
from clipmatch.checkpoint import (
    Checkpoint,
    create_checkpoint,
    load_checkpoint,
)
from clipmatch.config import DataConfig, ModelConfig, TrainConfig, from_json, to_json
from clipmatch.data import Splits, load_captions, shortest_names, split_captions
from clipmatch.errors import ClipmatchError, unwritable
from clipmatch.modelfolder import EMBEDDED_NAME, IMAGE_GRAPH, WEIGHTS, find_folder, find_local
from clipmatch.ranks import Ranks
from clipmatch.runlog import note, note_quirks, one_run
from clipmatch.runstate import find_state
from clipmatch.runtime import seed_everything
from clipmatch.streaming import ShardRows, stream_splits
from clipmatch.tokenizer import Tokenizer
from clipmatch.trainer import Result, Trainer


def train(
    data: DataConfig | Splits,
    settings: TrainConfig,
    model: ModelConfig | Checkpoint | str | Path | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Result:
    """Train a CLIP on captioned pictures and keep the model with the best recall on dev.

    data: caption file and folder, or splits already made. model: architecture for a new model, a model folder or a
    checkpoint to go on from; None takes the default towers from the hub. tokenizer: for text towers without one.
    resume: go on with the run in `settings.out`, whose saved model settings win.
    Raises ClipmatchError on bad settings or data, an existing run without `resume`, a loss that is not finite.
    """
    run = Path(settings.out)
    ranks = Ranks(settings.device)  # before anything can go wrong in one of them alone: the others see it end
    splits = data if isinstance(data, Splits) else read_splits(data, ranks)
    state = ranks.of_first(lambda: state_to_begin_with(run, resume))
    seed_everything(settings.seed)
    checkpoint = open_checkpoint(run / "last") if state else start_from(model, tokenizer)
    note(f"data: {len(splits.train)} pictures to train on, {len(splits.dev)} for dev ({splits.origin})")
    with one_run(run) if ranks.is_first else nullcontext():
        if ranks.is_first:
            write_plan(run, data, splits, settings)
        return Trainer(checkpoint, splits, settings, state, progress, ranks).run()


def resume(run: str | Path, progress: bool = True) -> Result:
    """Go on with the run in a folder, with the settings saved there. Raises ClipmatchError if there is none."""
    path = Path(run)
    try:
        plan = json.loads((path / "train.json").read_text())
        described, chosen = plan["data"], plan["settings"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ClipmatchError(f"{path} holds no run to resume; start one without --resume.") from None
    if described is None:  # its pictures were given in Python
        raise ClipmatchError(f"{path} was started from Python: call train(..., resume=True) there.")
    data, settings = from_json(DataConfig, described), from_json(TrainConfig, chosen)
    return train(data, replace(settings, out=str(path)), resume=True, progress=progress)


def read_splits(data: DataConfig, ranks: Ranks) -> Splits:
    """Caption file -> train and dev; what was repaired, dropped or missing is counted on stderr."""
    if data.stream:
        return stream_splits(data, ranks)
    captions = load_captions(data.captions, data.images, data.format)
    note_quirks(captions)
    return split_captions(captions, data.train_split, data.dev_split, data.dev_fraction)


def start_from(model: ModelConfig | Checkpoint | str | Path | None, tokenizer: Tokenizer | None) -> Checkpoint:
    """Whatever names a model -> a checkpoint to train."""
    if isinstance(model, Checkpoint):
        return model
    if isinstance(model, str | Path):
        return open_checkpoint(model)
    return create_checkpoint(model or ModelConfig(), tokenizer)


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """A model folder (or run, or hub repository of one) -> a checkpoint to train: of ONNX graphs, the heads."""
    local = find_folder(folder)
    if (local / WEIGHTS).is_file() or not (local / IMAGE_GRAPH).is_file():
        return load_checkpoint(local)
    from clipmatch.compact import load_heads

    return load_heads(local)


def state_to_begin_with(run: Path, resume: bool) -> dict[str, Any] | None:
    """The saved state of a run to resume; None for a new run. Raises ClipmatchError if the folder does not fit."""
    state = find_state(run)
    if resume:
        if state is None:
            raise ClipmatchError(f"{run} holds no run to resume; start one without --resume.")
        return state
    if state is not None or (run / "best").exists():
        raise ClipmatchError(f"{run} already holds a run; go on with it by --resume, or choose another --out.")
    return None


def write_plan(run: Path, data: DataConfig | Splits, splits: Splits, settings: TrainConfig) -> None:
    """Save what `resume` needs, and which pictures are in which part."""
    plan = {
        "data": absolute(data, "captions", "images", "train_split", "dev_split")
        if isinstance(data, DataConfig)
        else None,
        "settings": {
            **absolute(settings, "concepts"),
            "teachers": [absolute_name(name) for name in settings.teachers],
        },
    }
    files = {run / "train.json": json.dumps(plan, indent=2) + "\n"}
    for part, chosen in names_of_parts(splits).items():
        files[run / "splits" / f"{part}.txt"] = "".join(f"{name}\n" for name in chosen)
    try:
        for path, text in files.items():
            path.parent.mkdir(exist_ok=True)
            with atomic_file(path) as draft:  # a resumed run that is killed here leaves what the next one needs
                draft.write_text(text, encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise unwritable(f"The run in {run}", error, "choose another --out") from error


def names_of_parts(splits: Splits) -> dict[str, list[str]]:
    """The pictures of each part, or the archives that are streamed, by names that tell them apart."""
    if isinstance(splits.train, ShardRows):
        train = [shard.path for shard in splits.train.shards]
        dev = list(dict.fromkeys(inside[0] for row in splits.dev if (inside := locate(row.path))))
    else:
        train, dev = ([row.path for row in rows] for rows in (splits.train, splits.dev))
    names = shortest_names([*train, *dev])
    return {"train": names[: len(train)], "dev": names[len(train) :]}


def absolute(config: DataConfig | TrainConfig, *paths: str) -> dict[str, Any]:
    """A config with these of its paths absolute, so that a run can be resumed from any folder."""
    values = to_json(config)
    for name in paths:
        if values[name] is not None:
            values[name] = absolute_path(values[name])
    return values


def absolute_name(model: str) -> str:
    """The name of a model; if it is a folder here, absolute."""
    return absolute_path(model) if model != EMBEDDED_NAME and find_local(model) else model


def absolute_path(path: str) -> str:
    """A path as typed -> absolute."""
    return str(Path(path).expanduser().absolute())
