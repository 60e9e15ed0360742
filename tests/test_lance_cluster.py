"""Beyond one machine, for real: an S3 server, a Ray cluster of two nodes, and one of them is killed."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SERVER = os.environ.get("CLIPMATCH_MOTO")
if not SERVER:
    pytest.skip("needs an S3 server: make test-cluster", allow_module_level=True)
pytest.importorskip("lancedb")
pytest.importorskip("ray")

from clipmatch.errors import ClipmatchError
from clipmatch.index import Index
from clipmatch.lancestore import LanceStore
from clipmatch.remote import absolute

PICTURES = 2000
BROKEN = 25
COPIES = 10
TOKEN = "5d6bd2a1c8f04e7f9b3a6c1d2e4f5a7b"
RAY = Path(sys.executable).with_name("ray")
CLIPMATCH = Path(sys.executable).with_name("clipmatch")
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_for(ready, seconds, what):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"{what} takes more than {seconds} seconds"
        time.sleep(0.2)


def started_by(process):
    """The programs that a program has started, and those that these have, with what they are called."""
    parents = {}
    for place in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if place.name.isdecimal():
                parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
    found = [process.pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def stop(process):
    """`kill -9` of a program with all that it has started."""
    for one in started_by(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    process.wait(30)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """What programs need to find the S3 server and the cluster; so does this process."""
    address = f"http://127.0.0.1:{free_port()}"
    own = {
        **KEYS,
        "AWS_ENDPOINT_URL": address,
        "CLIPMATCH_CACHE": str(tmp_path_factory.mktemp("cache")),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "PYTHONWARNINGS": "ignore",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        server = subprocess.Popen(
            [SERVER, "-H", "127.0.0.1", "-p", address.rsplit(":", 1)[1]],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for(lambda: answers(address), 30, "the S3 server's start")
            urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT"))
            yield {**os.environ}
        finally:
            stop(server)


def answers(address):
    try:
        urllib.request.urlopen(f"{address}/moto-api/")
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def pictures(environment, tmp_path_factory):
    """A folder, and the same at s3://bucket/photos: pictures of four colours, some that are none, some copies, and text
    files beside some of them."""
    from pyarrow.fs import copy_files

    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(PICTURES):
        place = folder / f"{number % 10}"
        place.mkdir(exist_ok=True)
        small = Image.fromarray(rng.integers(0, 255, (2, 2, 3), np.uint8))
        small.resize((64, 64), Image.Resampling.BICUBIC).save(place / f"{number:04d}.jpg", quality=90)
    for number in range(BROKEN):
        whole = (folder / "0" / f"{number * 10:04d}.jpg").read_bytes()
        (folder / f"broken{number}.jpg").write_bytes(whole[:200] if number % 2 else b"no picture")
    for number in range(COPIES):
        shutil.copy(folder / "1" / f"{number * 10 + 1:04d}.jpg", folder / f"copy{number}.jpg")
    for number in range(0, PICTURES, 50):
        (folder / "0" / f"{number:04d}.txt").write_text(f"the caption of {number}")
    (folder / "copy1.json").write_text('{"caption": "the caption of a copy"}')
    copy_files(str(folder), "s3://bucket/photos", use_threads=False)
    return folder


@pytest.fixture(scope="module")
def single(pictures, embedded, environment, tmp_path_factory):
    """The index that one machine makes of them."""
    with Index.open(tmp_path_factory.mktemp("single") / "photos.sqlite", embedded) as index:
        summary = index.update([pictures], progress=False)
        assert (summary.added, len(summary.failures)) == (PICTURES + COPIES, BROKEN)
        yield index


@contextlib.contextmanager
def node(*options, cpus, environment, temporary):
    """A node of a Ray cluster."""
    command = [RAY, "start", "--block", "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", *options]
    command += ["--object-store-memory=300000000", "--disable-usage-stats"]
    process = subprocess.Popen(command, env=environment, stdout=temporary.open("ab"), stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        stop(process)


def has_workers(process):
    """Whether a node runs an actor with a model."""
    for one in started_by(process):
        with contextlib.suppress(OSError):
            if b"ray::MapWorker" in Path(f"/proc/{one}/cmdline").read_bytes():
                return True
    return False


def test_the_store_on_object_storage(environment, pictures, single, embedded):
    """An index that was copied there answers like the one here."""
    command = [CLIPMATCH, "store", "copy", single.store.path, "s3://bucket/copied"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{PICTURES + COPIES} copied, 0 unchanged, 0 removed; ")
    with Index.open("s3://bucket/copied", embedded, create=False) as index:
        for query in ("a red thing", "something blue"):
            assert same(index.find(query, top_k=20, duplicates="show"), single.find(query, top_k=20, duplicates="show"))
    with pytest.raises(ClipmatchError, match=r"There is no index s3://bucket/nowhere; make it"):
        Index.open("s3://bucket/nowhere", create=False)
    with pytest.raises(ClipmatchError, match=r"The index s3://nobucket/index can't be used now \("):
        Index.open("s3://nobucket/index", create=True)


def same(matches, others):
    """Whether matches are equal but for the folders, and for the order of those that score alike."""
    found, expected = (sorted((round(match.score, 4), match.path.name) for match in each) for each in (matches, others))
    return found == expected


def test_a_node_is_killed_in_the_middle(environment, pictures, single, embedded, tmp_path):
    """Each picture is stored exactly once, with the vector and the answers of the single machine."""
    place, log = "s3://bucket/index", tmp_path / "ray.log"
    port = free_port()
    head = ("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={short_folder()}")
    with (
        node(*head, cpus=5, environment=environment, temporary=log),
        node(f"--address=127.0.0.1:{port}", cpus=4, environment=environment, temporary=log) as second,
    ):
        command = [CLIPMATCH, "index", "s3://bucket/photos", "--engine", "ray", "--store", place]
        command += ["--address", f"127.0.0.1:{port}"]
        wait_for(lambda: two_nodes(port, environment), 60, "the start of the cluster")
        job = subprocess.Popen(
            [*command, "--workers", "4"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            wait_for(lambda: job.poll() is not None or stored(place) > 0, 120, "the first commit")
            assert job.poll() is None, job.communicate()
            assert has_workers(second), "the second node does not take part"
            stop(second)
            before = stored(place)
            out, said = job.communicate(timeout=200)
        finally:
            job.kill()
        assert job.returncode == 0, said
        assert before < PICTURES + COPIES, "it was done before the node was killed"
        assert f"{BROKEN} failed; {PICTURES + COPIES} photographs in the index" in out
        assert f"{BROKEN} images could not be read" in said
        assert "s3://bucket/photos/broken0.jpg: it is not an image in a known format" in said
        again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert again.stdout == (
            f"0 added, 0 moved, 0 changed, {PICTURES + COPIES} unchanged, 0 removed, {BROKEN} failed; "
            f"{PICTURES + COPIES} photographs in the index\n"
        )
    check_equal(place, pictures, single, embedded)


def two_nodes(port, environment):
    command = [RAY, "status", f"--address=127.0.0.1:{port}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return "/9.0 CPU" in done.stdout


def short_folder():
    """Ray's sockets lie below it, and their names may not be long."""
    return f"/tmp/clipmatch-ray-{os.getpid()}"


def stored(place):
    try:
        with LanceStore.open(place) as store:
            return len(store)
    except ClipmatchError:
        return 0


def check_equal(place, pictures, single, embedded):
    with Index.open(place, embedded, create=False) as index:
        here = {photo.path.relative_to(pictures).as_posix(): photo for photo in single}
        root = absolute("s3://bucket/photos")
        there = [photo.path.relative_to(root).as_posix() for photo in index]
        assert max(Counter(there).values()) == 1
        assert set(there) == here.keys()
        rows = index.store.rows_of(root / name for name in there)
        expected = single.store.rows_of(photo.path for photo in here.values())
        for name in there:
            np.testing.assert_allclose(rows[root / name], expected[here[name].path], atol=1e-6)
        assert {photo.digest for photo in index} == {photo.digest for photo in single}
        told = {photo.path.relative_to(root).as_posix(): photo.metadata.caption for photo in index}
        assert told == {name: photo.metadata.caption for name, photo in here.items()}
        assert told["0/0050.jpg"] == "the caption of 50"
        assert told["copy1.jpg"] == "the caption of a copy"
        assert sum(caption is not None for caption in told.values()) == PICTURES // 50 + 1
        assert {path.name for path in index.store.broken()} == {path.name for path in single.store.broken()}
        for query in ("a red thing", "something blue", "a dog"):
            assert same(index.find(query, top_k=30, duplicates="show"), single.find(query, top_k=30, duplicates="show"))


def test_folders_archives_and_what_is_gone(environment, embedded, tmp_path):
    """On a cluster of this run alone."""
    import tarfile

    import pyarrow as pa
    import pyarrow.parquet as pq

    folder, place = tmp_path / "pictures", tmp_path / "photos.lance"
    folder.mkdir()
    for name, colour in (("red", "red"), ("green", "lime"), ("blue", "blue")):
        Image.new("RGB", (32, 32), colour).save(folder / f"{name}.png")
    (text := tmp_path / "text").write_text("the sky")
    with tarfile.open(folder / "shard.tar", "w") as archive:
        archive.add(folder / "red.png", "000.png")
        archive.add(folder / "blue.png", "001.png")
        archive.add(text, "001.txt")
    (folder / "damaged.tar").write_bytes(b"nothing")
    pictures = [{"bytes": (folder / "green.png").read_bytes(), "path": "x"}, {"bytes": b"no picture", "path": "y"}]
    pq.write_table(pa.table({"image": pictures, "text": ["a", "b"]}), folder / "rows.parquet", row_group_size=1)
    paths = {"image_path": ["red.png", "gone.png", "red.png"], "caption": ["a rose", None, "a tulip"]}
    pq.write_table(pa.table(paths), folder / "paths.parquet")

    def run():
        command = [CLIPMATCH, "index", folder, "--engine", "ray", "--store", place, "--workers", "1"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)

    assert run().stdout.startswith("6 added, 0 moved, 0 changed, 0 unchanged, 0 removed, ")
    (folder / "green.png").unlink()
    done = run()
    assert done.stdout.startswith("0 added, 0 moved, 0 changed, 5 unchanged, 1 removed, ")
    assert "rows.parquet/00000001: it is not an image in a known format" in done.stderr
    assert "damaged.tar: damaged or cut off after 0 files" in done.stderr
    assert "gone.png: it is not there, and its table still names it" in done.stderr
    with Index.open(place, embedded, create=False) as index:
        expected = {
            "red.png": "a rose a tulip",
            "blue.png": None,
            "shard.tar/000.png": None,
            "shard.tar/001.png": "the sky",
            "rows.parquet/00000000": "a",
        }
        assert {str(photo.path.relative_to(folder)): photo.metadata.caption for photo in index} == expected
    (folder / "shard.tar").write_bytes(b"nothing")
    assert " 0 removed, " in run().stdout
    with Index.open(place, embedded, create=False) as index:
        assert len(index) == len(expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--store", "photos.sqlite"], "photos.sqlite is an SQLite file; name an address"),
        (["--store", "photos.lance", "--address", "127.0.0.1:1"], "There is no Ray cluster at 127.0.0.1:1"),
    ],
)
def test_what_can_not_be_done(environment, tmp_path, options, said):
    command = [CLIPMATCH, "index", ".", "--engine", "ray", *options]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
