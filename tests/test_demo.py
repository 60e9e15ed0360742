"""The search of sample photographs as a newcomer runs it, in an installation without PyTorch."""

import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path

from click.testing import CliRunner

from clipmatch.cli import main
from clipmatch.demo import PHOTOGRAPHS, QUERIES, best_matches, sample_photographs
from clipmatch.search import Match, Matches

SHOWS = {
    "a cat": "chelsea",
    "a cup of coffee": "coffee",
    "an astronaut": "astronaut",
    "a rocket launch": "rocket",
    "coins": "coins",
    "the moon": "moon",
    "a motorcycle": "motorcycle_left",
}


def run(*arguments):
    return CliRunner().invoke(main, ["demo", *map(str, arguments)])


def answers(output):
    """What is printed -> query: names of the best three photographs."""
    rows = re.findall(r"^(\S.*?)  +(\S+ -?\d\.\d\d  .*)$", output, re.MULTILINE)
    return {query: [answer.split()[0] for answer in best.split("  ")] for query, best in rows}


def test_most_queries_find_what_they_name(demo):
    """First where it is plain, and nearly always among the three that one glance takes in."""
    _, output = demo
    found = answers(output)
    assert list(found) == list(QUERIES) == list(SHOWS)
    assert {name for names in found.values() for name in names} <= {Path(name).stem for name in PHOTOGRAPHS}
    assert found["a cat"][0] == SHOWS["a cat"]
    assert found["a motorcycle"][0] == SHOWS["a motorcycle"]
    assert sum(SHOWS[query] in found[query] for query in QUERIES) >= 6


def test_the_page_shows_what_is_printed_and_stands_alone(demo):
    folder, output = demo
    assert f"\npage: {folder.name}/photographs.html\n" in output
    page = (folder / "photographs.html").read_text(encoding="utf-8")
    sections = page.split("<h3>")[1:]
    assert len(sections) == len(QUERIES)
    for section, (query, names) in zip(sections, answers(output).items(), strict=True):
        assert section.startswith(f"{query}</h3>")
        shown = re.findall(r'src="data:image/jpeg;base64,[^"]+" alt="([^"]+)"', section)
        assert [Path(name).stem for name in shown[:3]] == names
        assert len(set(shown)) == 5
        assert 'class="right"' not in section  # the page does not know
    for outside in ("http:", "https:", "<script", "@import"):
        assert outside not in page


def test_it_ends_with_what_to_type_next(demo):
    _, output = demo
    search, train = output.splitlines()[-2:]
    assert search.endswith('  clipmatch find "a dog on a beach" --images ~/Pictures')
    assert train.endswith("  clipmatch demo --train")


def test_confidence_is_printed_where_the_model_knows_it(tmp_path):
    results = [
        (query, Matches(query, [Match(tmp_path / f"{query}{number}.png", 0.25, 0.5) for number in range(4)]))
        for query in ("ox", "dog")
    ]
    assert best_matches(results) == [
        "query  best three, and how sure it is",
        "ox   ox0 0.50  ox1 0.50  ox2 0.50",
        "dog  dog0 0.50  dog1 0.50  dog2 0.50",
    ]


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
    def look_up(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("clipmatch.demo.distribution", look_up)
    done = run("--out", tmp_path / "demo")
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr == (
        'Error: The demo needs the package scikit-image; install it with: pip install "clipmatch[demo]"\n'
    )
    assert not (tmp_path / "demo").exists()


def test_an_installation_without_the_photographs(tmp_path, monkeypatch):
    monkeypatch.setattr("clipmatch.demo.FOLDER", "skimage/none")
    done = run("--out", tmp_path / "demo")
    assert done.exit_code == 1
    assert "scikit-image is installed without its sample photographs" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_photographs_are_all_there():
    assert [path.name for path in sample_photographs()] == list(PHOTOGRAPHS)


def test_a_seed_without_training_is_refused(tmp_path):
    done = run("--seed", 0, "--out", tmp_path / "demo")
    assert done.exit_code == 1
    assert done.stderr == (
        "Error: Without --train or --generate nothing is drawn or learnt, so --seed would change nothing; "
        "leave it out.\n"
    )
    assert not (tmp_path / "demo").exists()
