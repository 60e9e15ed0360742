"""Copy an index from one store to another, whatever their kinds.

In: two stores. Out: what was copied. Nothing is embedded, and no photograph is opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from tqdm import tqdm

from clipmatch.errors import ClipmatchError
from clipmatch.leave import give, given
from clipmatch.photo import Photo
from clipmatch.storage import PhotoStore

BATCH = 2000  # photographs between two commits
SHOWN = 5000  # photographs from which on there is a progress bar


@dataclass
class Copied:
    """In numbers of photographs. unchanged: were there already; removed: are not in the source any more."""

    copied: int = 0
    unchanged: int = 0
    removed: int = 0

    def __str__(self) -> str:
        return f"{self.copied} copied, {self.unchanged} unchanged, {self.removed} removed"


def copy_store(source: PhotoStore, target: PhotoStore, progress: bool = True) -> Copied:
    """Make the target what the source is: photographs with their vectors, folders, failures and concepts.

    Folders and concepts that the target alone has stay, for they were made by hand. What is there already is passed
    over, so an interrupted copy goes on. Raises ClipmatchError when the source is empty, or the target is bound to
    another model.
    """
    model = source.model
    if model is None:
        raise ClipmatchError(f"The index {source.path} is empty; there is nothing to copy.")
    bound = target.model
    if bound is not None and bound.fingerprint != model.fingerprint:
        raise ClipmatchError(f"The index {target.path} holds the vectors of another model; name another place.")
    done = Copied()
    with target.writer(), source.snapshot():
        target.bind(model)
        total = len(source)
        with tqdm(total=total, desc="copying", unit="img", disable=not progress or total < SHOWN) as bar:
            for batch in batches(source):
                copy_batch(source, target, model.fingerprint, batch, done)
                bar.update(len(batch))
        for batch in batches(target):
            known = source.numbers_of(photo.path for photo in batch)
            gone = [photo.path for photo in batch if photo.path not in known]
            if gone:
                target.delete(gone)
                done.removed += len(gone)
        broken = source.broken()
        target.delete(target.broken().keys() - broken.keys())
        target.upsert([], model.fingerprint, {}, broken)
        for root in source.roots():
            target.add_root(root)
        give(target.path, given(source.path))
        for fingerprint, concept in source.concepts().values():
            target.keep_concept(fingerprint, concept)
        target.tidy()
    return done


def batches(store: PhotoStore) -> Iterator[list[Photo]]:
    """All photographs, some at a time."""
    left = (photo for _, photo in store.photos())
    while batch := list(islice(left, BATCH)):
        yield batch


def copy_batch(source: PhotoStore, target: PhotoStore, model: str, batch: list[Photo], done: Copied) -> None:
    """Copy those of some photographs that the target lacks, or knows otherwise."""
    there = set(target.photos_of(target.numbers_of(photo.path for photo in batch).values()))
    new = [photo for photo in batch if photo not in there]
    rows = source.rows_of(photo.path for photo in new)
    if new:
        target.upsert(new, model, {photo.digest: rows[photo.path] for photo in new}, {})
    done.copied += len(new)
    done.unchanged += len(batch) - len(new)
