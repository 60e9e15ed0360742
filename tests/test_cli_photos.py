"""A photo collection on the command line: real photographs, the model that comes with clipmatch, real processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from colours import paint
from PIL import ExifTags, Image

from clipmatch.cli import main
from clipmatch.demo import sample_photographs
from clipmatch.export import export_model

COPY = "chelsea_small.jpg"


def run(*arguments, code=0):
    """Run a command in this process; it must end with this status and without a traceback."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    crash = result.exception if not isinstance(result.exception, SystemExit) else None
    assert crash is None, result.output
    assert result.exit_code == code, result.output
    return result


def sentence(*arguments):
    """The one sentence that a command fails with."""
    result = run(*arguments, code=1)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def stems(*arguments):
    """The names of the photographs that `find` prints."""
    return [Path(line).stem for line in run("find", *arguments, "--paths").stdout.splitlines()]


@pytest.fixture(scope="session")
def album(tmp_path_factory):
    """The sample photographs, one of them twice and one with a camera, a date and a caption -> (folder, index file)."""
    place = tmp_path_factory.mktemp("album")
    folder = place / "Pictures"
    folder.mkdir()
    for path in sample_photographs():
        shutil.copy(path, folder)
    with Image.open(folder / "chelsea.png") as cat:
        cat.convert("RGB").resize((300, 200)).save(folder / COPY, quality=80)
    with Image.open(folder / "coffee.png") as coffee:
        exif = Image.Exif()
        exif[ExifTags.Base.Make], exif[ExifTags.Base.Model] = "Pentax", "K-5"
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2023:06:15 12:30:00"
        (folder / "trip").mkdir()
        coffee.convert("RGB").save(folder / "trip" / "IMG_1.jpg", exif=exif)
    (folder / "coffee.png").unlink()
    (folder / "trip" / "IMG_1.txt").write_text("Breakfast at Zermatt")
    index = place / "photos.sqlite"
    done = run("index", folder, "--index", index)
    assert (
        done.stdout == "15 added, 0 moved, 0 changed, 0 unchanged, 0 removed, 0 failed; 15 photographs in the index\n"
    )
    return folder, index


@pytest.fixture(autouse=True)
def this_index(album, monkeypatch):
    """The album's index is the one that is asked when none is named."""
    monkeypatch.setenv("CLIPMATCH_INDEX", str(album[1]))


# Asking


def test_the_index_answers_without_its_folder_being_named(album):
    rows = json.loads(run("find", "a cat", "-k", 3, "--json").stdout)
    assert {rows[0]["path"], *rows[0]["duplicates"]} == {str(album[0] / "chelsea.png"), str(album[0] / COPY)}
    assert rows[0]["confidence"] > 0.5
    assert "+1" in run("find", "a cat", "-k", 1).stdout


def test_duplicates_in_results():
    assert {"chelsea", "chelsea_small"} == set(stems("a cat", "-k", 2, "--duplicates", "show"))
    assert len({"chelsea", "chelsea_small"} & set(stems("a cat", "-k", 16, "--duplicates", "hide"))) == 1


@pytest.mark.parametrize(
    "options",
    [
        ["--camera", "pentax"],
        ["--after", "2023-06", "--before", "2023-07"],
        ["--has-caption"],
        ["--folder", "trip"],
        ["--min-size", "20k", "--has-caption"],
        ["--after", "2023-06-15T12:30", "--min-side", "400"],
    ],
)
def test_filters(album, monkeypatch, options):
    monkeypatch.chdir(album[0])
    assert stems("a cat", *options) == ["IMG_1"]


def test_filters_that_nothing_passes():
    result = run("find", "a cat", "--after", "2031")
    assert (result.stdout, result.stderr) == ("", "No photograph passes the filters.\n")


def test_words_of_captions_count_with_hybrid():
    assert stems("zermatt", "-k", 1, "--hybrid") == ["IMG_1"]
    assert stems("hubble", "-k", 1, "--hybrid") == ["hubble_deep_field"]


def test_what_is_not_wanted_is_left_out():
    assert "motorcycle_left" in stems("a vehicle", "-k", 16)
    result = run("find", "a vehicle", "-k", 16, "--not", "a motorcycle", "--paths")
    assert "motorcycle" not in result.stdout
    assert "chelsea" in result.stdout
    assert "left out for what they show (--not)" in result.stderr


def test_an_example_and_more_like_a_match(album):
    assert set(stems(album[0] / COPY, "-k", 2, "--duplicates", "show")) == {"chelsea", "chelsea_small"}
    assert set(stems("a cat", "--more-like", 1, "-k", 2, "--duplicates", "show")) == {"chelsea", "chelsea_small"}
    assert "there are 15" in sentence("find", "a cat", "--more-like", 20, "--duplicates", "show")


def test_pages_do_not_overlap():
    pages = [stems("a photo", "-k", 5, "--page", page, "--duplicates", "show") for page in (1, 2, 3, 4)]
    assert [len(page) for page in pages] == [5, 5, 5, 0]
    assert len({stem for page in pages for stem in page}) == 15
    assert run("find", "a photo", "-k", 5, "--page", 9).stderr == "No more matches.\n"


def test_nothing_matches():
    result = run("find", "a combine harvester at dusk", "--min-confidence", 0.9)
    assert result.stdout == ""
    assert result.stderr.startswith("No photograph seems to show 'a combine harvester at dusk': the best has")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--after", "soon"], "'soon' is no date; write it as 2023, 2023-06 or 2023-06-15"),
        (["--min-size", "2 MiB"], "'2 MiB' is no size; write it as 500k, 2M or 1.5G"),
        (["--box", "1,2,3"], "give four numbers: SOUTH,WEST,NORTH,EAST"),
        (["--box", "50,0,40,9"], "south must not lie north of north"),
        (["--min-confidence", "7"], "7.0 is not in the range"),
    ],
)
def test_options_that_make_no_sense(options, complaint):
    assert complaint in run("find", "a cat", *options, code=2).stderr


def test_index_and_images_exclude_each_other(album):
    text = sentence("find", "a cat", "--images", album[0], "--index", album[1])
    assert "--images searches folders and --index searches an index; give one of them" in text


def test_no_index_yet(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPMATCH_INDEX", str(tmp_path / "none.sqlite"))
    assert "make one with clipmatch index DIR, or search a folder with --images DIR" in sentence("find", "a cat")
    assert "make it with: clipmatch index DIR" in sentence("index")
    assert "does not exist; check its name" in sentence("index", tmp_path / "nowhere")
    assert "There is no index" in sentence("duplicates", "--index", tmp_path / "other.sqlite")
    assert list(tmp_path.glob("*.sqlite")) == []


def test_a_damaged_index_is_named(tmp_path):
    (tmp_path / "bad.sqlite").write_bytes(b"this is no database, whatever its name says" * 100)
    assert "bad.sqlite" in sentence("find", "a cat", "--index", tmp_path / "bad.sqlite")


def test_near_duplicates_are_listed(album):
    groups = json.loads(run("duplicates", "--json").stdout)
    assert [str(album[0] / "chelsea.png"), str(album[0] / COPY)] in groups
    lines = run("duplicates").stdout.splitlines()
    assert any("451 x 300" in line and line.endswith("chelsea.png") for line in lines)
    assert run("duplicates", "--camera", "pentax").stderr == "No near-duplicates.\n"


# Keeping


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Two pictures and an index of them that a test may change -> (folder, index file)."""
    folder, index = tmp_path / "mine", tmp_path / "mine.sqlite"
    paint(folder / "red.png", "red")
    paint(folder / "sub" / "blue.png", "blue")
    monkeypatch.setenv("CLIPMATCH_INDEX", str(index))
    run("index", folder)
    return folder, index


def test_status_update_and_removal(own):
    folder, index = own
    (folder / "bad.jpg").write_bytes(b"no picture")
    done = run("index")
    assert done.stdout == "0 added, 0 moved, 0 changed, 2 unchanged, 0 removed, 1 failed; 2 photographs in the index\n"
    assert str(folder / "bad.jpg") in done.stderr
    lines = run("index", "--status").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["index", "model", "photographs", "folder", "failed"]
    assert lines[1] == "model        the one that comes with clipmatch"
    assert lines[0].endswith(str(index))
    done = run("index", "--remove", folder / "sub")
    assert done.stdout == f"forgot 1 photographs of {folder / 'sub'}\n"
    assert f"lies in {folder}, which the index keeps up with" in done.stderr
    assert "Nothing of" in sentence("index", "--remove", folder / "sub")
    assert (folder / "sub" / "blue.png").is_file()
    assert "--remove and --status can't be done at once" in sentence("index", "--remove", "--status", folder)


def test_exclusions_are_remembered(own):
    folder, _ = own
    assert run("index", folder, "--exclude", "sub").stdout.endswith("1 removed, 0 failed; 1 photographs in the index\n")
    assert run("index", folder).stdout.endswith("0 removed, 0 failed; 1 photographs in the index\n")
    assert f"{folder} without sub\n" in run("index", "--status").stdout
    assert run("index", folder, "--exclude", "").stdout.startswith("1 added")


def test_another_model_is_refused_until_the_index_is_changed_over(own, model_folder, tmp_path):
    """And then it is found again without being named."""
    export_model(model_folder, tmp_path / "other")
    text = sentence("find", "a star", "--model", tmp_path / "other")
    assert "holds the vectors of another model" in text
    assert f"clipmatch index --reembed --model {tmp_path / 'other'}" in text
    done = run("index", "--reembed", "--model", tmp_path / "other")
    assert done.stdout == "2 photographs embedded anew; 2 in the index\n"
    assert len(stems("a star")) == 2
    assert str(tmp_path / "other") in run("index", "--status").stdout
    assert str(tmp_path / "other") in sentence("find", "a star", "--device", "cpu", "--model", model_folder)


def wait_for(condition, what, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def heed_interrupt():
    """A shell starts its background jobs, such as this test run may be, deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_changes_are_followed_until_ctrl_c(own):
    folder, _ = own
    command = [sys.executable, "-m", "clipmatch.cli", "index", "--watch"]
    said = folder.parent / "said.txt"
    with said.open("w") as file:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, preexec_fn=heed_interrupt)
    try:
        wait_for(lambda: "watching" in said.read_text(), "it does not begin to watch")
        time.sleep(1)  # until the system tells it of changes
        paint(folder / "green.png", "lime")
        wait_for(lambda: "1 added" in said.read_text(), "a new picture is not seen")
        (folder / "green.png").unlink()
        wait_for(lambda: "1 removed" in said.read_text(), "a picture that is gone is not seen")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert "Traceback" not in said.read_text()
    assert process.returncode in (0, 130)


def test_where_watchfiles_is_missing(own, monkeypatch):
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    result = run("index", "--watch", code=1)
    assert 'install it with: pip install "clipmatch[photos]"' in result.stderr
