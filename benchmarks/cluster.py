"""Throughput of `clipmatch index --engine ray` with 1, 2 and 4 workers, beside the index of a single machine.

    python benchmarks/cluster.py --data DIR [--files 1500] [--rounds 3] [--workers 1 2 4] [--json FILE]

DIR/Images holds photographs. Each round is a whole process that makes a fresh index of Lance tables, and one that finds
all of it unchanged; what a picture costs is the difference, so that the start (Python, model, Ray) does not count, and
is reported by itself. On a machine with two cores this says what Ray adds, not what many machines gain.
"""

import argparse
import itertools
import shutil
import statistics
import tempfile
from pathlib import Path

from common import CLIPMATCH, in_turns, machine, machine_line, ratio, run, table, write_json


def measure(photographs, folder, options):
    """One fresh index -> seconds of the process that makes it, and of one that has nothing to do."""
    place = folder / "photos.lance"
    shutil.rmtree(place, ignore_errors=True)
    command = [CLIPMATCH, "index", photographs, "--store", place, *options]
    env = {"CLIPMATCH_CACHE": str(folder / "cache")}
    return {"all": run(command, env).seconds, "nothing": run(command, env).seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--files", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photographs = folder / "photographs"
        photographs.mkdir()
        for path in itertools.islice(sorted((given.data / "Images").iterdir()), given.files):
            shutil.copy(path, photographs)
        engines = {"one machine": []}
        for count in given.workers:
            engines[f"ray, {count} worker{'s' * (count > 1)}"] = ["--engine", "ray", "--workers", count]
        cases = {
            name: lambda options=options: measure(photographs, folder, options) for name, options in engines.items()
        }
        rounds = in_turns(cases, given.rounds)
    rates = {name: [given.files / (one["all"] - one["nothing"]) for one in found] for name, found in rounds.items()}
    result = {"machine": machine("ray", "lancedb", "onnxruntime"), "files": given.files, "rounds": rounds}
    result["pictures_per_second"] = rates
    result["to_one_machine"] = {name: ratio(rate, rates["one machine"]) for name, rate in rates.items()}
    rows = [
        [
            name,
            f"{statistics.median(rates[name]):.1f}",
            f"{result['to_one_machine'][name]:.2f}",
            f"{statistics.median(one['nothing'] for one in found):.1f}",
        ]
        for name, found in rounds.items()
    ]
    print(machine_line(result["machine"]))
    print(table(["engine", "pictures/s", "to one machine", "seconds with nothing to do"], rows))
    write_json(given.json, result)


if __name__ == "__main__":
    main()
