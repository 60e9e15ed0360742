"""Bring an index up to date with the folders on disk.

In: a store, an embedder, folders. Out: a `Summary`. Knows nothing of queries.

An unchanged file costs its `stat`. Others are read and hashed; a content that is known keeps its vector, wherever its
file has gone, and only what is new is embedded. Each batch is one transaction, so an interruption costs one batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from clipmatch.crawl import Found, Stamp, walk
from clipmatch.embedder import Embedder, Failure
from clipmatch.errors import ClipmatchError, reason_of
from clipmatch.imageformats import missing_library
from clipmatch.metadata import Metadata
from clipmatch.preprocess import ImageError, open_photo, read_header
from clipmatch.runtime import usable_cores
from clipmatch.store import ModelName, Photo, Root, Store

BATCH = 128  # files between two commits: what an interruption can cost
SHOWN = 64  # files from which on there is a progress bar
READ = 1 << 20  # bytes hashed at once


@dataclass
class Summary:
    """What an update did, in numbers of files. failures: files and folders that can't be used, and why."""

    added: int = 0
    moved: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    failures: list[Failure] = field(default_factory=list)

    def __str__(self) -> str:
        names = ("added", "moved", "changed", "unchanged", "removed")
        return ", ".join([f"{getattr(self, name)} {name}" for name in names] + [f"{len(self.failures)} failed"])


def update(store: Store, embedder: Embedder, roots: Sequence[Root], progress: bool = True) -> Summary:
    """Make the store what the folders are now.

    Photographs that are gone are forgotten, except where a folder can't be read or has become empty as a whole, as the
    place of a disk does that is not plugged in: then they stay, and a failure says so.
    Raises ClipmatchError when a folder does not exist, or the store is bound to another model.
    """
    check_model(store, embedder)
    summary = Summary()
    work: list[Found] = []
    gone: set[Path] = set()
    known: set[Path] = set()
    for root in roots:
        there = compare(store, root, summary)
        work += there.fresh
        gone |= there.gone
        known |= there.known
    contents = {} if not gone else digests_of(store, gone)
    arrived: set[str] = set()
    with tqdm(total=len(work), desc="photographs", unit="img", disable=not progress or len(work) < SHOWN) as bar:
        for start in range(0, len(work), BATCH):
            batch = work[start : start + BATCH]
            photos, failures = ingest(store, embedder, batch)
            for photo in photos:
                if photo.path in known:
                    summary.changed += 1
                elif photo.digest in contents and photo.digest not in arrived:
                    summary.moved += 1
                    arrived.add(photo.digest)
                else:
                    summary.added += 1
            summary.failures += failures
            bar.update(len(batch))
    summary.removed += len(gone) - summary.moved
    if gone:
        store.delete(gone)
    return summary


def reembed(store: Store, embedder: Embedder, name: ModelName, progress: bool = True) -> Summary:
    """Give every content a vector by another model, then bind the store to it; what is there already is kept."""
    summary = Summary()
    missing = store.not_embedded(name.fingerprint)
    with tqdm(total=len(missing), desc="photographs", unit="img", disable=not progress or len(missing) < SHOWN) as bar:
        for start in range(0, len(missing), BATCH):
            batch = {photo.path: photo for photo in missing[start : start + BATCH]}
            done = embedder.embed_images(list(batch), progress=False)
            rows = {batch[path].digest: row for path, row in zip(done.paths, done.rows, strict=True)}
            store.upsert([], name.fingerprint, rows, {})
            summary.changed += len(rows)
            summary.failures += done.failures
            bar.update(len(batch))
    store.bind(name)
    return summary


@dataclass
class Comparison:
    """A folder on disk against the store. fresh: new or changed files. gone, known: paths in the store."""

    fresh: list[Found]
    gone: set[Path]
    known: set[Path]


def compare(store: Store, root: Root, summary: Summary) -> Comparison:
    """Look at every file below a root; count the unchanged, and report what failed before and still would."""
    known, failed = store.stamps(root.path)
    fresh: list[Found] = []
    seen: set[Path] = set()
    closed: list[Path] = []
    for item in walk(root.path, root.exclude, root.follow_links):
        if isinstance(item, Failure):
            summary.failures.append(item)
            closed.append(item.path)
            continue
        seen.add(item.path)
        if reason := missing_library(item.path):  # not kept: the library may be there next time
            summary.failures.append(Failure(item.path, reason))
        elif known.get(item.path) == item.stamp:
            summary.unchanged += 1
        elif item.path in failed and failed[item.path][0] == item.stamp:
            summary.failures.append(Failure(item.path, failed[item.path][1]))
        else:
            fresh.append(item)
    gone = {path for path in (known.keys() | failed.keys()) - seen if not any(path.is_relative_to(p) for p in closed)}
    if known and not seen:
        reason = f"it is empty now; its {len(known)} photographs stay in the index until the folder is removed from it"
        summary.failures.append(Failure(root.path, reason))
        gone = set()
    return Comparison(fresh, gone, set(known))


def digests_of(store: Store, paths: set[Path]) -> set[str]:
    """The contents of photographs in the store."""
    return {photo.digest for _, photo in store.photos() if photo.path in paths}


def ingest(store: Store, embedder: Embedder, batch: Sequence[Found]) -> tuple[list[Photo], list[Failure]]:
    """Hash, embed where needed, and store a batch -> its photographs and failures."""
    stamps = {item.path: item.stamp for item in batch}
    digests, failures = hash_files(list(stamps))
    model = embedder.fingerprint
    have = store.embedded(model, set(digests.values()))
    relatives = store.with_content(have)
    first: dict[str, Path] = {}  # of several copies one is embedded
    for path, digest in digests.items():
        if digest not in relatives:
            first.setdefault(digest, path)
    looks = Looks()
    done = embedder.embed_images(list(first.values()), progress=False, read=looks.read)
    rows = {digests[path]: row for path, row in zip(done.paths, done.rows, strict=True) if np.isfinite(row).all()}
    reasons = {digests[failure.path]: failure.reason for failure in done.failures}
    photos = []
    for path, digest in digests.items():
        if digest in rows or digest in relatives:
            photos.append(photograph(path, digest, stamps[path], looks, first, relatives))
        else:
            failures.append(Failure(path, reasons.get(digest, "the model gives no finite vector for it")))
    store.upsert(photos, model, rows, {failure.path: (stamps[failure.path], failure.reason) for failure in failures})
    return photos, failures


class Looks:
    """What is learnt about a picture on the way to the model, where it is decoded anyway."""

    def __init__(self) -> None:
        self.metadata: dict[Path, Metadata] = {}
        self.hashes: dict[Path, int] = {}

    def read(self, path: Path, min_size: int | None) -> Image.Image:
        """As `load_image`; remembers what it saw. Called from several threads."""
        image, self.metadata[path] = open_photo(path, min_size)
        self.hashes[path] = picture_hash(image)
        return image


def photograph(
    path: Path, digest: str, stamp: Stamp, looks: Looks, first: dict[str, Path], relatives: dict[str, Photo]
) -> Photo:
    """A file whose content has a vector -> its row; a copy has its own caption, for that may lie beside it."""
    if path in looks.metadata:
        return Photo(path, digest, stamp, looks.metadata[path], looks.hashes[path])
    twin_hash = relatives[digest].picture_hash if digest in relatives else looks.hashes[first[digest]]
    known = relatives[digest].metadata if digest in relatives else looks.metadata[first[digest]]
    try:
        metadata = read_header(path)
    except ImageError:  # it has gone since it was hashed
        metadata = known
    return Photo(path, digest, stamp, metadata, twin_hash)


def picture_hash(image: Image.Image) -> int:
    """Picture -> 64 bits, of which few differ between copies of one picture that were resized or compressed.

    A difference hash (N. Krawetz, "Kind of like that", 2013): is each of 8 x 8 places brighter than its neighbour?
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)  # [8, 9]
    bits: NDArray[np.uint8] = np.packbits(grey[:, 1:] > grey[:, :-1])
    return int.from_bytes(bits.tobytes(), "big")


def hash_files(paths: Sequence[Path]) -> tuple[dict[Path, str], list[Failure]]:
    """SHA-256 of each file's bytes, and the files that can't be read."""

    def digest(path: Path) -> str | Failure:
        sha = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while block := file.read(READ):
                    sha.update(block)
        except OSError as error:
            return Failure(path, reason_of(error))
        return sha.hexdigest()

    with ThreadPoolExecutor(usable_cores()) as pool:
        results = list(zip(paths, pool.map(digest, paths), strict=True))
    failures = [result for _, result in results if isinstance(result, Failure)]
    return {path: result for path, result in results if not isinstance(result, Failure)}, failures


def check_model(store: Store, embedder: Embedder) -> None:
    """Raise ClipmatchError if the store holds another model's vectors."""
    bound = store.model
    if bound and bound.fingerprint != embedder.fingerprint:
        named = f"--model {bound.name}" if bound.name else "no --model, in the version of clipmatch that made it"
        own = getattr(embedder, "name", None)
        change = "clipmatch index --reembed" + (f" --model {own}" if own else "")
        raise ClipmatchError(
            f"The index {store.path} holds the vectors of another model: search it with {named}, or change it over "
            f"with: {change}"
        )
