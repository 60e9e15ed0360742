"""The commands that teach and explain: teach, concepts, explain. Parse, call, print.

In: the words of the command line. Out: answers on stdout, progress and warnings on stderr.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipmatch.atomic import atomic_file
from clipmatch.cli_photos import index_option, model_option
from clipmatch.errors import ClipmatchError
from clipmatch.output import printable

if TYPE_CHECKING:
    from clipmatch.teaching import Concept

BAR = 24  # characters of the longest bar


class Teach(click.Command):
    """A command whose --not takes all that follows up to the next option, as a shell expands others/*.jpg."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put a --not before each of them."""
        spread: list[str] = []
        others = False
        for word in args:
            if word.startswith("-") and word != "-":
                others = word == "--not"
                spread += [] if others else [word]
            else:
                spread += ["--not", word] if others else [word]
        return super().parse_args(ctx, spread)


@click.command("teach", cls=Teach)
@click.argument("name", metavar="@NAME")
@click.argument("photos", nargs=-1, required=True, metavar="PHOTO...")
@click.option("--not", "others", multiple=True, metavar="PHOTO...", help="All that follow do not show it; folders too.")
@index_option
def teach_command(name: str, photos: tuple[str, ...], others: tuple[str, ...], index_file: str | None) -> None:
    """Teach the index what @NAME looks like, from a few photographs or folders of them that show it.

    \b
        clipmatch teach @rex photos/rex/*.jpg
        clipmatch find "@rex on a beach"

    What else is in the index stands for all that is not meant; where @NAME is mistaken for something, show that with
    --not. Taught once more, the new examples take the place of the old ones.
    """  # noqa: D301 - click's mark for "do not wrap" is a real backspace
    from clipmatch.index import Index

    with Index.open(index_file, create=False) as index:
        concept = index.teach(name, photos, others)
    click.echo(f"@{concept.name}: {described(concept)}")
    if concept.precision is None:
        click.echo("With two examples or more clipmatch can tell how well it has learnt.", err=True)


@click.group("concepts", invoke_without_command=True)
@index_option
@click.pass_context
def concepts_group(context: click.Context, index_file: str | None) -> None:
    """List the concepts that the index was taught; rename, remove, export or import them."""
    context.obj = index_file
    if context.invoked_subcommand:
        return
    from clipmatch.index import Index

    with Index.open(index_file, create=False) as index:
        concepts = index.concepts()
    for concept in concepts:
        click.echo(f"@{concept.name}  {described(concept)}")
    if not concepts:
        click.echo("No concepts yet; teach one with: clipmatch teach @NAME PHOTO...", err=True)


@concepts_group.command("rename")
@click.argument("old", metavar="@OLD")
@click.argument("new", metavar="@NEW")
@click.pass_obj
def rename_command(index_file: str | None, old: str, new: str) -> None:
    """Give a concept another name."""
    from clipmatch.index import Index

    with Index.open(index_file, create=False) as index:
        index.rename_concept(old, new)


@concepts_group.command("remove")
@click.argument("names", nargs=-1, required=True, metavar="@NAME...")
@click.pass_obj
def remove_command(index_file: str | None, names: tuple[str, ...]) -> None:
    """Forget concepts; photographs stay as they are."""
    from clipmatch.index import Index

    with Index.open(index_file, create=False) as index:
        for name in names:
            index.forget_concept(name)


@concepts_group.command("export")
@click.argument("file", type=click.Path(dir_okay=False))
@click.pass_obj
def export_command(index_file: str | None, file: str) -> None:
    """Write all concepts into a JSON FILE, for another index of the same model."""
    from clipmatch.index import Index

    with Index.open(index_file, create=False) as index:
        values = index.export_concepts()
    with atomic_file(Path(file)) as draft:
        draft.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    click.echo(f"{len(values['concepts'])} concepts in {printable(file)}")


@concepts_group.command("import")
@click.argument("file", type=click.Path(dir_okay=False, exists=True))
@click.pass_obj
def import_command(index_file: str | None, file: str) -> None:
    """Take in the concepts of a FILE that `concepts export` has written, in the place of those so named."""
    from clipmatch.index import Index

    with Index.open(index_file, create=False) as index:
        try:
            count = index.import_concepts(json.loads(Path(file).read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ClipmatchError(f"The file {file} holds no concepts of clipmatch ({error}).") from error
    click.echo(f"{count} concepts taken in")


def described(concept: Concept) -> str:
    """What a concept was learnt from, and how well."""
    count = len(concept.examples)
    parts = [f"{count} example{'s' * (count != 1)}"]
    if concept.others:
        parts.append(f"{len(concept.others)} that are not")
    if concept.precision is not None:
        parts.append(f"leave-one-out precision {concept.precision:.2f}")
    return ", ".join(parts)


@click.command("explain")
@click.argument("query", metavar="QUERY")
@click.argument("photo", metavar="PHOTO")
@click.option(
    "-o", "--out", metavar="FILE", help="Write a picture: the photograph with a heat map, a bar for each word."
)
@model_option
@index_option
def explain_command(query: str, photo: str, out: str | None, **options: Any) -> None:
    """Say why PHOTO matches QUERY, or does not: which words speak for it, and with -o where in the picture.

    \b
        clipmatch explain "a dog on a beach" photo.jpg -o why.png

    A word's number is how much lower the cosine would be without it. Concepts (@NAME) are those of the index.
    """  # noqa: D301 - click's mark for "do not wrap" is a real backspace
    from clipmatch.embedder import load_model
    from clipmatch.explain import explain
    from clipmatch.index import Index
    from clipmatch.query import parse_query

    embedder, asked = load_model(options["model"]), parse_query(query)
    if asked.concepts:
        with Index.open(options["index_file"], embedder, create=False) as index:
            asked = index.with_concepts(asked)
    found = explain(embedder, asked, photo)
    x, y = found.peak
    click.echo(f"cosine {found.score:.3f}; hottest at {x:.0%} from the left, {y:.0%} from the top")
    most = max((abs(change) for _, change in found.words), default=0) or 1.0
    width = max((len(word) for word, _ in found.words), default=0)
    for word, change in found.words:
        bar = "#" * max(round(BAR * abs(change) / most), 1)
        click.echo(f"{printable(word):{width}}  {change:+.3f}  {bar if change > 0 else ''}".rstrip())
    if out:
        click.echo(f"written: {printable(found.save(out))}", err=True)
