"""Files that hang, on a disk or in a decoder: the run goes on without them, says so, and ends."""

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
from colours import ColourEmbedder, paint
from PIL import Image

from clipmatch import patience
from clipmatch.archive import digest_of
from clipmatch.errors import ClipmatchError
from clipmatch.index import Index
from clipmatch.patience import Crew, Turn, count_anew, one_by_one, patiently
from clipmatch.preprocess import ImageError, load_image

REASON = "it takes more than 0.2 seconds"


@pytest.fixture
def over(monkeypatch):
    """Little patience, and an event for which to wait until the end of the test."""
    monkeypatch.setattr(patience, "LIMIT", 0.2)
    event = threading.Event()
    yield event
    event.set()
    for aside in patience.hanging:
        aside.join(5)
        assert not aside.is_alive()


def test_what_is_done_in_time_is_as_if_it_were_called():
    threads = {patiently(threading.current_thread) for _ in range(10)}
    assert len(threads) == 1  # one thread serves all that comes one after another
    assert threads != {threading.current_thread()}
    with pytest.raises(ZeroDivisionError):
        patiently(lambda: 1 / 0)


def test_what_hangs_is_left_alone_and_others_are_not(over):
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=REASON):
        patiently(over.wait)
    assert 0.2 <= time.monotonic() - began < 2
    assert patiently(lambda: 7) == 7


def test_what_gets_on_has_its_time_anew(over):
    def slow_but_sure():
        for _ in range(6):
            time.sleep(0.06)
            count_anew()
        return "done"

    assert patiently(slow_but_sure) == "done"


def test_of_several_things_each_has_its_time(over):
    def work(item):
        if item in (1, 2, 5):
            over.wait()
        time.sleep(0.06)
        return 10 * item

    assert one_by_one(work, range(6), str) == [0, "1", "2", 30, 40, "5"]
    with pytest.raises(ZeroDivisionError):
        one_by_one(lambda item: 1 // item, [2, 1, 0], str)


def test_a_crew_goes_on_without_what_hangs_and_without_who_did_it(over):
    crew, done = Crew(2), []

    def work(lot):
        made = one_by_one(lambda item: over.wait() and item if item in (1, 2, 9) else 10 * item, lot, str)
        time.sleep(0.3)  # more than a file may take: what follows may
        done.append(lot)
        return made

    lots = [range(3), range(3, 6), range(6, 9), range(9, 12)]
    jobs = [crew.submit(work, lot) for lot in lots]
    assert [job.result() for job in jobs] == [[0, "1", "2"], [30, 40, 50], [60, 70, 80], ["9", 100, 110]]
    assert sorted(map(list, done)) == list(map(list, lots))  # each once
    with pytest.raises(ZeroDivisionError):
        crew.submit(lambda item: 1 // item, 0).result()


def test_a_crew_all_of_whose_threads_hang_goes_on(over):
    crew = Crew(2)
    jobs = [crew.submit(lambda lot: one_by_one(lambda _: over.wait(), lot, str), [number]) for number in range(5)]
    assert [job.result() for job in jobs] == [["0"], ["1"], ["2"], ["3"], ["4"]]
    assert crew.submit(lambda item: item + 1, 1).result() == 2


def test_a_crew_that_many_files_hang_has_still_its_threads(over, monkeypatch):
    monkeypatch.setattr(patience, "MOST", 2)
    crew = Crew(2)
    jobs = [crew.submit(lambda lot: one_by_one(lambda _: over.wait(), lot, str), [number]) for number in range(3)]
    with pytest.raises(ClipmatchError, match="2 files have been read"):
        jobs[0].result()
    assert crew.submit(lambda item: item + 1, 1).result() == 2


def test_the_threads_of_a_crew_end_with_it():
    crew = Crew(3)
    threads = {crew.submit(lambda _: (time.sleep(0.05), threading.current_thread())[1], number) for number in range(3)}
    threads = {job.result() for job in threads}
    assert len(threads) == 3
    del crew
    gc.collect()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_what_is_done_aside_already_is_passed_on_once():
    first, second = patiently(lambda: (threading.current_thread(), patiently(threading.current_thread)))
    assert first is second


def test_where_many_hang_it_is_their_disk(over, monkeypatch):
    monkeypatch.setattr(patience, "MOST", 3)
    monkeypatch.setattr(patience, "LIMIT", 0.05)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            patiently(over.wait)
    with pytest.raises(
        ClipmatchError, match=r"3 files have been read for more than 0.05 seconds each, and still are; see"
    ):
        patiently(over.wait)


def test_who_waits_for_a_turn_has_time_and_who_hangs_has_lost_it(over):
    turn, done = Turn(), []

    def take(seconds):
        with turn:
            time.sleep(seconds)
        done.append(seconds)

    def hang():
        with turn:
            over.wait()

    threads = [threading.Thread(target=patiently, args=(lambda: take(0.15),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    with pytest.raises(TimeoutError):
        patiently(hang)
    for thread in threads:
        thread.join()
    assert done == [0.15] * 4  # of which the last has waited for longer than anything may take


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_process_that_was_forked_has_threads_of_its_own():
    patiently(lambda: None)
    crew = Crew(2)
    assert crew.submit(lambda item: item + 1, 1).result() == 2
    for work in (partial(patiently, os.getpid), lambda: crew.submit(lambda item: item + 1, 1).result()):
        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        child.join(20)
        assert child.exitcode == 0


# Files


@pytest.fixture
def endless(over, monkeypatch):
    """Pillow has a decoder that finds no end, for files that begin with that word, until the event is set."""

    def decode(file, name):
        over.wait()
        return Image.new("RGB", (8, 8), "yellow")

    Image.init()
    monkeypatch.setattr(Image, "ID", [*Image.ID, "ENDLESS"])
    monkeypatch.setitem(Image.OPEN, "ENDLESS", (decode, lambda prefix: prefix.startswith(b"endless")))
    return over


def test_a_picture_without_end_is_listed_and_tried_again(photos, endless, tmp_path):
    for name in ("a.jpg", "copy.jpg"):
        (photos / name).write_bytes(b"endless")
    with pytest.raises(ImageError, match=REASON):
        load_image(photos / "a.jpg")
    with Index.open(tmp_path / "index.sqlite", ColourEmbedder()) as index:
        summary = index.update([photos], progress=False)
        assert {failure.path.name: failure.reason for failure in summary.failures} == {
            "a.jpg": REASON,
            "copy.jpg": REASON,
        }
        assert summary.added == 4
        assert index.store.failures() == []  # a disk may be there again next time
        endless.set()
        summary = index.update(progress=False)
        assert (summary.added, summary.unchanged, summary.failures) == (2, 4, [])


def test_a_new_model_does_not_drop_what_hung(photos, endless, tmp_path):
    endless.set()
    (photos / "a.jpg").write_bytes(b"endless")
    with Index.open(tmp_path / "index.sqlite", ColourEmbedder()) as index:
        count = index.update([photos], progress=False).added
        endless.clear()
        with pytest.raises(ClipmatchError, match=r"1 photographs can't be read now, such as .*a\.jpg; the index still"):
            index.reembed(ColourEmbedder("other"), progress=False)
        endless.set()
        assert len(index.store) == count
        assert index.reembed(ColourEmbedder("other"), progress=False).failures == []
        assert len(index.store) == count


def test_a_file_is_hashed_for_as_long_as_it_comes(tmp_path, over, monkeypatch):
    class Slow:
        def __init__(self, path):
            self.left = [b"x"] * 6

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def seek(self, *_):
            return 6

        def read(self, count):
            time.sleep(0.06)
            return self.left.pop()

    monkeypatch.setattr("clipmatch.archive.open_file", Slow)
    assert len(digest_of(tmp_path / "slow.jpg")) == 64
    monkeypatch.setattr(Slow, "read", lambda *_: over.wait())
    with pytest.raises(OSError, match=REASON):
        digest_of(tmp_path / "slow.jpg")


HANGS = """\
import os, threading
from PIL import Image
from clipmatch import patience, remote
from clipmatch.cli import main

patience.LIMIT = 1.0
remote.open_regular = os.open  # does not see that a pipe has taken the place of a file
Image.init()
Image.ID.append("ENDLESS")
Image.OPEN["ENDLESS"] = (lambda file, name: threading.Event().wait(), lambda prefix: prefix.startswith(b"endless"))
main()
"""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_the_command_ends_although_files_still_hang(tmp_path):
    paint(tmp_path / "photos" / "red.png", (255, 0, 0))
    os.mkfifo(tmp_path / "photos" / "pipe.jpg")  # nobody will ever write into it
    (tmp_path / "photos" / "loop.jpg").write_bytes(b"endless")
    command = [sys.executable, "-c", HANGS, "index", tmp_path / "photos", "--index", tmp_path / "index.sqlite"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 added" in done.stdout + done.stderr
    for name in ("pipe.jpg", "loop.jpg"):
        assert f"{tmp_path / 'photos' / name}: it takes more than 1 seconds" in done.stderr
