"""What a person is meant to read of things that went wrong: the one exception, and files that can't be used."""

from dataclasses import dataclass
from pathlib import Path


class ClipmatchError(Exception):
    """A problem that the caller can mend.

    Its text is one sentence (or two) that says which thing, what is wrong with it, and what to do. The command line
    prints it on stderr and exits with status 1; library code lets it rise.
    """


@dataclass(frozen=True)
class Failure:
    """A file that could not be used, and why."""

    path: Path
    reason: str


def reason_of(error: object) -> str:
    """What a library said, fit for the inside of a sentence: one line, not too long, no full stop."""
    return " ".join(str(error).split())[:300].rstrip(".")
