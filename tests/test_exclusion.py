"""A veto on rows whose right answer is known."""

import importlib.util
import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from clipmatch.calibration import Bank, Calibration, Exclusion
from clipmatch.calibration_fit import calibrate, make_bank
from clipmatch.embedder import ImageEmbeddings
from clipmatch.errors import ClipmatchError
from clipmatch.exclusion import (
    STRANGE,
    embed_concept,
    familiarity,
    features,
    find_likest,
    judge,
    names_of,
    nearness,
    shows,
    strangeness,
)
from clipmatch.exclusion_fit import (
    Concept,
    find_concepts,
    fit_exclusion,
    is_concept,
    logistic,
    mentions,
    pairs_of,
    removing,
)
from clipmatch.modelfolder import CALIBRATION

ROOT = Path(__file__).parents[1]
AXES = np.eye(4, dtype=np.float32)
THINGS = ["dog", "ball", "snow", "beach", "bike", "car", "boat", "tree", "swing", "hat", "guitar", "horse", "bench"]
THINGS += ["kite", "drum", "lamp", "tent"]


def by_hand(weights=(0.0, 1.0, 0.0, 0.0), needed=(0.5, 0.0), familiar=-1.0, usual=-1.0):
    """Verdicts that can be worked out on paper: the bank's pictures are two axes, five of its captions a third."""
    bank = Bank(pictures=AXES[:2].astype(np.float16), captions=AXES[[2, 2, 2, 2, 2, 3]].astype(np.float16))
    return Calibration((0.0,) * 4, 0.9, bank, "f00d", exclusion=Exclusion(weights, needed, familiar, usual))


class Reader:
    """It knows the things by name: a text is the sum of their directions, a picture what it shows, blurred."""

    fingerprint, dim = "4ead", 48

    def __init__(self, shown=None, blur=0.8):
        rng = np.random.default_rng(0)
        self.directions = unit(rng.normal(size=(len(THINGS) + 1, self.dim)))  # and one for all that it doesn't know
        self.shown, self.blur, self.noise = shown or {}, blur, np.random.default_rng(1)

    def embed_texts(self, texts, progress=False):
        known = [[text.count(thing) for thing in THINGS] for text in texts]
        return unit(np.array([[*row, 0.2 + (sum(row) == 0)] for row in known]) @ self.directions)

    def rows_of(self, shown):
        rows = unit(np.asarray(shown, float) @ self.directions[:-1])
        return unit(rows + self.blur * unit(self.noise.normal(size=rows.shape)))

    def embed_images(self, paths, progress=True):
        return ImageEmbeddings(self.rows_of([self.shown[Path(path).name] for path in paths]), list(paths), [])


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def world(pictures, seed):
    """What pictures show [n, things] (two to four things each), and five captions each that name most of it."""
    rng = np.random.default_rng(seed)
    shown = np.zeros((pictures, len(THINGS)), int)
    for row in shown:
        row[rng.permutation(len(THINGS))[: rng.integers(2, 5)]] = 1
    captions = [
        " and ".join([f"a {THINGS[thing]}" for thing in np.flatnonzero(row) if rng.random() < 0.9] or ["something"])
        for row in shown
        for _ in range(5)
    ]
    return shown, captions, np.repeat(np.arange(pictures), 5)


@pytest.fixture(scope="module")
def reader():
    return Reader()


@pytest.fixture(scope="module")
def fitted(reader):
    """Calibrated on 400 pictures, with a bank of 300 others."""
    shown, captions, owner = world(300, seed=1)
    bank = make_bank(reader.rows_of(shown), reader.embed_texts(captions), owner)
    shown, captions, owner = world(400, seed=2)
    concepts = find_concepts(captions, owner, reader.embed_texts)
    rows = reader.rows_of(shown), reader.embed_texts(captions), owner
    return calibrate(*rows, bank, concepts=concepts, fingerprint=reader.fingerprint)


# Concepts as a person types them


def test_names():
    assert names_of(" a  red hat ") == ("red hat",)
    assert names_of("The dogs") == ("dogs",)
    assert names_of("another") == ("another",)
    assert names_of("People") == names_of("a person") == ("person", "man", "woman", "boy", "girl")
    for blank in ("", " \n"):
        with pytest.raises(ClipmatchError, match="is empty"):
            names_of(blank)


def test_phrasings():
    asked = []

    def embed_texts(texts):
        asked.append(texts)
        return AXES[: len(texts)]

    assert embed_concept(embed_texts, "a kite").tolist() == AXES[:2].tolist()
    assert embed_concept(embed_texts, "the bus").tolist() == AXES[:1].tolist()
    assert asked == [["a photo of kite", "kites"], ["a photo of bus"]]


def test_people_are_the_mean_of_men_women_and_children():
    rows = embed_concept(lambda texts: np.eye(10, dtype=np.float32), "people")
    assert rows.shape == (2, 10)
    assert rows[0] == pytest.approx([np.sqrt(0.2)] * 5 + [0] * 5)


def test_the_phrasing_that_fits_best_counts_most():
    both = AXES[[0, 1]]
    assert nearness(AXES[:1], AXES[[0, 0]]) == pytest.approx([1])
    assert nearness(AXES[:1], both) == pytest.approx([np.log((np.exp(10) + 1) / 2) / 10])  # 0.93, where the mean is 0.5
    assert nearness(AXES[2:3], both) == pytest.approx([0])


# Verdicts


def test_cosine_context_and_level():
    calibration = replace(by_hand(), bank=Bank(np.eye(12, dtype=np.float16), np.eye(12, dtype=np.float16)))
    gallery = unit(np.r_[1.0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0] + np.arange(12) * -0.01)[None]  # 10 of 12 are its likest
    concept = np.eye(12, dtype=np.float32)[:1]
    likest = find_likest(calibration, gallery)
    assert sorted(likest.places[0]) == list(range(10))
    assert likest.cosine[0] == pytest.approx(gallery[0, :10].mean())
    assert features(calibration, concept, gallery, likest) == pytest.approx(
        np.array([[1, gallery[0, 0], 1 / 10, 1 / 12]]), abs=1e-6
    )


def test_of_pictures_unlike_the_bank_s_more_is_asked():
    """The first lies among the bank's two axes, the other is far from both; both show the concept alike."""
    concept, gallery = AXES[2:3], unit([[1, 0.2, 1, 0], [0.1, 0, 1, 1]])
    gallery[1, 2] = gallery[0, 2]
    likest = find_likest(by_hand(), gallery)
    assert likest.cosine == pytest.approx([gallery[0, :2].mean(), gallery[1, :2].mean()])
    assert judge(by_hand(), concept, gallery).vetoed.tolist() == [True, True]
    assert judge(by_hand(usual=0.3), concept, gallery).vetoed.tolist() == [True, False]
    assert strangeness(likest, 0.3) == pytest.approx([0, STRANGE * (0.3 - likest.cosine[1])])


def test_confidence_and_what_is_needed():
    verdict = judge(by_hand(weights=(-1.0, 3.0, 0.0, 2.0)), AXES[:1], AXES[:2])  # cosines 1 and 0, level 1/2
    assert verdict.confidence == pytest.approx([1 / (1 + np.exp(-3)), 0.5])
    assert verdict.vetoed.tolist() == [True, False]
    assert verdict.familiar


def test_of_a_familiar_concept_more_is_needed():
    plain, implied = AXES[2:3], unit(np.array([[0.0, 0, 0.6, 0.8]]))
    calibration = by_hand(needed=(0.0, 5.0))
    assert familiarity(calibration, plain) == pytest.approx(1 - 5 / 6)  # the nearest five less all six
    assert familiarity(calibration, implied) == pytest.approx((0.8 + 4 * 0.6) / 5 - (0.8 + 5 * 0.6) / 6)  # 0.0067
    gallery = unit(np.array([[0.0, 0, 0.9, 0], [0.8, 0, 0.6, 0]]))
    assert judge(calibration, plain, gallery).vetoed.tolist() == [True, False]  # cosines 1 and 0.6, needed 0.83
    assert judge(calibration, implied, gallery).vetoed.tolist() == [True, True]  # 0.6 and 0.36, needed 0.03


def test_an_unfamiliar_concept_vetoes_only_what_stands_out():
    bold = by_hand(weights=(9.0, 1.0, 0.0, 0.0), familiar=0.1)  # sure of everything
    assert judge(bold, AXES[2:3], AXES).vetoed.all()
    verdict = judge(bold, unit(np.array([[0.3, 0.1, 0, 1.0]])), AXES)
    assert not verdict.familiar
    assert verdict.vetoed.tolist() == [False, False, False, True]  # cosines 0.29, 0.10, 0, 0.95; needed: 0.48
    assert (verdict.confidence > 0.9).all()


def test_what_can_not_be_judged():
    with pytest.raises(ClipmatchError, match=r"does not say when .* run clipmatch evaluate"):
        judge(replace(by_hand(), exclusion=None), AXES[:1], AXES)
    for concept, rows in ((AXES[0], AXES), (AXES[:1], np.eye(5)), (np.eye(5)[:1], AXES)):
        with pytest.raises(ClipmatchError, match="rows of 4 numbers"):
            judge(by_hand(), concept, rows)
    broken = AXES.copy()
    broken[2, 2] = np.nan
    for concept, rows in ((AXES[:1], broken), (broken[2:3], AXES)):
        with pytest.raises(ClipmatchError, match="not finite"):
            judge(by_hand(), concept, rows)


def test_several_concepts_in_one_go(reader, fitted):
    shown, _, _ = world(50, seed=9)
    rows = reader.rows_of(shown)
    for text, vetoed in zip(("a dog", "ball"), shows(reader, fitted, rows, ["a dog", "ball"]), strict=True):
        assert vetoed.tolist() == judge(fitted, embed_concept(reader.embed_texts, text), rows).vetoed.tolist()
    assert shows(reader, fitted, rows, []) == []
    with pytest.raises(ClipmatchError, match="does not say when"):
        shows(reader, replace(fitted, exclusion=None), rows, ["a dog", "ball"])


# Concepts that captions agree on


def test_words_are_counted_once_a_caption_and_plurals_with_their_singular():
    captions = ["Dogs and a dog.", "two dogs", "the bus, it's a T-shirt", "buses"]
    counts = mentions(captions, np.array([0, 0, 1, 1]))
    assert counts["dog"].tolist() == [2, 0]
    assert counts["bus"].tolist() == [0, 2]
    assert counts["t-shirt"].tolist() == [0, 1]
    assert "dogs" not in counts
    assert "it" not in counts  # it's


def test_captions_must_agree_on_a_concept():
    owner = np.repeat(np.arange(100), 5)
    agreed, chance, grammar, rare = (np.zeros(100, int) for _ in range(4))
    agreed[:20] = 4  # where one has it, 3 of the 4 others do: 0.75
    chance[:] = 1  # none of the others does
    grammar[:] = 4  # 0.75, but so it would be by chance
    rare[:7] = 5
    assert [is_concept(count, owner) for count in (agreed, chance, grammar, rare)] == [True, False, False, False]
    assert not is_concept(np.ones(100, int), np.arange(100))  # one caption each: nothing to agree with


def test_concepts_come_out_of_the_captions(reader):
    shown, captions, owner = world(200, seed=4)
    concepts = find_concepts([*captions, "a lone word"], np.append(owner, 0), reader.embed_texts)
    assert {concept.word for concept in concepts} == set(THINGS)  # neither "a" nor "and"
    dog = next(concept for concept in concepts if concept.word == "dog")
    assert not (dog.shown & dog.lacking).any()
    assert dog.shown[shown[:, THINGS.index("dog")] == 0].sum() == 0
    assert dog.rows.tolist() == embed_concept(reader.embed_texts, "dog").tolist()
    assert find_concepts(["one two", "three"], [0, 1], reader.embed_texts) == []


# Fitting


def test_logistic_regression_finds_the_odds():
    design = np.array([[1.0, -1], [1, -1], [1, 1], [1, 1]])
    weights = logistic(design, np.array([0.0, 1, 0, 1]), np.array([0.4, 0.1, 0.1, 0.4]))
    assert weights == pytest.approx([0, np.log(4)], abs=0.02)  # at +1 four to one, at -1 one to four
    apart = logistic(design, np.array([0.0, 0, 1, 1]), np.full(4, 0.25))  # no end to certainty but the ridge
    assert 3 < apart[1] < 10


def concept(shown, lacking=None):
    shown = np.array(shown, bool)
    return Concept("", np.empty((0, 4), np.float32), shown, ~shown if lacking is None else np.array(lacking, bool))


def test_questions_that_pictures_can_answer():
    first, second, third = [1] * 12 + [0] * 8, [1] * 6 + [0] * 14, [0] * 18 + [1] * 2
    found = pairs_of([concept(first), concept(second), concept(third)])
    assert [(b, both.tolist(), wanted.tolist()) for b, both, wanted in found] == [
        (1, [0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11])  # the first but not the second; nobody has it the other way round
    ]
    assert pairs_of([concept(first), concept(second)], excluded=[0]) == []
    unsure = concept(second, lacking=[0] * 8 + [1] * 12)  # 6 and 7 are left out
    assert pairs_of([concept(first), unsure]) == []


def test_the_threshold_removes_nine_tenths_of_each_question_on_average():
    evidence = np.array([np.arange(200.0), np.arange(1000.0, 1200.0)])
    pairs = [(0, np.arange(100), np.arange(0)), (1, np.arange(100), np.arange(0))]
    assert removing(evidence, pairs[:1]) == 9  # 91 of 0 to 99: what other concepts lose makes it nine tenths
    assert removing(evidence, pairs[1:]) == 1009
    assert removing(evidence, pairs) == 18  # all of the second, 82 of 100 of the first
    assert removing(evidence, [pairs[0], (1, np.arange(1), np.arange(0))]) == 18  # however few the second has


def test_what_is_unwanted_goes_and_what_is_wanted_stays(reader, fitted):
    assert fitted.exclusion.weights[1] > 0
    shown, _, _ = world(400, seed=5)
    rows, removed, kept, subtracted = reader.rows_of(shown), [], [], []
    for a, b in product(range(6), repeat=2):
        if a == b:
            continue
        both, wanted = (np.flatnonzero(shown[:, a] & (shown[:, b] == side)) for side in (1, 0))
        vetoed = judge(fitted, embed_concept(reader.embed_texts, THINGS[b]), rows).vetoed
        removed.append(vetoed[both].mean())
        kept.append(1 - vetoed[wanted].mean())
        query = reader.embed_texts([THINGS[a]])[0] - 0.5 * reader.embed_texts([THINGS[b]])[0]
        cut = np.quantile(rows[wanted] @ query, 1 - kept[-1])
        subtracted.append((rows[both] @ query < cut).mean())
    assert np.mean(removed) == pytest.approx(0.9, abs=0.06)
    assert np.mean(kept) > 0.8
    assert np.mean(removed) > np.mean(subtracted) + 0.05


def test_a_concept_that_is_new_to_the_fit(reader, fitted):
    shown, captions, owner = world(400, seed=6)
    rows, concepts = reader.rows_of(shown), find_concepts(captions, owner, reader.embed_texts)
    others = [one for one in concepts if one.word != "bench"]
    calibration = replace(fitted, exclusion=fit_exclusion(fitted, rows, others))
    fresh, _, _ = world(400, seed=7)
    vetoed = judge(calibration, embed_concept(reader.embed_texts, "bench"), reader.rows_of(fresh)).vetoed
    there = fresh[:, THINGS.index("bench")] == 1
    assert vetoed[there].mean() > 0.8
    assert vetoed[~there].mean() < 0.25


def test_nonsense_does_not_empty_the_results(reader, fitted):
    shown, _, _ = world(200, seed=8)
    verdict = judge(fitted, embed_concept(reader.embed_texts, "xqzt"), reader.rows_of(shown))
    assert not verdict.familiar
    assert verdict.vetoed.mean() < 0.02


def test_a_model_that_knows_nothing_and_captions_too_few(reader, fitted):
    shown, captions, owner = world(200, seed=3)
    concepts = find_concepts(captions, owner, reader.embed_texts)
    rows = reader.rows_of(shown)
    turned = [replace(one, rows=-one.rows) for one in concepts]  # cosines that say the opposite
    assert fit_exclusion(fitted, rows, turned) is None
    assert fit_exclusion(fitted, rows, concepts[:7]) is None
    assert fit_exclusion(fitted, rows, concepts[:8]) is not None
    rows = rows, reader.embed_texts(captions), owner
    assert calibrate(*rows, fingerprint="").exclusion is None


# Keeping


def test_saved_and_loaded_it_is_the_same(fitted, tmp_path):
    path = fitted.save(tmp_path)
    assert Calibration.load(tmp_path, fitted.fingerprint).exclusion == fitted.exclusion
    values = json.loads(path.read_text())
    for damaged in ({"weights": [1, 2]}, {**values["exclusion"], "needed": [np.nan, 1]}, [1]):
        path.write_text(json.dumps({**values, "exclusion": damaged}))
        with pytest.raises(ClipmatchError, match="damaged"):
            Calibration.load(tmp_path, fitted.fingerprint)


def test_a_calibration_from_before_exclusion(fitted, tmp_path):
    path = fitted.save(tmp_path)
    values = {**json.loads(path.read_text()), "schema": 1}
    del values["exclusion"]
    path.write_text(json.dumps(values))
    old = Calibration.load(tmp_path, fitted.fingerprint)
    assert (old.exclusion, old.weights, old.figures) == (None, fitted.weights, fitted.figures)
    old.save(tmp_path)
    assert json.loads((tmp_path / CALIBRATION).read_text())["exclusion"] is None


# The benchmark


@pytest.fixture
def benchmark():
    spec = importlib.util.spec_from_file_location("exclusion_benchmark", ROOT / "benchmarks" / "exclusion.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_list_of_concepts_names_each_by_itself(benchmark):
    listed = json.loads(benchmark.CONCEPTS.read_text())
    for word, words in listed.items():
        assert word == "American football" or benchmark.pattern(words["named"]).search(word), word
    water, ball = (benchmark.pattern(listed[word]["named"]) for word in ("water", "ball"))
    assert water.search("Surfers ride")
    assert ball.search("two basketballs")
    assert not ball.search("a balloon")
    assert not benchmark.pattern("").search("anything")


def test_a_ranking_is_cut_where_as_many_wanted_pictures_stay(benchmark):
    scores = np.array([9.0, 7, 5, 3, 8, 6, 4, 2])
    asked = [(0, 1, np.arange(4), np.arange(4, 8))]  # wanted: 8, 6, 4, 2
    assert benchmark.ranked(asked, lambda a, b: scores, [0.5]).tolist() == [0.5]  # from 6 on: 9 and 7 stay too
    assert benchmark.ranked(asked, lambda a, b: scores, [1]).tolist() == [0]
    assert benchmark.ranked(asked, lambda a, b: scores, [0]).tolist() == [1]


def test_the_benchmark_runs(benchmark, tmp_path, monkeypatch, capsys):
    shown, captions, owner = world(500, seed=11)
    names = [f"{number}.jpg" for number in range(500)]
    lines = [f"{names[picture]},{caption}" for picture, caption in zip(owner, captions, strict=True)]
    (tmp_path / "captions.txt").write_text("\n".join(["image,caption", *lines]) + "\n")
    for folder in ("Images", "splits"):
        (tmp_path / folder).mkdir()
    for name in names:
        (tmp_path / "Images" / name).touch()
    (tmp_path / "splits" / "train.txt").write_text("\n".join(names[:200]) + "\n")
    (tmp_path / "splits" / "dev.txt").write_text("\n".join(names[200:]) + "\n")
    (tmp_path / "concepts.json").write_text(json.dumps({thing: {"named": thing, "open": ""} for thing in THINGS[:8]}))
    monkeypatch.setattr(benchmark, "load_model", lambda name: Reader(dict(zip(names, shown, strict=True))))
    options = {"--data": tmp_path, "--concepts": tmp_path / "concepts.json", "--json": tmp_path / "out.json"}
    command = ["exclusion.py", "--seeds", "1", *(str(part) for pair in options.items() for part in pair)]
    monkeypatch.setattr(sys, "argv", command)
    benchmark.main()
    result = json.loads((tmp_path / "out.json").read_text())
    methods = result["all that show A"]["methods"]
    assert set(methods) == {"veto", "cosine", "a - 0.3 b", "a - 0.5 b", "a - 1 b", '"A without B"', "A alone"}
    assert methods["veto"]["removed"] > 0.8
    assert methods["veto"]["kept"] == methods["a - 0.5 b"]["kept"]
    assert methods["veto"]["removed"] > methods["A alone"]["removed"]
    assert set(result["concepts"]) <= set(THINGS[:8])
    assert "veto" in capsys.readouterr().out
