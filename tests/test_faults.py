"""Kills, full and read-only disks, newer and half-written files, several at once: nothing is lost, and it is said."""

import asyncio
import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from urllib.request import Request, urlopen

import pytest
import torch
from click.testing import CliRunner
from colours import ColourEmbedder, paint
from fastapi.testclient import TestClient

from clipmatch import desk, server
from clipmatch.atomic import DRAFT, aside, atomic_file, atomic_folder, draft_folder
from clipmatch.checkpoint import load_checkpoint, save_checkpoint
from clipmatch.cli import main
from clipmatch.config import TrainConfig
from clipmatch.data import load_captions, split_captions
from clipmatch.datacheck import check_data
from clipmatch.datafix import write_clean
from clipmatch.errors import ClipmatchError, own_version
from clipmatch.generation import looptools
from clipmatch.index import Index
from clipmatch.output import copy_file
from clipmatch.runlog import RunLog, one_run, read_history
from clipmatch.runstate import find_state, is_finished
from clipmatch.store import Root, Store
from clipmatch.teaching import Concept
from clipmatch.training import train, write_plan

ROOT = Path(__file__).parents[1]


@pytest.fixture
def disk(tmp_path):
    """A disk of 2 MB; skips where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("it takes the administrator's rights to mount a small disk")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@contextmanager
def filled(disk):
    """A disk without any room."""
    with (disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    yield
    (disk / "ballast").unlink()


@contextmanager
def read_only(disk):
    """A disk that can only be read."""
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    yield
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)


@pytest.fixture
def seen(disk, tmp_path):
    """The disk once more, as somebody sees it who can only read it."""
    place = tmp_path / "seen"
    place.mkdir()
    subprocess.run(["mount", "--bind", disk, place], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def clipmatch(*arguments, code=0):
    """A command, here -> what it said."""
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result


# The rig


def test_killed_and_followed_at_a_tiny_size(tmp_path):
    """`benchmarks/reliability_faults.py`, so that it can't rot: two works, killed twice each; their system calls."""
    script, result = ROOT / "benchmarks" / "reliability_faults.py", tmp_path / "result.json"
    size = ["--cheap", "2", "--pictures", "20", "--works", "indexing", "fixing captions"]
    command = [sys.executable, script, *size, "--parts", "kills", "order", "--json", result]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(result.read_text())
    for work in ("indexing", "fixing captions"):
        kills = found["kills"][work]
        assert kills["problems"] == []
        assert all(kills[key] == 2 for key in ("kills", "opens", "kept", "completes", "equal"))
        assert kills["drafts left at the end"] == 0
        if found["order"]:  # there is strace
            order = found["order"][work]
            assert order["renamed"] == order["content first"] == order["folder after"] > 0
            assert order["log not synced"] == 0
    assert "| indexing | 2 |" in done.stdout


# Drafts


def test_drafts_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path):
    dead = tmp_path / f"{DRAFT}{7:032x}"
    dead.write_text("half")
    with atomic_file(tmp_path / "mine.txt") as alive:
        alive.write_text("mine")
        with atomic_file(tmp_path / "other.txt") as draft:
            draft.write_text("other")
        assert not dead.exists()
        assert alive.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "other.txt"]


@pytest.mark.parametrize(("name", "value"), [("fcntl", None), ("lock", lambda *_, **__: None)])  # the system, the disk
def test_where_nothing_can_be_locked_each_has_a_draft_folder_of_its_own(tmp_path, monkeypatch, name, value):
    monkeypatch.setattr(f"clipmatch.atomic.{name}", value)
    with draft_folder(tmp_path / "model") as first:
        (first / "a").write_text("first")
        with draft_folder(tmp_path / "model") as second:
            assert not list(second.iterdir())
        assert (first / "a").read_text() == "first"
    assert not list(tmp_path.iterdir())


def test_links_stay_and_pipes_are_written_into(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    with atomic_file(tmp_path / "link.txt") as draft:
        draft.write_text("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with atomic_file(tmp_path / "pipe") as draft:
        draft.write_text("through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_draft_that_another_process_writes_stays(tmp_path):
    code = (
        "import sys; from pathlib import Path; from clipmatch.atomic import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as draft: draft.write_text('theirs'); print(flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "theirs.txt")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        with atomic_file(tmp_path / "mine.txt") as draft:
            draft.write_text("mine")
        process.communicate("\n")
    assert (tmp_path / "theirs.txt").read_text() == "theirs"


def test_a_folder_that_another_writes_is_refused(tmp_path):
    with atomic_folder(tmp_path / "model") as draft:
        (draft / "mine.txt").write_text("mine")
        with pytest.raises(OSError, match="another process is writing it"), atomic_folder(tmp_path / "model"):
            pass
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["mine.txt"]
    with atomic_folder(tmp_path / "model") as draft:  # and nobody writes it any more
        (draft / "later.txt").write_text("later")


def test_a_draft_in_a_model_folder_is_no_file_of_somebody_else(model_folder, tmp_path):
    """What `clipmatch evaluate` leaves behind if it is killed while it keeps the calibration."""
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / f"{DRAFT}{7:032x}").write_text("half")
    save_checkpoint(load_checkpoint(model_folder), tmp_path / "model")
    assert not (tmp_path / "model" / f"{DRAFT}{7:032x}").exists()


def test_what_takes_its_place_is_on_the_disk_before_and_its_folder_after(tmp_path, monkeypatch):
    """Without that a power cut leaves an empty file, or undoes what was said to be done."""
    events = []

    def note(name, call):
        def noted(first, *more, **options):
            path = Path(f"/proc/self/fd/{first}").readlink() if isinstance(first, int) else first
            events.append((name, path.name if "clipmatch-" not in str(path) else "draft"))
            return call(first, *more, **options)

        return noted

    monkeypatch.setattr(os, "fsync", note("sync", os.fsync))
    monkeypatch.setattr(Path, "replace", note("move", Path.replace))
    monkeypatch.setattr(Path, "rename", note("move", Path.rename))
    (tmp_path / "place").mkdir()
    with atomic_file(tmp_path / "place" / "page.html") as draft:
        draft.write_text("whole")
    assert events == [("sync", "draft"), ("move", "draft"), ("sync", "place")]
    events.clear()
    with atomic_folder(tmp_path / "place" / "model") as draft:
        (draft / "weights").write_text("1")
    assert events == [
        ("sync", "draft"),
        ("sync", "draft"),
        ("move", "draft"),
        ("sync", "place"),
    ]  # the file, its folder


def test_a_copied_match_appears_when_it_is_complete(photos, tmp_path, monkeypatch):
    """Half of one, left by a kill, would be in the way of the next try."""
    target, copyfile = tmp_path / "red.png", shutil.copyfile

    def copy(source, draft):
        assert not target.exists()
        return copyfile(source, draft)

    monkeypatch.setattr(shutil, "copyfile", copy)
    copy_file(photos / "red.png", target)
    copy_file(photos / "red.png", target)  # as a second run does
    assert target.read_bytes() == (photos / "red.png").read_bytes()
    with pytest.raises(ClipmatchError, match="is there already and is something else"):
        copy_file(photos / "orange.png", target)


def test_what_can_not_be_written_goes_by_its_own_name(disk):
    with read_only(disk), pytest.raises(OSError, match="Read-only") as caught, atomic_file(disk / "page.html"):
        pass
    assert caught.value.filename == str(disk / "page.html")


# Full and read-only disks


def test_a_full_disk_ends_an_update_with_one_sentence_and_loses_nothing(disk, photos):
    with Index.open(disk / "photos.sqlite", ColourEmbedder()) as index:
        index.update([photos], progress=False)
        before = [photo for _, photo in index.store.photos()]
        for number in range(60):
            paint(photos / "more" / f"{number}.png", (number, 9, 9))
        with filled(disk):
            with pytest.raises(ClipmatchError, match=r"photos.sqlite can't be written \(No space left.*; make room"):
                index.update(progress=False)
            assert [photo for _, photo in index.store.photos()] == before
            assert [match.path.name for match in index.find("red", top_k=1)] == ["red.png"]
        assert index.update(progress=False).added == 60  # the same index goes on, once there is room
    with filled(disk), Index.open(disk / "photos.sqlite", ColourEmbedder()) as index:
        assert len(index.find("red", top_k=99, duplicates="show")) == 64
        with pytest.raises(ClipmatchError, match="No space left"):
            index.forget_concept("rex")


def test_an_index_on_a_disk_that_can_only_be_read(disk, photos):
    path = disk / "photos.sqlite"
    with Index.open(path, ColourEmbedder()) as index:
        index.update([photos], progress=False)
    (disk / "photos.sqlite.vectors").unlink()
    with read_only(disk), Index.open(path, ColourEmbedder()) as index:
        assert [match.path.name for match in index.find("red", top_k=1)] == ["red.png"]
        with pytest.raises(ClipmatchError, match=r"can't be written \(Read-only file system\); choose another place"):
            index.update(progress=False)
        with pytest.raises(ClipmatchError, match="can't be written"):
            index.teach("rex", [photos / "red.png"])


def test_an_index_that_was_killed_and_can_only_be_read_does_not_hide_what_was_stored(disk, photos):
    path = disk / "photos.sqlite"
    with Index.open(path, ColourEmbedder()) as index:
        index.update([photos], progress=False)
        copy = disk / "copy"
        copy.mkdir()
        with index.store.writer():
            index.store.add_root(Root(disk / "more"))
            for name in ("photos.sqlite", "photos.sqlite-wal"):  # as a kill leaves them
                shutil.copy(disk / name, copy)
    with read_only(disk), pytest.raises(ClipmatchError, match=r"has yet to take in what lies in photos.sqlite-wal"):
        Index.open(copy / "photos.sqlite")
    with Index.open(copy / "photos.sqlite", ColourEmbedder()) as index:
        assert len(index) == 4
        assert disk / "more" in {root.path for root in index.store.roots()}


def test_the_server_goes_on_while_others_change_an_index_that_it_can_only_read(disk, seen, album):
    index = album.copy(disk).index
    command = [sys.executable, "-m", "clipmatch.cli", "serve", "--port", "0", "--index", str(seen / index.name)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        address = server.stdout.readline().split()[-1]

        def ask():
            asked = Request(f"{address}api/search", b'{"query": "a cat"}', {"Content-Type": "application/json"})
            with urlopen(asked) as answer:
                return json.load(answer)["searched"]

        assert ask() == 10
        clipmatch("index", "--remove", album.folder / "trip", "--index", index)
        assert ask() == 9
        with Index.open(disk / "other.sqlite") as other:
            other.update([album.folder / "trip"], progress=False)
        shutil.copy(disk / "other.sqlite", index)  # onto it, and not in its place
        assert ask() == 1
        Path(shutil.copy(album.index, disk / "again.sqlite")).rename(index)
        assert ask() == 10
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=20)
    assert server.returncode == 0
    assert "Traceback" not in errors


def test_an_answer_is_of_one_moment_though_the_index_changes_meanwhile_and_can_only_be_read(disk, seen, photos):
    """Read as one that does not change, it would look damaged, or be half of each."""
    path = disk / "photos.sqlite"
    with Index.open(path, ColourEmbedder()) as index:
        for number in range(200):
            paint(photos / f"{number:04}.png", (number, 9, 9))
        index.update([photos], progress=False)
    counted = []

    def question(index):
        found = index.store.photos()
        first = next(found)
        if not counted:
            with Index.open(path, ColourEmbedder()) as other:
                for number in range(200):
                    (photos / f"{number:04}.png").unlink()
                other.update(progress=False)
                other.store._db.execute("VACUUM")
        counted.append(1)
        return [first, *found]

    asked = desk.Desk(seen / path.name, SimpleNamespace(embedder=ColourEmbedder()))
    try:
        names = {photo.path.name for _, photo in asyncio.run(asked.ask(question))}
    finally:
        asked.close()
    assert (names, len(counted)) == ({"red.png", "orange.png", "green.png", "blue.png"}, 2)


def test_an_index_that_another_is_copied_onto(photos, tmp_path):
    """Unlike one that is moved there it is the same file, of which SQLite still knows parts."""
    path = tmp_path / "photos.sqlite"
    one = paint(tmp_path / "one" / "blue.png", (0, 0, 255)).parent
    for name, folder in (("photos", photos), ("other", one)):
        with Index.open(tmp_path / f"{name}.sqlite", ColourEmbedder()) as index:
            index.update([folder], progress=False)
    with TestClient(server.make_app(path, ColourEmbedder()), base_url="http://127.0.0.1:8765") as client:
        assert client.get("/api/status").json()["photos"] == 4
        with Index.open(path, ColourEmbedder()) as index:  # beside an open server the log is not removed at the end
            index.update([paint(tmp_path / "two" / "red.png", (255, 0, 0)).parent], progress=False)
            index.teach("rex", [photos / "red.png"])
        assert client.get("/api/status").json()["photos"] == 5
        log = path.with_name("photos.sqlite-wal")
        assert not log.exists() or log.stat().st_size == 0
        shutil.copy(tmp_path / "other.sqlite", path)
        assert client.get("/api/status").json()["photos"] == 1
        assert [match["name"] for match in client.post("/api/browse", json={}).json()["matches"]] == ["blue.png"]
    with closing(sqlite3.connect(path)) as checked:
        assert next(checked.execute("PRAGMA integrity_check")) == ("ok",)


def test_a_full_disk_leaves_the_plan_of_a_run(disk, scenes):
    """Else the run could neither be resumed nor begun anew."""
    splits, run = split_captions(load_captions(scenes)), disk / "run"
    run.mkdir()
    write_plan(run, splits, splits, TrainConfig(out=str(run)))
    before = (run / "train.json").read_text()
    with filled(disk):
        with pytest.raises(ClipmatchError, match=r"The run in .* can't be written \(No space left.*make room"):
            write_plan(run, splits, splits, TrainConfig(out=str(run)))
        with pytest.raises(ClipmatchError, match=r"The run in .* can't be written \(No space left"):
            RunLog(run, [])
    assert (run / "train.json").read_text() == before


def test_a_run_on_a_disk_that_fills_up_ends_with_one_sentence_and_goes_on(disk, scenes, model_folder):
    """Also TensorBoard's thread, which would print a traceback."""
    command = [sys.executable, "-m", "clipmatch.cli", "train", "--out", str(disk / "run")]
    options = ["--captions", scenes, "--model", model_folder, "--epochs", "1", "--batch-size", "20"]
    subprocess.run(["mount", "-o", "remount,size=200k", disk], check=True)
    done = subprocess.run(list(map(str, [*command, *options])), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "(No space left on device); make room there and try again." in done.stderr.splitlines()[-1]
    subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
    resumed = ["--resume"] if (disk / "run" / "last").exists() else options
    done = subprocess.run(list(map(str, [*command, *resumed])), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert is_finished(disk / "run")


def test_a_full_disk_leaves_exported_concepts(disk):
    with Store.open(disk / "photos.sqlite", create=True):
        pass
    listed = disk / "concepts.json"
    listed.write_text("those of before")
    with filled(disk):
        said = clipmatch("concepts", "--index", disk / "photos.sqlite", "export", listed, code=1).stderr
    assert "No space left on device); make room there and try again." in said
    assert listed.read_text() == "those of before"


# Newer, and half


def test_what_a_newer_clipmatch_wrote_says_which_version_it_takes(model_folder, tmp_path):
    Store.open(tmp_path / "photos.sqlite", create=True).close()
    with closing(sqlite3.connect(tmp_path / "photos.sqlite")) as store, store:
        assert store.execute("SELECT value FROM about WHERE name = 'needs'").fetchone() == (own_version(),)
        store.execute("PRAGMA user_version = 99")
        store.execute("UPDATE about SET value = '7.1' WHERE name = 'needs'")
    needed = r'is from a newer clipmatch, and this is .*; it takes 7\.1 or later: pip install -U "clipmatch>=7\.1"'
    with pytest.raises(ClipmatchError, match=f"photos.sqlite {needed}"):
        Store.open(tmp_path / "photos.sqlite")
    shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["clipmatch"] == own_version()
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "schema": 99, "clipmatch": "7.1"}))
    with pytest.raises(ClipmatchError, match=f"model {needed}"):
        load_checkpoint(tmp_path / "model")


@pytest.fixture(scope="module")
def run(scenes, model_folder, tmp_path_factory):
    """A finished run; to be copied."""
    out = tmp_path_factory.mktemp("runs") / "run"
    settings = TrainConfig(out=str(out), epochs=1, batch_size=20, precision="float32")
    train(split_captions(load_captions(scenes)), settings, model_folder, progress=False)
    assert is_finished(out)
    return out


@pytest.mark.parametrize(
    "name", ["state.json", "optimizer.safetensors", "model.safetensors", "config.json", "tokenizer.json"]
)
@pytest.mark.parametrize("how", ["half", "missing"])
def test_a_run_whose_last_save_is_half_there(run, scenes, tmp_path, name, how):
    """As a copy that was cut off leaves it: one sentence, and its best model is as it was."""
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "last" / name
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    if how == "missing":
        file.unlink()
    splits = split_captions(load_captions(scenes))
    settings = TrainConfig(out=str(tmp_path / "run"), epochs=1, batch_size=20, precision="float32")
    with pytest.raises(ClipmatchError, match=r"damaged|can't be read|holds no run to resume|is no model folder"):
        train(splits, settings, resume=True, progress=False)
    load_checkpoint(tmp_path / "run" / "best")


def test_a_log_with_zeros_where_a_line_was_to_be(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n' + bytes(9) + b'\n{"step": 2}\n')
    assert read_history(tmp_path) == [{"step": 1}]


def test_a_run_stands_where_its_last_save_says(run, tmp_path):
    assert find_state(tmp_path) is None
    assert not is_finished(tmp_path)
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "last").rename(aside(tmp_path / "run" / "last"))  # killed between two renamings
    assert is_finished(tmp_path / "run")


def test_a_generator_whose_save_was_cut_off_between_two_renamings_goes_on(tmp_path):
    class Learner:
        def __init__(self):
            self.parts = {"line": torch.nn.Linear(1, 1)}
            self.optimizers = {"line": looptools.adamw(self.parts["line"], 0.1)}

        def step(self, number):
            return {"loss": float(number)}

        def look(self, number):
            return {}

    assert looptools.run_steps(Learner(), tmp_path / "run", 2, {}, progress=False)
    (tmp_path / "run" / "last").rename(aside(tmp_path / "run" / "last"))
    with pytest.raises(ClipmatchError, match="already holds a run"):
        looptools.run_steps(Learner(), tmp_path / "run", 3, {}, progress=False)
    assert looptools.run_steps(Learner(), tmp_path / "run", 3, {}, resume=True, progress=False)
    assert looptools.is_finished(tmp_path / "run", 3)


# Captions


def test_a_clean_copy_that_was_cut_off_is_completed(scenes, tmp_path):
    data = load_captions(scenes)
    report = check_data(data, progress=False)
    whole = write_clean(data, report, tmp_path / "whole" / "clean.csv")
    (tmp_path / "cut").mkdir()
    shutil.copy(whole.splits[0], tmp_path / "cut")  # killed after the first file
    fixed = write_clean(data, report, tmp_path / "cut" / "clean.csv")
    files = [fixed.file, *fixed.splits]
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in (whole.file, *whole.splits)]
    (tmp_path / "cut" / "other.train.txt").write_text("mine")
    with pytest.raises(ClipmatchError, match=r"other\.train\.txt is there already and is not overwritten"):
        write_clean(data, report, tmp_path / "cut" / "other.csv")
    assert not (tmp_path / "cut" / "other.csv").exists()


# At the same time


def test_two_that_train_into_one_folder(run, tmp_path):
    out = tmp_path / "run"
    with one_run(out):
        code = (
            "import sys; from pathlib import Path; from clipmatch.runlog import one_run\n"
            "with one_run(Path(sys.argv[1])): pass"
        )
        done = subprocess.run([sys.executable, "-c", code, out], capture_output=True, text=True, check=False)
        assert "Another clipmatch is training in" in done.stderr
    with one_run(out):
        pass


def test_concepts_are_taught_while_an_update_runs(photos, tmp_path):
    with Index.open(tmp_path / "photos.sqlite", ColourEmbedder()) as index:
        index.update([photos], progress=False)
        with index.store.writer():  # as another process holds it
            taught = threading.Thread(target=teach_in_between, args=(tmp_path / "photos.sqlite", photos))
            taught.start()
            taught.join(20)
            assert not taught.is_alive()
        assert [concept.name for concept in index.concepts()] == ["rex"]


def teach_in_between(path, photos):
    with Index.open(path, ColourEmbedder()) as index:
        index.teach("tom", [photos / "red.png"])
        index.rename_concept("tom", "rex")


def test_a_reader_gets_the_old_answers_until_a_change_of_models_is_done(photos, tmp_path):
    path, answers = tmp_path / "photos.sqlite", []

    class Watched(ColourEmbedder):
        def embed_images(self, *arguments, **options):
            with Index.open(path, ColourEmbedder()) as reader:  # as another process does
                answers.append([match.path.name for match in reader.find("red", top_k=2, duplicates="show")])
            return super().embed_images(*arguments, **options)

    with Index.open(path, ColourEmbedder()) as index:
        index.update([photos], progress=False)
        index.reembed(Watched("other"), progress=False)
    assert answers == [["red.png", "orange.png"]]
    with Index.open(path, ColourEmbedder()) as late, pytest.raises(ClipmatchError, match="of another model"):
        late.find("red")


def test_an_index_that_another_program_holds(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("clipmatch.storefile.PATIENCE", 0.2)
    path = tmp_path / "photos.sqlite"
    with Index.open(path, ColourEmbedder()) as index, closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ClipmatchError, match=r"Another program has held the index .*; end that, and try again"):
            index.update([photos], progress=False)
        other.rollback()
        assert index.update([photos], progress=False).added == 4


def test_a_name_that_was_just_taken_is_no_damage(photos, tmp_path):
    with Store.open(tmp_path / "photos.sqlite", create=True) as store:
        row = paint(tmp_path / "x.png", "red") and ColourEmbedder().embed_texts(["red"])[0]
        for name in ("rex", "tom"):
            store.keep_concept("colours", Concept(name, row))
        with pytest.raises(ClipmatchError, match="There is a concept @tom already"):
            store.rename_concept("rex", "tom")
        assert store.rename_concept("rex", "REX")
        assert set(store.concepts()) == {"REX", "tom"}


def test_the_server_follows_an_index_to_another_model(photos, tmp_path, monkeypatch):
    path, other = tmp_path / "photos.sqlite", ColourEmbedder("other")
    with Index.open(path, ColourEmbedder()) as index:
        index.update([photos], progress=False)
    monkeypatch.setattr(desk, "load_model", lambda name: other)
    with TestClient(server.make_app(path, ColourEmbedder()), base_url="http://127.0.0.1:8765") as client:

        def ask():
            return client.post("/api/search", json={"query": "red"})

        assert ask().json()["matches"][0]["name"] == "red.png"
        with Index.open(path, ColourEmbedder()) as index:
            index.reembed(other, progress=False)
        changed = ask()
        assert (changed.status_code, changed.json()["detail"]) == (400, desk.CHANGED)
        assert ask().json()["matches"][0]["name"] == "red.png"
        picture = {"image": ("red.png", (photos / "red.png").read_bytes())}
        found = client.post("/api/search-image", files=picture, data={"question": "{}"}, headers={"X-Clipmatch": "1"})
        assert found.status_code == 200, found.text
        assert found.json()["matches"][0]["name"] == "red.png"


def test_the_server_opens_the_index_that_lies_there_now(photos, tmp_path):
    path = tmp_path / "photos.sqlite"
    for name, folder in (("photos", photos), ("other", paint(tmp_path / "one" / "blue.png", (0, 0, 255)).parent)):
        with Index.open(tmp_path / f"{name}.sqlite", ColourEmbedder()) as index:
            index.update([folder], progress=False)
    with TestClient(server.make_app(path, ColourEmbedder()), base_url="http://127.0.0.1:8765") as client:
        assert client.get("/api/status").json()["photos"] == 4
        path.rename(tmp_path / "away.sqlite")
        gone = client.get("/api/status")
        assert (gone.status_code, "There is no index" in gone.json()["detail"]) == (400, True)
        assert not path.exists()
        (tmp_path / "other.sqlite").rename(path)
        assert client.get("/api/status").json()["photos"] == 1


def test_a_collection_that_has_moved_is_not_embedded_anew(photos, tmp_path):
    model = ColourEmbedder()
    with Index.open(tmp_path / "photos.sqlite", model) as index:
        index.update([photos], progress=False)
        index.teach("rex", [photos / "red.png"])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "photos.sqlite").rename(tmp_path / "elsewhere" / "moved.sqlite")
    photos.rename(tmp_path / "elsewhere" / "photos")
    model.seen.clear()
    with Index.open(tmp_path / "elsewhere" / "moved.sqlite", model) as index:
        assert len(index.find("red", top_k=9, duplicates="show")) == 4  # as it was, wherever the pictures are
        summary = index.update(progress=False)
        assert "it is not there now; its photographs stay" in summary.failures[0].reason
        index.update([tmp_path / "elsewhere" / "photos"], progress=False)
        index.remove(photos)
        assert {match.path.parent.name for match in index.find("@rex", top_k=1)} == {"photos"}
        assert len(index) == 4
    assert model.seen == []


def test_a_picture_that_is_older_than_before_has_changed(photos, tmp_path):
    """As after the clock was set back, or another picture was moved there."""
    with Index.open(tmp_path / "photos.sqlite", ColourEmbedder()) as index:
        index.update([photos], progress=False)
        os.utime(paint(photos / "red.png", (0, 0, 250)), ns=(1, 1))
        assert str(index.update(progress=False)).startswith("0 added, 0 moved, 1 changed, 3 unchanged")
