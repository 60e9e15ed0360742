"""What becomes of matches: each form read back, from real pictures, through the options of a command."""

import io
import json
import os
import re
import tarfile
from base64 import b64decode
from datetime import datetime
from html import unescape
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import ExifTags, Image
from pseudoterminal import Terminal

from clipmatch import remote
from clipmatch.errors import ClipmatchError
from clipmatch.output import (
    OutputOptions,
    copy_file,
    link_file,
    match_table,
    output_options,
    place_matches,
    printable,
    thumbnail,
    write_gallery,
    write_matches,
)
from clipmatch.photo import Metadata, Photo, Stamp
from clipmatch.search import Match, Matches

HOSTILE = "<script>alert('1 & 2')</script>"


def paint(path, size=(640, 400), colour="red", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


@pytest.fixture
def red(tmp_path):
    """A picture of 640 x 400 that was taken long ago."""
    path = paint(tmp_path / "a" / "dog.jpg")
    os.utime(path, ns=(1_000_000_000_123_456_700, 1_000_000_000_123_456_700))
    return path


@pytest.fixture
def found(tmp_path, red):
    """Three matches: one of which all is known, one of the same name with two duplicates, one that is lying."""
    known = Metadata(640, 400, datetime(2023, 6, 1, 12, 30, 5), 47.5, -8.25, "Canon EOS R5", f"Élan {HOSTILE}")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # a quarter turn makes it upright
    lying = paint(tmp_path / "c" / "lying.jpg", (800, 400), "blue", exif=exif)
    photo = Photo(red, "00" * 32, Stamp(1234, 5), known, 0)
    duplicates = (tmp_path / "b" / "copy 1.jpg", tmp_path / "b" / "copy#2.jpg")
    return Matches(
        HOSTILE,
        [
            Match(red, 0.31249, 0.625, photo),
            Match(paint(tmp_path / "b" / "dog.jpg", colour="green"), 0.25, 0.5, duplicates=duplicates),
            Match(lying, -0.125, 0.0),
        ],
    )


@pytest.fixture
def stray(tmp_path):
    """A picture whose name is not UTF-8."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 #1.jpg"))
    try:
        return paint(path)
    except OSError:
        pytest.skip("this file system takes no such names")


def run(matches, *arguments):
    """A command with the options -> what it did; `failures` gets what `write_matches` returned."""

    @click.command()
    @click.argument("query")
    @output_options
    @click.option("--first", default=1)
    def find(query, chosen, first):
        assert query == "a dog"
        for failure in write_matches(matches, chosen, first):
            click.echo(f"{failure.path.name}: {failure.reason}", err=True)

    return CliRunner().invoke(find, ["a dog", *map(str, arguments)])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Printing


def test_table(found, tmp_path):
    assert match_table(found).split("\n") == [
        "rank  score  conf  path",
        f"   1  0.312  0.62  {tmp_path}/a/dog.jpg",
        f"   2  0.250  0.50  {tmp_path}/b/dog.jpg  +2",
        f"   3  -0.125  0.00  {tmp_path}/c/lying.jpg",
    ]
    assert run(found).stdout == match_table(found) + "\n"


def test_table_without_confidence_from_another_rank_on():
    matches = [Match(Path("a\n\x1b[31m.jpg"), 0.5), Match(Path("b.jpg"), 0.25)]
    assert match_table(matches, first=10).split("\n") == [
        "rank  score  path",
        "  10  0.500  a\\n\\x1b[31m.jpg",
        "  11  0.250  b.jpg",
    ]


def test_printable():
    assert printable("a b/ü.jpg") == "a b/ü.jpg"
    assert printable("a\nb\tc\x7f\udcff") == "a\\nb\\tc\\x7f\\udcff"


def test_json_has_all_that_is_known(found, tmp_path):
    first, second, third = json.loads(run(found, "--json").stdout)
    assert first == {
        "path": f"{tmp_path}/a/dog.jpg",
        "score": 0.31249,
        "confidence": 0.625,
        "size": 1234,
        "width": 640,
        "height": 400,
        "taken": "2023-06-01T12:30:05",
        "camera": "Canon EOS R5",
        "latitude": 47.5,
        "longitude": -8.25,
        "caption": f"Élan {HOSTILE}",
        "duplicates": [],
    }
    assert second["duplicates"] == [f"{tmp_path}/b/copy 1.jpg", f"{tmp_path}/b/copy#2.jpg"]
    assert third == {"path": str(found[2].path), "score": -0.125, "confidence": 0.0, "duplicates": []}


def test_jsonl_has_the_same_a_line(found):
    lines = run(found, "--jsonl").stdout.splitlines()
    assert [json.loads(line) for line in lines] == json.loads(run(found, "--json").stdout)


def test_paths_byte_for_byte(stray, red):
    matches = Matches("q", [Match(stray, 0.5), Match(red, 0.4)])
    raw = [os.fsencode(stray), os.fsencode(red)]
    assert b"\xe9" in raw[0]
    assert run(matches, "--paths").stdout_bytes == b"".join(path + b"\n" for path in raw)
    assert run(matches, "-0").stdout_bytes == b"".join(path + b"\0" for path in raw)
    assert [os.fsencode(row["path"]) for row in json.loads(run(matches, "--json").stdout)] == raw


@pytest.mark.parametrize(
    ("arguments", "listed"),
    [
        (["--json", "--jsonl"], "--json and --jsonl"),
        (["-0", "--paths"], "--paths and --print0"),
        (["--thumbnails", "--json", "-0"], "--json, --print0 and --thumbnails"),
    ],
)
def test_one_way_to_print(found, arguments, listed):
    done = run(found, *arguments)
    assert isinstance(done.exception, ClipmatchError)
    assert str(done.exception) == f"{listed} are different ways to print the matches; give one of them."
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [([], ""), (["--thumbnails"], ""), (["--json"], "[]\n"), (["--jsonl"], ""), (["--paths"], ""), (["-0"], "")],
)
def test_nothing_found(arguments, printed, tmp_path):
    done = run(Matches("q", []), *arguments, "--copy-to", tmp_path / "none", "--html", tmp_path / "page.html")
    assert (done.exit_code, done.stdout, done.stderr) == (0, printed, "")
    assert "0 photographs." in (tmp_path / "page.html").read_text()


# Thumbnails in a terminal


def test_no_escapes_into_a_pipe(found, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-kitty")
    done = run(found, "--thumbnails")
    assert done.stdout == match_table(found) + "\n"
    assert done.stderr == (
        "No thumbnails: they need a terminal that shows pictures (by the kitty, iTerm2 or sixel protocol); "
        "--html FILE makes a page of them.\n"
    )


SHOW = """\
import sys
from pathlib import Path
from clipmatch.output import print_thumbnails
from clipmatch.search import Match
print_thumbnails([Match(Path(path), 0.5) for path in sys.argv[1:]])
"""


def test_thumbnails_in_a_terminal(found, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    paths = [found[0].path, tmp_path / "bad.jpg", found[2].path]
    written = Terminal(TERM="xterm-kitty").run(SHOW, *paths)
    text, *pictures = re.split(rb"(\x1b_G.*?m=0;.*?\x1b\\)", written, flags=re.DOTALL)
    assert text.decode() == f"rank  score  path\n   1  0.500  {paths[0]}\n"
    assert pictures[1].decode() == (
        f"\n   2  0.500  {paths[1]}\n      it is not an image in a known format\n   3  0.500  {paths[2]}\n"
    )
    assert pictures[3] == b"\n"
    for code, path in zip(pictures[::2], (paths[0], paths[2]), strict=False):
        data = b64decode(b"".join(re.findall(rb";([^\x1b]*)\x1b", code)))
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(thumbnail(path, (400, 200))))


def test_thumbnails_are_whole_and_upright(found):
    assert thumbnail(found[0].path, (400, 200)).size == (320, 200)
    upright = thumbnail(found[2].path, (400, 200))  # 800 x 400, lying
    assert upright.size == (100, 200)
    assert upright.getpixel((50, 100)) == pytest.approx((0, 0, 254), abs=2)


# A page


def cards(page):
    return re.findall(r"<li><figure.*?</figure></li>", page, re.DOTALL)


def path_of(href):
    """A file URI -> the file's path in bytes."""
    parts = urlsplit(href)
    assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == ("file", "", "", "")
    return unquote_to_bytes(parts.path)


def test_gallery_shows_what_is_known(found, tmp_path):
    done = run(found, "--html", tmp_path / "new" / "page.html", "--paths", "--first", 4)
    assert done.stdout.count("\n") == 3  # beside what is printed
    page = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    first, second, third = cards(page)
    words = [unescape(word).strip() for word in re.findall(r">([^<>]*\S[^<>]*)<", first)]
    assert words == ["dog.jpg", f"Élan {HOSTILE}", "4 · 0.312, conf 0.62", "2023-06-01 12:30", "Canon EOS R5"]
    assert 'datetime="2023-06-01T12:30:05"' in first
    assert "2 more like it" in second
    links = [path_of(href) for href in re.findall(r'href="([^"]+)"', second)]
    assert links == [os.fsencode(path) for path in (found[1].path, *found[1].duplicates)]
    assert ("<time" in third, "<details" in third, "None" in third) == (False, False, False)


def test_gallery_stands_alone(found, tmp_path):
    page = write_gallery(found, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert unescape(re.search("<h1>(.*)</h1>", page)[1]) == HOSTILE
    for outside in ("http:", "https:", "@import", "url("):
        assert outside not in page
    assert all(source.startswith("data:image/jpeg;base64,") for source in re.findall(r'src="([^"]+)"', page))


def test_gallery_pictures(found, tmp_path):
    page = write_gallery(found, tmp_path / "page.html").read_text(encoding="utf-8")
    tags = re.findall(r'base64,([^"]+)" width="(\d+)" height="(\d+)" alt="([^"]+)"', page)
    pictures = [Image.open(io.BytesIO(b64decode(data))) for data, *_ in tags]
    assert [picture.size for picture in pictures] == [(320, 200), (320, 200), (160, 320)]
    assert [(int(width), int(height)) for _, width, height, _ in tags] == [picture.size for picture in pictures]
    assert [unescape(alt) for *_, alt in tags] == [f"Élan {HOSTILE}", "dog.jpg", "lying.jpg"]
    assert not pictures[2].getexif()  # neither a second turn nor a place


def test_gallery_of_awkward_files(stray, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = Path("bad\x1b.jpg")
    bad.write_bytes(b"no picture")
    matches = Matches("caf\udce9", [Match(stray, 0.5), Match(bad, 0.4), Match(Path("gone.jpg"), 0.3)])
    page = write_gallery(matches, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h1>caf\\udce9</h1>" in page
    first, second, third = cards(page)
    assert "caf\\udce9 #1.jpg" in first
    assert path_of(re.search('href="([^"]+)"', first)[1]) == os.fsencode(stray)
    assert "it is not an image in a known format" in second
    assert "bad\\x1b.jpg" in second
    assert path_of(re.search('href="([^"]+)"', third)[1]) == os.fsencode(tmp_path / "gone.jpg")  # not relative
    assert "no such file or directory" in third


def test_gallery_that_can_not_be_written(found, tmp_path):
    (tmp_path / "file").write_text("")
    done = run(found, "--html", tmp_path / "file" / "page.html")
    assert "page.html can't be written (File exists); choose another place." in str(done.exception)
    assert done.stdout == match_table(found) + "\n"  # the answer is not lost


# Copies and links


def test_copies_are_named_by_rank_and_keep_their_times(found, red, tmp_path):
    out = tmp_path / "new" / "out"
    assert run(found, "--copy-to", out).exit_code == 0
    assert contents(out) == {
        "01_dog.jpg": red.read_bytes(),
        "02_dog.jpg": found[1].path.read_bytes(),  # the same name from another folder
        "03_lying.jpg": found[2].path.read_bytes(),
    }
    assert (out / "01_dog.jpg").stat().st_mtime_ns == red.stat().st_mtime_ns
    assert not (out / "01_dog.jpg").is_symlink()


def test_ranks_of_a_later_page_and_of_many(red, tmp_path):
    place_matches([Match(red, 0.5)] * 2, tmp_path / "out", copy_file, first=99)
    assert sorted(contents(tmp_path / "out")) == ["099_dog.jpg", "100_dog.jpg"]


@pytest.mark.parametrize("option", ["--copy-to", "--link-to"])
def test_the_same_again_changes_nothing(found, tmp_path, option):
    def state():
        return {path: path.lstat() for path in (tmp_path / "out").iterdir()}

    run(found, option, tmp_path / "out")
    before = state()
    assert len(before) == 3
    done = run(found, option, tmp_path / "out")
    assert (done.exit_code, done.stderr) == (0, "")
    assert [(s.st_ino, s.st_mtime_ns) for s in state().values()] == [(s.st_ino, s.st_mtime_ns) for s in before.values()]


def test_links_lead_to_the_originals(found, red, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = Matches("q", [Match(Path("a/dog.jpg"), 0.5), *found[1:]])
    assert run(relative, "--link-to", "out").exit_code == 0
    assert sorted(contents(tmp_path / "out")) == ["01_dog.jpg", "02_dog.jpg", "03_lying.jpg"]
    assert (tmp_path / "out" / "01_dog.jpg").readlink() == red


@pytest.mark.parametrize("option", ["--copy-to", "--link-to"])
@pytest.mark.parametrize("other", ["file", "folder", "link"])
def test_nothing_is_overwritten(found, tmp_path, option, other):
    target = tmp_path / "out" / "02_dog.jpg"
    target.parent.mkdir()
    if other == "file":
        target.write_text("mine")
    elif other == "folder":
        target.mkdir()
    else:
        target.symlink_to("nowhere")
    done = run(found, option, target.parent)
    assert isinstance(done.exception, ClipmatchError)
    assert str(done.exception) == f"{target} is there already and is something else; choose another folder."
    assert done.stdout == match_table(found) + "\n"
    if other == "file":
        assert target.read_text() == "mine"
    elif other == "link":
        assert str(target.readlink()) == "nowhere"


def test_a_link_is_no_copy(found, tmp_path):
    run(found, "--link-to", tmp_path / "out")
    assert "is something else" in str(run(found, "--copy-to", tmp_path / "out").exception)


@pytest.mark.parametrize("option", ["--copy-to", "--link-to"])
def test_folders_that_are_none(found, red, option):
    before = red.read_bytes()
    assert str(run(found, option, red).exception) == f"{red} is a file; name a folder."
    assert str(run(found, option, red / "out").exception) == (
        f"The folder {red}/out can't be made: not a directory; choose another."
    )
    assert red.read_bytes() == before


@pytest.mark.parametrize("place", [copy_file, link_file])
def test_a_photograph_that_has_gone_is_reported_and_the_others_are_placed(found, tmp_path, place):
    found[1].path.unlink()
    (failure,) = place_matches(found, tmp_path / "out", place)
    assert (failure.path, failure.reason) == (found[1].path, "no such file or directory")
    assert sorted(contents(tmp_path / "out")) == ["01_dog.jpg", "03_lying.jpg"]


def test_pictures_in_an_archive_are_copied_out_of_it_and_not_linked(red, tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        shard.add(red, "sub/dog.jpg")
    inside = [Match(tmp_path / "shard.tar" / "sub" / name, 0.5) for name in ("dog.jpg", "cat.jpg")]
    for _ in range(2):  # a second run leaves what the first has made
        (failure,) = place_matches(inside, tmp_path / "out", copy_file)
        assert (failure.path, failure.reason) == (inside[1].path, "no such file or directory")
        assert (tmp_path / "out" / "01_dog.jpg").read_bytes() == red.read_bytes()
    failures = place_matches(inside[:1], tmp_path / "links", link_file)
    assert [failure.reason for failure in failures] == [
        "it is in an archive or on object storage; --copy-to copies it out"
    ]
    (tmp_path / "out" / "01_dog.jpg").write_bytes(b"mine")
    with pytest.raises(ClipmatchError, match="is there already and is something else"):
        place_matches(inside[:1], tmp_path / "out", copy_file)


def test_pictures_on_object_storage_are_copied(red, tmp_path):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.pipe_file("/copies/dog.jpg", red.read_bytes())
    found = [Match(remote.absolute(f"fsspec+memory://copies/{name}.jpg"), 0.5) for name in ("dog", "cat")]
    for _ in range(2):
        (failure,) = place_matches(found, tmp_path / "out", copy_file)
        assert failure.path == found[1].path
        assert (tmp_path / "out" / "01_dog.jpg").read_bytes() == red.read_bytes()
    assert len(place_matches(found, tmp_path / "links", link_file)) == 2


def test_a_full_disk_leaves_no_half_copy(red, tmp_path, monkeypatch):
    def fill(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", fill)
    with pytest.raises(ClipmatchError, match=r"01_dog\.jpg can't be made: no space left on device; choose another"):
        place_matches([Match(red, 0.5)], tmp_path / "out", copy_file)
    assert contents(tmp_path / "out") == {}


def test_where_there_are_no_links(red, tmp_path, monkeypatch):
    def refuse(self, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(ClipmatchError, match=r"can't be made: operation not permitted; --copy-to makes copies instead"):
        place_matches([Match(red, 0.5)], tmp_path / "out", link_file)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(red, tmp_path):
    (tmp_path / "shut").mkdir(mode=0o500)
    with pytest.raises(ClipmatchError, match="can't be made: permission denied; choose another"):
        place_matches([Match(red, 0.5)], tmp_path / "shut" / "out", copy_file)
    with pytest.raises(ClipmatchError, match="can't be made: permission denied; choose another"):
        place_matches([Match(red, 0.5)], tmp_path / "shut", copy_file)


def test_all_at_once(found, tmp_path):
    chosen = OutputOptions(html=tmp_path / "p.html", copy_to=tmp_path / "copies", link_to=tmp_path / "links")
    assert write_matches(found, chosen) == []
    assert (tmp_path / "p.html").is_file()
    assert contents(tmp_path / "copies") == contents(tmp_path / "links")
