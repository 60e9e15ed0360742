"""Files and folders that are there as a whole, or as before."""

from pathlib import Path

import pytest

from clipmatch.atomic import aside, atomic_file, atomic_folder


def tree(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "page.html"
    with atomic_file(path) as draft:
        draft.write_text("half")
        assert not path.exists()
        draft.write_text("whole")
    assert tree(tmp_path) == {"page.html": "whole"}


def test_a_file_that_fails_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")

    def write():
        with atomic_file(path) as draft:
            draft.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert tree(tmp_path) == {"page.html": "old"}


def test_two_writers_of_a_file_do_not_meet(tmp_path):
    path = tmp_path / "page.html"
    with atomic_file(path) as first, atomic_file(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert tree(tmp_path) == {"page.html": "first"}  # the one that ended last, whole


def test_a_name_of_255_bytes_can_be_written(tmp_path):
    path = tmp_path / ("ä" * 127)
    with atomic_file(path) as draft:
        draft.write_text("whole")
    assert path.read_text() == "whole"


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "model"
    for text in ("old", "new"):
        with atomic_folder(folder) as draft:
            (draft / "part").mkdir()
            (draft / "part" / f"{text}.txt").write_text(text)
    assert tree(tmp_path) == {"model/part/new.txt": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("moment", ["while it is filled", "in the last step"])
def test_a_folder_that_fails_leaves_the_old_one(tmp_path, monkeypatch, moment):
    folder, rename = tmp_path / "model", Path.rename
    folder.mkdir()
    (folder / "old.txt").write_text("old")

    def fails(path, target):
        if target == folder and path != aside(folder):
            raise OSError("no room")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)

    def write():
        with atomic_folder(folder) as draft:
            (draft / "new.txt").write_text("new")
            if moment == "while it is filled":
                raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert tree(tmp_path) == {"model/old.txt": "old"}


def test_folders_of_like_names_are_let_be(tmp_path):
    """`gallery.old` may well be what somebody keeps."""
    for name in ("gallery", "gallery.old", "gallery.draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text(name)
    with atomic_folder(tmp_path / "gallery") as draft:
        (draft / "new.txt").write_text("new")
    assert tree(tmp_path) == {
        "gallery/new.txt": "new",
        "gallery.old/mine.txt": "gallery.old",
        "gallery.draft/mine.txt": "gallery.draft",
    }
