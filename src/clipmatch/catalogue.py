"""Which models there are: the one that comes with the package, those in folders, a few on the hub.

In: folders to look in. Out: a row for each model. Knows nothing of what a model does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipmatch.errors import ClipmatchError
from clipmatch.modelfolder import (
    CONFIG,
    EMBEDDED,
    EMBEDDED_NAME,
    FILES,
    FORMAT,
    IMAGE_GRAPH,
    WEIGHTS,
    find_local,
    kind_of,
    read_config,
)

LEVELS = 3


@dataclass(frozen=True)
class ModelRow:
    """A model. name: what `--model` takes, None for the one that comes with clipmatch (EMBEDDED_NAME). size: bytes on
    disk, or to download. recall: text-to-image recall@1, 5 and 10 on the dev split that it was chosen on, as fractions.
    """

    name: str | None
    place: str  # "clipmatch", "folder", "hub cache", "hub"
    runs_by: str
    size: int
    dim: int
    recall: tuple[float, float, float] | None = None
    licence: str | None = None


HUB = (  # each well known, with safetensors weights; sizes are those of the files that are fetched
    ModelRow("openai/clip-vit-base-patch32", "hub", "PyTorch", 609_000_000, 512, licence="MIT"),
    ModelRow("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "hub", "PyTorch", 609_000_000, 512, licence="MIT"),
    ModelRow("google/siglip2-base-patch16-224", "hub", "PyTorch", 1_535_000_000, 768, licence="Apache-2.0"),
)


def list_models(folders: Sequence[str | Path]) -> list[ModelRow]:
    """The embedded model, those in the folders and those of the hub. Raises ClipmatchError for a missing folder."""
    rows = [describe(EMBEDDED, None)] if (EMBEDDED / CONFIG).is_file() else []
    for folder in folders:
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise ClipmatchError(f"The folder {root} does not exist; name one that holds models.")
        rows += [describe(found, str(found)) for found in models_below(root, LEVELS)]
    return rows + [on_the_hub(row) for row in HUB]


def models_below(folder: Path, levels: int) -> Iterator[Path]:
    """The model folders and training runs in a folder, itself included, in order."""
    local = find_local(folder)
    if local is not None and kind_of(local / CONFIG) == FORMAT:
        if local.resolve() != EMBEDDED.resolve():
            yield folder
    elif levels:
        try:
            inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        except OSError:  # not ours to read
            return
        for path in inside:
            yield from models_below(path, levels - 1)


def describe(folder: Path, name: str | None) -> ModelRow:
    """A model folder or training run -> its row. Raises ClipmatchError when its config.json is damaged."""
    local = find_local(folder) or folder
    values = read_config(local)
    about = values.get("about") or {}
    sizes = {file: (local / file).stat().st_size for file in FILES if (local / file).is_file()}
    runs_by = [kind for file, kind in ((IMAGE_GRAPH, "ONNX"), (WEIGHTS, "PyTorch")) if file in sizes]
    return ModelRow(
        name=name,
        place="folder" if name else "clipmatch",
        runs_by=", ".join(runs_by),
        size=sum(sizes.values()),
        dim=values["model"]["embed_dim"],
        recall=recall_of(about),
        licence=about.get("licence"),
    )


def recall_of(about: dict[str, Any]) -> tuple[float, float, float] | None:
    """The text-to-image recalls in the free part of a config.json; None if it has none."""
    figures = (about.get("dev") or {}).get("text_to_image")
    return (figures["recall@1"], figures["recall@5"], figures["recall@10"]) if figures else None


def on_the_hub(row: ModelRow) -> ModelRow:
    """The row, marked if the hub's local cache has the weights, in whichever revision."""
    from huggingface_hub import constants

    repository = Path(constants.HF_HUB_CACHE) / f"models--{row.name}".replace("/", "--")
    return replace(row, place="hub cache") if any(repository.glob(f"snapshots/*/{WEIGHTS}")) else row


def model_table(rows: Sequence[ModelRow]) -> str:
    """The rows as a table."""
    table = [("--model", "where", "runs by", "MB", "dim", "dev R@1/5/10", "licence")]
    for row in rows:
        recall = "/".join(f"{100 * value:.1f}" for value in row.recall) if row.recall else "-"
        name = row.name or EMBEDDED_NAME
        size = f"{row.size / 1e6:.1f}"
        table.append((name, row.place, row.runs_by, size, str(row.dim), recall, row.licence or "-"))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join(lines)
