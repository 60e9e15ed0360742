"""Archives that are streamed: one, two and four processes have the same steps, and go on with each other's runs."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from captionfiles import pack_rows
from click.testing import CliRunner

from clipmatch import streaming
from clipmatch.cli import main
from clipmatch.config import DataConfig, TrainConfig
from clipmatch.data import load_captions, select_split, split_captions
from clipmatch.errors import ClipmatchError
from clipmatch.ranks import Ranks
from clipmatch.streaming import Shard, ShardRows, StreamedBatches, stream_splits
from clipmatch.training import resume, train

# The work of each process. Cases are [settings of the data, of training, or null to resume; the step to stop after].
CASES = """\
import json, os, signal, sys
from clipmatch.config import DataConfig, TrainConfig
from clipmatch.errors import ClipmatchError
from clipmatch.trainer import Trainer
from clipmatch.training import resume, train

model, *cases = sys.argv[1:]
number, stop, step_of = os.environ["RANK"], None, Trainer.take_step

def take_step(self, *arguments):
    figures = step_of(self, *arguments)
    if self.step == stop and number == "0":
        signal.raise_signal(signal.SIGINT)
    return figures

Trainer.take_step = take_step
for data, settings, stop in map(json.loads, cases):
    try:
        if data is None:
            resume(settings["out"], progress=False)
        else:
            data |= data.pop("of", {}).get(number, {})
            train(DataConfig(**data), TrainConfig(**settings), model, progress=False)
    except ClipmatchError as error:
        print(json.dumps([number, str(error)]) + "\\n", end="", flush=True)  # in one piece: both write to one pipe
"""

DIES = """\
import os, signal
from clipmatch.cli import main
from clipmatch.trainer import Trainer

step_of = Trainer.take_step

def take_step(self, *arguments):
    if self.step == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return step_of(self, *arguments)

Trainer.take_step = take_step
main()
"""


@pytest.fixture
def shards(scenes, tmp_path):
    """60 pictures in five archives, not all as many, and 20 in one whose name says val -> their folder."""
    splits = split_captions(load_captions(scenes))
    cuts = {f"train-{number}.tar": splits.train[start:end] for number, (start, end) in enumerate(PARTS)}
    for name, rows in {**cuts, "val.tar": splits.dev}.items():
        pack_rows(tmp_path / "shards" / name, rows)
    return tmp_path / "shards"


PARTS = ((0, 9), (9, 25), (25, 33), (33, 48), (48, 60))


def launch(count, script, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), script]
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=environment, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done


def losses(run):
    rows = [json.loads(line) for line in (Path(run) / "log.jsonl").open()]
    return [row["loss"] for row in rows if row["kind"] == "step"]


def test_any_number_of_processes_has_the_same_steps(sure, shards, tmp_path):
    """A run of one, undisturbed; one that two processes begin, and one or four end. Batches of 10: parts of 3 and 2."""
    common = {"epochs": 2, "batch_size": 10, "precision": "float32", "device": "cpu", "workers": 0}
    modes = {"streamed": ({"stream": True}, {"tune_image": "all", "tune_text": "all"}), "table": ({}, {})}
    cases, work = [], tmp_path / "work.py"
    work.write_text(CASES)
    for mode, (data, tuned) in modes.items():
        data = {"captions": str(shards), **data}
        settings = {**common, **tuned, "out": str(tmp_path / mode / "one")}
        whole = train(DataConfig(**data), TrainConfig(**settings), sure, progress=False)
        assert (whole.finished, whole.history[-1]["step"], whole.failures) == (True, 12, [])
        cases.append(json.dumps([data, {**settings, "out": str(tmp_path / mode / "begun")}, 5]))
    # archives that are not the same everywhere
    other = {**data, "of": {"1": {"captions": str(shards / "{train-0,train-1,train-2,val}.tar")}}}
    cases.append(json.dumps([other, {**settings, "out": str(tmp_path / "other")}, None]))
    done = launch(2, work, sure, *cases)
    sentence = "Process 1 of 2 has other pictures or captions to train on than process 0; give all machines the same "
    assert sorted(map(json.loads, done.stdout.splitlines())) == [[n, f"{sentence}files and options."] for n in "01"]
    assert not (tmp_path / "other" / "last").exists()
    for mode in modes:
        assert len(losses(tmp_path / mode / "begun")) == 5
        shutil.copytree(tmp_path / mode / "begun", tmp_path / mode / "by_one")
        shutil.copytree(tmp_path / mode / "begun", tmp_path / mode / "by_four")
        assert resume(tmp_path / mode / "by_one", progress=False).finished
    launch(4, work, sure, *(json.dumps([None, {"out": str(tmp_path / mode / "by_four")}, None]) for mode in modes))
    for mode in modes:
        expected = losses(tmp_path / mode / "one")
        assert len(set(expected)) == 12
        for run in ("by_one", "by_four"):
            assert losses(tmp_path / mode / run) == pytest.approx(expected, rel=1e-3), (mode, run)


def test_when_a_process_dies_the_others_say_so(sure, shards, tmp_path):
    """Started without any launcher that would end them."""
    (tmp_path / "dies.py").write_text(DIES)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    options = ["--captions", shards, "--model", sure, "--out", tmp_path / "run", "--batch-size", 10, "--device", "cpu"]
    command = [sys.executable, tmp_path / "dies.py", "train", *options]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    first, second = (
        subprocess.Popen(
            list(map(str, command)),
            stderr=subprocess.PIPE,
            text=True,
            env={**shared, "RANK": number, "LOCAL_RANK": number},
        )
        for number in "01"
    )
    assert (second.wait(120), second.stderr.read()) == (-signal.SIGKILL, "")
    gone = time.monotonic()
    said = first.communicate(timeout=60)[1]
    assert first.returncode == 1
    assert time.monotonic() - gone < 20
    assert "Error: Another process of this run has ended or can't be reached; its own last line says why." in said
    assert "Traceback" not in said
    assert (tmp_path / "run" / "last" / "state.json").is_file()


# Which pictures a batch holds


def rows_of(*counts):
    return ShardRows([Shard(Path(f"{number}.tar"), 0, count) for number, count in enumerate(counts)])


@pytest.mark.parametrize("batch_size", [1, 7, 40, 64, 130])
def test_an_epoch_passes_over_each_picture_once(batch_size):
    rows = rows_of(100, 3, 57, 240)
    batches = list(StreamedBatches(rows, batch_size, epochs=2, seed=0, start=0, part=(0, 1)))
    assert {len(batch) for batch in batches} == {batch_size}
    for epoch in (0, 1):
        items = [item for batch in batches for number, item in batch if number == epoch]
        assert len(items) == len(set(items)) == 400 // batch_size * batch_size
        assert set(items) <= set(range(400))
    first, second = ([[item for _, item in batch] for batch in batches if batch[0][0] == epoch] for epoch in (0, 1))
    assert first != second
    later = StreamedBatches(rows, batch_size, epochs=2, seed=0, start=2, part=(0, 1))
    assert list(later) == batches[2:]
    assert len(later) == len(batches) - 2
    parts = [list(StreamedBatches(rows, batch_size, 2, 0, 0, (number, 3))) for number in range(3)]
    assert [[*first, *second, *third] for first, second, third in zip(*parts, strict=True)] == batches


def test_a_process_reads_its_share_of_the_archives_from_front_to_back(monkeypatch):
    """Of 16 archives in 4 lanes, each of 4 processes reads 4, one after the other, mixed within windows of 10."""
    monkeypatch.setattr(streaming, "LANES", 4)
    monkeypatch.setattr(streaming, "WINDOW", 10)
    rows, read = rows_of(*[50] * 16), []
    for number in range(4):
        items = np.array([item for batch in StreamedBatches(rows, 8, 1, 0, 0, (number, 4)) for _, item in batch])
        archives, places = items // 50, items % 50
        order = list(dict.fromkeys(archives.tolist()))
        assert len(order) == 4
        assert archives.tolist() == np.repeat(order, 50).tolist()
        assert (places.reshape(-1, 10) // 10 == np.tile(np.arange(5), 4)[:, None]).all()
        assert any(np.diff(places[:10]) != 1)
        read += order
    assert sorted(read) == list(range(16))


def test_of_archives_only_those_in_use_are_held(shards, monkeypatch):
    monkeypatch.setattr(streaming, "WINDOW", 1)
    rows = stream_splits(DataConfig(str(shards), stream=True), Ranks()).train
    assert [shard.pictures for shard in rows.shards] == [9, 16, 8, 15, 12]
    rows.keep = 30
    for item in range(60):
        rows.sample(item)
        assert sum(map(len, rows.read.values())) <= 30
    assert list(rows.read) == [3, 4]
    table = {row.path: row.captions for row in load_captions(shards).rows}
    assert {row.path: row.captions for row in rows[:]} == {p: c for p, c in table.items() if p.parent.name != "val.tar"}


# What can't be streamed


def test_archives_are_held_out_by_their_names_or_by_a_hash(shards, capsys):
    (shards / "9.tar").write_bytes((shards / "train-0.tar").read_bytes()[:5000])
    splits = stream_splits(DataConfig(str(shards), stream=True), Ranks())
    assert splits.origin == "6 archives streamed, 1 held out by their names"
    assert "1 archives are not whole, the first: 9.tar (damaged or cut off after" in capsys.readouterr().err
    splits = stream_splits(DataConfig(str(shards / "train-{0..4}.tar"), stream=True), Ranks())
    assert splits.origin == "4 archives streamed, 1 held out by a hash of their names"
    assert len(splits.train) + len(splits.dev) == 60
    assert not {row.path.parent for row in splits.dev} & {shard.path for shard in splits.train.shards}


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"captions": "{scenes}"}, "is no WebDataset, which --stream reads: give .tar archives, or leave it out"),
        ({"captions": "{shards}/train-0.tar"}, "has 0 archives to learn from and 1 for dev; give two or more"),
        ({"captions": "{shards}", "images": "."}, "so --images, --format, --train-split and --dev-split would be idle"),
    ],
)
def test_what_is_no_stream(scenes, shards, data, sentence):
    data = {name: value.format(scenes=scenes, shards=shards) for name, value in data.items()}
    with pytest.raises(ClipmatchError, match=sentence):
        stream_splits(DataConfig(stream=True, **data), Ranks())


def test_what_needs_all_pictures_can_not_be_streamed(sure, shards, tmp_path):
    options = ["train", "--captions", str(shards), "--stream", "--model", str(sure), "--out", str(tmp_path / "run")]
    for option in (["--views", "2"], ["--hard-negatives", "0.2"], ["--mixup", "0.2"], ["--teacher", str(sure)]):
        done = CliRunner().invoke(main, [*options, *option])
        assert done.exit_code == 1
        assert f"{option[0]} needs something of every picture at hand, and --stream keeps nothing" in done.stderr
    done = CliRunner().invoke(main, [*options, "--dry-run"])
    assert (done.exit_code, done.stderr[:45]) == (1, "Error: --dry-run looks at all captions; leave")


def test_a_broken_picture_does_not_end_a_stream_and_frozen_towers_stay(sure, shards, tmp_path):
    content = (shards / "train-1.tar").read_bytes()
    start = content.index(b"\x89PNG" if b"\x89PNG" in content else b"\xff\xd8")
    (shards / "train-1.tar").write_bytes(content[:start] + b"no picture at all" + content[start + 17 :])
    settings = TrainConfig(out=str(tmp_path / "run"), epochs=2, batch_size=60, device="cpu", workers=1)
    result = train(DataConfig(str(shards), stream=True), settings, sure, progress=False)
    assert (result.finished, [failure.path for failure in result.failures]) == (
        True,
        [shards / "train-1.tar" / "0.jpg"],
    )
    parts = [(tmp_path / "run" / "splits" / f"{part}.txt") for part in ("train", "dev")]
    assert [part.read_text().split() for part in parts] == [[f"train-{at}.tar" for at in range(5)], ["val.tar"]]
    rows = load_captions(shards).rows
    assert [len(select_split(rows, part)) for part in parts] == [60, 20]
