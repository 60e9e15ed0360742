"""The command that paints: generate. Parse, call, print.

In: the words of the command line. Out: pictures, a table of them on stdout, progress and warnings on stderr.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from tqdm import tqdm

from clipmatch.cli_train import refuse_idle
from clipmatch.errors import ClipmatchError
from clipmatch.generation.settings import DEMO, GENERATOR, GUIDE, MOST_SEED, find_demo
from clipmatch.output import printable

if TYPE_CHECKING:
    from clipmatch.generation.optimise import Progress
    from clipmatch.generation.painter import PaintConfig, Painted, Painter


@click.command("generate")
@click.argument("prompt")
@click.option(
    "--guide", metavar="NAME", help=f"Model that says what a picture shows: folder or hub CLIP; else that in {DEMO}/."
)
@click.option(
    "--generator", metavar="NAME", help=f"VQGAN or BigGAN that paints: folder or hub name; else that in {DEMO}/."
)
@click.option("--out", default="painting.png", show_default=True, metavar="FILE", help="PNG; of several: FILE-1, ...")
@click.option("--n", default=1, show_default=True, type=click.IntRange(min=1), help="Pictures, ranked.")
@click.option("--judge", metavar="NAME", help="Another model that ranks them instead of the guide.")
@click.option("--size", type=click.IntRange(min=1), help="Side in pixels; the generator's own if not given.")
@click.option("--steps", type=click.IntRange(min=0), help="Of guidance; 20 after a prior if not given, else 200.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, MOST_SEED), help="Of the first; 1 more for each."
)
@click.option("--init", type=click.Path(path_type=Path), metavar="FILE", help="Picture to begin with.")
@click.option(
    "--strength",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="How far guidance may go from --init, or from what a prior painted: 0 not at all, 1 anywhere.",
)
@click.option(
    "--truncation",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Of a BigGAN's noise: less gives plainer pictures.",
)
@click.option("--save-every", type=click.IntRange(min=1), metavar="N", help="Write the best so far every N steps.")
@click.option("--video", type=click.Path(path_type=Path), metavar="FILE", help="How the best came about: .gif or .mp4.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, mps.")
@click.pass_context
def generate_command(context: click.Context, /, **options: Any) -> None:
    """Paint what PROMPT says.

    A generator's latent numbers are changed, step by step, until the guide sees in the picture what PROMPT asks for.
    PROMPT is a sentence, or several with weights, as in "a bus | snow:0.5 | blur:-0.5"; a picture file is asked for
    like a sentence. If the generator's folder has a prior, that paints first, and guidance refines.

    Ctrl-C stops and keeps the best so far. On the CPU the same command gives the same picture,
    bit for bit, on the same machine.
    """
    from clipmatch.generation.painter import PaintConfig, load_painter
    from clipmatch.generation.picture import Film, check_writable
    from clipmatch.runlog import stop_on_interrupt

    given = {name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    wanted = ("prompt", "n", "size", "steps", "seed", "init", "strength")
    config = PaintConfig(**{name: options[name] for name in wanted})
    out = Path(options["out"])
    if out.suffix.lower() != ".png":
        raise ClipmatchError(f"The picture {out} can only be a .png, which says how it was made; name it so.")
    check_writable(out)
    film = Film(options["video"]) if options["video"] else None
    guide, generator = (
        options["guide"] or of_demo("guide", GUIDE),
        options["generator"] or of_demo("generator", GENERATOR),
    )
    painter = load_painter(guide, generator, options["judge"], options["device"], options["truncation"])
    refuse_without_effect(given, painter, config)
    steps = painter.steps_of(config)
    with stop_on_interrupt() as stop, tqdm(total=steps, desc="painting", unit="step", delay=0.5) as bar:

        def on_step(progress: Progress) -> None:
            bar.set_postfix(score=f"{float(progress.scores.max()):.3f}", refresh=False)
            bar.update(progress.step - bar.n)
            if film:
                film.add(progress.step, progress.pictures)
            if options["save_every"] and progress.step and progress.step % options["save_every"] == 0:
                scores = painter.scores(progress.best, config.prompts, progress.scores)
                save(painter.rank(config, progress.best, scores, progress.step), out)

        painted, stopped = painter.paint(config, on_step, stop)
    paths = save(painted, out)
    if film:
        film.save(painted[0].number, painted[0].picture)
    click.echo("rank  score   seed  picture")
    for rank, (one, path) in enumerate(zip(painted, paths, strict=True), 1):
        click.echo(f"{rank:4}  {one.score:.3f}  {one.facts['seed']:5}  {printable(path)}")
    if stopped:
        click.echo(f"Stopped after {painted[0].facts['steps']} of {steps} steps; this is the best so far.", err=True)
        raise SystemExit(130)


def of_demo(option: str, folder: str) -> str:
    """The demo's guide or generator, when none is named. Raises ClipmatchError if it was not made here."""
    found = find_demo(folder)
    if found is None:
        raise ClipmatchError(
            f"Which {option}? Name one by --{option}, or make small ones for drawn scenes by: clipmatch demo --generate"
        )
    return found


def save(painted: list[Painted], out: Path) -> list[Path]:
    """Write pictures, the best first -> their files: `out` for one, numbered by rank for several."""
    from clipmatch.generation.picture import save_png

    paths = [out if len(painted) == 1 else out.with_stem(f"{out.stem}-{rank}") for rank in range(1, len(painted) + 1)]
    for one, path in zip(painted, paths, strict=True):
        save_png(path, one.picture, one.facts)
    return paths


def refuse_without_effect(given: set[str], painter: Painter, config: PaintConfig) -> None:
    """Raise ClipmatchError for options that this generator has no use for."""
    if painter.prior is None and config.init is None:
        refuse_idle(given & {"strength"}, "There is neither a picture to begin with (--init) nor a prior")
    if painter.canvas.kind != "BigGAN":
        refuse_idle(given & {"truncation"}, "The generator is no BigGAN")
