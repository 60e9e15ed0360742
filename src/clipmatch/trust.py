"""Model folders from strangers: what is looked at before any library reads their files.

In: a folder, or the file of an ONNX graph. Out: nothing, or `ClipmatchError` with what is wrong. Knows nothing of what
the files mean otherwise, and imports nothing slow.

Nothing here makes code safe to run, for none is run: weights are safetensors or ONNX graphs, tokenizers and settings
are JSON. What is left to a stranger is to name other files: by links, by an ONNX graph whose weights lie "elsewhere",
by settings from which a library goes on to another model, to a file, or to compiled code of the hub.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipmatch.errors import ClipmatchError

ADAPTER = "adapter_config.json"  # transformers would go on to whatever model it names
SHARDS = "model.safetensors.index.json"
SHARD = re.compile(r"[\w.-]+\.safetensors")
# An entry of a tensor's `external_data` whose key is "location", as protobuf writes it, numbers at any length: tag 1,
# length 8, the word. A graph with such a tensor has these bytes; one without only if a node or value is named just so.
ELSEWHERE = re.compile(rb"(?:\x0a|\x8a\x80*\x00)(?:\x08|\x88\x80*\x00)location")
# Settings by which transformers fetches compiled code ("kernels") of the hub, or hands weights to other packages.
FOREIGN = ("attn_implementation", "experts_implementation", "quantization_config")
FILE_SETTINGS = ("vocab_file", "merges_file", "tokenizer_file", "spm_file", "init_inputs")


def check_folder(folder: Path) -> None:
    """Raise ClipmatchError if a model folder leads out of itself: by links, or by settings of transformers."""
    check_links(folder)
    if (folder / ADAPTER).exists():
        raise ClipmatchError(
            f"The model folder {folder} holds an adapter ({ADAPTER}), which names another model; merge the two first."
        )
    named = json_of(folder / SHARDS).get("weight_map")
    for shard in named.values() if isinstance(named, dict) else ():
        if not (isinstance(shard, str) and SHARD.fullmatch(shard)):
            raise ClipmatchError(f"{folder / SHARDS} names {shard!r} as weights, which is no safetensors file of it.")
    check_settings(json_of(folder / "config.json"), f"The config.json of the model folder {folder}")
    for name in FILE_SETTINGS:
        if json_of(folder / "tokenizer_config.json").get(name):
            raise ClipmatchError(
                f"The tokenizer_config.json of the model folder {folder} names a file by {name}; delete that setting."
            )


def check_settings(values: dict[str, Any], whose: str) -> None:
    """Raise ClipmatchError if a config of transformers asks for code from elsewhere. whose: as a sentence begins."""
    for key, value in settings_of(values):
        if key.strip("_").removesuffix("_internal") in FOREIGN and value not in (None, "eager", "sdpa"):
            raise ClipmatchError(
                f"{whose} asks for {key} {value!r}, which may be code from elsewhere; delete that setting or choose "
                "another model."
            )


def check_links(folder: Path) -> None:
    """Raise ClipmatchError if a link in a folder leads out of it.

    In the hub's cache all files are links, from REPOSITORY/snapshots/COMMIT/ to REPOSITORY/blobs/.
    """
    home = folder.resolve()
    inside = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    for path in entries(folder):
        if path.is_symlink() and not any(Path(os.path.realpath(path)).is_relative_to(place) for place in inside):
            raise ClipmatchError(
                f"{path} is a link that leads out of the model folder; put the file itself there, if you trust it."
            )


def check_graph(path: Path) -> None:
    """Raise ClipmatchError if an ONNX graph keeps weights in other files, for their names may lead anywhere.

    Raises OSError if it can't be read. Graphs that clipmatch writes are whole.
    """
    with path.open("rb") as file:
        if not file.seek(0, 2):
            return  # empty, which can't be mapped; ONNX Runtime says what it thinks of it
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data.find(b"location") < 0 or not ELSEWHERE.search(data):  # the first takes a tenth of the time
                return
    raise ClipmatchError(f"the graph {path.name} keeps weights in other files, which are not read")


def entries(folder: Path) -> Iterator[Path]:
    """What a folder holds; nothing if it can't be read."""
    try:
        yield from folder.iterdir()
    except OSError:
        return


def json_of(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one for any other file, whose reader will complain."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def settings_of(values: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values of nested JSON objects."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield key, value
            yield from settings_of(value)
    elif isinstance(values, list):
        for value in values:
            yield from settings_of(value)
