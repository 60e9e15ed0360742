"""A first search, in seconds and offline: the model that comes with clipmatch asked for seven things.

In: a folder. Out: a page in it with the pictures found, and the best of them as text. The photographs are those that
scikit-image carries, read from where it is installed. Imports neither it nor PyTorch, and knows nothing of which
picture is the right one: it shows what the model answers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from clipmatch.embedder import load_model
from clipmatch.errors import ClipmatchError
from clipmatch.index import find_matches
from clipmatch.report import write_search_page
from clipmatch.search import Match, Matches

INSTALL = 'pip install "clipmatch[demo]"'
FOLDER = "skimage/data"
PHOTOGRAPHS = (  # the rest of that folder is drawings, microscopy and near-duplicates
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
)
QUERIES = ("a cat", "a cup of coffee", "an astronaut", "a rocket launch", "coins", "the moon", "a motorcycle")
NEXT = """\
search your own photographs:     clipmatch find "a dog on a beach" --images ~/Pictures
see a model learn from nothing:  clipmatch demo --train"""


def run_demo(out: Path) -> str:
    """Search the sample photographs, write out/photographs.html -> the text to print.

    Raises ClipmatchError when what the extra `demo` brings is not there.
    """
    check_extra()
    began = time.perf_counter()
    photographs = sample_photographs()
    embedder = load_model()
    results = [(query, find_matches(query, embedder, photographs, top_k=5, progress=False)) for query in QUERIES]
    facts = {
        "photographs": f"{len(photographs)}, from scikit-image {distribution('scikit-image').version}",
        "model": f"the one that comes with clipmatch, {embedder.fingerprint[:8]}",
        "time": f"{time.perf_counter() - began:.1f} s for loading and searching",
    }
    page = write_search_page(results, out / "photographs.html", facts)
    return "\n".join([*best_matches(results), "", f"page: {page}", "", NEXT])


def check_extra() -> None:
    """Raise ClipmatchError when what the extra `demo` brings is not installed."""
    try:
        distribution("scikit-image")
    except PackageNotFoundError:
        raise ClipmatchError(f"The demo needs the package scikit-image; install it with: {INSTALL}") from None


def sample_photographs() -> list[Path]:
    """The photographs in scikit-image's folder. Raises ClipmatchError if it was installed without them."""
    folder = Path(str(distribution("scikit-image").locate_file(FOLDER)))
    found = [folder / name for name in PHOTOGRAPHS if (folder / name).is_file()]
    if not found:
        raise ClipmatchError(
            f"scikit-image is installed without its sample photographs ({folder}); "
            "install it again with: pip install --force-reinstall scikit-image"
        )
    return found


def best_matches(results: Sequence[tuple[str, Matches]]) -> list[str]:
    """The best three of each query as a line of a table, each with its confidence (its cosine, if not calibrated)."""
    width = max(len(query) for query, _ in results)
    heading = f"{'query':{width}}  best three, and how sure it is"
    return [heading, *(f"{query:{width}}  {'  '.join(map(named, matches[:3]))}" for query, matches in results)]


def named(match: Match) -> str:
    """A match in a few words."""
    return f"{match.path.stem} {match.score if match.confidence is None else match.confidence:.2f}"
