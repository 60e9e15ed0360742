"""What a person is meant to read of things that went wrong: the one exception, and files that can't be used."""

import errno
import re
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


ADVICE = {  # to what the system says of a disk
    errno.ENOSPC: "make room there and try again",
    errno.EDQUOT: "make room there and try again",
    errno.EROFS: "choose another place",
    errno.EBUSY: "wait for it, or choose another place",
}


def unwritable(what: object, error: OSError, otherwise: str = "choose another place") -> ClipmatchError:
    """The sentence for what can't be written. otherwise: what to do, where the disk is neither full nor read-only."""
    advice = ADVICE.get(error.errno or 0, otherwise)
    return ClipmatchError(f"{what} can't be written ({error.strerror or error}); {advice}.")


def newer(what: str, needs: object) -> ClipmatchError:
    """The sentence for what a newer clipmatch has written. needs: the version that can read it, if that is known."""
    own = own_version()
    known = isinstance(needs, str) and needs != own and re.fullmatch(r"[\w.+!-]{1,40}", needs)
    can, wish = (f"it takes {needs} or later", f"clipmatch>={needs}") if known else ("upgrade this one", "clipmatch")
    return ClipmatchError(f'{what} is from a newer clipmatch, and this is {own}; {can}: pip install -U "{wish}"')


def own_version() -> str:
    """The version of this clipmatch."""
    from importlib.metadata import version

    return version("clipmatch")


def reason_of(error: object) -> str:
    """What a library said, fit for the inside of a sentence: one line, not too long, no full stop."""
    return " ".join(str(error).split())[:300].rstrip(".")
