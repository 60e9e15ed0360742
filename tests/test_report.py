import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from clipmatch import report
from clipmatch.errors import ClipmatchError
from clipmatch.evaluation import Evaluation, measure, retrieval_ranks
from clipmatch.search import Match

pytest.importorskip("matplotlib", reason='the reports need pip install "clipmatch[train]"')

VOID = {"meta", "img", "br", "hr", "link", "input"}
HOSTILE = "<script>alert('$5 & $6')</script>"


class Page(HTMLParser):
    """The words, pictures and references of a page; fails on a tag that is not closed in order."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.references, self.words, self.alts = [], [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        self.alts += [value for name, value in attrs if name == "alt"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.words.append(" ".join(data.split()))

    def after(self, word, count):
        """The pieces of text that follow the first one that reads `word`."""
        at = self.words.index(word)
        return self.words[at + 1 : at + 1 + count]


@pytest.fixture
def evaluation(tmp_path):
    """Twelve coloured squares, two captions each; every other caption of a picture is vague."""
    paths = tuple(tmp_path / f"square{number}.png" for number in range(12))
    for number, path in enumerate(paths):
        Image.new("RGB", (200, 100), (20 * number, 255 - 20 * number, 128)).save(path)
    rng = np.random.default_rng(2)
    owner = np.repeat(np.arange(12), 2)
    images = np.eye(12, dtype=np.float32)
    texts = images[owner] + np.tile([[0.1], [2.5]], (12, 1)) * rng.random((24, 12))
    texts = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32)
    text_ranks, image_ranks = retrieval_ranks(images, texts, owner)
    return Evaluation(
        **measure(images, texts, owner),
        text_ranks=text_ranks,
        image_ranks=image_ranks,
        image_rows=images,
        text_rows=texts,
        image_of_text=owner,
        paths=paths,
        captions=tuple(HOSTILE if text < 2 else f"caption {text}" for text in range(24)),
        split_hash="0123456789abcdef",
        failures=(SimpleNamespace(path=Path("broken<b>.jpg"), reason="the file ends early"),),
        fingerprint="f00dfeed",
        model_path=None,
        seed=0,
    )


@pytest.fixture
def history():
    steps = [
        {"kind": "step", "step": s, "epoch": s // 10, "loss": 4 - s / 10, "logit_scale": 14.3 + s / 10}
        for s in range(30)
    ]
    recalls = {"recall@1": 0.1, "recall@5": 0.3, "recall@10": 0.5}
    dev = {"text_to_image": recalls, "image_to_text": recalls}
    epochs = [{"kind": "epoch", "epoch": e, "step": 10 * e + 10, "train_loss": 3.0, "dev": dev} for e in range(3)]
    return steps + epochs


def matches(evaluation, count=4):
    return [Match(path, 0.5 - 0.1 * i) for i, path in enumerate(evaluation.paths[:count])]


def write_card(evaluation, path, history=None):
    return report.write_evaluation_card(evaluation, path, title="Twelve & more", history=history)


def write_demo(evaluation, path, history):
    facts = {"Pictures": "12", "Seconds": "3 <fast>"}
    return report.write_demo_report(evaluation, history, [(HOSTILE, matches(evaluation))], path, facts)


def test_card_holds_the_figures(evaluation, history, tmp_path):
    page = Page(write_card(evaluation, tmp_path / "new" / "card.html", history))
    recall = evaluation.text_to_image["recall@1"]
    low, high = evaluation.text_to_image["interval"]["recall@1"]
    assert 0 < low < recall < high < 1
    table = page.after("Text → image", 8)
    assert table[3:] == [
        "recall@1",
        f"{100 * recall:.1f} %",
        f"{100 * low:.1f} – {100 * high:.1f}",
        "8.3 %",
        "recall@5",
    ]
    assert page.after("Image → text", 8)[3] == "recall@1"
    assert page.after("Gallery", 1) == ["12 pictures"]
    assert page.after("Captions", 1) == ["24"]
    assert page.after("Split hash", 1) == ["0123456789abcdef"]
    assert page.after("Model fingerprint", 1) == ["f00dfeed"]
    assert "broken<b>.jpg: the file ends early" in page.words
    assert {"Training loss", "Dev recall, %", "Logit scale"} <= set(page.words)


def test_card_without_history_has_no_curves(evaluation, tmp_path):
    page = Page(write_card(evaluation, tmp_path / "card.html"))
    assert "Training loss" not in page.words
    assert page.tags.count("svg") == 2


def test_worst_queries_show_the_right_picture_and_its_rank(evaluation, tmp_path):
    page = Page(write_card(evaluation, tmp_path / "card.html"))
    worst = int(evaluation.text_ranks.argmax())
    rank = int(evaluation.text_ranks[worst])
    assert rank > 5  # so that the right picture stands apart from the five answers
    own = int(evaluation.image_of_text[worst])
    caption, sentence, score = page.after("Worst queries", 4)[1:]
    assert caption == f"caption {worst}"
    assert sentence == f"Its own picture came at rank {rank} of 12."
    assert score == f"own · {evaluation.text_rows[worst, own]:.3f}"
    assert page.alts[0] == f"square{own}.png"


@pytest.mark.parametrize("write", [write_card, write_demo])
def test_pages_are_self_contained_and_escaped(evaluation, history, tmp_path, write):
    path = write(evaluation, tmp_path / "page.html", history=history)
    page = Page(path)
    assert page.references
    assert all(reference.startswith(("data:", "#")) for reference in page.references)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(http" not in path.read_text(encoding="utf-8")
    assert HOSTILE in page.words  # as text


def test_plots_take_the_colour_of_the_page(evaluation, tmp_path):
    html = write_card(evaluation, tmp_path / "card.html").read_text(encoding="utf-8")
    assert "fill: currentColor" in html
    svg = html[html.index("<svg") : html.index("</svg>")]
    assert report.INK not in svg
    assert not re.search(r"fill: (#000000|#ffffff)", svg)


def test_demo_report_shows_facts_and_matches(evaluation, history, tmp_path):
    page = Page(write_demo(evaluation, tmp_path / "demo.html", history))
    assert page.after("Seconds", 1) == ["3 <fast>"]
    assert page.after("Pictures found", 5)[1:] == ["1 · 0.500", "2 · 0.400", "3 · 0.300", "4 · 0.200"]
    assert page.alts[:2] == ["square0.png", "square1.png"]
    assert page.after("Text → image", 5)[4] == f"{100 * evaluation.text_to_image['recall@1']:.1f} %"


def test_a_search_page_shows_confidence_where_it_is_known(evaluation, tmp_path):
    sure = [Match(path, 0.25, confidence) for path, confidence in zip(evaluation.paths, (0.9, 0.05), strict=False)]
    results = [(HOSTILE, sure), ("a square", matches(evaluation, 1))]
    page = Page(report.write_search_page(results, tmp_path / "search.html", {"Pictures": "12"}))
    assert page.after("Pictures", 1) == ["12"]
    assert page.after(HOSTILE, 2) == ["1 · 0.250, conf 0.90", "2 · 0.250, conf 0.05"]
    assert page.after("a square", 1) == ["1 · 0.500"]


def test_a_missing_picture_is_a_grey_box(evaluation, tmp_path):
    for path in evaluation.paths[::2]:
        path.unlink()
    page = Page(write_card(evaluation, tmp_path / "card.html"))
    assert "Best queries" in page.words
    box = report._thumbnail(evaluation.paths[0])
    assert box.getcolors() == [(160 * 160, (0x8A, 0x90, 0x9C))]


def test_thumbnail_is_the_middle_square(tmp_path):
    wide = Image.new("RGB", (400, 200), "red")
    wide.paste((0, 0, 255), (90, 0, 310, 200))
    wide.save(tmp_path / "wide.png")
    assert report._thumbnail(tmp_path / "wide.png").getcolors() == [(160 * 160, (0, 0, 255))]


def test_a_page_is_written_whole_or_not_at_all(evaluation, tmp_path, monkeypatch):
    path = tmp_path / "card.html"
    path.write_text("the old page")

    def fail(self, *args, **options):
        Path.open(self, "w").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(ClipmatchError, match=r"card\.html can't be written \(No space left on device\); make room"):
        write_card(evaluation, path)
    assert path.read_text() == "the old page"
    assert not list(tmp_path.glob("*.partial"))


def test_similarity_plot_reads_caption_by_picture(evaluation):
    axes = report.similarity_plot(evaluation, pairs=3).axes[0]
    values = [text.get_text() for text in axes.texts]
    chosen = [0, 5, 11]  # evenly spaced over the twelve
    expected = [evaluation.text_rows[2 * row, column] for row in chosen for column in chosen]
    assert values == [f"{value:.2f}" for value in expected]
    assert [label.get_text() for label in axes.get_yticklabels()] == [HOSTILE, "caption 10", "caption 22"]
    assert len(axes.images) == 4  # the matrix and a picture over each column


def test_training_curves_of_a_run_that_has_just_begun():
    figure = report.training_curves([])
    assert [axes.get_title() for axes in figure.axes] == ["Training loss", "Dev recall, %", "Logit scale"]


def test_training_curves_draw_what_was_logged(history):
    loss, recall, scale = report.training_curves(history).axes
    assert loss.lines[0].get_ydata().tolist() == pytest.approx([4 - s / 10 for s in range(30)])
    assert [line.get_ydata().tolist() for line in recall.lines] == [
        pytest.approx([value] * 3) for value in (10, 10, 30, 30, 50, 50)
    ]
    assert recall.lines[0].get_xdata().tolist() == [1, 2, 3]
    assert scale.lines[0].get_ydata()[-1] == pytest.approx(17.2)


def test_smoothing_lags_but_does_not_look_ahead():
    assert report._smooth([4.0, 0.0, 0.0], share=2 / 3) == [4.0, 2.0, 1.0]


def test_match_grid_places_pictures_in_rows(evaluation):
    figure = report.match_grid("two dogs for $5 and $6", matches(evaluation, 4), columns=3)
    figure.canvas.draw()
    assert [axes.get_title() for axes in figure.axes] == ["0.500", "0.400", "0.300", "0.200", "", ""]
    assert figure.get_suptitle() == "two dogs for $5 and $6"


def test_match_grid_of_nothing(evaluation):
    assert report.match_grid("nothing", []).axes


@pytest.mark.parametrize(
    ("fraction", "shown"),
    [(0.0, "0.0 %"), (1 / 31783, "0.0031 %"), (0.001, "0.1 %"), (0.4825, "48.2 %"), (1.0, "100.0 %")],
)
def test_percentages(fraction, shown):
    assert report._percent(fraction) == shown


def test_absent_libraries_are_named(evaluation, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ClipmatchError, match=r'pip install "clipmatch\[train\]"'):
        report.recall_curve(evaluation)
