"""Caption files -> captioned images, and their split into train and dev.

In: captions (a file, a folder, or a pattern), the image folder, split files. The formats are those of `readers`.
Out: immutable rows, one an image, with a note for every line that was repaired or dropped. Knows nothing of pixels,
tokens or models; it looks whether an image file is there and never opens one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath

from clipmatch import archive
from clipmatch.errors import ClipmatchError
from clipmatch.formats import Entry, Reader, read_lines
from clipmatch.formats import LineNote as LineNote  # part of this module's interface
from clipmatch.readers import find_caption_file, pick_reader

IMAGE_FOLDERS = (
    "Images",
    "images",
    "Flicker8k_Dataset",  # spelt so by its makers
    "Flickr8k_Dataset",
    "flickr30k_images",
    "flickr30k-images",
    "train2014",
    "val2014",
    "train2017",
    "val2017",
)
SPLITS = {  # what data sets call the parts
    "train": ("train", "training", "restval"),  # restval: of COCO's val, given to train by Karpathy and all after him
    "dev": ("dev", "val", "valid", "validation"),
    "test": ("test", "testing"),
}
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, as broken JSON has it: no text in UTF-8 holds it
LEAVES = "leaves the image folder"
NAMES = 1 << 18  # file names whose checks are remembered: each comes once a caption
OFFICIAL_SPLITS = (
    ("splits/train.txt", "splits/dev.txt"),
    ("Flickr_8k.trainImages.txt", "Flickr_8k.devImages.txt"),
)


@dataclass(frozen=True)
class CaptionedImage:
    """One image that is on disk (perhaps inside an archive, see `archive`), with all its captions in file order.

    split: the part that the caption file puts it in, of SPLITS or any other word; "" if it does not say.
    """

    path: Path
    captions: tuple[str, ...]
    split: str = ""


@dataclass(frozen=True)
class CaptionSet:
    """What a caption file came to: images in order of first appearance, and what is not among them."""

    rows: tuple[CaptionedImage, ...]
    format: str
    source: Path
    repaired: tuple[LineNote, ...]
    dropped: tuple[LineNote, ...]
    missing: tuple[str, ...]  # names of images that are not on disk
    entries: tuple[Entry, ...] = ()  # every caption with its line, in file order, those of missing images too
    unit: str = "line"  # what their numbers count


@dataclass(frozen=True)
class Splits:
    """Two parts without a common image.

    origin: in words, where the division comes from. missing: images that the caption file lists and the folder lacks.
    """

    train: Sequence[CaptionedImage]
    dev: tuple[CaptionedImage, ...]
    origin: str
    missing: tuple[str, ...] = ()


def load_captions(path: str | Path, images: str | Path | None = None, format: str | None = None) -> CaptionSet:
    """Read captions and find their images.

    `path` is the file, a folder that holds one, up to three folders deep, or a pattern such as `{00..99}.tar`. `images`
    is the image folder, guessed from the usual names beside the file if None. `format` is a name in `READERS`,
    recognised if None.
    Raises `ClipmatchError` if nothing can be read or none of the images is there.
    """
    source = Path(path).expanduser()
    with readable(source):
        source = find_caption_file(source, format)
        reader = pick_reader(source, format)
        own_folder = reader.images(source)
        if own_folder is not None and images is not None:
            raise ClipmatchError(f"{source} brings its images with it, so {images} would be idle; leave it out.")
        found = list(reader.read(source))
    folder = own_folder or choose_folder(source, found, images)
    entries, repaired, dropped = gather(found, folder, reader.unit)
    if not entries:
        raise nothing_found(source, reader, dropped, folder)
    captions, splits = by_image(entries), splits_of(entries)
    missing = tuple(name for name in captions if not exists(folder / name))
    if len(missing) == len(captions):
        raise ClipmatchError(
            f"None of the {len(captions)} images that {source.name} names is in {folder} "
            f"(tried {folder / missing[0]}); give the folder that holds them."
        )
    absent = set(missing)
    rows = tuple(
        CaptionedImage(folder / name, tuple(texts), splits.get(name, ""))
        for name, texts in captions.items()
        if name not in absent
    )
    return CaptionSet(rows, reader.name, source, repaired, dropped, missing, entries, reader.unit)


def nothing_found(source: Path, reader: Reader, dropped: Sequence[LineNote], folder: Path) -> ClipmatchError:
    """The sentence for captions of which none can be read."""
    away = bool(dropped) and dropped[0].text.endswith(LEAVES)
    first = f"; the first was {dropped[0].place}: {dropped[0].text}" if dropped else ""
    return ClipmatchError(
        f"{source} has no caption that can be read as {reader.name} (dropped {reader.unit}s: {len(dropped)}{first}); "
        + (f"give names below {folder}, or another folder." if away else "choose another file or format.")
    )


def choose_folder(source: Path, found: Iterable[Entry | LineNote], images: str | Path | None) -> Path:
    """The given folder of the images; else, where most names are whole paths, the one that holds these; else the
    likeliest. Raises ClipmatchError if there is none.
    """
    names = {normal_name(entry.image): None for entry in found if isinstance(entry, Entry)}
    whole = [path for path in map(Path, names) if path.is_absolute() and ".." not in path.parts]
    if images is not None:
        folder = Path(images).expanduser()
    elif 2 * len(whole) > len(names):
        folder = common_folder(whole)
    else:
        folder = guess_images(source, [name for name in names if not leaves_folder(name)])
    if not folder.is_dir():
        raise ClipmatchError(f"The image folder {folder} does not exist; give the folder that holds the images.")
    return folder


def common_folder(paths: Sequence[Path]) -> Path:
    """The innermost folder that holds all these files, as far as their own folders are there."""
    parents = {path.parent for path in paths}
    there = {parent for parent in parents if parent.is_dir()}
    try:
        return Path(os.path.commonpath(there or parents))
    except ValueError:  # on several drives: most of them
        return Counter(path.parent for path in paths).most_common(1)[0][0]


def guess_images(source: Path, names: Iterable[str]) -> Path:
    """The usual image folder near a caption file that holds most of the first names.

    A draw goes to the folder that the file's name contains (`captions_val2017.json`), then to the nearest.
    """
    sample = list(itertools.islice(names, 50))
    near = source if source.is_dir() else source.parent
    folders: list[Path] = []
    for base in (near, near.parent):
        for name in IMAGE_FOLDERS:
            folders += [base / name, *(base / name / inner for inner in IMAGE_FOLDERS)]
    folders = [folder for folder in folders if folder.is_dir()] + [near, near.parent]
    words = source.stem.split("_")
    return max(folders, key=lambda folder: (sum(exists(folder / name) for name in sample), folder.name in words))


def exists(path: Path) -> bool:
    """Whether a file is there, also inside an archive. A name that no file could have (too long, say) is not there."""
    try:
        return archive.is_file(path)
    except (OSError, ValueError):
        return False


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to read a file into a `ClipmatchError`."""
    try:
        yield
    except OSError as error:
        raise ClipmatchError(f"Cannot read {path}: {error.strerror or error}.") from error


def gather(
    entries: Iterable[Entry | LineNote], folder: Path, unit: str = "line"
) -> tuple[tuple[Entry, ...], tuple[LineNote, ...], tuple[LineNote, ...]]:
    """What a reader found -> entries that can be used, notes on what was repaired, notes on what was dropped.

    folder: of the images; whole paths that lie in it become names below it.
    """
    folders = tuple({f"{place.as_posix().rstrip('/')}/": None for place in (folder.absolute(), folder.resolve())})
    kept: list[Entry] = []
    repaired: list[LineNote] = []
    dropped: list[LineNote] = []
    for entry in entries:
        if isinstance(entry, LineNote):
            dropped.append(replace(entry, unit=unit))
            continue
        name, caption = name_in(folder, folders, entry.image), SURROGATE.sub("\ufffd", entry.caption).strip()
        problem = problem_of(name, caption)
        if problem is not None:
            dropped.append(LineNote(entry.line, problem, unit))
            continue
        changed = name != entry.image or caption != entry.caption
        kept.append(replace(entry, image=name, caption=caption) if changed else entry)
        note = LineNote(entry.line, entry.repair, unit)
        if entry.repair and repaired[-1:] != [note]:  # a record has perhaps five captions
            repaired.append(note)
    return tuple(kept), tuple(repaired), tuple(dropped)


def by_image(entries: Iterable[Entry]) -> dict[str, list[str]]:
    """Captions by image name, both in file order."""
    captions: dict[str, list[str]] = {}
    for entry in entries:
        captions.setdefault(entry.image, []).append(entry.caption)
    return captions


def splits_of(entries: Sequence[Entry]) -> dict[str, str]:
    """The split of each image, as far as the file tells: by a word, or by first folders that are all named so."""
    splits: dict[str, str] = {}
    for entry in entries:
        if entry.split:
            splits[entry.image] = join_splits(splits.get(entry.image, ""), entry.split)
    if splits:
        return splits
    folders = {name: split_word(name.partition("/")[0]) for name in {entry.image: None for entry in entries}}
    # a folder of trains, beside one of buses, is no split
    return folders if len(set(folders.values())) > 1 and set(folders.values()) <= set(SPLITS) else {}


def join_splits(known: str, word: str) -> str:
    """What a file says of an image's split, twice: where it says two things, the one that is farther from training."""
    found, order = split_word(word), list(SPLITS)
    return found if known not in order or (found in order and order.index(found) > order.index(known)) else known


def split_word(word: str) -> str:
    """A word for a part -> the one of SPLITS; any other as it is, in small letters."""
    word = word.strip().lower()
    return next((part for part, words in SPLITS.items() if word in words), word)


def name_below(folders: Sequence[str], name: str) -> str:
    """A whole path of an image -> its name below one of these spellings of the image folder; any other as it is."""
    return next((name.removeprefix(folder) for folder in folders if name.startswith(folder)), name)


def name_in(folder: Path, folders: Sequence[str], written: str) -> str:
    """How an image is called below the image folder; one whose own name has a space at its end, or where that is no
    separator a backslash, as it is written.
    """
    name = normal_name(written)
    odd = written != written.strip() or ("\\" in written and os.sep == "/")
    return written if odd and not exists(folder / name) and exists(folder / written) else name_below(folders, name)


def problem_of(name: str, caption: str) -> str | None:
    """Why an image name and a caption cannot be used, or None."""
    if name in ("", "."):
        return "no image name"
    if not caption:
        return f"empty caption of {name}"
    return f"the image name {name} {LEAVES}" if leaves_folder(name) else None


@lru_cache(NAMES)
def leaves_folder(name: str) -> bool:
    """Whether a name leads out of the image folder, by the rules of both systems: a caption file travels."""
    return any(path.anchor or ".." in path.parts for path in (PurePosixPath(name), PureWindowsPath(name)))


@lru_cache(NAMES)
def normal_name(name: str) -> str:
    r"""One spelling for one relative path: `.\a\b.jpg` and `a/b.jpg` are the same image."""
    name = name.strip().replace("\\", "/")
    return str(PurePosixPath(name)) if name else ""


def read_split(path: str | Path) -> list[str]:
    """The image names of a split file, one a line. Raises `ClipmatchError` if it lists none."""
    with readable(Path(path)):
        names = [line.text.strip() for line in read_lines(Path(path)) if line.text.strip()]
    if not names:
        raise ClipmatchError(f"The split file {path} lists no image; give another.")
    return names


def select_split(rows: Iterable[CaptionedImage], split_file: str | Path) -> tuple[CaptionedImage, ...]:
    """The rows whose image a split file lists, by name with or without extension, or by the end of its path; or whose
    archive it lists.

    A listed name without a row is no error; a list of which no name has a row is.
    """
    rows, listed = tuple(rows), {normal_name(name) for name in read_split(split_file)}
    chosen = tuple(row for row in rows if not listed.isdisjoint(spellings(row.path.absolute())))
    if not chosen:
        raise ClipmatchError(
            f"None of the {len(listed)} images that {split_file} lists is among the {len(rows)} captioned images; "
            "give a split file of this data set."
        )
    return chosen


def select_part(captions: CaptionSet, split: str | Path) -> CaptionSet:
    """Only the images that a split file lists; or, where no file has that name, those of this part by the captions'
    own file: train, dev or test.
    """
    part = split_word(str(split))
    if part not in SPLITS or exists(Path(split)):
        listed = set(read_split(split))
        missing = tuple(name for name in captions.missing if name in listed)
        return replace(captions, rows=select_split(captions.rows, split), missing=missing)
    rows = tuple(row for row in captions.rows if row.split == part)
    if not rows:
        raise ClipmatchError(f"{captions.source} puts no image into a part {split}; give a file with one name a line.")
    splits = splits_of(captions.entries)
    missing = tuple(name for name in captions.missing if splits.get(name) == part)
    return replace(captions, rows=rows, missing=missing)


def shortest_names(paths: Sequence[Path]) -> list[str]:
    """Names that tell the files apart in a list: those of the files, with as many folders before them as it takes."""
    longest = max((len(path.parts) for path in paths), default=0)
    names: list[str] = []
    for depth in range(1, longest + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def spellings(path: Path) -> list[str]:
    """How a list may name an image: `b`, `b.jpg`, `a/b.jpg`, ...; one in an archive also by that, `a.tar` and so on."""
    inside = archive.locate(path)
    return [path.stem, *ends_of(path), *(ends_of(inside[0]) if inside else [])]


def ends_of(path: Path) -> list[str]:
    """A path and what is left of it without its first folders, to the name alone."""
    parts = path.as_posix().split("/")
    return ["/".join(parts[at:]) for at in range(len(parts))]


def split_captions(
    captions: CaptionSet,
    train: str | Path | None = None,
    dev: str | Path | None = None,
    dev_fraction: float = 0.1,
    seed: int = 0,
) -> Splits:
    """Divide by image, never by row: by the given split files, else as the captions' own file says, else by the
    official split files beside it, else by hash.

    The hash of seed and image name decides for each image alone, so a row more or less never moves another image.
    Raises `ClipmatchError` if an image is in both parts or a part is empty.
    """
    if (train is None) != (dev is None):
        raise ClipmatchError("Only one of the train and dev split files is given; give both, or neither.")
    if train is not None and dev is not None:
        splits = split_by_files(captions.rows, Path(train), Path(dev), f"split files {train} and {dev}")
        return replace(splits, missing=captions.missing)
    if any(row.split in SPLITS for row in captions.rows):
        return replace(split_by_own(captions.rows, dev_fraction, seed), missing=captions.missing)
    folder = captions.source if captions.source.is_dir() else captions.source.parent
    for names in OFFICIAL_SPLITS:
        files = (folder / names[0], folder / names[1])
        if exists(files[0]) and exists(files[1]):
            origin = f"official split files {names[0]} and {names[1]} beside {captions.source.name}"
            return replace(split_by_files(captions.rows, *files, origin), missing=captions.missing)
    return replace(split_by_hash(captions.rows, dev_fraction, seed), missing=captions.missing)


def split_by_files(rows: tuple[CaptionedImage, ...], train: Path, dev: Path, origin: str) -> Splits:
    """Split by two files that list image names."""
    splits = Splits(select_split(rows, train), select_split(rows, dev), origin)
    both = set(read_split(train)).intersection(read_split(dev))
    both |= {row.path.name for row in set(splits.train).intersection(splits.dev)}
    if both:
        raise ClipmatchError(
            f"{train} and {dev} both list {min(both)} ({len(both)} images in all); take them out of one of the files."
        )
    return splits


def split_by_own(rows: tuple[CaptionedImage, ...], dev_fraction: float, seed: int) -> Splits:
    """Split as the caption file says; what it sets apart for tests, or calls by another name, is in neither part.

    A file that has no dev part gives a fraction of its train part.
    """
    parts = {part: tuple(row for row in rows if row.split == part) for part in SPLITS}
    others = len(rows) - len(parts["train"]) - len(parts["dev"])
    aside = f"; {others} images of its other parts in neither" if others else ""
    if not parts["train"]:
        raise ClipmatchError(
            f"The captions are of no train part ({len(parts['dev'])} images of dev, {len(parts['test'])} of test), so "
            "there is nothing to learn from; give other captions, or split files."
        )
    if parts["dev"]:
        return Splits(parts["train"], parts["dev"], f"the caption file's own splits{aside}")
    splits = split_by_hash(parts["train"], dev_fraction, seed)
    return replace(splits, origin=f"the caption file's own train part, {splits.origin}{aside}")


def split_by_hash(rows: tuple[CaptionedImage, ...], dev_fraction: float, seed: int) -> Splits:
    """Split by the hash of seed and image name."""
    if not 0 < dev_fraction < 1:
        raise ClipmatchError(f"dev_fraction must lie between 0 and 1, both excluded (got {dev_fraction}).")
    parts: dict[bool, list[CaptionedImage]] = {True: [], False: []}
    for row in rows:
        parts[hash_fraction(f"{seed}/{row.path.name}") < dev_fraction].append(row)
    if not parts[True] or not parts[False]:
        empty = "train" if parts[True] else "dev"
        raise ClipmatchError(
            f"With dev_fraction {dev_fraction} and seed {seed} none of the {len(rows)} images falls into {empty}; "
            "change one of them, or give split files."
        )
    origin = f"split by hash of the image name, {100 * dev_fraction:g} % to dev, seed {seed}"
    return Splits(tuple(parts[False]), tuple(parts[True]), origin)


def hash_fraction(text: str) -> float:
    """Text -> number in [0, 1) that is the same on every machine."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48  # 48 bits: exact in a float


def content_hash(rows: Iterable[CaptionedImage]) -> str:
    """16 hex digits that change with any image name or caption, and with nothing else: not with order or folder."""
    lines = sorted(json.dumps([row.path.name, sorted(row.captions)]) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
