"""Two processes, or machines, train as one does."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clipmatch.config import TrainConfig
from clipmatch.data import load_captions, split_captions
from clipmatch.errors import ClipmatchError
from clipmatch.ranks import Ranks
from clipmatch.trainer import Trainer
from clipmatch.training import open_checkpoint, train

ROOT = Path(__file__).parents[1]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

GRADIENTS = """\
import json, sys
from safetensors.torch import save_file
from clipmatch.config import TrainConfig, from_json
from clipmatch.data import load_captions, split_captions
from clipmatch.ranks import Ranks
from clipmatch.trainer import Trainer
from clipmatch.training import open_checkpoint

model, scenes, *cases = sys.argv[1:]
ranks = Ranks("cpu")
for case in cases:
    settings = from_json(TrainConfig, json.loads(case))
    trainer = Trainer(open_checkpoint(model), split_captions(load_captions(scenes)), settings, None, False, ranks)
    trainer.model.train()
    batch = next(iter(trainer.loader()))
    loss = trainer.objective.backward(batch, 0)
    learning = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    ranks.average_gradients(learning.values())
    if ranks.is_first:
        found = {name: value.grad.contiguous() for name, value in learning.items()}
        save_file(found, f"{settings.out}/two.safetensors")
        print(json.dumps([len(batch.image_ids), loss]))
"""


def launch(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*LAUNCH, *map(str, arguments)], capture_output=True, text=True, env=environment, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done


def test_two_processes_have_the_gradient_of_one(sure, scenes, tmp_path):
    """Of a batch of 15, one has 8 pairs and the other 7."""
    cases = [
        {},
        {"tune_image": "all", "tune_text": "all", "chunk": 3},
        {"tune_text": 1, "loss": "sigmoid"},
        {"loss": "hinge", "teachers": (str(sure),)},
    ]
    for number, case in enumerate(cases):
        case.update(out=str(tmp_path / str(number)), batch_size=15, precision="float32", device="cpu")
        Path(case["out"]).mkdir()
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    done = launch(tmp_path / "gradients.py", sure, scenes, *map(json.dumps, cases))
    for case, line in zip(cases, done.stdout.splitlines(), strict=True):
        check_gradients(TrainConfig(**case), sure, scenes, *json.loads(line))


def check_gradients(settings, model, scenes, size, loss):
    """The loss and the gradients of two processes, against those of one."""
    assert size == 8
    one = Trainer(open_checkpoint(model), split_captions(load_captions(scenes)), settings, None, False)
    one.model.train()
    batch = next(iter(one.loader()))
    assert len(batch.image_ids) == 15
    assert one.objective.backward(batch, 0) == pytest.approx(loss, rel=1e-5), settings
    expected = {name: value.grad for name, value in one.model.named_parameters() if value.requires_grad}
    found = load_file(f"{settings.out}/two.safetensors")
    assert found.keys() == expected.keys()
    assert "log_logit_scale" in found
    for name, value in expected.items():
        value = torch.zeros_like(found[name]) if value is None else value
        near = 1e-3 * float(value.abs().max()) + 1e-7  # float32, summed in another order
        assert float((found[name] - value).abs().max()) <= near, (settings, name)


def test_a_run_of_two_machines_is_that_of_one(sure, scenes, tmp_path):
    """From Slurm's script, with its commands played by ones that start both machines here; one log, one voice."""
    options = ["--captions", scenes, "--model", sure, "--epochs", 2, "--batch-size", 10, "--accumulate", 2]
    options += ["--precision", "float32", "--tune-text", "all"]
    done = submit(tmp_path, tmp_path / "two", *options)
    assert done.stdout.count("best model:") == 1
    assert "processes: 2, each with 5 of a batch's 10 pairs" in done.stderr
    splits = split_captions(load_captions(scenes))
    settings = TrainConfig(out=str(tmp_path / "one"), epochs=2, batch_size=10, accumulate=2, precision="float32")
    result = train(splits, replace(settings, device="cpu", tune_text="all"), sure, progress=False)
    losses = [
        [row["loss"] for row in map(json.loads, (tmp_path / run / "log.jsonl").open()) if row["kind"] == "step"]
        for run in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert len(losses[0]) == result.history[-1]["step"]
    assert f"resumed at step {len(losses[0])}" in submit(tmp_path, tmp_path / "two", *options).stderr


SRUN = """\
#!/usr/bin/env bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 2
shift
for node in 0 1; do SLURM_NODEID=$node "$@" & done
wait -n && wait -n || { kill -9 $(jobs -p); exit 1; }  # as that option says
"""


SCONTROL = """\
#!/usr/bin/env bash
[ "$*" = "show hostnames n[0-1]" ] && printf "127.0.0.1\\n127.0.0.2\\n"
"""


def submit(place, *arguments):
    """`sbatch runs/slurm.sh ARGUMENTS`, on a cluster of two machines that are this one."""
    commands = place / "commands"
    commands.mkdir(exist_ok=True)
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(script)
        (commands / name).chmod(0o755)
    job = str(free_port() - 20000)  # the script takes it for a port
    slurm = {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_JOB_NUM_NODES": "2"}
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, **slurm, "PATH": path, "OMP_NUM_THREADS": "1"}
    command = ["runs/slurm.sh", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done


def free_port():
    """One of those that the script chooses from."""
    for port in range(20000, 30000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port is free")


def test_a_batch_that_can_not_be_shared(sure, scenes, tmp_path, monkeypatch):
    monkeypatch.setattr("clipmatch.trainer.Ranks", FourRanks)
    settings = TrainConfig(out=str(tmp_path / "run"), batch_size=6, device="cpu")
    with pytest.raises(
        ClipmatchError, match="A batch of 6 is too small for 4 processes; give two pairs or more for each"
    ):
        Trainer(open_checkpoint(sure), split_captions(load_captions(scenes)), settings, None, False)


class FourRanks(Ranks):
    def __init__(self, device=None):
        super().__init__(device)
        self.count = 4

    def of_all(self, own):
        return [own] * 4


def test_alone_everything_stays_as_it_is():
    ranks, rows = Ranks(), torch.ones(2, 3, requires_grad=True)
    assert ranks.gather(rows) is rows
    assert (ranks.is_first, ranks.fewest(7), ranks.any(True), ranks.any(False)) == (True, 7, True, False)
    assert ranks.of_first(lambda: "answer") == "answer"
