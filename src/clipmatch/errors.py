"""The one exception that a person is meant to read."""


class ClipmatchError(Exception):
    """A problem that the caller can mend.

    Its text is one sentence (or two) that says which thing, what is wrong with it, and what to do. The command line
    prints it on stderr and exits with status 1; library code lets it rise.
    """


def reason_of(error: object) -> str:
    """What a library said, fit for the inside of a sentence: one line, not too long, no full stop."""
    return " ".join(str(error).split())[:300].rstrip(".")
