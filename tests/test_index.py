"""The photo index: what it keeps, how it keeps up, what happens when it is stopped, damaged or shared."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
from colours import SLOW, ColourEmbedder, paint
from PIL import ExifTags, Image

from clipmatch.crawl import list_images, walk
from clipmatch.errors import ClipmatchError, Failure
from clipmatch.index import Index
from clipmatch.store import Filter, Store
from clipmatch.storefile import UPGRADES, version_of


@pytest.fixture
def model():
    return ColourEmbedder()


@pytest.fixture
def index(kind, tmp_path, model):
    with Index.open(tmp_path / f"photos.{kind}", model) as opened:
        yield opened


def names(matches):
    return [match.path.name for match in matches]


def later(path):
    """As if the file had been written some time after."""
    stamp = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(stamp, stamp))
    return path


# Which files


def test_pictures_of_a_folder_in_order(photos):
    (photos / "notes.txt").write_text("no picture")
    paint(photos / ".hidden.png", "red")
    paint(photos / ".thumbnails" / "red.png", "red")
    shutil.copy(photos / "red.png", photos / "UPPER.PNG")
    found = [str(path.relative_to(photos)) for path in list_images(photos)]
    assert found == ["UPPER.PNG", "orange.png", "red.png", "sub/blue.png", "sub/green.png"]


def test_a_file_stands_for_itself(photos):
    assert list_images(photos / "red.png") == [photos / "red.png"]


def test_folders_without_pictures(tmp_path):
    with pytest.raises(ClipmatchError, match="nowhere does not exist; check its name"):
        list_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ClipmatchError, match=r"empty holds no pictures \(.*\.jpeg"):
        list_images(tmp_path / "empty")


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("*.png", set()),
        ("sub", {"red.png", "orange.png"}),
        ("sub/g*", {"red.png", "orange.png", "blue.png"}),
        ("nothing", {"red.png", "orange.png", "green.png", "blue.png"}),
    ],
)
def test_what_is_excluded(photos, pattern, left):
    assert {found.path.name for found in walk(photos, [pattern])} == left


def test_links_to_folders_are_followed_when_asked_and_loops_end(photos, tmp_path):
    paint(tmp_path / "elsewhere" / "white.png", "white")
    (photos / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (photos / "sub" / "loop").symlink_to(photos, target_is_directory=True)
    assert len(list(walk(photos))) == 4
    assert sorted(found.path.name for found in walk(photos, follow_links=True))[-1] == "white.png"
    assert len(list(walk(photos, follow_links=True))) == 5


# Keeping up


def test_the_first_time_and_the_second(index, model, photos):
    summary = index.update([photos], progress=False)
    assert str(summary) == "4 added, 0 moved, 0 changed, 0 unchanged, 0 removed, 0 failed"
    assert sorted(path.name for path in model.seen) == ["blue.png", "green.png", "orange.png", "red.png"]
    model.seen.clear()
    assert str(index.update(progress=False)) == "0 added, 0 moved, 0 changed, 4 unchanged, 0 removed, 0 failed"
    assert model.seen == []
    assert names(index.find("red", duplicates="show"))[:2] == ["red.png", "orange.png"]


def test_a_moved_file_keeps_its_vector(index, model, photos):
    index.update([photos], progress=False)
    model.seen.clear()
    (photos / "2024").mkdir()
    (photos / "red.png").rename(photos / "2024" / "scarlet.png")
    assert str(index.update(progress=False)) == "0 added, 1 moved, 0 changed, 3 unchanged, 0 removed, 0 failed"
    assert model.seen == []
    assert index.find("red")[0].path == photos / "2024" / "scarlet.png"


def test_a_copy_shares_the_vector(index, model, photos):
    index.update([photos], progress=False)
    model.seen.clear()
    shutil.copy(photos / "red.png", photos / "again.png")
    assert index.update(progress=False).added == 1
    assert model.seen == []
    assert set(names(index.find("red", top_k=2, duplicates="show"))) == {"red.png", "again.png"}


def test_copies_in_batches_that_are_under_way_together(index, model, photos, monkeypatch):
    """Each content is embedded once, and a bad one is tried once, wherever its copies lie."""
    monkeypatch.setattr("clipmatch.ingest.BATCH", 1)
    (photos / "bad.jpg").write_bytes(b"no picture")
    for number in range(4):
        shutil.copy(photos / "red.png", photos / f"red{number}.png")
        shutil.copy(photos / "bad.jpg", photos / f"bad{number}.jpg")
    summary = index.update([photos], progress=False)
    assert (summary.added, len(summary.failures)) == (8, 5)
    assert len({failure.reason for failure in summary.failures}) == 1
    assert len(model.seen) == 5
    found = names(index.find("red", top_k=5, duplicates="show"))
    assert set(found) == {"red.png", *(f"red{number}.png" for number in range(4))}


def test_a_deleted_file_leaves_and_a_changed_one_is_embedded_anew(index, model, photos):
    index.update([photos], progress=False)
    (photos / "red.png").unlink()
    later(paint(photos / "orange.png", (0, 0, 255)))
    summary = index.update(progress=False)
    assert (summary.removed, summary.changed, summary.unchanged) == (1, 1, 2)
    assert "red.png" not in names(index.find("red"))
    blues = index.find("blue", duplicates="show")
    assert {match.path.name for match in blues if match.score > 0.99} == {"blue.png", "orange.png"}


def test_a_bad_picture_costs_no_other_and_is_tried_again_when_it_changes(index, model, photos):
    bad = photos / "bad.png"
    bad.write_bytes(b"no picture")
    for _ in range(2):
        summary = index.update([photos], progress=False)
        assert [failure.path for failure in summary.failures] == [bad]
        assert len(index) == 4
    assert model.seen.count(bad) == 1  # the second time its stamp was enough
    later(paint(bad, (255, 255, 255)))
    assert index.update(progress=False).added == 1
    assert len(index) == 5


def test_a_picture_that_becomes_bad_leaves_the_index(index, photos):
    index.update([photos], progress=False)
    (photos / "red.png").write_bytes(b"no picture")
    later(photos / "red.png")
    assert [failure.path.name for failure in index.update(progress=False).failures] == ["red.png"]
    assert "red.png" not in names(index.find("red"))


def test_a_folder_that_has_become_empty_keeps_its_photographs(index, photos):
    """As the place of a disk that is not plugged in."""
    index.update([photos], progress=False)
    shutil.move(photos, photos.with_name("unplugged"))
    photos.mkdir()
    summary = index.update(progress=False)
    assert [failure.path for failure in summary.failures] == [photos]
    assert "is empty now; its 4 photographs stay" in summary.failures[0].reason
    assert len(index) == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may read everything")
def test_a_folder_that_can_not_be_read_keeps_its_photographs(index, photos):
    index.update([photos], progress=False)
    (photos / "sub").chmod(0)
    try:
        summary = index.update(progress=False)
    finally:
        (photos / "sub").chmod(0o755)
    assert [failure.path for failure in summary.failures] == [photos / "sub"]
    assert len(index) == 4


def test_two_folders_and_one_again(index, photos, tmp_path):
    other = paint(tmp_path / "other" / "white.png", "white").parent
    index.update([photos, other], progress=False)
    (photos / "red.png").unlink()
    (other / "white.png").unlink()
    paint(other / "black.png", "black")
    assert index.update([other], progress=False).removed == 1  # only what was asked for is looked at
    assert len(index) == 5
    assert index.update(progress=False).removed == 1


def test_without_a_folder(index):
    with pytest.raises(ClipmatchError, match="keeps up with no folder yet; name one: clipmatch index DIR"):
        index.update(progress=False)


def test_a_folder_that_is_not_there(index, photos):
    with pytest.raises(ClipmatchError, match="nowhere does not exist"):
        index.update([photos, photos / "nowhere"], progress=False)
    assert len(index) == 0


@pytest.mark.parametrize("name", [b"caf\xe9.png", b'it\'s "quoted".png', b"two\nlines.png", "Ω ☃.png".encode()])
def test_awkward_names(index, tmp_path, name):
    folder = os.fsencode(tmp_path / "odd")
    os.mkdir(folder)  # noqa: PTH102 - a name of bytes
    try:
        with open(os.path.join(folder, name), "wb") as file:  # noqa: PTH118, PTH123
            Image.new("RGB", (8, 8), "red").save(file, format="PNG")
    except OSError:
        pytest.skip("this file system takes no such name")
    index.update([tmp_path / "odd"], progress=False)
    (match,) = index.find("red")
    assert os.fsencode(match.path) == os.path.join(folder, name)  # noqa: PTH118
    assert index.update(progress=False).unchanged == 1


def test_a_picture_whose_library_is_missing_is_taken_in_once_it_is_there(index, photos, monkeypatch):
    (photos / "red.png").rename(photos / "red.heic")
    monkeypatch.setattr("clipmatch.imageformats.library", lambda name: None)
    summary = index.update([photos], progress=False)
    assert [(failure.path.name, "clipmatch[photos]" in failure.reason) for failure in summary.failures] == [
        ("red.heic", True)
    ]
    monkeypatch.undo()
    assert index.update(progress=False).added == 1


# Being stopped, shared, damaged


def test_an_interruption_keeps_what_was_done(index, model, photos, monkeypatch):
    monkeypatch.setattr("clipmatch.ingest.BATCH", 2)
    calls = []

    def interrupted(paths, progress=True, **options):
        calls.append(paths)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ColourEmbedder.embed_images(model, paths, progress, **options)

    model.embed_images = interrupted
    with pytest.raises(KeyboardInterrupt):
        index.update([photos], progress=False)
    assert len(index) == 2
    del model.embed_images
    model.seen.clear()
    assert str(index.update(progress=False)) == "2 added, 0 moved, 0 changed, 2 unchanged, 0 removed, 0 failed"
    assert len(model.seen) == 2


@pytest.fixture
def many(tmp_path):
    """80 pictures, each of another red."""
    for number in range(80):
        paint(tmp_path / "many" / f"{number:02d}.png", (100 + number, 0, 0))
    return tmp_path / "many"


def start_slow(path, folder):
    command = [sys.executable, "-c", SLOW, path, folder]
    return subprocess.Popen(command, cwd=Path(__file__).parent, stderr=subprocess.PIPE, text=True)


def wait_for_rows(path, least):
    end = time.monotonic() + 300  # on a busy machine too
    while time.monotonic() < end:
        if path.is_file():
            with sqlite3.connect(path) as store:
                try:
                    count = store.execute("SELECT count(*) FROM photos").fetchone()[0]
                except sqlite3.OperationalError:  # not made yet
                    count = 0
            if count >= least:
                return count
        time.sleep(0.02)
    raise AssertionError("nothing was indexed")


def test_killed_at_any_moment_it_goes_on(many, tmp_path):
    """Killed without warning several times; what was stored is whole, and the end is that of an unbroken run."""
    path = tmp_path / "killed.sqlite"
    least = 2
    for _ in range(4):
        process = start_slow(path, many)
        stored = wait_for_rows(path, least)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with sqlite3.connect(path) as store:
            assert store.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            found = store.execute("SELECT count(*) FROM photos").fetchone()[0]
            assert found >= stored
            orphans = "SELECT count(*) FROM photos WHERE digest NOT IN (SELECT digest FROM vectors)"
            assert store.execute(orphans).fetchone() == (0,)
        least = min(found + 4, 80)
    model = ColourEmbedder()
    with Index.open(path, model) as index:
        index.update(progress=False)
        assert len(index) == 80
        assert len(model.seen) <= 80 - found
        assert len(index.find("red", top_k=100, duplicates="show")) == 80


def test_one_writes_and_others_read(many, tmp_path):
    path = tmp_path / "shared.sqlite"
    writer = start_slow(path, many)
    try:
        wait_for_rows(path, 4)
        with Index.open(path, ColourEmbedder()) as reader:
            assert len(reader.find("red", top_k=3, duplicates="show")) == 3
            with pytest.raises(ClipmatchError, match=r"Another clipmatch is writing the index .*; try again later"):
                reader.update(wait=False, progress=False)
    finally:
        writer.wait(300)
    assert writer.returncode == 0


def test_a_second_writer_waits_and_says_so(many, tmp_path):
    path = tmp_path / "shared.sqlite"
    first = start_slow(path, many)
    wait_for_rows(path, 2)
    second = start_slow(path, many)
    _, said = second.communicate(timeout=300)
    assert first.wait(300) == 0
    assert "Another clipmatch is writing the index" in said
    assert second.returncode == 0
    with Index.open(path, ColourEmbedder()) as index:
        assert len(index) == 80


def test_the_derived_file_may_be_lost_stale_or_damaged(index, photos, tmp_path):
    index.update([photos], progress=False)
    expected = [(match.path, match.score) for match in index.find("red")]
    derived = Path(f"{index.store.derived}.vectors")
    assert derived.is_file()
    whole = derived.read_bytes()
    for damage in (b"", b"nonsense", whole[:-8], whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]):
        derived.write_bytes(damage)
        assert [(match.path, match.score) for match in index.find("red")] == expected
        assert derived.read_bytes() == whole
    derived.unlink()
    assert [(match.path, match.score) for match in index.find("red")] == expected
    (photos / "red.png").unlink()
    index.update(progress=False)
    assert names(index.find("red"))[0] == "orange.png"


def test_no_index(tmp_path):
    with pytest.raises(ClipmatchError, match=r"There is no index .*none.sqlite; make it with: clipmatch index DIR"):
        Index.open(tmp_path / "none.sqlite", create=False)


@pytest.mark.parametrize("kind", ["sqlite"])
def test_an_index_that_is_damaged_or_newer(index, photos, tmp_path):
    index.update([photos], progress=False)
    index.close()
    path = tmp_path / "photos.sqlite"
    with sqlite3.connect(path) as store:
        store.execute("PRAGMA user_version = 99")
    store.close()
    with pytest.raises(
        ClipmatchError, match=r"photos\.sqlite is from a newer clipmatch, and this is .*; upgrade this one"
    ):
        Index.open(path)
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(ClipmatchError, match=r"photos.sqlite is damaged \(.*\); delete it"):
        Index.open(path)
    assert path.read_bytes().startswith(b"this is no database")


def test_an_older_index_is_brought_up_to_date(tmp_path, monkeypatch):
    Store.open(tmp_path / "old.sqlite", create=True).close()
    monkeypatch.setattr("clipmatch.storefile.UPGRADES", (*UPGRADES, "ALTER TABLE photos ADD COLUMN stars INTEGER;"))
    with Store.open(tmp_path / "old.sqlite") as store:
        assert version_of(store._db) == len(UPGRADES) + 1
        store._db.execute("SELECT stars FROM photos")


def test_an_upgrade_that_fails_changes_nothing(tmp_path, monkeypatch):
    Store.open(tmp_path / "old.sqlite", create=True).close()
    broken = "CREATE TABLE half (name TEXT);\nALTER TABLE nothing ADD COLUMN stars INTEGER;"
    monkeypatch.setattr("clipmatch.storefile.UPGRADES", (*UPGRADES, broken))
    with pytest.raises(ClipmatchError):
        Store.open(tmp_path / "old.sqlite")
    monkeypatch.undo()
    with Store.open(tmp_path / "old.sqlite") as store:
        assert version_of(store._db) == len(UPGRADES)
        assert store._db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'half'").fetchone() == (0,)


# Models


def test_another_model_is_refused(index, photos):
    index.update([photos], progress=False)
    with (
        Index.open(index.store.path, ColourEmbedder("other")) as other,
        pytest.raises(
            ClipmatchError,
            match=r"holds the vectors of another model; search it by that .*: clipmatch find QUERY .* --reembed",
        ),
    ):
        other.find("red")


def test_changing_over_to_another_model(index, photos, tmp_path, monkeypatch):
    """The old index answers until the switch; interrupted, the second call does the rest only."""
    monkeypatch.setattr("clipmatch.ingest.BATCH", 2)
    index.update([photos], progress=False)
    other = ColourEmbedder("other")
    calls = []

    def interrupted(paths, progress=True, **options):
        calls.append(paths)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ColourEmbedder.embed_images(other, paths, progress, **options)

    other.embed_images = interrupted
    with pytest.raises(KeyboardInterrupt):
        index.reembed(other, progress=False)
    assert names(index.find("red"))[0] == "red.png"
    del other.embed_images
    other.seen.clear()
    index.reembed(other, progress=False)
    assert len(other.seen) == 2
    assert names(index.find("red"))[0] == "red.png"
    assert index.store.model.fingerprint == "other"
    contents = {photo.digest for photo in index}
    assert index.store.embedded("colours", contents) == set()
    assert index.store.embedded("other", contents) == contents


# Rows and filters


def photograph(path, colour, taken=None, camera=None, position=None):
    image = Image.new("RGB", (40, 30), colour)
    exif = Image.Exif()
    if taken:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = taken
    if camera:
        exif[ExifTags.Base.Make], exif[ExifTags.Base.Model] = camera
    if position:
        north, east = position
        gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
        gps.update({1: "N" if north >= 0 else "S", 2: (abs(north), 0.0, 0.0), 3: "E" if east >= 0 else "W",
                    4: (abs(east), 0.0, 0.0)})  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95, exif=exif)
    return path


@pytest.fixture
def album(index, tmp_path):
    """Red photographs of several days, cameras and places; their names tell which."""
    folder = tmp_path / "album"
    photograph(folder / "spring" / "a.jpg", (255, 0, 0), "2023:05:01 10:00:00", ("Canon", "Canon EOS R5"), (48.0, 11.0))
    photograph(folder / "spring" / "b.jpg", (0, 255, 0), "2023:06:01 00:00:00", ("Google", "Pixel 7"), (-17.0, 179.0))
    photograph(folder / "summer" / "c.jpg", (0, 0, 255), "2023:07:15 12:30:00", None, (-17.0, -179.0))
    photograph(folder / "summer" / "d.jpg", (255, 255, 255))
    (folder / "summer" / "d.txt").write_text("Snow, nothing but snow\n")
    index.update([folder], progress=False)
    return folder


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({}, "abcd"),
        ({"folders": ("spring",)}, "ab"),
        ({"folders": ("spring", "summer/c.jpg")}, "abc"),
        ({"after": datetime(2023, 6, 1)}, "bc"),
        ({"before": datetime(2023, 6, 1)}, "a"),
        ({"after": datetime(2023, 6, 1), "before": datetime(2023, 7, 1)}, "b"),
        ({"camera": "pixel"}, "b"),
        ({"camera": "CANON"}, "a"),
        ({"min_side": 30}, "abcd"),
        ({"min_side": 31}, ""),
        ({"min_size": 100}, "abcd"),
        ({"min_size": 100_000}, ""),
        ({"has_caption": True}, "d"),
        ({"box": (40, 0, 50, 20)}, "a"),
        ({"box": (-20, 170, 0, -170)}, "bc"),  # over the date line
    ],
)
def test_filters(index, album, where, expected):
    if "folders" in where:
        where = {"folders": tuple(album / name for name in where["folders"])}
    found = index.find("red", where=Filter(**where), duplicates="show")
    assert "".join(sorted(match.path.stem for match in found)) == expected
    assert found.searched == len(expected)


def test_a_folder_whose_name_begins_alike_is_another(index, tmp_path):
    paint(tmp_path / "a" / "one.png", "red")
    paint(tmp_path / "a-b" / "two.png", "red")
    paint(tmp_path / "ab" / "three.png", "red")
    index.update([tmp_path / "a", tmp_path / "a-b", tmp_path / "ab"], progress=False)
    assert names(index.find("red", where=Filter(folders=(tmp_path / "a",)))) == ["one.png"]


def test_what_a_row_knows(index, album):
    photos = {photo.path.stem: photo for photo in index}
    a = photos["a"]
    assert (a.metadata.width, a.metadata.height) == (40, 30)
    assert a.metadata.taken == datetime(2023, 5, 1, 10)
    assert a.metadata.camera == "Canon EOS R5"
    assert (a.metadata.latitude, a.metadata.longitude) == (48, 11)
    assert photos["d"].metadata.caption == "Snow, nothing but snow"
    assert a.stamp.size == a.path.stat().st_size


def test_a_caption_that_changes_costs_no_embedding(index, model, album):
    model.seen.clear()
    later(album / "summer" / "d.txt").write_text("Fog")
    (album / "summer" / "c.txt").write_text("The blue hour")
    index.update(progress=False)
    assert model.seen == []
    captions = {photo.path.stem: photo.metadata.caption for photo in index}
    assert captions == {"a": None, "b": None, "c": "The blue hour", "d": "Fog"}


def test_words_of_captions_and_names_take_part(index, album):
    """White is no nearer to red than blue or green is; the word brings it to the second place."""
    assert names(index.find("red", duplicates="show"))[0] == "a.jpg"
    index.embedder.words["snow"] = "red"
    assert index.find("snow", hybrid=True, duplicates="show")[0].path.stem in ("a", "d")
    assert {match.path.stem for match in index.find("snow", hybrid=True, duplicates="show")[:2]} == {"a", "d"}


def test_rows_for_a_table(index, album):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(photo.row() for photo in index)
    assert set(table["camera"].dropna()) == {"Canon EOS R5", "Google Pixel 7"}
    assert table["taken"].min() == datetime(2023, 5, 1, 10)
    assert list(table["width"]) == [40] * 4
    found = index.find("red", duplicates="show")
    table = pandas.DataFrame(match.row() for match in found)
    assert list(table["path"]) == [str(match.path) for match in found]
    assert table["score"].is_monotonic_decreasing
    assert table["size"][0] == found[0].path.stat().st_size


def test_failures_are_kept(index, photos):
    (photos / "bad.png").write_bytes(b"x")
    index.update([photos], progress=False)
    assert [failure.path for failure in index.store.failures()] == [photos / "bad.png"]
    assert isinstance(index.store.failures()[0], Failure)


# What is away for a while


def test_changing_over_while_a_disk_is_away_changes_nothing(index, photos, tmp_path):
    index.update([photos], progress=False)
    photos.rename(tmp_path / "unplugged")
    with pytest.raises(ClipmatchError, match=r"4 photographs can't be read now, .*; the index still answers"):
        index.reembed(ColourEmbedder("other"), progress=False)
    assert index.store.model.fingerprint == "colours"
    assert len(index) == 4


def test_a_folder_that_is_gone_stops_no_other(index, photos, tmp_path):
    paint(tmp_path / "second" / "white.png", (255, 255, 255))
    index.update([photos, tmp_path / "second"], progress=False)
    shutil.rmtree(tmp_path / "second")
    paint(photos / "new.png", (1, 2, 3))
    summary = index.update(progress=False)
    assert (summary.added, summary.removed) == (1, 0)
    assert [failure.path for failure in summary.failures] == [tmp_path / "second"]
    assert "clipmatch index --remove" in summary.failures[0].reason
    assert len(index) == 6


def test_a_folder_in_a_folder_is_counted_once(index, photos):
    paint(photos / ".private" / "white.png", (255, 255, 255))
    folders = [photos, photos / "sub", photos / ".private"]
    assert index.update(folders, progress=False).added == 5
    for _ in range(2):
        assert str(index.update(progress=False)) == "0 added, 0 moved, 0 changed, 5 unchanged, 0 removed, 0 failed"


def test_how_a_folder_is_walked_is_remembered_until_it_is_said_anew(index, photos):
    assert index.update([photos], exclude=["sub"], progress=False).added == 2
    assert index.update([photos], progress=False).added == 0
    assert index.store.roots()[0].exclude == ("sub",)
    assert index.update([photos], exclude=[""], progress=False).added == 2
    assert index.store.roots()[0].exclude == ()
    assert index.update([photos], follow_links=True, progress=False).added == 0
    index.update([photos], exclude=["sub"], progress=False)
    assert index.store.roots()[0].follow_links


def test_a_folder_without_photographs_can_be_forgotten(index, tmp_path):
    (tmp_path / "bare").mkdir()
    index.update([tmp_path / "bare"], progress=False)
    assert index.remove(tmp_path / "bare") == 0
    assert index.store.roots() == []
    with pytest.raises(ClipmatchError, match=r"Nothing of .*bare is in the index"):
        index.remove(tmp_path / "bare")


@pytest.mark.parametrize("kind", ["sqlite"])
def test_an_index_whose_inside_is_damaged(index, photos, tmp_path):
    """Its first page is good, so it opens; each question is answered by one sentence."""
    index.update([photos], progress=False)
    index.close()
    Path(f"{index.store.path}.vectors").unlink()
    whole = index.store.path.read_bytes()
    assert len(whole) > 8192
    index.store.path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    questions = (
        lambda damaged: damaged.find("red"),
        lambda damaged: len(damaged),
        list,
        lambda damaged: damaged.update(progress=False),
        lambda damaged: damaged.duplicates(),
    )
    for question in questions:
        with pytest.raises(ClipmatchError, match=r"photos.sqlite (is damaged|can't be used)"):  # noqa: SIM117
            with Index.open(index.store.path, ColourEmbedder()) as damaged:
                question(damaged)


def test_an_unchanged_index_keeps_its_derived_files(index, photos):
    index.update([photos], progress=False)
    token = index.store.content
    index.update([photos], progress=False)
    assert index.store.content == token


def test_an_open_index_notices_that_its_model_was_changed(index, photos):
    index.update([photos], progress=False)
    index.find("red")
    with Index.open(index.store.path, ColourEmbedder("other")) as second:
        second.reembed(second._load(), progress=False)
    with pytest.raises(ClipmatchError, match="holds the vectors of another model"):
        index.find("red")


def test_a_database_of_something_else_stays_as_it_is(tmp_path):
    with sqlite3.connect(tmp_path / "foreign.sqlite") as foreign:
        foreign.execute("CREATE TABLE songs (name TEXT)")
    foreign.close()
    before = (tmp_path / "foreign.sqlite").read_bytes()
    with pytest.raises(ClipmatchError, match="is a database of something else"):
        Store.open(tmp_path / "foreign.sqlite")
    assert (tmp_path / "foreign.sqlite").read_bytes() == before
