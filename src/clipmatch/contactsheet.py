"""A page of captioned photographs, drawn at random.

In: captions and their images. Out: one HTML file that needs no other. Knows nothing of models.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from clipmatch.data import CaptionSet, by_image
from clipmatch.datacheck import image_folder
from clipmatch.output import picture_card, printable
from clipmatch.report import render_page, write_page


def write_contact_sheet(data: CaptionSet, path: Path, count: int = 24, seed: int = 0) -> Path:
    """Write `count` images with all their captions, in the order of the file; the seed says which.

    An image that is missing or can't be read keeps its place, with the reason. Raises ClipmatchError if the page can't
    be written.
    """
    captions, folder = by_image(data.entries), image_folder(data)
    chosen = set(random.Random(seed).sample(sorted(captions), min(count, len(captions))))
    cards = [card(folder / name, name, texts) for name, texts in captions.items() if name in chosen]
    lead = f"{len(cards)} of {len(captions):,} images, drawn with seed {seed}."
    page = render_page("sheet.html.j2", title=printable(data.source.name), lead=lead, first=1, cards=cards)
    return write_page(path, page)


def card(path: Path, name: str, captions: list[str]) -> dict[str, Any]:
    """What the page shows of an image."""
    return {
        "name": printable(name),
        "href": path.absolute().as_uri(),
        "score": f"{len(captions)} caption{'s' * (len(captions) != 1)}",
        "caption": "\n".join(f"• {caption}" for caption in captions),
        "taken": None,
        "camera": None,
        "duplicates": [],
        **picture_card(path, alt=captions[0]),
    }
