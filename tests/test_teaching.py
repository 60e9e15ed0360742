"""Concepts: learnt from examples, kept in the index, used in queries. In colours a reader sees what is right."""

import json
import sqlite3

import numpy as np
import pytest
from click.testing import CliRunner
from colours import ColourEmbedder, paint

from clipmatch.cli import main
from clipmatch.demo import sample_photographs
from clipmatch.errors import ClipmatchError
from clipmatch.index import Index
from clipmatch.query import Query, Term, parse_query
from clipmatch.search import Request
from clipmatch.store import Store
from clipmatch.storefile import UPGRADES, version_of
from clipmatch.teaching import learn, leave_one_out

RED, YELLOW = (255, 0, 0), (200, 200, 0)


def unit(rows):
    rows = np.array(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def cloud(centre, count, seed, spread=0.1):
    """Unit rows around a direction of 8 dimensions."""
    return unit(np.eye(8)[centre] + spread * np.random.default_rng(seed).standard_normal((count, 8)))


# Learning


def test_the_direction_tells_examples_from_the_rest():
    row = learn(cloud(0, 5, 1), np.empty((0, 8), np.float32), cloud(1, 50, 2))
    assert np.linalg.norm(row) == pytest.approx(1, abs=1e-5)
    assert (cloud(0, 20, 3) @ row).min() > (cloud(1, 20, 4) @ row).max()


def test_a_counter_example_turns_the_direction_away():
    liked = unit(np.eye(8)[0] + np.eye(8)[2] + 0.05 * np.random.default_rng(0).standard_normal((4, 8)))
    rest = cloud(1, 50, 2)
    mistaken = unit(np.eye(8)[2])
    none = np.empty((0, 8), np.float32)
    assert learn(liked, mistaken[None], rest) @ mistaken < learn(liked, none, rest) @ mistaken - 0.2


def test_unlabelled_examples_among_the_rest_hardly_matter():
    rest = np.concatenate([cloud(1, 50, 2), cloud(0, 10, 3)])
    row = learn(cloud(0, 5, 1), np.empty((0, 8), np.float32), rest)
    assert (rest[50:] @ row).min() > (rest[:50] @ row).max()


def test_without_examples_the_query_stays():
    none, query = np.empty((0, 8), np.float32), unit(np.eye(8)[3])
    assert learn(none, none, cloud(1, 50, 2), query) @ query > 0.9


def test_precision_of_what_can_and_what_cannot_be_learnt():
    none, rest = np.empty((0, 8), np.float32), cloud(1, 60, 2)
    assert leave_one_out(cloud(0, 6, 1), none, rest) == 1.0
    assert leave_one_out(cloud(1, 20, 5), none, rest) < 0.75  # no different from the rest: by chance a half
    assert leave_one_out(cloud(0, 1, 1), none, rest) is None


def test_precision_is_of_photographs_that_were_left_out():
    """In 64 dimensions any five rows are told from 40 others once they were seen; left out, they are like them."""
    rows = unit(np.random.default_rng(0).standard_normal((45, 64)))
    examples, none, rest = rows[:5], np.empty((0, 64), np.float32), rows[5:]
    row = learn(examples, none, rest)
    assert (examples @ row).min() > (rest @ row).max()
    assert leave_one_out(examples, none, rest) < 0.75


# Queries


def test_a_name_in_a_sentence_is_a_concept():
    assert parse_query("@rex on a beach").terms == (Term(concept="rex"), Term("on a beach"))
    assert parse_query("a beach with @rex, @old-tom:2").terms == (
        Term(concept="rex", weight=2.0),
        Term(concept="old-tom", weight=2.0),
        Term("a beach with", weight=2.0),
    )
    assert parse_query("@rex").terms == (Term(concept="rex"),)
    assert parse_query("mail me@home").terms == (Term("mail me@home"),)
    assert str(parse_query(["@rex", "snow"])) == "@rex + snow"


def test_a_query_with_a_concept_has_no_confidence_of_its_own():
    query = parse_query("@rex on a beach")
    assert (query.is_text, query.is_mixed, query.text, query.concepts) == (False, True, "on a beach", ["rex"])
    known = query.with_concepts({"rex": np.ones(3, np.float32)})
    assert known.concepts == []
    assert isinstance(known, Query)


# In the index


@pytest.fixture
def colours(tmp_path):
    """20 yellow pictures of different brightness, 20 red ones, 20 blue ones."""
    for number in range(20):
        shade = 100 + 7 * number
        paint(tmp_path / "photos" / f"yellow{number:02}.png", (shade, shade - 20, 3 * number))
        paint(tmp_path / "photos" / f"red{number:02}.png", (shade, 0, 3 * number))
        paint(tmp_path / "photos" / f"blue{number:02}.png", (3 * number, 0, shade))
    return tmp_path / "photos"


@pytest.fixture
def index(kind, tmp_path, colours):
    with Index.open(tmp_path / f"photos.{kind}", ColourEmbedder()) as opened:
        opened.update([colours], progress=False)
        yield opened


def names(matches):
    return [match.path.name for match in matches]


def yellow_share(matches):
    return np.mean(["yellow" in name for name in names(matches)])


def test_a_taught_concept_finds_what_no_word_says(index, colours):
    concept = index.teach("@sunny", [colours / f"yellow{number:02}.png" for number in (2, 9, 16)])
    assert (concept.name, concept.precision, len(concept.examples)) == ("sunny", 1.0, 3)
    found = index.find("@sunny", top_k=20, duplicates="show")
    assert yellow_share(found) == 1
    assert found[0].confidence is None
    assert yellow_share(index.find("red", top_k=20, duplicates="show")) == 0


def test_a_concept_and_a_sentence_together(index, colours):
    index.teach("warm", [colours / "yellow03.png", colours / "red03.png", colours / "red17.png"])
    first = index.find("@warm green", top_k=5, duplicates="show")
    assert yellow_share(first) == 1  # the warm ones with the most green


def test_examples_from_anywhere_and_whole_folders(index, colours, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    for number in range(3):
        paint(elsewhere / f"{number}.png", (0, 200 + number, 0))
    index.teach("leaf", [elsewhere], others=[colours / "blue01.png"])
    (concept,) = index.concepts()
    assert [path.name for path in concept.examples] == ["0.png", "1.png", "2.png"]
    assert concept.others == (colours / "blue01.png",)
    assert yellow_share(index.find("@leaf", top_k=5, duplicates="show")) == 1  # the only ones with green in them


def test_names_are_renamed_and_forgotten_in_any_case(index, colours):
    index.teach("Sunny", [colours / "yellow00.png"])
    index.teach("night", [colours / "blue00.png"])
    assert names(index.find("@sunny", duplicates="show")) == names(index.find("@SUNNY", duplicates="show"))
    index.rename_concept("@sunny", "@Bright")
    assert [concept.name for concept in index.concepts()] == ["Bright", "night"]
    with pytest.raises(ClipmatchError, match="There is a concept @Bright already"):
        index.rename_concept("night", "bright")
    index.forget_concept("@bright")
    assert [concept.name for concept in index.concepts()] == ["night"]


def test_what_is_wrong_is_said(index, colours, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    for wrong, said in (
        (
            lambda: index.find("@nobody there"),
            r"no concept @nobody; teach it with: clipmatch teach @nobody PHOTO",
        ),
        (lambda: index.teach("two words", [colours / "red00.png"]), "can't be a concept's"),
        (lambda: index.teach("x", [colours / "none.png"]), "does not exist"),
        (lambda: index.teach("x", [broken]), "can't be read"),
        (lambda: index.teach("x", [colours / "red00.png"], [colours / "red00.png"]), "can't both show @x and not"),
        (lambda: index.forget_concept("x"), "There is no concept @x"),
        (lambda: index.rename_concept("x", "y"), "There is no concept @x"),
    ):
        with pytest.raises(ClipmatchError, match=said):
            wrong()
    assert index.concepts() == []


def test_an_empty_index_can_not_tell_what_is_not_meant(tmp_path, colours):
    with Index.open(tmp_path / "empty.sqlite", ColourEmbedder()) as empty:
        with pytest.raises(ClipmatchError, match="The index is empty"):
            empty.teach("x", [colours / "red00.png"])
        empty.teach("x", [colours / "red00.png"], [colours / "blue00.png"])
        assert len(empty.concepts()) == 1


def test_teaching_makes_nothing_stale(index, colours):
    before = index.store.content
    index.teach("sunny", [colours / "yellow00.png"])
    index.rename_concept("sunny", "bright")
    index.forget_concept("bright")
    assert index.store.content == before


def test_a_new_model_is_taught_anew(index, colours, tmp_path):
    lost = paint(tmp_path / "lost.png", (0, 0, 99))
    index.teach("sunny", [colours / "yellow00.png", colours / "yellow09.png"])
    index.teach("lost", [lost])
    lost.unlink()
    summary = index.reembed(ColourEmbedder("other"), progress=False)
    assert yellow_share(index.find("@sunny", top_k=10, duplicates="show")) == 1
    assert [str(failure.path) for failure in summary.failures] == ["@lost"]
    with pytest.raises(ClipmatchError, match="@lost was taught to another model; teach it once more"):
        index.find("@lost")


def test_a_picture_and_its_copy_that_is_said_not_to_show_it(colours, tmp_path):
    """Nothing can be learnt of them: not a concept without a direction, which no index would be read with again."""
    copy = tmp_path / "copy.png"
    copy.write_bytes((colours / "yellow00.png").read_bytes())
    with Index.open(tmp_path / "empty.sqlite", ColourEmbedder()) as index:
        with pytest.raises(ClipmatchError, match="the pictures that show @sunny are those that do not; choose others"):
            index.teach("sunny", [colours / "yellow00.png"], [copy])
        assert index.concepts() == []


def test_concepts_move_to_another_index(index, colours, tmp_path):
    index.teach("sunny", [colours / "yellow00.png", colours / "yellow09.png"])
    values = json.loads(json.dumps(index.export_concepts()))
    with Index.open(tmp_path / "other.sqlite", ColourEmbedder()) as other:
        assert other.import_concepts(values) == 1
        assert other.concepts()[0].row == pytest.approx(index.concepts()[0].row)
        for change in ({"row": [5.0, *values["concepts"][0]["row"][1:]]}, {"examples": [""]}):
            with pytest.raises(ValueError, match=r"of @sunny is not of length 1|a path is none"):
                other.import_concepts({**values, "concepts": [values["concepts"][0] | change]})
        assert other.concepts()[0].row == pytest.approx(index.concepts()[0].row)
    with (
        Index.open(tmp_path / "third.sqlite", ColourEmbedder("other")) as third,
        pytest.raises(ClipmatchError, match="@sunny was taught to another model"),
    ):
        third.import_concepts(values)


def test_an_index_of_before_learns_concepts(tmp_path):
    old = tmp_path / "old.sqlite"
    with sqlite3.connect(old) as store:
        store.executescript(UPGRADES[0] + "PRAGMA user_version = 1;")
    store.close()
    with Store.open(old) as store:
        assert store.concepts() == {}
        assert version_of(store._db) == len(UPGRADES)


# Ticks and crosses


def test_ticks_and_crosses_refine_a_query(index, colours):
    request = Request(top_k=60, duplicates="show")
    before = [name[:3] for name in names(index.answer(parse_query("green"), request))]
    assert before[:20] == ["yel"] * 20
    assert set(before[20:40]) == {"red", "blu"}  # neither has any green
    liked, disliked = ([colours / f"{colour}{number:02}.png" for number in (1, 8, 15)] for colour in ("red", "blue"))
    found = index.refine(parse_query("green"), liked, disliked, request)
    assert [name[:3] for name in names(found)] == ["yel"] * 20 + ["red"] * 20 + ["blu"] * 20
    assert found.query == "green"
    assert {name[:3] for name in names(index.refine(None, liked, [], request))[:20]} == {"red"}


def test_nothing_that_was_ticked_is_there(index, tmp_path):
    with pytest.raises(ClipmatchError, match="None of the photographs that were ticked"):
        index.refine(None, [tmp_path / "gone.png"], [], Request())


# On the command line


@pytest.fixture
def album(tmp_path, monkeypatch):
    """The sample photographs, indexed by the model that comes with clipmatch."""
    pictures = tmp_path / "Pictures"
    pictures.mkdir()
    for path in sample_photographs():
        (pictures / path.name).symlink_to(path)
    monkeypatch.setenv("CLIPMATCH_INDEX", str(tmp_path / "album.sqlite"))
    run("index", pictures)
    return pictures


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def test_teach_list_and_find_on_the_command_line(album, tmp_path):
    said = run("teach", "@chelsea", album / "chelsea.png", "--not", album / "coffee.png", album / "page.png").stdout
    assert said == "@chelsea: 1 example, 2 that are not\n"
    assert run("find", "@chelsea", "-k", "1", "--paths").stdout.strip().endswith("chelsea.png")
    assert run("concepts").stdout == "@chelsea  1 example, 2 that are not\n"
    run("concepts", "rename", "@chelsea", "@cat")
    exported = tmp_path / "concepts.json"
    assert run("concepts", "export", exported).stdout.startswith("1 concepts in ")
    run("concepts", "remove", "@cat")
    assert run("concepts").stdout == ""
    assert run("concepts", "import", exported).stdout == "1 concepts taken in\n"
    assert run("concepts").stdout.startswith("@cat  ")


def test_errors_on_the_command_line_are_one_sentence(album, tmp_path):
    nothing = tmp_path / "nothing.json"
    nothing.write_text('{"schema": 1}')
    for words in (
        ("find", "@nobody"),
        ("teach", "@x", tmp_path / "none.jpg"),
        ("concepts", "remove", "@x"),
        ("concepts", "import", nothing),
    ):
        result = run(*words, code=1)
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1, result.stderr
