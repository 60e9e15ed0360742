"""ONNX files -> sessions of ONNX Runtime, which may be opened ahead of need.

In: the path of a graph. Out: a session, and how to run it. A graph is whole: one whose weights lie in other files is
refused before ONNX Runtime sees it. Knows nothing of models. Importing this loads nothing slow:
a query lets ONNX Runtime read its graph in the background while it imports all else.
"""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from clipmatch.errors import ClipmatchError
from clipmatch.modelfolder import EMBEDDED
from clipmatch.runtime import usable_cores
from clipmatch.trust import check_graph

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, RunOptions


class Opening(Thread):
    """A session on its way."""

    def __init__(self, path: Path):
        super().__init__()  # no daemon: a process that ends while ONNX Runtime is at work would be aborted
        self.path = path
        self.session: InferenceSession | None = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        """Open it."""
        try:
            self.session = open_now(self.path)
        except Exception as error:  # ONNX Runtime has a dozen kinds; raised where the session is wanted
            self.error = error


_ahead: dict[Path, Opening] = {}


def open_ahead(path: Path) -> None:
    """Begin to open a graph that `open_session` will probably be asked for."""
    import onnxruntime  # noqa: F401 - here: NumPy, which it brings, can't be imported by two threads at once

    _ahead[path] = Opening(path)


def open_session(path: Path, threads: int | None = None) -> InferenceSession:
    """An ONNX file -> a session on as many threads as this process may use cores, or on `threads`.

    Raises ClipmatchError for a graph that names other files, and whatever ONNX Runtime raises.
    """
    opening = _ahead.pop(path, None) if threads is None else None
    if opening is None:
        return open_now(path, threads)
    opening.join()
    if opening.error:
        raise opening.error
    assert opening.session is not None
    return opening.session


def open_now(path: Path, threads: int | None = None) -> InferenceSession:
    """The same, from the start."""
    from onnxruntime import InferenceSession, SessionOptions

    if path.parent != EMBEDDED:
        check_graph(path)
    options = SessionOptions()
    options.add_session_config_entry("session.load_model_format", "ONNX")  # whatever its name or first bytes say
    options.intra_op_num_threads = threads or usable_cores()  # its own count knows nothing of a container's quota
    # Threads that wait for the next run by spinning take the cores from what a query does with its vector.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors: its warnings are of no use to a person who searches
    return InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def asked_for_only() -> RunOptions:
    """How to run a graph without computing the outputs that are not asked for."""
    from onnxruntime import RunOptions

    options = RunOptions()
    options.only_execute_path_to_fetches = True
    return options


def output_shape(session: InferenceSession, name: str) -> tuple[int, ...]:
    """The shape of one row of the output called `name`. Raises ClipmatchError if the graph has no such output."""
    shapes = {value.name: tuple(value.shape[1:]) for value in session.get_outputs()}
    if name not in shapes:
        raise ClipmatchError(f"The model has no output {name!r}; it has {', '.join(shapes)}.")
    return shapes[name]
