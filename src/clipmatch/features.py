"""What frozen layers say about each picture and caption, computed once and kept on disk.

In: a checkpoint and files or strings. Out: memory-mapped rows, float16, found again by content and by the fingerprint
of the layers that made them: a renamed file, another data set with the same picture or an interrupted run costs
nothing twice. Knows nothing of losses or steps.

On disk, a folder for each kind of row: `rows.bin`, appended to, and `keys.txt`, one key a row, written after it. A
crash leaves at most rows without keys, which the next run cuts off.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from clipmatch.archive import digest_of
from clipmatch.checkpoint import Checkpoint
from clipmatch.config import to_json
from clipmatch.errors import ClipmatchError, Failure
from clipmatch.model import hidden_width, tower_config, trained_part
from clipmatch.preprocess import ImageError, load_image
from clipmatch.runtime import Precision, cache_folder

BATCH = 64
VERSION = 1  # of the rows' meaning: raise it when the same key would give other numbers

Rows = NDArray[np.float16]


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """rows: memory map [r, ...] float16; places: where each asked-for item lies in it, -1 for a failed one."""

    rows: Rows
    places: NDArray[np.int64]  # [views, n] or [n]


class FeatureStore:
    """Append-only rows with keys; one writer at a time."""

    def __init__(self, folder: Path, shape: tuple[int, ...]):
        self.folder, self.shape = folder, shape
        self.row_bytes = int(np.prod(shape)) * 2
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(folder / "lock")
        self.keys: dict[str, int] = {}

    def open(self) -> None:
        """Read the keys; cut off what a crash left half-written."""
        keys_file, rows_file = self.folder / "keys.txt", self.folder / "rows.bin"
        keys_file.touch()
        rows_file.touch()
        lines = keys_file.read_bytes().decode().split("\n")[:-1]  # what follows the last newline is half a key
        count = min(len(lines), rows_file.stat().st_size // self.row_bytes)
        self.keys = {key: place for place, key in enumerate(lines[:count])}
        os.truncate(rows_file, count * self.row_bytes)
        os.truncate(keys_file, sum(len(line) + 1 for line in lines[:count]))

    def append(self, keys: Sequence[str], rows: NDArray[Any]) -> None:
        """Store rows [k, *shape] under their keys: rows reach the disk before the keys that vouch for them."""
        values = np.ascontiguousarray(rows, dtype=np.float16)
        if not np.isfinite(values).all():
            raise ClipmatchError("The frozen tower gives values that are not finite in half precision; use another.")
        with (self.folder / "rows.bin").open("ab") as file:
            file.write(values.tobytes())
            file.flush()
            os.fsync(file.fileno())
        with (self.folder / "keys.txt").open("ab") as file:  # bytes: line ends are the same on every system
            file.write("".join(f"{key}\n" for key in keys).encode())
        first = len(self.keys)
        self.keys.update({key: first + number for number, key in enumerate(keys)})

    def table(self, keys: NDArray[Any]) -> FeatureTable:
        """Keys of any shape ("" for a failed item) -> the memory map and the places of their rows."""
        places = np.array([self.keys.get(key, -1) for key in keys.ravel()], np.int64).reshape(keys.shape)
        if not self.keys:
            return FeatureTable(np.zeros((0, *self.shape), np.float16), places)
        shape = (len(self.keys), *self.shape)
        return FeatureTable(np.memmap(self.folder / "rows.bin", np.float16, "r", shape=shape), places)


def cache_root() -> Path:
    """The folder of all feature stores."""
    return cache_folder() / "features"


def image_features(
    checkpoint: Checkpoint,
    paths: Sequence[Path],
    *,
    precision: Precision,
    device: torch.device,
    last_blocks: int = 0,
    views: int = 1,
    flip: bool = True,
    progress: bool = True,
) -> tuple[FeatureTable, list[Failure]]:
    """Features of each picture under a frozen image tower, view 0 plain, further ones augmented.

    last_blocks: 0 gives pooled features [h]; k > 0 gives the hidden states [t, h] that enter the last k blocks, which
    are to be trained. Returns the table (places [views, n]) and the pictures that could not be read.
    """
    encoder, transform = checkpoint.model.image_encoder, checkpoint.transform
    recipe = [
        to_json(transform.config),
        last_blocks,
        flip,
        encoder.pooling if not last_blocks else "",
        str(precision.dtype),
    ]
    digests, failures = content_keys(paths)
    reasons: dict[str, str] = {}  # of pictures that can't be decoded, by content: copies fail alike
    keys = np.array([[f"{digest}:{view}" if digest else "" for digest in digests] for view in range(views)])

    def forward(batch: Tensor) -> Tensor:
        return encoder.hidden_before(batch, last_blocks) if last_blocks else encoder.features(batch)

    def compute(jobs: list[tuple[int, int]]) -> tuple[list[str], Tensor]:
        pixels, names = [], []
        for view, item in jobs:
            try:
                image = load_image(paths[item], min_size=transform.config.size * (2 if view else 1))
            except ImageError as error:
                reasons[digests[item]] = error.reason
                continue
            if view:  # the same view of the same picture in every run
                image = transform.augment(image, np.random.default_rng([view, int(digests[item], 16)]), flip=flip)
            pixels.append(transform.pixels(image))
            names.append(str(keys[view, item]))
        if not pixels:
            return [], torch.empty(0)
        batch = torch.from_numpy(transform.normalise(np.stack(pixels))).to(device)
        return names, forward(batch)

    with torch.inference_mode():  # a blank picture tells the shape of a row
        blank = torch.zeros(1, 3, transform.config.size, transform.config.size, device=device)
        shape = tuple(forward(blank).shape[1:])
    store = FeatureStore(folder_for("image", encoder.backbone, recipe, last_blocks), shape)
    fill(store, keys, compute, precision, device, "image features", progress)
    failures += [Failure(path, reasons[key]) for path, key in zip(paths, digests, strict=True) if key in reasons]
    return store.table(keys), failures


def text_features(
    checkpoint: Checkpoint,
    texts: Sequence[str],
    *,
    precision: Precision,
    device: torch.device,
    progress: bool = True,
) -> FeatureTable:
    """Pooled features [h] of each caption under a frozen text tower; places [m]."""
    encoder, tokenizer = checkpoint.model.text_encoder, checkpoint.tokenizer
    length = checkpoint.model.config.max_length
    recipe = [length, encoder.pooling, str(precision.dtype), tokenizer.fingerprint]
    keys = np.array([hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts])
    order = np.argsort([len(text) for text in texts], kind="stable")  # captions of one length need no padding

    def compute(jobs: list[tuple[int, int]]) -> tuple[list[str], Tensor]:
        items = [order[item] for _, item in jobs]
        tokens = tokenizer([texts[item] for item in items], padding=True, max_length=length, return_tensors="pt")
        names = [str(keys[item]) for item in items]
        return names, encoder.features(tokens["input_ids"].to(device), tokens["attention_mask"].to(device))

    store = FeatureStore(folder_for("text", encoder.backbone, recipe), (hidden_width(encoder.backbone),))
    fill(store, keys[None, order], compute, precision, device, "caption features", progress)
    return store.table(keys)


def fill(
    store: FeatureStore,
    keys: NDArray[Any],
    compute: Callable[[list[tuple[int, int]]], tuple[list[str], Tensor]],
    precision: Precision,
    device: torch.device,
    title: str,
    progress: bool,
) -> None:
    """Compute and append the rows of `keys` [views, n] that the store lacks."""
    with store.lock, torch.inference_mode():
        store.open()
        jobs = missing_jobs(store, keys)
        bar = tqdm(total=len(jobs), desc=title, unit="row", disable=not progress or not jobs)
        for start in range(0, len(jobs), BATCH):
            chunk = jobs[start : start + BATCH]
            with torch.autocast(device.type, precision.dtype, enabled=precision.dtype is not None):
                names, rows = compute(chunk)
            if names:
                store.append(names, rows.float().cpu().numpy())
            bar.update(len(chunk))
        bar.close()


def missing_jobs(store: FeatureStore, keys: NDArray[Any]) -> list[tuple[int, int]]:
    """(view, item) of each key that has no row yet, each key once."""
    jobs, seen = [], set()
    for view in range(keys.shape[0]):
        for item in range(keys.shape[1]):
            key = str(keys[view, item])
            if key and key not in store.keys and key not in seen:
                seen.add(key)
                jobs.append((view, item))
    return jobs


def content_keys(paths: Sequence[Path]) -> tuple[list[str], list[Failure]]:
    """SHA-256 (32 hex digits) of each file's bytes, "" and a failure for a file that can't be read."""
    digests, failures = [], []
    for path in paths:
        try:
            digests.append(digest_of(path)[:32])
        except OSError as error:
            digests.append("")
            failures.append(Failure(path, error.strerror or "can't be read"))
    return digests, failures


def folder_for(kind: str, backbone: nn.Module, recipe: list[Any], last_blocks: int = 0) -> Path:
    """The store's folder: a kind, and a hash of the weights and of everything else that shapes a row.

    The last blocks, when they are being trained, and the norm after them do not shape it: a resumed run finds its rows.
    """
    digest = hashlib.sha256(json.dumps([VERSION, recipe, tower_config(backbone)], default=str).encode())
    parts = trained_part(backbone, last_blocks)
    learning = {id(value) for part in parts for value in part.state_dict(keep_vars=True).values()}
    for name, value in backbone.state_dict(keep_vars=True).items():
        if id(value) in learning:
            continue
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return cache_root() / f"{kind}-{digest.hexdigest()[:16]}"
