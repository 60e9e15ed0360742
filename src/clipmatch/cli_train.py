"""The commands for captioned photographs and models: demo, train, evaluate, export, models. Parse, call, print.

In: the words of the command line. Out: answers on stdout, progress and warnings on stderr.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from clipmatch.cli_data import data_options
from clipmatch.cli_photos import model_option
from clipmatch.config import DataConfig, ModelConfig, TrainConfig, from_json
from clipmatch.errors import ClipmatchError
from clipmatch.output import report_failures

if TYPE_CHECKING:
    from clipmatch.embedder import BatchedEmbedder
    from clipmatch.evaluation import Evaluation

CAPTIONS_HELP = "Caption file, the folder that holds it, or shards as in 'data/{00..99}.tar'."
Command = Callable[..., Any]


def device_options(command: Command) -> Command:
    """Options that say where to compute."""
    precisions = click.Choice(["float32", "bfloat16", "float16"])
    for option in (
        click.option(
            "--precision", type=precisions, help="Number type; by default float32, to train the fastest safe one."
        ),
        click.option("--device", help="cpu, cuda, cuda:1, mps; the fastest if not given."),
    ):
        command = option(command)
    return command


@click.command()
@click.option("--train", is_flag=True, help="Train a small CLIP from nothing instead: three minutes on two CPU cores.")
@click.option("--generate", is_flag=True, help="Learn to paint instead: some twenty minutes, a sheet of pictures.")
@click.option("--out", default="clipmatch-demo", show_default=True, metavar="DIR", help="Folder for all that it makes.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of scenes and training.")
@click.pass_context
def demo(context: click.Context, /, train: bool, generate: bool, out: str, seed: int) -> None:
    """Search sample photographs, or train from nothing, offline.

    Asks the model that comes with clipmatch for seven things among the photographs of scikit-image, and writes
    DIR/photographs.html: what is found for each, right or wrong.

    With --train: draws 8,500 captioned scenes, trains a ViT and a DistilBERT from scratch, measures them on 500
    held-out scenes, answers a few queries and writes DIR/report.html. Interrupted, it goes on where it was.

    With --generate: trains that model if it is not there, then an autoencoder of the scenes (VQGAN) and what paints its
    codes from a sentence, and writes DIR/painted.png: pictures of 16 sentences whose contents it has never seen.
    """
    if train and generate:
        raise ClipmatchError("--generate trains all that it needs; leave out --train.")
    if generate:
        from clipmatch.generation.demo_generate import run_generation_demo

        click.echo(run_generation_demo(Path(out), seed))
        return
    if train:
        from clipmatch.demo_train import run_training_demo

        click.echo(run_training_demo(Path(out), seed))
        return
    if context.get_parameter_source("seed") is ParameterSource.COMMANDLINE:
        refuse_idle({"seed"}, "Without --train or --generate nothing is drawn or learnt")
    from clipmatch.demo import run_demo

    click.echo(run_demo(Path(out)))


def blocks(context: click.Context, option: click.Parameter, value: str) -> int | str:
    """none, all, or a number of blocks."""
    if value in ("none", "all"):
        return value
    if value.isdigit() and int(value) > 0:
        return int(value)
    raise click.BadParameter("give none, all, or a number of blocks")


# Shown in this order by `clipmatch train --help`; every default is the config's own.
TRAIN_HELP = {
    "epochs": "Passes over the pictures.",
    "batch_size": "Pairs that compete with each other; larger is better for heads.",
    "tune_image": "Image tower: none (heads only, on cached features), the last N blocks, or all.",
    "tune_text": "Text tower: the same.",
    "lora": "Rank of updates that tuned towers learn in place of their weights (LoRA); wants ten times their rates.",
    "rate_heads": "Peak learning rate of the heads.",
    "rate_image": "Peak learning rate of the image tower, as far as it is tuned.",
    "rate_text": "Peak learning rate of the text tower, as far as it is tuned.",
    "weight_decay": "Decay of matrices; norms, biases and logit scale have none.",
    "loss": "softmax (CLIP), sigmoid (SigLIP), or hinge (VSE++: the hardest negatives alone).",
    "hard_negatives": "Share of each batch (such as 0.25) that are pictures similar to its others.",
    "mine_every": "Epochs between looks at which pictures are similar.",
    "mixup": "Mix pairs by shares from a Beta distribution with this parameter (0.2 is usual); frozen towers only.",
    "warmup": "Fraction of the steps with rising rate.",
    "clip_norm": "Largest gradient norm.",
    "average": "Decay of a moving average of the weights, which is then measured and kept (0.99 is usual).",
    "concepts": "File of what the image tower's classifier knows, to be learnt beside the pictures (runs/concepts.py).",
    "concept_weight": "Weight of the concepts' loss.",
    "teachers": 'Model (folder, hub name or "embedded") whose likings are learnt beside the pairs; may be given again.',
    "teacher_weight": "Weight of the teachers' part of the loss.",
    "views": "Cached views of each picture: the plain one and N-1 augmented ones.",
    "augment": "Augment pictures as they are read, when the whole image tower learns.",
    "flip": "Mirror augmented pictures; say --no-flip if captions tell left from right.",
    "adversarial": "Learn pictures as changed for the worse by so many levels of 255 (7, say), for a model that guides "
    "painting; the whole image tower must learn, and a step takes about twice as long.",
    "accumulate": "Batches whose gradients are added up for one step; each has its own negatives.",
    "chunk": "Pairs that pass the towers at a time: large batches in little memory, with the same gradients.",
    "gradient_checkpointing": "Less memory, more time.",
    "evaluate_every": "Epochs between looks at dev.",
    "patience": "Looks at dev without a better recall before stopping early.",
    "workers": "Processes that decode pictures.",
    "seed": "Of weights, order, captions and views.",
}


def train_options(command: Command) -> Command:
    """An option for each training setting, made from the config so that name and default are said once."""
    for field in reversed(fields(TrainConfig)):
        if field.name not in TRAIN_HELP:
            continue
        name, text = field.name.replace("_", "-"), TRAIN_HELP[field.name]
        if field.default in (True, False) and isinstance(field.default, bool):
            flag = f"--{name}/--no-{name}"
            command = click.option(flag, default=field.default, show_default=True, help=text)(command)
        elif field.name == "teachers":
            command = click.option("--teacher", field.name, multiple=True, metavar="NAME", help=text)(command)
        elif field.name.startswith("tune_"):
            command = click.option(
                f"--{name}", default="none", show_default=True, callback=blocks, metavar="none|N|all", help=text
            )(command)
        else:
            optional = str if str(field.type).startswith("str") else int
            kind = optional if field.default is None else type(field.default)
            shown = field.default is not None
            command = click.option(f"--{name}", type=kind, default=field.default, show_default=shown, help=text)(
                command
            )
    return command


@click.command()
@click.option("--captions", metavar="FILE", help=CAPTIONS_HELP)
@data_options
@click.option("--train-split", metavar="FILE", help="Image names to train on, one a line.")
@click.option(
    "--dev-split",
    metavar="FILE",
    help="Held-out names. Without both: official files, if there.",
)
@click.option(
    "--dev-fraction",
    default=DataConfig.dev_fraction,
    show_default=True,
    help="Held out if there are no split files.",
)
@click.option(
    "--stream",
    is_flag=True,
    help="Read WebDataset archives as they are learnt from, each process its share: nothing of all pictures is kept.",
)
@click.option("--out", required=True, metavar="DIR", help="Folder of the run: best/, last/, log.jsonl, tensorboard/.")
@click.option("--dry-run", is_flag=True, help="Only say what it would do and take, from a few measured steps.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, with its own settings.")
@click.option("--model", metavar="DIR", help="Go on from this model folder instead of new heads on two towers.")
@click.option(
    "--towers",
    type=click.Choice(["compact"]),
    help="Go on from the model that comes with clipmatch, whose towers stay; the result searches without PyTorch.",
)
@click.option("--image-tower", default=ModelConfig.image_tower, show_default=True, help="Hub name or local folder.")
@click.option("--text-tower", default=ModelConfig.text_tower, show_default=True, help="Hub name or local folder.")
@click.option(
    "--image-pooling",
    default="cls",
    show_default=True,
    type=click.Choice(["cls", "mean", "cls+mean", "mean+max"]),
    help="What stands for the picture: class token, mean or maximum of the patches.",
)
@click.option(
    "--text-pooling",
    default="cls",
    show_default=True,
    type=click.Choice(["cls", "mean"]),
    help="What stands for the caption: first token, mean of all.",
)
@click.option("--max-length", default=ModelConfig.max_length, show_default=True, help="Tokens of a caption at most.")
@click.option(
    "--feature-dropout",
    default=ModelConfig.feature_dropout,
    show_default=True,
    help="On what the towers give the heads.",
)
@click.option("--dropout", default=ModelConfig.dropout, show_default=True, help="In the projection heads.")
@train_options
@device_options
@click.pass_context
def train(context: click.Context, /, **options: Any) -> None:
    """Train a CLIP on captioned photographs.

    By default only the heads learn, on features of the frozen towers that are computed once and cached: minutes on a
    laptop. --tune-text all and --tune-image N fine-tune the towers too. Ctrl-C stops cleanly; --resume goes on.
    """
    from clipmatch import training
    from clipmatch.runtime import is_first_process

    given = {name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if options["resume"]:
        refuse_idle(given - {"resume", "out"}, "--resume goes on with the run's own settings")
        result = training.resume(options["out"])
    else:
        if not options["captions"]:
            raise ClipmatchError("Which captions? Give --captions FILE (and --images DIR), or --resume.")
        if options["dry_run"]:
            from clipmatch.plan import plan_run

            wanted = pick(DataConfig, options), pick(TrainConfig, options), starting_model(options, given)
            click.echo(str(plan_run(*wanted)))
            return
        result = training.train(pick(DataConfig, options), pick(TrainConfig, options), starting_model(options, given))
    if not is_first_process():
        return
    report_failures(result.failures)
    if not result.finished:
        click.echo(f"go on with: clipmatch train --resume --out {options['out']}", err=True)
        raise SystemExit(130)
    click.echo(f"best model: {result.model}")
    click.echo(json.dumps({"model": str(result.model), "dev": result.dev}), err=True)


def starting_model(options: dict[str, Any], given: set[str]) -> ModelConfig | Path | str:
    """What --towers, --model or the options of a new model say that training starts from."""
    architecture = given & {field.name for field in fields(ModelConfig)}
    if options["towers"]:
        from clipmatch.embedder import embedded_folder

        refuse_idle(given & {"model"} | architecture, "--towers compact brings a model with its own architecture")
        return embedded_folder()
    if options["model"]:
        refuse_idle(architecture, "--model brings its own architecture")
        return str(options["model"])
    model: ModelConfig = pick(ModelConfig, options)
    return model


def refuse_idle(names: set[str], why: str) -> None:
    """Raise ClipmatchError for options that would have no effect."""
    if names:
        listed = ", ".join(sorted("--" + name.replace("_", "-") for name in names))
        raise ClipmatchError(f"{why}, so {listed} would change nothing; leave it out.")


def pick(kind: type[Any], options: dict[str, Any]) -> Any:
    """The options that are settings of `kind` -> that config."""
    known = {field.name for field in fields(kind)}
    return from_json(kind, {name: value for name, value in options.items() if name in known})


@click.command()
@model_option
@click.option("--captions", required=True, metavar="FILE", help=CAPTIONS_HELP)
@data_options
@click.option(
    "--split",
    metavar="FILE",
    help="Only these images: one name a line; or train, dev, test, if the captions say which.",
)
@click.option("--json", "json_file", metavar="FILE", help="Write the figures; - for stdout.")
@click.option("--html", metavar="FILE", help="Write the evaluation card: table, curves, best and worst queries.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the bootstrap.")
@device_options
def evaluate(
    model: str | None,
    captions: str,
    images: str | None,
    format: str | None,
    split: str | None,
    json_file: str | None,
    html: str | None,
    seed: int,
    device: str | None,
    precision: str | None,
) -> None:
    """Measure recall@k, with chance level and confidence interval.

    Both ways: captions that find their picture, pictures that find one of their captions. With 60 pictures or more the
    model also learns how probable its matches are, which it keeps in its folder for clipmatch find.
    """
    from clipmatch import evaluation
    from clipmatch.data import load_captions, select_part
    from clipmatch.embedder import load_model
    from clipmatch.modelfolder import write_json
    from clipmatch.runlog import note_quirks

    embedder = load_model(model, device, precision)
    data = load_captions(captions, images, format)
    note_quirks(data)
    if split:
        data = select_part(data, split)
    flattered = bool(model) and warn_of_training_pictures(str(model), data.rows)
    result = evaluation.evaluate(embedder, data, seed=seed)
    figures = result.to_json()
    figures["model"]["path"] = model
    figures["confidence"] = None if flattered else calibrate_model(embedder, result)
    report_failures(result.failures)
    click.echo(json.dumps(figures, indent=2) if json_file == "-" else evaluation.recall_table(figures))
    if json_file and json_file != "-":
        write_json(Path(json_file), figures)
    if html:
        from clipmatch.report import write_evaluation_card
        from clipmatch.runlog import read_history

        write_evaluation_card(result, Path(html), history=(read_history(model) if model else None) or None)


def calibrate_model(embedder: BatchedEmbedder, result: Evaluation) -> dict[str, Any] | None:
    """Fit the confidence of the model's matches and keep it in its folder -> its figures; None if it can't be done."""
    from clipmatch.calibration_fit import calibrate
    from clipmatch.exclusion_fit import find_concepts
    from clipmatch.modelfolder import EMBEDDED

    try:
        calibration = calibrate(
            result.image_rows,
            result.text_rows,
            result.image_of_text,
            concepts=find_concepts(result.captions, result.image_of_text, embedder.embed_texts),
            fingerprint=result.fingerprint,
            split_hash=result.split_hash,
            seed=result.seed,
        )
        if embedder.folder is not None and embedder.folder != EMBEDDED:
            calibration.save(embedder.folder)
    except ClipmatchError as error:  # the recalls stand without it
        click.echo(f"No confidence: {error}", err=True)
        return None
    return calibration.figures


def warn_of_training_pictures(model: str, rows: Any) -> bool:
    """Whether a run is measured on what it was trained on; says so, for such figures flatter."""
    from clipmatch.data import select_split

    lists = Path(model).expanduser() / "splits"
    if not (lists / "train.txt").is_file():
        return False
    try:
        seen = len(select_split(rows, lists / "train.txt"))
    except ClipmatchError:  # none of them
        return False
    click.echo(
        f"Warning: {model} was trained on {seen} of these {len(rows)} images, which flatters it; "
        f"for the others give --split {lists / 'dev.txt'}",
        err=True,
    )
    return True


@click.command()
@click.argument("model")
@click.option("--out", required=True, metavar="DIR", help="Folder of the ONNX model.")
@click.option("--int8", is_flag=True, help="Weights of one byte: a quarter of the size, nearly the same answers.")
@click.option(
    "--pictures",
    metavar="DIR",
    help="With --int8: photographs that tell the scale of what flows between convolutions, which else stay float.",
)
def export(model: str, out: str, int8: bool, pictures: str | None) -> None:
    """Write MODEL (a model folder or training run) as an ONNX model.

    It searches without PyTorch, faster and with less memory. Its embeddings of pictures (random ones, or of --pictures)
    and of random sentences are compared with those of PyTorch first; if they differ, nothing is written.
    """
    from clipmatch.export import export_model

    if pictures and not int8:
        refuse_idle({"pictures"}, "A float model needs no scales")
    done = export_model(model, out, int8, pictures)
    for side, difference in done.differences.items():
        size = (done.folder / f"{side}.onnx").stat().st_size / 1e6
        click.echo(f"{side}.onnx  {size:.1f} MB  largest 1 - cosine from PyTorch {difference:.1e}")
    click.echo(f"ONNX model: {out}")


@click.command()
@click.argument("folders", nargs=-1, metavar="[FOLDER]...")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def models(folders: tuple[str, ...], as_json: bool) -> None:
    """List the models that --model can name.

    The one that comes with clipmatch, those in FOLDERs (by default here) down to three levels, and some on the Hugging
    Face hub that are downloaded when they are first used.
    """
    from clipmatch.catalogue import list_models, model_table

    found = list_models(folders or ["."])
    click.echo(json.dumps([asdict(model) for model in found], indent=2) if as_json else model_table(found))
