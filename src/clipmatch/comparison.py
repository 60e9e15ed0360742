"""What an update has to do: the folders on disk beside what the store knows of them.

In: a store, folders. Out: a `Comparison`: the files to be taken in, and those that are gone. Reads no picture; an
unchanged one costs its `stat`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path

from clipmatch.archive import locate
from clipmatch.crawl import Found, walk
from clipmatch.errors import Failure
from clipmatch.imageformats import missing_library
from clipmatch.listing import GONE, is_archive, pictures_in, with_sidecars
from clipmatch.photo import Stamp
from clipmatch.sidecars import is_known
from clipmatch.storage import PhotoStore
from clipmatch.store import Root


@dataclass
class Summary:
    """What an update did, in numbers of files. failures: files and folders that can't be used, and why.

    derived: whether all files are there that make searches quicker.
    """

    added: int = 0
    moved: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    failures: list[Failure] = field(default_factory=list)
    derived: bool = True

    def __str__(self) -> str:
        names = ("added", "moved", "changed", "unchanged", "removed")
        return ", ".join([f"{getattr(self, name)} {name}" for name in names] + [f"{len(self.failures)} failed"])


@dataclass
class Comparison:
    """Folders on disk against the store. fresh: new or changed files. known: photographs in the store.

    gone: photographs whose files are not there any more, and their contents. mended: the same of files that had failed.
    """

    fresh: list[Found] = field(default_factory=list)
    known: set[Path] = field(default_factory=set)
    gone: dict[Path, str] = field(default_factory=dict)
    mended: set[Path] = field(default_factory=set)


def compare(store: PhotoStore, roots: Sequence[Root], summary: Summary, keep_empty: bool) -> Comparison:
    """Look at every file below the roots once; count the unchanged, and report what failed before and still would."""
    found = Comparison()
    seen: set[Path] = set()
    kept: set[Path] = set()  # what lies below can't be told to be gone
    failed: set[Path] = set()
    for root in sorted(roots, key=lambda root: not is_archive(root.path)):  # a table says more than the folder
        known, broken = store.stamps(root.path)
        items: Iterable[Found | Failure] = files_below(root)
        stamps = known
        if is_archive(root.path):  # a table names pictures that may lie anywhere
            items = list(items)
            more = store.stamps_of([item.path for item in items if not item.path.is_relative_to(root.path)])
            stamps, broken = known | more[0], broken | more[1]
        failed |= broken.keys()
        found.known |= stamps.keys()
        for item in items:
            if isinstance(item, Failure):
                summary.failures.append(item)
                if item.reason != GONE:
                    kept.add(item.path)
            elif item.path not in seen:
                seen.add(item.path)
                sort_out(item, stamps, broken, found, summary)
        if keep_empty and known and not any(path.is_relative_to(root.path) for path in seen) and root.path not in kept:
            reason = f"it is empty now; its {len(known)} photographs stay until it is removed: clipmatch index --remove"
            summary.failures.append(Failure(root.path, reason))
            kept.add(root.path)
    named = {root.path for root in roots}
    absent = {
        path for path in (found.known | failed) - seen if not is_below(path, kept) and not is_in_another(path, named)
    }
    found.gone = digests_of(store, absent & found.known)
    found.mended = absent - found.known
    return found


def is_below(path: Path, places: AbstractSet[Path]) -> bool:
    """Whether a path is one of some places, or lies below one."""
    return not places.isdisjoint((path, *path.parents))


def is_in_another(path: Path, roots: AbstractSet[Path]) -> bool:
    """Whether a picture is in an archive that is still there and that was not looked into: those below a folder are
    read by a cluster, or where they are named.
    """
    inside = locate(path)
    return inside is not None and inside[0] not in roots and inside[0].exists()


def files_below(root: Root) -> Iterator[Found | Failure]:
    """`walk`, for a folder that may have gone since it was named; of an archive the pictures in it."""
    if not root.path.exists():
        yield Failure(
            root.path, "it is not there now; its photographs stay until it is removed: clipmatch index --remove"
        )
        return
    if is_archive(root.path) and root.path.is_file():
        yield from pictures_in(root.path)
    else:
        yield from walk(root.path, root.exclude, root.follow_links)


def sort_out(
    item: Found, known: dict[Path, Stamp], broken: dict[Path, tuple[Stamp, str]], found: Comparison, summary: Summary
) -> None:
    """One file: unchanged, unusable as before, or to be looked at."""
    if reason := missing_library(item.path):  # not kept: the library may be there next time
        summary.failures.append(Failure(item.path, reason))
    elif is_unchanged(item.stamp, known.get(item.path)):
        summary.unchanged += 1
    elif item.path in broken and is_unchanged(item.stamp, broken[item.path][0]):
        summary.failures.append(Failure(item.path, broken[item.path][1]))
    else:
        found.fresh.append(with_sidecars(item, known.get(item.path)))


def is_unchanged(now: Stamp, known: Stamp | None) -> bool:
    """Whether a file is as the store knows it, by whatever has found it: its folder, or a table that names it."""
    if known is None or (now.size, now.mtime) != (known.size, known.mtime):
        return False
    return is_known(now.sidecar, known.sidecar)


def digests_of(store: PhotoStore, paths: set[Path]) -> dict[Path, str]:
    """The contents of photographs in the store."""
    return {photo.path: photo.digest for photo in store.photos_of(store.numbers_of(paths).values())}
