"""Other programs, ready to be measured: rclip with a model of the right shape, made from nothing.

In: where a program is, or nothing. Out: its executable, a data folder with a model, a database of vectors. The weights
are random, for speed does not depend on them, so what rclip finds here means nothing.
"""

from __future__ import annotations

import gzip
import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import run

from clipmatch.runtime import cache_folder

RCLIP = "rclip==3.3.0"
MODEL = "ViT-B-32-256-datacomp_s34b_b86k"
MERGES = 49152 - 256 - 2  # of CLIP's vocabulary of 49,408
WIDTH = 512  # of its vectors

# Run by rclip's own Python: vectors [n, 512] and paths into its database, through its own code.
FILL = """
import sys
import numpy as np
from rclip.db import DB, NewImage
database, rows = DB(sys.argv[1]), np.load(sys.argv[2])
for number, (path, row) in enumerate(zip(open(sys.argv[3]).read().splitlines(), rows)):
    image = NewImage(filepath=path, modified_at=1.7e9, size=50_000, vector=row.tobytes(), hash=f"{number:064x}")
    database.upsert_image(image, commit=False)
database.close()
"""


def find_rclip(given: Path | None) -> Path | None:
    """rclip's executable: the one given, or one in a virtual environment of its own; None where that fails."""
    if given:
        return given.absolute()
    home = cache_folder() / "peers" / RCLIP
    folder = home / ("Scripts" if sys.platform == "win32" else "bin")
    if not (folder / "rclip").exists():
        print(f"installing {RCLIP} into {home}", file=sys.stderr)
        try:
            run([sys.executable, "-m", "venv", home])
            run([folder / "python", "-m", "pip", "install", "--quiet", RCLIP])
        except (RuntimeError, OSError) as error:
            print(f"rclip is not measured: {error}", file=sys.stderr)
            return None
    return folder / "rclip"


def rclip_home(folder: Path) -> Path:
    """A data folder for rclip, with the model and without pictures, as RCLIP_DATADIR names it."""
    models = cache_folder() / "peers" / "rclip-models"
    write_rclip_model(models)
    folder.mkdir(parents=True)
    for part in (MODEL, "tokenizer"):
        (folder / part).symlink_to(models / part, target_is_directory=True)
    return folder


def write_rclip_model(folder: Path, layers: int = 12) -> None:
    """The files that rclip looks for: two towers of ViT-B/32 at 256 pixels, and a vocabulary of made-up merges."""
    visual, textual = folder / MODEL / "visual.onnx", folder / MODEL / "textual.onnx"
    vocabulary = folder / "tokenizer" / "bpe_simple_vocab_16e6.txt.gz"
    for path in (visual, textual, vocabulary):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not vocabulary.exists():
        vocabulary.write_bytes(gzip.compress(made_up_merges().encode()))
    if visual.exists() and textual.exists():
        return
    print(f"making a model for rclip in {folder}", file=sys.stderr)
    import torch
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    torch.manual_seed(0)
    image = CLIPVisionModelWithProjection(
        CLIPVisionConfig(image_size=256, patch_size=32, num_hidden_layers=layers, projection_dim=WIDTH)
    )  # 768 wide, 12 heads, 3072 between
    text = CLIPTextModelWithProjection(
        CLIPTextConfig(vocab_size=49408, num_hidden_layers=layers, projection_dim=WIDTH, eos_token_id=49407)
    )  # 512 wide, 8 heads, 77 tokens
    write_tower(visual, image, "image_embeds", torch.zeros(2, 3, 256, 256))
    write_tower(textual, text, "text_embeds", torch.full((2, 77), 49407))


def write_tower(path: Path, tower, output: str, example) -> None:
    """A tower as an ONNX file: "input", of any number -> "output" [b, 512]."""
    import torch
    from torch import nn

    from clipmatch.export import write_graph

    class Only(nn.Module):  # one of a tower's outputs
        def __init__(self):
            super().__init__()
            self.tower = tower

        def forward(self, value):
            return getattr(self.tower(value), output)

    draft = path.with_suffix(".part")
    with torch.no_grad():
        write_graph(draft, Only(), {"input": example}, {0: torch.export.Dim("b")}, ["output"])
    draft.replace(path)


def made_up_merges() -> str:
    """A heading, and pairs of bytes as CLIP's vocabulary writes them: as many as it has."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(value) for value in printable] + [chr(256 + value) for value in range(256 - len(printable))]
    pairs = itertools.product(letters, letters + [f"{letter}</w>" for letter in letters])
    return "\n".join(["#version: made up", *(f"{a} {b}" for a, b in itertools.islice(pairs, MERGES))])


def fill_rclip(rclip: Path, home: Path, paths: Sequence[Path]) -> None:
    """As many random unit vectors as paths, into rclip's database."""
    rows = np.random.default_rng(0).standard_normal((len(paths), WIDTH), np.float32)
    np.save(home / "rows.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    (home / "paths.txt").write_text("\n".join(map(str, paths)))
    run([rclip.with_name("python"), "-c", FILL, home / "db.sqlite3", home / "rows.npy", home / "paths.txt"])
    (home / "rows.npy").unlink()


def has_package(python: Path, name: str) -> bool:
    """Whether a Python has a package."""
    find = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    return subprocess.run([python, "-c", find], check=False).returncode == 0
