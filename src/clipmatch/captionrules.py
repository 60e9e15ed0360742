"""What is wrong with a caption, as far as its words tell.

In: captions with their image names and lines. Out: findings. Knows nothing of files, pictures or models.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from clipmatch.formats import Entry

MOST_WORDS = 100  # Flickr30k's longest has about 80; models read 64 tokens or 77
MANY_IMAGES = 10  # the commonest sentence of Flickr8k's 35,455, "A dog runs through the grass", describes 7 images

# scripts that put no spaces between words: there each character counts as a word
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+(?:['’.-][^\W{UNSPACED}]+)*")
MARKUP = re.compile(r"</?[a-zA-Z][^<>]*>|&(?:[a-zA-Z]+|#\d+);|\b(?:https?|ftp)://|\bwww\.", re.IGNORECASE)
ONE_CHARACTER = re.compile(r"(\S)\1{4,}")  # "....." and "aaaaa"; "..." is punctuation
ONE_WORD = re.compile(r"\b(\w+)(?:\W+\1\b){3,}", re.IGNORECASE)


@dataclass(frozen=True)
class OddCaption:
    """A caption that no training should see, and why."""

    line: int
    image: str
    caption: str
    reason: str


@dataclass(frozen=True)
class RepeatedCaption:
    """A caption that one image has more than once, and where."""

    image: str
    caption: str
    lines: list[int]


@dataclass(frozen=True)
class SharedCaption:
    """A caption of many different images, and where it stands."""

    caption: str
    images: list[str]
    lines: list[int]


def find_odd(entries: Sequence[Entry]) -> list[OddCaption]:
    """The captions that are no description of anything, in file order."""
    judged = ((entry, why_odd(entry.caption)) for entry in entries)
    return [OddCaption(entry.line, entry.image, entry.caption, reason) for entry, reason in judged if reason]


def why_odd(caption: str) -> str | None:
    """Why a caption describes nothing, or None."""
    words = WORD.findall(caption)
    if "\ufffd" in caption:
        return "characters that are not UTF-8"
    if not any(character.isalpha() for character in caption):
        return "no letters"
    if markup := MARKUP.search(caption):
        return f"markup or an address ({markup[0][:30]})"
    if repeated := ONE_CHARACTER.search(caption):
        return f"a character repeated ({repeated[0][:10]})"
    if repeated := ONE_WORD.search(caption):
        return f"a word repeated ({repeated[1]})"
    if len(words) < 2:
        return "one word"
    return f"{len(words)} words" if len(words) > MOST_WORDS else None


def normal_caption(caption: str) -> str:
    """One spelling for captions of the same words, whatever their capitals and full stops."""
    return " ".join(WORD.findall(caption.casefold()))


def find_repeated(entries: Sequence[Entry]) -> list[RepeatedCaption]:
    """The captions that stand twice or more with one image."""
    same: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        same[entry.image, normal_caption(entry.caption)].append(entry)
    groups = (group for group in same.values() if len(group) > 1)
    return [RepeatedCaption(group[0].image, group[0].caption, [entry.line for entry in group]) for group in groups]


def find_shared(entries: Sequence[Entry]) -> list[SharedCaption]:
    """The captions of `MANY_IMAGES` different images or more, commonest first."""
    same: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        same[normal_caption(entry.caption)].append(entry)
    groups = [(list(dict.fromkeys(entry.image for entry in group)), group) for group in same.values()]
    shared = [
        SharedCaption(group[0].caption, images, [entry.line for entry in group])
        for images, group in groups
        if len(images) >= MANY_IMAGES
    ]
    return sorted(shared, key=lambda caption: -len(caption.images))
