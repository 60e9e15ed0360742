"""Probabilities on rows whose right answer is known."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clipmatch.calibration import Bank, Calibration
from clipmatch.calibration_fit import (
    Answers,
    ask,
    calibrate,
    figures_of,
    fit,
    make_bank,
    only,
    reliability,
    simulate,
)
from clipmatch.errors import ClipmatchError
from clipmatch.modelfolder import CALIBRATION

ROOT = Path(__file__).parents[1]
SIX = float(np.log(6))  # a weight that makes a cosine of 1 six times as likely as one of 0


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def planted(pictures, noise, seed, dim=24):
    """Pictures in random directions with three noisy captions each -> images, texts, owners."""
    rng = np.random.default_rng(seed)
    images = unit(rng.normal(size=(pictures, dim)))
    owner = np.repeat(np.arange(pictures), 3)
    return images, unit(images[owner] + noise * unit(rng.normal(size=(len(owner), dim)))), owner


def by_hand(weights=(0.0, SIX, 0.0, 0.0), alike=0.9, dim=4):
    """A calibration whose probabilities can be worked out on paper; its bank is two axes."""
    axes = np.eye(dim, dtype=np.float16)
    return Calibration(weights, alike, Bank(pictures=axes[:2], captions=axes[2:3]), fingerprint="f00d")


@pytest.fixture(scope="module")
def fitted():
    """Fitted on planted pictures whose captions are easy to take for another's, with the bank that it used."""
    bank = make_bank(*planted(300, 1.3, seed=1))
    return calibrate(*planted(400, 1.3, seed=2), bank, fingerprint="f00d", split_hash="5911")


# What it says


def test_odds_against_the_others_and_against_none():
    gallery = np.eye(4)[:3]  # cosines 1, 0, 0: odds 6, 1, 1, and "none" weighs as much as three pictures
    assert by_hand().probabilities(np.eye(4)[0], gallery) == pytest.approx([6 / 11, 1 / 11, 1 / 11])


def test_a_collection_of_one():
    assert by_hand().probabilities(np.eye(4)[0], np.eye(4)[:1]) == pytest.approx([6 / 7])
    assert by_hand().probabilities(np.eye(4)[0], np.eye(4)[1:2]) == pytest.approx([1 / 2])


def test_pictures_that_look_alike_do_not_compete():
    twins = np.eye(4)[[0, 0, 1]]  # odds 6, 6, 1
    assert by_hand().probabilities(np.eye(4)[0], twins) == pytest.approx([6 / 10, 6 / 10, 1 / 16])
    rivals = by_hand(alike=1.5).probabilities(np.eye(4)[0], twins)  # nothing is that alike
    assert rivals == pytest.approx([6 / 16, 6 / 16, 1 / 16])


def test_a_hub_is_not_trusted():
    hub, plain = unit(np.array([1.0, 0, 1, 0])), np.array([0.0, 1, 0, 0])  # the hub is near to the bank's caption
    query = unit(np.array([1.0, 1, 0, 0]))
    gallery = np.stack([hub, 0.8 * plain + 0.6 * np.eye(4)[3]])  # cosines 0.5 and 0.57
    calibration = by_hand(weights=(0.0, 10.0, -10.0, 0.0))
    assert calibration.background(gallery) == pytest.approx([np.sqrt(0.5), 0], abs=1e-3)
    low, high = calibration.probabilities(query, gallery)
    assert low == pytest.approx(
        np.exp(5 - 10 * np.sqrt(0.5)) / (2 + np.exp(5 - 10 * np.sqrt(0.5)) + np.exp(5.657)), rel=0.01
    )
    assert high > 0.9


def test_a_query_that_is_near_to_any_picture_needs_more():
    calibration, gallery = by_hand(weights=(0.0, 5.0, 0.0, -5.0)), np.eye(4)[[3]]
    strange, familiar = unit(np.array([0, 0, 1.0, 1])), unit(np.array([1.0, 0, 0, 1]))  # the same cosine with it
    assert calibration.familiarity(np.stack([strange, familiar])) == pytest.approx([0, np.sqrt(0.5)], abs=1e-3)
    assert calibration.probabilities(strange, gallery) > 0.9
    assert calibration.probabilities(familiar, gallery) == pytest.approx([0.5], abs=1e-3)


def test_a_higher_cosine_is_a_higher_probability(fitted):
    images, texts, _ = planted(200, 1.3, seed=5)
    other = unit(images[0] - (images[0] @ texts[0]) * texts[0])  # the first picture, turned away from the query
    found = []
    for cosine in np.linspace(-0.9, 0.9, 19):
        images[0] = cosine * texts[0] + np.sqrt(1 - cosine**2) * other
        found.append(fitted.probabilities(texts[0], images, np.full(200, 0.5)))
    assert (np.diff([chances[0] for chances in found]) > 0).all()
    assert (np.diff([chances[1] for chances in found]) < 0).all()  # at another's expense


def test_the_background_may_be_computed_once(fitted):
    images, texts, _ = planted(50, 1.3, seed=6)
    once = fitted.background(images)
    assert fitted.probabilities(texts[3], images, once).tolist() == fitted.probabilities(texts[3], images).tolist()


def test_a_sample_stands_for_the_pictures_that_are_not_looked_at():
    """Odds 6 for what is meant and 1 for each of 99 others, of which 9 are looked at."""
    evidence = np.log(np.array([6.0, *[1.0] * 99]))
    rows = np.eye(100)
    whole = by_hand().choose(evidence, rows, 100)
    assert by_hand().choose(evidence[:10], rows, 100, evidence[50:60]) == pytest.approx(whole[:10])
    assert by_hand().choose(evidence[:10], rows, 100)[0] > whole[0]  # the others are rivals
    assert by_hand().choose(evidence[:10] - 5000, rows, 100, evidence[50:60] + 5000).tolist() == [0] * 10


def test_strong_evidence_does_not_overflow():
    chances = by_hand(weights=(0.0, 5000.0, 0.0, 0.0)).probabilities(np.eye(4)[0], np.eye(4))
    assert chances.tolist() == [1, 0, 0, 0]
    assert by_hand(weights=(-5000.0, 0.0, 0.0, 0.0)).probabilities(np.eye(4)[0], np.eye(4)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_refused(value):
    broken = np.eye(4)
    broken[2, 2] = value
    with pytest.raises(ClipmatchError, match="not finite"):
        by_hand().probabilities(np.eye(4)[0], broken)
    with pytest.raises(ClipmatchError, match="not finite"):
        by_hand().probabilities(broken[2], np.eye(4))
    images, texts, owner = planted(80, 1, seed=1)
    texts[7, 7] = value
    with pytest.raises(ClipmatchError, match="not finite"):
        calibrate(images, texts, owner, fingerprint="")


def test_rows_of_another_model_are_refused():
    with pytest.raises(ClipmatchError, match="rows of 4 numbers"):
        by_hand().probabilities(np.eye(5)[0], np.eye(5))
    with pytest.raises(ClipmatchError, match="rows of 4 numbers"):
        by_hand().probabilities(np.eye(4)[0], np.empty((0, 4)))


# Fitting


def test_probabilities_are_what_comes_true(fitted):
    answers = ask(fitted, *planted(400, 1.3, seed=3), seed=9)
    assert 0.2 < answers.right.mean() < 0.45  # neither trivial nor hopeless; half of the queries have no answer
    assert reliability(answers.probability, answers.right)[1] < 0.02
    for size in (1, 3, 10, 30, 100, 300):
        part = answers.among(answers.size == size)
        assert reliability(part.probability, part.right)[1] < 0.05
        assert part.probability.mean() == pytest.approx(part.right.mean(), abs=0.025)


def test_sizes_that_it_was_not_fitted_on(fitted):
    answers = ask(fitted, *planted(1500, 1.3, seed=4), sizes=[1400], seed=9)
    assert answers.probability.mean() == pytest.approx(answers.right.mean(), abs=0.03)


def test_clear_matches_are_kept_and_the_others_get_nothing():
    bank = make_bank(*planted(200, 0.5, seed=1))
    clear = fit(*planted(200, 0.5, seed=2), bank, fingerprint="")
    answers = ask(clear, *planted(200, 0.5, seed=3), sizes=[1, 3, 50, 199])
    assert (answers.probability[answers.right] > 0.5).mean() > 0.99
    assert (answers.probability[~answers.present] < 0.5).mean() > 0.98


def test_a_model_that_knows_nothing_is_not_trusted():
    images, texts, owner = planted(200, 1, seed=1)
    strangers = unit(np.random.default_rng(0).normal(size=texts.shape))
    calibration = calibrate(images, strangers, owner, fingerprint="")
    chances = calibration.probabilities(strangers[0], images)
    assert chances.max() < 0.02  # of 200 pictures any, or none
    assert calibration.figures["ece"] < 0.03


def test_a_tie_counts_as_wrong():
    images, texts = np.tile(np.eye(4)[0], (30, 1)), np.tile(np.eye(4)[1], (30, 1))
    assert not ask(by_hand(), images, texts, np.arange(30), sizes=[5]).right.any()


def test_collections_with_and_without_the_answer():
    owner = np.repeat(np.arange(12), 5)
    queries, galleries = simulate(owner, 12, 7, np.random.default_rng(0))
    assert sorted(queries) == list(range(60))
    assert galleries.shape == (60, 8)
    assert (galleries[:, 0] == owner[queries]).all()
    assert all(len(set(row)) == 8 for row in galleries.tolist())
    assert set(galleries[:, 1:].ravel()) == set(range(12))


def test_a_bank_has_one_caption_of_each_picture():
    images, texts = np.eye(9), np.eye(9)
    bank = make_bank(images, texts, np.array([0, 0, 0, 1, 1, 1, 2, 2, 2]))
    assert sorted(bank.captions.argmax(axis=1) // 3) == [0, 1, 2]
    assert len(bank.pictures) == 9
    assert (bank.pictures.dtype, bank.captions.dtype) == (np.float16, np.float16)


def test_only_some_pictures_with_their_captions():
    images, texts, owner = only(np.array([2, 0]), np.eye(3), np.arange(5)[:, None], np.array([0, 1, 2, 2, 0]))
    assert images.argmax(axis=1).tolist() == [2, 0]
    assert texts.ravel().tolist() == [0, 2, 3, 4]
    assert owner.tolist() == [1, 0, 0, 1]


def test_too_few_pictures_and_rows_that_do_not_fit():
    with pytest.raises(ClipmatchError, match=r"50 captioned pictures are too few .* 60 or more"):
        calibrate(*planted(50, 1, seed=1), fingerprint="")
    images, texts, owner = planted(80, 1, seed=1)
    with pytest.raises(ClipmatchError, match="don't fit together"):
        calibrate(images, texts[:-1], owner, fingerprint="")
    with pytest.raises(ClipmatchError, match="0 to 78"):
        calibrate(images[:-1], texts, owner, fingerprint="")


# Keeping


def test_saved_and_loaded_it_says_the_same(fitted, tmp_path):
    fitted.save(tmp_path)
    loaded = Calibration.load(tmp_path, "f00d")
    images, texts, _ = planted(40, 1.3, seed=8)
    assert loaded.probabilities(texts[0], images).tolist() == fitted.probabilities(texts[0], images).tolist()
    assert (loaded.split_hash, loaded.figures) == ("5911", fitted.figures)
    assert [path.name for path in tmp_path.iterdir()] == [CALIBRATION]


def test_the_calibration_of_another_model_is_refused(fitted, tmp_path):
    with pytest.raises(ClipmatchError, match="not calibrated; run: clipmatch evaluate"):
        Calibration.load(tmp_path, "f00d")
    path = fitted.save(tmp_path)
    with pytest.raises(ClipmatchError, match="fitted for model f00d and this one is beef"):
        Calibration.load(tmp_path, "beef")
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "schema": 99}))
    with pytest.raises(ClipmatchError, match="newer clipmatch"):
        Calibration.load(tmp_path, "f00d")
    for damaged in (
        "{",
        "[]",
        json.dumps({**values, "weights": [1, 2]}),
        json.dumps({**values, "weights": [np.nan] * 4}),
        json.dumps({**values, "bank": {}}),
    ):
        path.write_text(damaged)
        with pytest.raises(ClipmatchError, match="damaged"):
            Calibration.load(tmp_path, "f00d")


def test_a_folder_that_can_not_be_written(fitted, tmp_path):
    with pytest.raises(ClipmatchError, match="can't be written"):
        fitted.save(tmp_path / "nowhere")


# Figures


def test_reliability_of_a_curve_that_can_be_counted():
    curve, error = reliability([0.1, 0.15, 0.9, 1.0], [False, True, True, True])
    assert [(part["low"], part["count"]) for part in curve] == [(0.1, 2), (0.9, 2)]
    assert [(part["probability"], part["share"]) for part in curve] == [(0.125, 0.5), (0.95, 1.0)]
    assert error == pytest.approx((2 * 0.375 + 2 * 0.05) / 4)
    for probabilities, truths in (([], []), ([0.5], [True, False]), ([1.5], [True]), ([np.nan], [True])):
        with pytest.raises(ClipmatchError, match="Reliability needs"):
            reliability(probabilities, truths)


def test_what_a_threshold_keeps_and_silences():
    right = [0.9, 0.8, 0.7, 0.6, 0.2]  # the best answers of five queries whose picture is there, and found
    wrong = [0.5]  # of one whose picture is there, but not found
    absent = [0.1, 0.3, 0.55, 0.65]
    answers = Answers(
        np.array(right + wrong + absent),
        np.array([True] * 5 + [False] * 5),
        np.array([True] * 6 + [False] * 4),
        np.full(10, 7),
    )
    figures = figures_of(answers)["galleries"]["7"]
    assert figures["right"] == pytest.approx(5 / 6)
    assert figures["kept@0.5"] == pytest.approx(4 / 5)
    assert figures["nothing@0.5"] == pytest.approx(2 / 4)
    assert 0.2 < figures["threshold"] < 0.6
    assert figures["nothing"] == pytest.approx(2 / 4)
    assert figures["both"] == pytest.approx(3 / 4)  # at 0.6: 4/5 kept and 3/4 silent


def test_figures_are_of_pictures_held_out_and_are_json(fitted):
    figures = fitted.figures
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert list(figures["galleries"]) == ["1", "3", "10", "30", "100", "199"]
    assert sum(part["count"] for part in figures["reliability"]) == 6 * 2 * 2 * 600  # sizes, with and without, halves
    assert figures["ece"] < 0.02


def test_benchmark(model_folder, scenes, tmp_path):
    out, splits = tmp_path / "result.json", scenes / "splits"
    command = [sys.executable, ROOT / "benchmarks" / "confidence.py", "--model", model_folder, "--captions", scenes]
    command += ["--dev-split", splits / "train.txt", "--train-split", splits / "dev.txt", "--seeds", "1", "--json", out]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["confidence"]["all"]["ece"] < 0.1
    assert set(result["hubness"]["rows"]) == {"cosine", "QB-Norm", "NNN", "probability"}
    assert result["hubness"]["rows"]["cosine"]["gain@1"] == [0, 0, 0]
