"""The five kinds of work that faults are tried on, through the commands that people type.

In: an empty folder. Out: drawn pictures, two small models and an index in it; works, each of which says how it begins,
which command does it and which goes on with it, and what it has stored. Knows nothing of faults.
"""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import CLIPMATCH
from safetensors.numpy import load_file

from clipmatch.runlog import read_history
from clipmatch.runstate import OPTIMIZER
from clipmatch.scenes import generate

# `clipmatch train`, but with a save after each step instead of each minute, so that faults hit saves too.
EAGER = """\
import sys
from clipmatch import runstate
runstate.SAVE_EVERY, runstate.SAVE_SHARE = 0.0, 1e9
from clipmatch.cli import main
main(sys.argv[1:])
"""
STORE, RUN, CLEAN = "photos.sqlite", "run", "clean.csv"


@dataclass(frozen=True)
class Work:
    """begin: makes a folder ready for it. command: does the work in a folder; or goes on with it, where that is another
    command. stored: what the folder holds that a reader can rely on, as comparable values by key; {} if nothing.
    first: a file whose presence says that the work has begun to write; None: it writes at its end only.
    """

    name: str
    begin: Callable[[Path], None]
    command: Callable[[Path], list[str | Path]]
    stored: Callable[[Path], dict[object, object]]
    first: str | None


def environment(folder: Path) -> dict[str, str]:
    """One thread and a cache of its own, so that a work neither helps nor hinders another."""
    own = {"CLIPMATCH_THREADS": "1", "OMP_NUM_THREADS": "1", "CLIPMATCH_CACHE": str(folder / "cache")}
    return {**os.environ, **own, "HF_HUB_OFFLINE": "1"}


def run(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """A command in its environment, to its end."""
    return subprocess.run(list(map(str, command)), env=environment(folder), capture_output=True, text=True, check=False)


NAMES = (
    "indexing", "re-embedding", "training", "teaching a concept", "importing concepts", "fixing captions"
)  # fmt: skip


def make_works(place: Path, pictures: int, concepts: int, names: tuple[str, ...] = NAMES) -> dict[str, Work]:
    """The works of these names, and what they read, made in a folder: so many drawn scenes, two models, an index of the
    scenes, concepts to take in.
    """
    scenes = generate(place / "scenes", n_train=pictures * 4 // 5, n_dev=pictures // 5, size=64, progress=False)
    spoil(scenes)
    trained, other = place / "small", place / "other"
    if {"re-embedding", "training"} & set(names):
        make_models(scenes, trained, other)
    index = place / "index"
    index.mkdir()
    must(run([CLIPMATCH, "index", scenes / "Images", "--index", index / STORE], place))
    must(run([CLIPMATCH, "teach", "@rex", *examples(scenes), "--index", index / STORE], place))
    listed = place / "concepts.json"
    must(run([CLIPMATCH, "concepts", "--index", index / STORE, "export", listed], place))
    many = json.loads(listed.read_text())
    many["concepts"] = [{**many["concepts"][0], "name": f"rex{number}"} for number in range(concepts)]
    listed.write_text(json.dumps(many))

    def nothing(folder):
        folder.mkdir(parents=True)

    def copy(folder):
        shutil.copytree(index, folder)

    def train(folder):
        if (folder / RUN / "last" / "state.json").is_file() or (folder / RUN / ".last.clipmatch-old").is_dir():
            return [sys.executable, "-c", EAGER, "train", "--resume", "--out", folder / RUN]
        start = ["train", "--captions", scenes, "--model", trained, "--precision", "float32", "--views", "2"]
        return [sys.executable, "-c", EAGER, *start, "--batch-size", "16", "--epochs", "3", "--out", folder / RUN]

    def index_command(*options):
        return lambda folder: [CLIPMATCH, *options, "--index", folder / STORE]

    def take_in(folder):
        return [CLIPMATCH, "concepts", "--index", folder / STORE, "import", listed]

    check = ["data", "check", scenes, "--fix"]
    works = [
        Work("indexing", nothing, index_command("index", scenes / "Images"), rows_in, STORE),
        Work("re-embedding", copy, index_command("index", "--reembed", "--model", other), rows_in, f"{STORE}-wal"),
        Work("training", nothing, train, run_in, f"{RUN}/train.json"),
        Work("teaching a concept", copy, index_command("teach", "@tom", *examples(scenes, 5)), rows_in, None),
        Work("importing concepts", copy, take_in, rows_in, f"{STORE}-wal"),
        Work(
            "fixing captions", nothing, lambda folder: [CLIPMATCH, *check, folder / CLEAN], texts_in, "clean.train.txt"
        ),
    ]
    return {work.name: work for work in works if work.name in names}


def spoil(scenes: Path) -> None:
    """A caption of a picture that is missing, one that says nothing, a row that is cut off: something to fix."""
    with (scenes / "captions.txt").open("a", encoding="utf-8") as file:
        file.write("nowhere.jpg,a red circle\ntrain-00000.jpg,.\ntrain-00001.jpg\n")


def examples(scenes: Path, start: int = 0) -> list[Path]:
    """Five pictures."""
    return [scenes / "Images" / f"train-{number:05d}.jpg" for number in range(start, start + 5)]


def make_models(scenes: Path, small: Path, other: Path) -> None:
    """A small model with random weights, to train; and as ONNX graphs, to embed anew with."""
    import torch

    from clipmatch.checkpoint import Checkpoint, save_checkpoint
    from clipmatch.config import PreprocessConfig
    from clipmatch.data import load_captions
    from clipmatch.demo_train import SIZE, learn_tokenizer, small_model
    from clipmatch.export import export_model
    from clipmatch.model import CLIPModel
    from clipmatch.preprocess import Transform

    torch.manual_seed(0)
    words = learn_tokenizer(load_captions(scenes).rows)
    model = CLIPModel(small_model(words.vocab_size))
    save_checkpoint(Checkpoint(model, words, Transform(PreprocessConfig(size=SIZE))), small)
    export_model(small, other)


def must(done: subprocess.CompletedProcess[str]) -> None:
    """Raise RuntimeError if a command has failed."""
    if done.returncode:
        raise RuntimeError(f"{done.args} ended with {done.returncode}: {done.stderr[-2000:]}")


# What is stored


def rows_in(folder: Path) -> dict[object, object]:
    """An index, opened as any reader does: its photographs, vectors, folders, concepts and model."""
    path = folder / STORE
    if not path.is_file():
        return {}
    found: dict[object, object] = {}
    connection = sqlite3.connect(path, timeout=30)
    try:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'concepts'").fetchone():
            return {}
        connection.execute("BEGIN")
        found |= {("photo", row[0]): row for row in connection.execute(PHOTOS)}
        found |= {("vector", *row[:2]): row[2] for row in connection.execute("SELECT model, digest, row FROM vectors")}
        found |= {("folder", row[0]): row for row in connection.execute("SELECT * FROM roots")}
        found |= {("concept", row[0]): row for row in connection.execute("SELECT * FROM concepts")}
        found[("model",)] = connection.execute("SELECT value FROM about WHERE name = 'model'").fetchone() or ("",)
        return found
    finally:
        connection.close()


PHOTOS = "SELECT path, digest, size, mtime, width, height, taken, caption, picture_hash FROM photos"


def run_in(folder: Path) -> dict[object, object]:
    """A training run: the weights of its models, its optimiser's numbers, the loss of each step that was saved."""
    run = folder / RUN
    found: dict[object, object] = {}
    for name in ("best", "last"):
        for file in ("model.safetensors", OPTIMIZER):
            place = next((p for p in (run / name, run / f".{name}.clipmatch-old") if (p / file).is_file()), None)
            if place:
                found |= {(name, file, key): value.tobytes() for key, value in load_file(place / file).items()}
    found |= {("loss", row["step"]): row["loss"] for row in read_history(run) if row["kind"] == "step"}
    return found


def texts_in(folder: Path) -> dict[object, object]:
    """A clean copy of captions: its files."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}


def problem_of(work: Work, folder: Path) -> str:
    """What keeps a folder from being opened; "" if nothing does. Half a thing is a problem too."""
    try:
        if work.stored is rows_in and (folder / STORE).is_file():
            with closing(sqlite3.connect(folder / STORE, timeout=30)) as connection:
                (state,) = connection.execute("PRAGMA integrity_check").fetchone()
                if state != "ok":
                    return str(state)
                known = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
                lone = "SELECT count(*) FROM photos WHERE digest NOT IN (SELECT digest FROM vectors)"
                if "vectors" in known and connection.execute(lone).fetchone() != (0,):
                    return "photographs without a vector"
        rows = work.stored(folder)
        bad = [key for key, value in rows.items() if isinstance(value, float) and not np.isfinite(value)]
        return f"{bad[0]} is no number" if bad else ""
    except Exception as error:  # whatever it is, it is what the table is about
        return f"{type(error).__name__}: {error}"


def drafts_in(folder: Path) -> list[str]:
    """What writers have left behind."""
    return sorted(path.name for path in folder.rglob(".*") if "clipmatch-" in path.name)
