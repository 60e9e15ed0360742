"""The one exception that a person is meant to read."""


class ClipmatchError(Exception):
    """A problem that the caller can mend.

    Its text is one sentence (or two) that says which thing, what is wrong with it, and what to do. The command line
    prints it on stderr and exits with status 1; library code lets it rise.
    """
