"""What is to be painted -> prompts: sentences and example pictures, each with its weight.

In: a string. Out: `Prompt`s. Knows nothing of models.

    "a bus in the snow"             a sentence
    "a bus | snow:0.5 | blur:-0.5"  several, with weights (1 if not given); what is below 0 is kept away from
    "photo.jpg | at night"          an example picture: something like this
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from clipmatch.errors import ClipmatchError
from clipmatch.imageformats import is_image_name
from clipmatch.query import MOST_WEIGHT, is_picture

# "at 10:30" is no weight, "area 51:-1" is one.
WEIGHT = re.compile(r"(?P<what>|.*[^\s\d]\s*|.*(?=:\s*[+-])):\s*(?P<weight>[+-]?\d+(?:\.\d+)?)", re.DOTALL)
SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Prompt:
    """A sentence, or a picture file that shows what is meant; weight is not 0, and below 0 for what is unwanted."""

    text: str = ""
    image: Path | None = None
    weight: float = 1.0

    @property
    def has_sides(self) -> bool:
        """Whether it tells left from right, so that a mirrored picture would show something else."""
        return bool(SIDES.search(self.text))


def parse_prompts(line: str, pictures: bool = True) -> tuple[Prompt, ...]:
    """A line such as "bus:1 | blur:-0.5" -> its prompts.

    pictures: whether a part may name a picture file; otherwise all are sentences, and no file is looked for.
    Raises ClipmatchError when nothing is asked for, a weight is 0 or a picture does not exist.
    """
    prompts = tuple(parse_prompt(part.strip(), pictures) for part in line.split("|") if part.strip())
    if not prompts:
        raise ClipmatchError("The prompt is empty; type what the picture should show.")
    if all(prompt.weight < 0 for prompt in prompts):
        raise ClipmatchError("The prompt only says what not to paint; add what to paint, such as: a bus | blur:-0.5")
    return prompts


def parse_prompt(part: str, pictures: bool = True) -> Prompt:
    """One part of a line -> its prompt."""
    what, weight = part, 1.0
    if not (pictures and is_picture(part)) and (match := WEIGHT.fullmatch(part)):
        what, weight = match["what"].rstrip(), float(match["weight"])
    if not weight:
        raise ClipmatchError(f"The weight of {what!r} is 0; leave it out.")
    if abs(weight) > MOST_WEIGHT:
        raise ClipmatchError(f"The weight of {what!r} is above {MOST_WEIGHT:,}; others would count for nothing.")
    if pictures and is_picture(what):
        return Prompt(image=Path(what).expanduser(), weight=weight)
    if pictures and is_image_name(what) and not re.search(r"\s", what):
        raise ClipmatchError(f"The picture {what} does not exist; check its name.")
    if not what:
        raise ClipmatchError(f"The part {part!r} of the prompt has a weight but no words; say what it is of.")
    return Prompt(what, weight=weight)
