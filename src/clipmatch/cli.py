"""The command line: which commands there are, and how their errors are told.

Answers go to stdout, progress and warnings to stderr. A problem that the user can mend is one sentence on stderr and
exit status 1. A command's module is imported when it is called, so that a search does not wait for what trains.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from importlib import import_module
from typing import Any

import click

from clipmatch.errors import ADVICE, ClipmatchError, unwritable
from clipmatch.output import one_line

HOMES = {  # in the order of use: command -> its module, and its name there
    "index": ("cli_photos", "index_command"),
    "find": ("cli_photos", "find_command"),
    "duplicates": ("cli_photos", "duplicates_command"),
    "store": ("cli_store", "store_group"),
    "serve": ("cli_serve", "serve_command"),
    "export-gallery": ("cli_gallery", "export_gallery_command"),
    "teach": ("cli_concepts", "teach_command"),
    "concepts": ("cli_concepts", "concepts_group"),
    "explain": ("cli_concepts", "explain_command"),
    "data": ("cli_data", "data_group"),
    "demo": ("cli_train", "demo"),
    "train": ("cli_train", "train"),
    "evaluate": ("cli_train", "evaluate"),
    "export": ("cli_train", "export"),
    "models": ("cli_train", "models"),
    "generate": ("cli_generate", "generate_command"),
    "train-vqgan": ("cli_paint", "train_vqgan_command"),
    "train-prior": ("cli_paint", "train_prior_command"),
    "convert-vqgan": ("cli_paint", "convert_vqgan_command"),
    "evaluate-generation": ("cli_paint", "evaluate_generation_command"),
}


class Commands(click.Group):
    """A group whose commands end with one sentence, never a traceback, on problems that the user can mend."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of use."""
        return list(HOMES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in HOMES:
            return None
        module, name = HOMES[cmd_name]
        command: click.Command = getattr(import_module(f"clipmatch.{module}"), name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, translating errors."""
        try:
            return super().invoke(ctx)
        except ClipmatchError as error:
            raise click.ClickException(one_line(str(error))) from error
        except ModuleNotFoundError as error:
            if error.name and error.name.startswith("clipmatch"):
                raise
            from clipmatch.embedder import missing_training_extra

            raise click.ClickException(str(missing_training_extra(error))) from error
        except BrokenPipeError:  # the reader of our output (head, less) has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush complains
            ctx.exit(0)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(130)
        except OSError as error:  # an output file that can't be written, a full disk
            place = error.filename or "Output"
            told = unwritable(place, error) if error.errno in ADVICE else f"{place}: {error.strerror or error}"
            raise click.ClickException(str(told)) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="clipmatch", prog_name="clipmatch")
def main() -> None:
    """Match text to images.

    \b
    Search a folder of photographs, at once and offline:
        clipmatch find "a dog on a beach" --images ~/Pictures
    Keep up with a whole collection, and ask it more:
        clipmatch index ~/Pictures
        clipmatch find "a dog on a beach" --not person --after 2023
    See it in your browser:
        clipmatch serve --open
    Give it away, as a folder that is searched in a browser without any server:
        clipmatch export-gallery holiday --after 2026-07
    Teach it what only you know, and see why a photograph matches:
        clipmatch teach @rex rex1.jpg rex2.jpg
        clipmatch explain "a dog on a beach" photo.jpg -o why.png
    See what it finds in sample photographs:
        clipmatch demo
    See a model learn from nothing, in three minutes:
        clipmatch demo --train
    Check your own captioned photographs, train on them, measure on those held out, search:
        clipmatch data check captions.txt --images Images
        clipmatch train --captions captions.txt --images Images --out out/mine
        clipmatch evaluate --model out/mine --captions captions.txt --images Images --split out/mine/splits/dev.txt
        clipmatch find "two dogs in the snow" --model out/mine --images ~/Pictures
    Make it a model that needs no PyTorch; see which models there are:
        clipmatch export out/mine --out out/mine-onnx --int8
        clipmatch models
    Paint what a sentence says:
        clipmatch generate "a bus in the snow" --guide out/mine --generator path/to/vqgan
    """  # noqa: D301 - click's mark for "do not wrap" is a real backspace
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal's encoding lacks is shown escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # a photograph's odd EXIF concerns nobody


if __name__ == "__main__":
    main()
