"""The commands that make and measure generators: train-vqgan, train-prior, convert-vqgan, evaluate-generation.

In: the words of the command line. Out: answers on stdout, progress and warnings on stderr. Parse, call, print.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from clipmatch.cli_data import data_options
from clipmatch.errors import ClipmatchError
from clipmatch.generation.settings import MOST_SEED, PriorTraining, VQConfig

Command = Callable[..., Any]
STOPPED = 130  # exit status after Ctrl-C
VQ_HELP = {
    "size": "Side of the pictures in pixels; of others the square in the middle is taken.",
    "codes": "Codes in the codebook.",
    "steps": "Batches to learn from.",
    "batch_size": "Pictures a batch.",
    "rate": "Peak learning rate.",
    "perceptual": "Model (folder or hub name) whose image tower says what looks alike, beside the pixels.",
    "perceptual_weight": "Weight of that.",
    "adversarial": "Weight of a patch discriminator (0.1 is usual): sharper, slower, less exact.",
    "flip": "Mirror half of the pictures.",
    "seed": "Of weights and order.",
}
PRIOR_HELP = {
    "steps": "Batches to learn from.",
    "batch_size": "Pictures a batch.",
    "width": "Of the transformer.",
    "layers": "Of the transformer.",
    "rate": "Peak learning rate.",
    "captioned": "Share of the prompts that are captions; the rest are the pictures' own embeddings with noise.",
    "noise": "Length of that noise, at most.",
    "seed": "Of weights, order and masks.",
}


def options_of(kind: type[Any], helps: dict[str, str]) -> Callable[[Command], Command]:
    """An option for each of a config's settings that has a help text; defaults are the config's own."""

    def add(command: Command) -> Command:
        for name, text in reversed(helps.items()):
            default, flag = getattr(kind, name), f"--{name.replace('_', '-')}"
            if isinstance(default, bool):
                flag = f"{flag}/--no-{name}"
            settings: dict[str, Any] = {} if default is None else {"default": default, "show_default": True}
            command = click.option(flag, help=text, **settings)(command)
        return click.option("--device", help="cpu, cuda, cuda:1, mps; the fastest if not given.")(command)

    return add


def settings_of(context: click.Context, kind: type[Any], values: dict[str, Any], resume: bool) -> Any:
    """The config of the options; None for a run that is resumed, which has its own. Refuses options beside --resume."""
    from clipmatch.cli_train import refuse_idle

    if not resume:
        return kind(**values)
    given = {name for name in values if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    refuse_idle(given, "A resumed run has its own settings")
    return None


@click.command("train-vqgan")
@click.argument("pictures", metavar="FOLDER")
@click.option("--out", required=True, metavar="DIR", help="Folder of the model, and of its run: last/, samples/.")
@click.option("--model", metavar="NAME", help="VQGAN to go on from (folder or hub name) instead of a new one.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, with its own settings.")
@options_of(VQConfig, VQ_HELP)
@click.pass_context
def train_vqgan_command(
    context: click.Context, /, pictures: str, out: str, model: str | None, resume: bool, **values: Any
) -> None:
    """Train a VQGAN on the pictures in FOLDER: an autoencoder between pictures and a grid of codes.

    Pictures of 64 pixels take minutes on a CPU. DIR/samples shows held-out pictures above their reconstructions; the
    log says how many codes are in use. Ctrl-C stops cleanly.
    """
    from clipmatch.generation.vqtrain import train_vqgan

    config = settings_of(context, VQConfig, values, resume)
    finish(train_vqgan(pictures, out, config, model=model, resume=resume), f"VQGAN: {out}")


@click.command("train-prior")
@click.option("--captions", required=True, metavar="FILE", help="Caption file, or a folder of pictures without any.")
@data_options
@click.option("--split", metavar="FILE", help="Names of the pictures to learn from, one a line; all, if not given.")
@click.option("--generator", required=True, metavar="DIR", help="Folder of the VQGAN whose codes are painted.")
@click.option("--guide", required=True, metavar="NAME", help="Model whose embeddings are painted from.")
@click.option("--out", metavar="DIR", help="Folder of the prior; DIR/prior of the generator if not given.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, with its own settings.")
@options_of(PriorTraining, PRIOR_HELP)
@click.pass_context
def train_prior_command(
    context: click.Context,
    /,
    captions: str,
    images: str | None,
    format: str | None,
    split: str | None,
    generator: str,
    guide: str,
    out: str | None,
    resume: bool,
    **values: Any,
) -> None:
    """Train a prior: from a sentence's embedding to the codes of a picture, in a dozen steps.

    Where pictures have no captions, their own embeddings with noise stand in for them. clipmatch generate finds the
    prior in the generator's folder. Ctrl-C stops cleanly.
    """
    from clipmatch.embedder import load_model
    from clipmatch.generation.priortrain import train_prior

    config = settings_of(context, PriorTraining, values, resume)
    folder = out or str(Path(generator) / "prior")
    rows = read_rows(captions, images, format, split)
    finish(train_prior(rows, generator, load_model(guide), folder, config, resume=resume), f"prior: {folder}")


def read_rows(captions: str, images: str | None, format: str | None, split: str | None) -> Any:
    """Captioned pictures; of a folder without captions, its pictures alone."""
    from clipmatch.crawl import list_images
    from clipmatch.data import CaptionedImage, load_captions, select_part
    from clipmatch.runlog import note, note_quirks

    try:
        data = load_captions(captions, images, format)
    except ClipmatchError:
        if not Path(captions).is_dir() or images or split:
            raise
        note(f"{captions} has no captions: the prior learns from its pictures alone")
        return tuple(CaptionedImage(path, ()) for path in list_images(captions))
    note_quirks(data)
    return (select_part(data, split) if split else data).rows


@click.command("convert-vqgan")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", required=True, metavar="DIR", help="Folder of the model.")
def convert_vqgan_command(file: Path, out: str) -> None:
    """Convert FILE, a VQGAN checkpoint of taming-transformers, for --generator.

    Such as its ImageNet models (f = 16, 1,024 or 16,384 codes). No code in the file is run, and its package is not
    needed.
    """
    from clipmatch.generation.taming import convert_taming
    from clipmatch.generation.vqgan import pixels_per_code

    model = convert_taming(file, out)
    codes = len(model.quantize.embedding.weight)
    click.echo(f"VQGAN: {out}  ({codes} codes, {pixels_per_code(model)} pixels a code)")


@click.command("evaluate-generation")
@click.option("--out", default="clipmatch-demo", show_default=True, metavar="DIR", help="Folder of the demo.")
@click.option("--n", default=200, show_default=True, type=click.IntRange(min=100), help="Held-out prompts.")
@click.option("--guided", default=100, show_default=True, type=click.IntRange(min=1), help="Of them, by guidance.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, MOST_SEED), help="The demo's.")
@click.option("--json", "json_file", metavar="FILE", help="Write the figures too.")
def evaluate_generation_command(out: str, n: int, guided: int, seed: int, json_file: str | None) -> None:
    """Measure what clipmatch demo --generate paints, beside its baselines.

    Trains a judge (another model than the guide, on other scenes) and a classifier of attributes first, if they are
    not there: some ten minutes on two cores.
    """
    from clipmatch.generation.demo_evaluation import evaluate_generation, table
    from clipmatch.modelfolder import write_json

    figures = evaluate_generation(Path(out), n, min(guided, n), seed)
    click.echo(json.dumps(figures, indent=2) if json_file == "-" else table(figures))
    if json_file and json_file != "-":
        write_json(Path(json_file), figures)


def finish(finished: bool, answer: str) -> None:
    """Say where the result is; end with Ctrl-C's status if it is half of one."""
    if not finished:
        raise SystemExit(STOPPED)
    click.echo(answer)
