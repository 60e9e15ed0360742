"""The training from nothing as a newcomer runs it, in full: the promise of the README's first screen."""

import json
import re

from clipmatch.data import load_captions
from clipmatch.demo_train import is_unfinished, small_settings
from clipmatch.embedder import load_model
from clipmatch.explain import explain
from clipmatch.scenes import read_scenes


def test_the_demo_keeps_its_promise(training_demo):
    folder, output = training_demo
    figures = json.loads((folder / "evaluation.json").read_text())
    assert figures["gallery"] == figures["images"] == 500
    assert figures["captions"] == 2500
    assert figures["text_to_image"]["chance"]["recall@1"] == 1 / 500
    assert figures["text_to_image"]["recall@1"] >= 0.5
    low, high = figures["text_to_image"]["interval"]["recall@1"]
    assert low < figures["text_to_image"]["recall@1"] < high
    assert "500 images, 2500 captions" in output
    assert f"R@1 {100 * figures['text_to_image']['recall@1']:.1f}" in output


def test_the_report_stands_alone(training_demo):
    folder, output = training_demo
    page = (folder / "report.html").read_text()
    assert "data:image/jpeg;base64," in page
    assert all(query in page for query in re.findall(r'^"(.+)"$', output, re.MULTILINE))
    for outside in ('src="http', "src='http", 'href="http', "<script src", "@import"):
        assert outside not in page


def test_the_queries_have_an_answer_and_most_find_it(training_demo):
    folder, output = training_demo
    rows = load_captions(folder / "scenes").rows
    dev = [row for row in rows if row.path.name.startswith("dev")]
    asked = re.findall(r'^"(.+)"\n((?:  .+\n)+)', output, re.MULTILINE)
    assert len(asked) == 4
    answers = [[row.path.name for row in dev if query in row.captions] for query, _ in asked]
    assert all(answers)
    assert sum(any(name in found for name in names) for names, (_, found) in zip(answers, asked, strict=True)) >= 2


def test_a_finished_run_is_not_resumed(training_demo):
    folder, _ = training_demo
    settings = small_settings(folder / "run")
    assert not is_unfinished(folder / "run", settings)
    state = folder / "run" / "last" / "state.json"
    values = json.loads(state.read_text())
    assert values["step"] == values["total"]


def test_the_heat_map_finds_what_is_named(training_demo):
    """In held-out scenes with two groups of things the hottest place lies on the one that is asked for."""
    folder, _ = training_demo
    model, hits = load_model(folder / "run"), []
    scenes = [(name, scene) for name, scene in read_scenes(folder / "scenes").items() if name.startswith("dev")]
    for name, scene in [pair for pair in scenes if len(pair[1].groups) == 2][:200]:
        thing = scene.things[0]
        found = explain(model, f"a {thing.colour} {thing.shape}", folder / "scenes" / "Images" / name)
        x, y = found.peak
        same = [other.box for other in scene.things if (other.colour, other.shape) == (thing.colour, thing.shape)]
        hits.append(any(left <= x <= right and top <= y <= bottom for left, top, right, bottom in same))
    assert len(hits) == 200
    assert sum(hits) >= 160
