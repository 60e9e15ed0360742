"""Bring an index up to date with the folders on disk.

In: a store, an embedder, folders. Out: a `Summary`. Knows nothing of queries.

An unchanged file costs its `stat`. Others are read and hashed; a content that is known keeps its vector, wherever its
file has gone, and only what is new is embedded. Each batch is one transaction. While one is written the next ones are
embedded and another is hashed, so an interruption costs those under way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from clipmatch.archive import digest_of, locate
from clipmatch.comparison import Comparison, Summary, compare
from clipmatch.crawl import Found
from clipmatch.embedder import Embedder, ImageEmbeddings
from clipmatch.errors import ClipmatchError, Failure
from clipmatch.imageformats import LACKING
from clipmatch.metadata import Words, words_beside
from clipmatch.patience import one_by_one, patiently, too_long
from clipmatch.photo import Metadata, Photo, Stamp
from clipmatch.pipeline import in_order
from clipmatch.preprocess import ImageError, open_photo, plain_reason, read_header
from clipmatch.remote import is_remote, open_raw
from clipmatch.runtime import usable_cores
from clipmatch.sanity import are_unit
from clipmatch.sidecars import has_sidecars, without_sidecars
from clipmatch.storage import PhotoStore
from clipmatch.store import ModelName, Root, check_model

BATCH = 64  # files between two commits
LOT = 8  # files that a core hashes at once
UNDER_WAY = 2  # batches being embedded: as one runs out, each core finds work in the next
SHOWN = 64  # files from which on there is a progress bar
NO_VECTOR = "the model gives no vector of length 1 for it"
CHANGED = "it changed while it was read; the next update takes it in"

T = TypeVar("T")


def update(
    store: PhotoStore, embedder: Embedder, roots: Sequence[Root], progress: bool = True, keep_empty: bool = True
) -> Summary:
    """Make the store what the folders are now.

    Photographs that are gone are forgotten, except where a folder can't be read or is missing or, with `keep_empty`,
    has become empty as a whole, as the place of a disk does that is not plugged in: they stay, and a failure says so.
    Raises ClipmatchError when the store is bound to another model.
    """
    check_model(store, embedder)
    summary = Summary()
    there = compare(store, roots, summary, keep_empty)
    take_in(store, embedder, there, summary, progress)
    summary.removed += len(there.gone) - summary.moved
    if there.gone or there.mended:
        store.delete([*there.gone, *there.mended])
    return summary


def take_in(
    store: PhotoStore,
    embedder: Embedder,
    there: Comparison,
    summary: Summary,
    progress: bool,
    batch: int | None = None,
) -> None:
    """Embed and store what is new or changed, `batch` files to a commit, and count it."""
    left = Counter(there.gone.values())  # contents that a moved file can bring back
    for photos, failures in ingest(store, embedder, there.fresh, progress, batch):
        for photo in photos:
            if photo.path in there.known:
                summary.changed += 1
            elif left[photo.digest]:
                summary.moved += 1
                left[photo.digest] -= 1
            else:
                summary.added += 1
        summary.failures += failures


def reembed(store: PhotoStore, embedder: Embedder, name: ModelName, progress: bool = True) -> Summary:
    """Give every content a vector by another model, then bind the store to it; what is there already is kept.

    Raises ClipmatchError, and leaves the store with its model, when photographs can't be read that were never found to
    be damaged, as on a disk that is not plugged in.
    """
    summary = Summary()
    missing = store.not_embedded(name.fingerprint)

    def embed(batch: dict[Path, Photo]) -> tuple[dict[Path, Photo], ImageEmbeddings]:
        return batch, embedder.embed_images(list(batch), progress=False)

    batches = ({photo.path: photo for photo in part} for part in groups(missing))
    with counter(len(missing), progress) as bar, ThreadPoolExecutor(UNDER_WAY) as pool:
        for batch, done in in_order(embed, batches, pool, UNDER_WAY):
            pairs = zip(done.paths, done.rows, strict=True)
            made = {path: row for path, row in pairs if are_unit(row)}
            store.upsert([], name.fingerprint, {batch[path].digest: row for path, row in made.items()}, {})
            summary.changed += len(made)
            summary.failures += done.failures
            summary.failures += [Failure(path, NO_VECTOR) for path in done.paths if path not in made]
            bar.update(len(batch))
    passing = {*LACKING, too_long()}
    absent = [
        failure.path for failure in summary.failures if failure.reason in passing or not is_readable(failure.path)
    ]
    if absent:
        raise ClipmatchError(
            f"{len(absent)} photographs can't be read now, such as {absent[0]}; the index still answers with the old "
            "model. Plug in what is missing, or bring the index up to date with clipmatch index, and try again."
        )
    store.bind(name)
    return summary


def is_readable(path: Path) -> bool:
    """Whether a file, or the archive that it is in, can be opened."""
    inside = locate(path)
    try:
        with patiently(partial(open_raw, inside[0] if inside else path)):
            return True
    except OSError:
        return False


@dataclass(frozen=True)
class Batch:
    """Files on their way into the store.

    stamps, captions (in tables), digests: of the files that could be hashed; unread: the others. relatives: contents
    that have a vector, and a photograph of each. first: what is to be embedded, of several copies one. looks: what is
    seen of it then.
    """

    stamps: dict[Path, Stamp]
    captions: dict[Path, str | None]
    digests: dict[Path, str]
    unread: list[Failure]
    relatives: dict[str, Photo]
    first: dict[str, Path]
    looks: Looks


def ingest(
    store: PhotoStore, embedder: Embedder, files: Sequence[Found], progress: bool, batch: int | None = None
) -> Iterator[tuple[list[Photo], list[Failure]]]:
    """Hash, embed where needed, and store files -> photographs and failures, a batch at a time, in order."""
    under_way: dict[str, str] = {}  # contents in batches not yet stored, and why those can't be used that just failed

    def embed(batch: Batch) -> tuple[Batch, ImageEmbeddings]:
        paths = list(batch.first.values())
        return batch, embedder.embed_images(paths, progress=False, read=batch.looks.read)

    batches = (prepare(store, embedder.fingerprint, part, under_way) for part in groups(files, batch))
    with counter(len(files), progress) as bar, ThreadPoolExecutor(UNDER_WAY) as pool:
        for hashed, done in in_order(embed, batches, pool, UNDER_WAY):
            yield keep(store, embedder.fingerprint, hashed, done, under_way)
            bar.update(len(hashed.stamps))


def groups(items: Sequence[T], size: int | None = None) -> Iterator[Sequence[T]]:
    """A sequence, `size` at a time; `BATCH`, if not given."""
    size = size or BATCH
    return (items[start : start + size] for start in range(0, len(items), size))


def counter(total: int, progress: bool) -> tqdm[Any]:
    """A progress bar in photographs; none where it would be gone before it is read."""
    return tqdm(total=total, desc="photographs", unit="img", disable=not progress or total < SHOWN)


def prepare(store: PhotoStore, model: str, files: Sequence[Found], under_way: dict[str, str]) -> Batch:
    """Hash files, and see which of their contents have to be embedded."""
    stamps = {item.path: item.stamp for item in files}
    captions = {item.path: item.caption for item in files}
    digests, unread = hash_files(list(stamps))
    relatives = store.with_content(store.embedded(model, set(digests.values())))
    first: dict[str, Path] = {}
    for path, digest in digests.items():
        if digest not in relatives and digest not in under_way:
            first.setdefault(digest, path)
    under_way.update(dict.fromkeys(first, ""))
    return Batch(stamps, captions, digests, unread, relatives, first, Looks(stamps, captions))


def keep(
    store: PhotoStore, model: str, batch: Batch, done: ImageEmbeddings, under_way: dict[str, str]
) -> tuple[list[Photo], list[Failure]]:
    """Store a batch that has been embedded -> its photographs and failures."""
    changed = changes(batch)
    pairs = zip(done.paths, done.rows, strict=True)
    rows = {batch.digests[path]: row for path, row in pairs if are_unit(row) and path not in changed}
    reasons = {batch.digests[failure.path]: failure.reason for failure in done.failures}
    reasons |= {digest: CHANGED for digest, path in batch.first.items() if path in changed}
    elsewhere = {digest for digest in batch.digests.values() if digest not in batch.first}  # in a batch before
    relatives = {**batch.relatives, **store.with_content(store.embedded(model, elsewhere - batch.relatives.keys()))}
    for digest in batch.first:
        if digest in rows:
            del under_way[digest]  # from now on the store knows it
        else:
            under_way[digest] = reasons.get(digest, NO_VECTOR)
    photos, failures = [], []
    for path, digest in batch.digests.items():
        if path in changed:
            failures.append(Failure(path, changed[path]))
        elif digest in rows or digest in relatives:
            photos.append(photograph(path, digest, batch, relatives))
        else:
            failures.append(Failure(path, under_way[digest]))
    passing = {*LACKING, CHANGED, too_long(), *changed.values()}
    lasting = [failure for failure in failures if failure.reason not in passing]
    store.upsert(
        photos, model, rows, {failure.path: (batch.stamps[failure.path], failure.reason) for failure in lasting}
    )
    return photos, failures + batch.unread  # what could not be read now may be readable next time


def changes(batch: Batch) -> dict[Path, str]:
    """Files of a batch that are not what they were when they were found, and what became of them.

    Their vectors may be of another content than their hashes: a file may be written, or go, at any moment.
    """

    def look(path: Path) -> str | None:
        try:
            status = path.stat()
        except OSError as error:
            return plain_reason(error)
        same = (status.st_size, status.st_mtime_ns) == (batch.stamps[path].size, batch.stamps[path].mtime)
        return None if same else CHANGED

    paths = [path for path in batch.digests if not is_remote(path) and locate(path) is None]
    seen = zip(paths, one_by_one(look, paths, lambda _: too_long()), strict=True)
    return {path: reason for path, reason in seen if reason}


class Looks:
    """What is learnt about a picture on the way to the model, where it is decoded anyway."""

    def __init__(self, stamps: Mapping[Path, Stamp], captions: Mapping[Path, str | None]) -> None:
        self.stamps, self.captions = stamps, captions
        self.metadata: dict[Path, Metadata] = {}
        self.hashes: dict[Path, int] = {}
        self.silent: set[Path] = set()  # those whose side-cars object storage didn't give

    def read(self, path: Path, min_size: int | None) -> Image.Image:
        """As `load_image`; remembers what it saw. Called from several threads."""
        image, self.metadata[path] = open_photo(path, min_size, self.beside(path))
        self.hashes[path] = picture_hash(image)
        return image

    def beside(self, path: Path) -> Words:
        """The words outside a picture's file, of those that can be had now."""
        told = self.captions[path]
        if not has_sidecars(self.stamps[path].sidecar):
            return words_beside(None, told)
        try:
            return patiently(partial(words_beside, path, told))
        except OSError:
            self.silent.add(path)
            return words_beside(None, told)

    def stamp(self, path: Path) -> Stamp:
        """A picture's stamp; where words could not be had, one that the next update finds to have changed."""
        stamp = self.stamps[path]
        return replace(stamp, sidecar=without_sidecars(stamp.sidecar)) if path in self.silent else stamp


def photograph(path: Path, digest: str, batch: Batch, relatives: Mapping[str, Photo]) -> Photo:
    """A file whose content has a vector -> its row; a copy has its own caption, for that may lie beside it."""
    looks = batch.looks
    if path in looks.metadata:
        return Photo(path, digest, looks.stamp(path), looks.metadata[path], looks.hashes[path])
    if digest in relatives:
        known, twin_hash = relatives[digest].metadata, relatives[digest].picture_hash
    else:
        twin = batch.first[digest]
        known, twin_hash = looks.metadata[twin], looks.hashes[twin]
    try:
        metadata = read_header(path, looks.beside(path))
    except ImageError:  # it has gone since it was hashed
        metadata = known
    return Photo(path, digest, looks.stamp(path), metadata, twin_hash)


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
        try:
            return digest_of(path)
        except OSError as error:
            return Failure(path, plain_reason(error))

    def late(path: Path) -> Failure:
        return Failure(path, too_long())

    each = max(1, min(LOT, -(-len(paths) // usable_cores())))
    with ThreadPoolExecutor(usable_cores()) as pool:
        lots = pool.map(lambda lot: one_by_one(digest, lot, late), groups(paths, each))
        results = list(zip(paths, chain.from_iterable(lots), strict=True))
    failures = [result for _, result in results if isinstance(result, Failure)]
    return {path: result for path, result in results if not isinstance(result, Failure)}, failures
