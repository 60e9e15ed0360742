"""Figures and self-contained HTML pages.

In: an Evaluation, the rows of a training log, matches of a search. Out: Matplotlib figures, and one HTML file that
needs no other (pictures and plots lie inside it). Knows nothing of models or PyTorch: whatever it shows was measured
elsewhere.
"""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipmatch.atomic import atomic_file
from clipmatch.errors import ClipmatchError, unwritable
from clipmatch.evaluation import RECALLS, Evaluation, Integers, chance_level
from clipmatch.preprocess import load_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from clipmatch.search import Match

History = Sequence[Mapping[str, Any]]

THUMBNAIL = 160  # pixels, square
ANSWERS = 5  # pictures shown for a query
INK = "#1f2430"  # of axes and words; becomes the reader's text colour inside a page, so that it suits light and dark
BLUE, AMBER, GREEN, GREY = "#3f83d8", "#d9822b", "#3a9d6b", "#8a909c"  # mid-tones: legible on white and on black
DIRECTIONS = {"text_to_image": "Text → image", "image_to_text": "Image → text"}
NEEDS_EXTRA = 'Reports and plots need Matplotlib; install it with: pip install "clipmatch[train]"'


# Figures


def training_curves(history: History) -> Figure:
    """Rows of log.jsonl -> loss by step, dev recall@1, @5 and @10 by epoch, and logit scale by step."""
    steps = [row for row in history if row.get("kind") == "step"]
    epochs = [row for row in history if row.get("kind") == "epoch" and row.get("dev")]
    with _figure(11, 3.4) as figure:
        loss, recall, scale = figure.subplots(1, 3, width_ratios=[5, 5, 2.6])
        _draw_loss(loss, steps)
        _draw_dev_recall(recall, epochs)
        scale.plot([row["step"] for row in steps], [row["logit_scale"] for row in steps], color=GREEN)
        scale.set(title="Logit scale", xlabel="step")
    return figure


def similarity_plot(evaluation: Evaluation, pairs: int = 12) -> Figure:
    """Cosine of up to `pairs` pictures with one caption each, drawn as a matrix with thumbnails over the columns.

    The pictures are evenly spaced over the gallery: the choice is not made by how well they do.
    """
    gallery = len(evaluation.paths)
    chosen = np.unique(np.linspace(0, gallery - 1, min(pairs, gallery)).astype(int))
    texts = [int(np.argmax(evaluation.image_of_text == image)) for image in chosen]  # its first caption
    scores = evaluation.text_rows[texts] @ evaluation.image_rows[chosen].T  # [pairs, pairs]
    with _figure(3.3 + 0.62 * len(chosen), 1.2 + 0.62 * len(chosen)) as figure:
        axes = figure.subplots()
        _draw_matrix(axes, scores)
        for column, image in enumerate(chosen):
            extent = (column - 0.47, column + 0.47, -0.56, -1.5)  # one row above the matrix
            axes.imshow(_thumbnail(evaluation.paths[image], 96), extent=extent)
        axes.set(xlim=(-0.5, len(chosen) - 0.5), ylim=(len(chosen) - 0.5, -1.5), xticks=[])
        labels = ["\n".join(textwrap.wrap(_short(evaluation.captions[text], 68), 36)) for text in texts]
        axes.set_yticks(range(len(texts)), labels, fontsize=9, parse_math=False)
        axes.set_anchor("E")  # square cells leave spare width; the captions can use it
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure


def recall_curve(evaluation: Evaluation, largest: int = 100) -> Figure:
    """Recall@k against k, both ways, with the level of chance."""
    gallery = len(evaluation.paths)
    ks = np.arange(1, max(2, min(largest, gallery)) + 1)
    with _figure(6.4, 3.4) as figure:
        axes = figure.subplots()
        for key, ranks, color in (
            ("text_to_image", evaluation.text_ranks, BLUE),
            ("image_to_text", evaluation.image_ranks, AMBER),
        ):
            axes.plot(ks, [100 * np.mean(ranks <= k) for k in ks], color=color, label=DIRECTIONS[key])
        chance = [100 * chance_level(int(k), gallery) for k in ks]
        axes.plot(ks, chance, color=GREY, linestyle=":", label="chance, text → image")
        axes.set(xlabel="k", ylabel="recall@k, %", ylim=(0, 102), xscale="log")
        ticks = [k for k in (1, 2, 5, 10, 20, 50, 100) if k <= ks[-1]]
        axes.set_xticks(ticks, [str(k) for k in ticks])
        axes.minorticks_off()
        axes.legend()
    return figure


def match_grid(query: str, matches: Sequence[Match], columns: int = 3) -> Figure:
    """The pictures found for a query, best first, each with its score, in rows of `columns`."""
    rows = max(1, -(-len(matches) // columns))
    with _figure(2.6 * columns, 2.9 * rows + 0.5) as figure:
        figure.suptitle("\n".join(textwrap.wrap(query, 24 * columns)), parse_math=False, fontsize=13)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid:
            axes.axis("off")
        for axes, match in zip(grid, matches, strict=False):
            axes.imshow(_thumbnail(match.path, 320))
            axes.set_title(f"{match.score:.3f}", fontsize=10)
    return figure


def _draw_loss(axes: Any, steps: History) -> None:
    at, loss = [row["step"] for row in steps], [row["loss"] for row in steps]
    axes.plot(at, loss, color=BLUE, alpha=0.3, linewidth=1)
    axes.plot(at, _smooth(loss), color=BLUE)
    axes.set(title="Training loss", xlabel="step")


def _draw_dev_recall(axes: Any, epochs: History) -> None:
    at = [row["epoch"] + 1 for row in epochs]
    for k, color in zip(RECALLS, (BLUE, AMBER, GREEN), strict=True):
        for direction, style in (("text_to_image", "-"), ("image_to_text", "--")):
            recall = [100 * row["dev"][direction][f"recall@{k}"] for row in epochs]
            label = f"recall@{k}" if style == "-" else None
            axes.plot(at, recall, style, color=color, marker="o", markersize=3, label=label)
    axes.set(title="Dev recall, %", xlabel="epoch  (solid: text → image, dashed: image → text)", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.legend()


def _draw_matrix(axes: Any, scores: np.ndarray[Any, Any]) -> None:
    drawn = axes.imshow(scores, cmap="viridis")
    best = scores.argmax(axis=1)
    for row, column in np.ndindex(scores.shape):
        red, green, blue, _ = drawn.cmap(drawn.norm(scores[row, column]))
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
        axes.text(
            column,
            row,
            f"{round(float(scores[row, column]), 2) + 0.0:.2f}",  # + 0.0: no "-0.00"
            ha="center",
            va="center",
            fontsize=9,
            fontweight="bold" if column == best[row] else "normal",
            color="white" if dark else "black",
        )


def _smooth(values: Sequence[float], share: float = 0.03) -> list[float]:
    """Exponential average over about `share` of the run; each value is only averaged with those before it."""
    keep = 1 - 1 / max(1.0, share * len(values))
    out: list[float] = []
    for value in values:
        out.append(value if not out else keep * out[-1] + (1 - keep) * value)
    return out


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    """A figure of the house style, sizes in inches. It belongs to no window and needs no closing."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ClipmatchError(NEEDS_EXTRA) from error
    style: dict[str, Any] = {f"{part}.color": INK for part in ("text", "xtick", "ytick")}
    style |= {"axes.edgecolor": INK, "axes.labelcolor": INK, "axes.titlecolor": INK, "axes.titlesize": 11}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 10}
    with matplotlib.rc_context(style):
        yield Figure(figsize=(width, height), layout="constrained")


def _thumbnail(path: Path, size: int = THUMBNAIL) -> Image:
    """The middle square of a picture; a grey one where it can't be read."""
    from PIL import Image, ImageOps

    try:
        return ImageOps.fit(load_image(path, min_size=size), (size, size))
    except (ClipmatchError, OSError):
        return Image.new("RGB", (size, size), GREY)


# Pages


def write_evaluation_card(
    evaluation: Evaluation, path: str | Path, title: str = "Evaluation", history: History | None = None
) -> Path:
    """Write the figures, plots, best and worst queries and failures as one HTML file; returns its path."""
    page = render_page(
        "card.html.j2",
        title=title,
        **_measured(evaluation, history),
        worst=[_query(evaluation, text) for text in _extremes(evaluation, best=False)],
        best=[_query(evaluation, text) for text in _extremes(evaluation, best=True)],
    )
    return write_page(Path(path), page)


def write_demo_report(
    evaluation: Evaluation,
    history: History,
    results: Sequence[tuple[str, Sequence[Match]]],
    path: str | Path,
    facts: Mapping[str, str],
) -> Path:
    """Write one run as one HTML file: facts, curves, recall, and the pictures found for a few queries."""
    page = render_page(
        "demo.html.j2",
        title="clipmatch demo --train",
        **_measured(evaluation, history),
        results=[_found(query, matches) for query, matches in results],
        run=dict(facts),
    )
    return write_page(Path(path), page)


def write_search_page(
    results: Sequence[tuple[str, Sequence[Match]]], path: str | Path, facts: Mapping[str, str]
) -> Path:
    """Write the pictures found for a few queries, and facts about the search, as one HTML file; needs no Matplotlib."""
    found = [_found(query, matches) for query, matches in results]
    return write_page(
        Path(path), render_page("search.html.j2", title="clipmatch demo", results=found, facts=dict(facts))
    )


def _measured(evaluation: Evaluation, history: History | None) -> dict[str, Any]:
    """What both pages show of an evaluation."""
    figures = {"text_to_image": evaluation.text_to_image, "image_to_text": evaluation.image_to_text}
    return {
        "directions": [_direction(DIRECTIONS[key], values) for key, values in figures.items()],
        "provenance": {
            "Gallery": f"{len(evaluation.paths):,} pictures",
            "Captions": f"{len(evaluation.captions):,}",
            "Split hash": evaluation.split_hash,
            "Model fingerprint": evaluation.fingerprint,
            "Seed": str(evaluation.seed),
        },
        "recall_curve": _svg(recall_curve(evaluation)),
        "similarity": _svg(similarity_plot(evaluation)),
        "curves": _svg(training_curves(history)) if history else None,
        "failures": evaluation.failures,
    }


def _direction(name: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """One direction of an evaluation, each number as the reader sees it."""
    rows = []
    for key in (f"recall@{k}" for k in RECALLS):
        low, high = figures["interval"][key]
        interval = f"{100 * low:.1f} – {100 * high:.1f}"
        rows.append((key, _percent(figures[key]), interval, _percent(figures["chance"][key])))
    return {
        "name": name,
        "rows": rows,
        "median": f"{figures['median_rank']:g}",
        "mean": f"{figures['mean_rank']:.1f}",
    }


def _found(query: str, matches: Sequence[Match]) -> dict[str, Any]:
    """A query with the pictures that a search found for it; which of them is right is not known."""
    return {"caption": query, "rank": None, "own": None, "answers": [_tile(m.path, score_text(m)) for m in matches]}


def score_text(match: Match) -> str:
    """The score, and the confidence if the model is calibrated."""
    return f"{match.score:.3f}" if match.confidence is None else f"{match.score:.3f}, conf {match.confidence:.2f}"


def _extremes(evaluation: Evaluation, best: bool, count: int = ANSWERS) -> list[int]:
    """Numbers of the captions that did best or worst (by rank, then by score), at most one a picture."""
    own = evaluation.image_rows[evaluation.image_of_text]
    score = np.einsum("ij,ij->i", own, evaluation.text_rows)
    order: Integers = np.lexsort((-score, evaluation.text_ranks))
    chosen: dict[int, int] = {}
    for text in order if best else order[::-1]:
        chosen.setdefault(int(evaluation.image_of_text[text]), int(text))
    return list(chosen.values())[: max(1, min(count, len(chosen) // 2))]  # in a tiny gallery none is both


def _query(evaluation: Evaluation, text: int) -> dict[str, Any]:
    """A caption with its own picture, its rank, and the pictures that came first."""
    own = int(evaluation.image_of_text[text])
    scores = evaluation.image_rows @ evaluation.text_rows[text]
    top = np.argsort(-scores, kind="stable")[:ANSWERS]
    return {
        "caption": evaluation.captions[text],
        "rank": f"{evaluation.text_ranks[text]:,}",
        "gallery": f"{len(evaluation.paths):,}",
        "own": None if own in top else _tile(evaluation.paths[own], f"{scores[own]:.3f}"),
        "answers": [_tile(evaluation.paths[image], f"{scores[image]:.3f}", image == own) for image in top],
    }


def _tile(path: Path, score: str, right: bool = False) -> dict[str, Any]:
    return {"name": Path(path).name, "uri": data_uri(_thumbnail(path)), "score": score, "right": bool(right)}


def data_uri(image: Image) -> str:
    """A picture as a JPEG file that lies inside a page."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _svg(figure: Figure) -> str:
    """A figure as an inline SVG element: words stay words, ink takes the page's text colour, nothing lies behind it."""
    import matplotlib

    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "clipmatch"}):
        figure.savefig(buffer, format="svg", transparent=True, dpi=144, metadata=no_metadata)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def render_page(template: str, **values: Any) -> str:
    """A template of this package, filled in; whatever is put in is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def write_page(path: Path, page: str) -> Path:
    """Write all of the page or none of it; stray bytes of a name, which are no UTF-8, as backslash escapes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as draft:
            draft.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise unwritable(f"The page {path}", error) from error
    return path


def _percent(fraction: float) -> str:
    """One decimal, or two digits of a figure that one decimal would hide (chance in a large gallery)."""
    percent = 100 * fraction
    return f"{percent:.2g} %" if 0 < percent < 0.1 else f"{percent:.1f} %"


def _short(text: str, length: int) -> str:
    """A caption in at most `length` characters, without the lone full stop that data sets put at its end."""
    return textwrap.shorten(text.removesuffix(" ."), length, placeholder="…")
