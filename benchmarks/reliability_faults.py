"""What is left of an index, a training run or captions after kill -9, a full or read-only disk, a power cut.

    python benchmarks/reliability_faults.py [--kills 20] [--cheap 100] [--works NAME...] [--parts NAME...] [--json FILE]

Everything is tried on real processes, over pictures that are drawn for it. One thread each, two at a time.

    kills       each work is killed at moments that are drawn at random (seed 0) between its first write and its end, as
                an undisturbed run tells them; works that write only at their end, between their start and that. Just
                before the kill a reader notes what is stored. Afterwards: does it open, is all that the reader saw
                there, does the same command (or --resume) end well, is the result that of the undisturbed run, bit by
                bit.
    full disk   each work on a disk that is too small, from a tenth to nine tenths of what it takes (needs the right to
                mount one): one sentence and a status of 1, nothing lost; then, with room, the same result.
    read-only   a disk that can only be read: what reads answers, what writes says why not.
    clock       a clock that goes back by 400 days in the middle of each work (needs faketime).
    order       the system calls of each work (needs strace): a file or folder that takes its place has been put on the
                disk before, its folder after; of the store's log every commit.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from common import CLIPMATCH, machine, machine_line, table, write_json
from faultworks import NAMES, STORE, drafts_in, environment, make_works, problem_of, run

CHEAP = ("indexing", "re-embedding", "teaching a concept", "importing concepts", "fixing captions")
AT_ONCE = 2
ROOM = (0.1, 0.3, 0.5, 0.7, 0.9)  # of what a work takes on the disk
ATTEMPTS = 8  # to hit a process before it ends


# Kills


def start(command, folder):
    """A process with all that it starts, as a group."""
    with (folder.parent / f"{folder.name}.txt").open("a") as said:
        return subprocess.Popen(
            list(map(str, command)), env=environment(folder), stdout=said, stderr=said, start_new_session=True
        )


def begun(work, folder, process):
    """Wait until a work has written something, or ended -> seconds that took."""
    began = time.perf_counter()
    while work.first and process.poll() is None and not (folder / work.first).exists():
        time.sleep(0.001)
    return time.perf_counter() - began


def undisturbed(work, folder):
    """A work without any fault -> its result, and seconds from its first write (or its start) to its end."""
    work.begin(folder)
    process = start(work.command(folder), folder)
    begun(work, folder, process)
    began = time.perf_counter()
    if process.wait():
        raise RuntimeError(f"{work.name}: {(folder.parent / f'{folder.name}.txt').read_text()[-2000:]}")
    return work.stored(folder), time.perf_counter() - began


def kill(work, folder, span, rng):
    """Start a work and kill it at random -> what a reader saw just before."""
    for _ in range(ATTEMPTS):
        work.begin(folder)
        process = start(work.command(folder), folder)
        begun(work, folder, process)
        time.sleep(rng.uniform(0, span))
        with contextlib.suppress(Exception):  # nothing to be read yet
            seen = {}
            seen = work.stored(folder)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return seen
        shutil.rmtree(folder)
    raise RuntimeError(f"{work.name} ends before it can be killed")


def trial(work, folder, whole, span, seed):
    """One kill -> what became of it; "problem" says what was wrong, if something was."""
    seen = kill(work, folder, span, np.random.default_rng(seed))
    found = {"seen": len(seen), "of": len(whole), "left": drafts_in(folder)}
    found["problem"] = problem_of(work, folder)
    found["opens"] = not found["problem"]
    after = work.stored(folder) if found["opens"] else {}
    found["kept"] = found["opens"] and all(held(work, key, value, after) for key, value in seen.items())
    done = run(work.command(folder), folder)
    found["completes"] = done.returncode == 0 or is_done(work, done)
    if not found["completes"]:
        found["problem"] = done.stderr[-500:]
    found["equal"] = found["completes"] and work.stored(folder) == whole
    found["litter"] = drafts_in(folder)
    shutil.rmtree(folder)
    return found


def held(work, key, value, after):
    """Whether what a reader saw is there: the same, or where the work replaces it, what has taken its place."""
    if key[0] == "vector" and key[1] not in after[("model",)][0]:
        return True  # changed over to the other model just then
    replaced = {"training": ("best", "last"), "re-embedding": ("model", "concept")}.get(work.name, ())
    return key in after and (key[0] in replaced or after[key] == value)


def is_done(work, done):
    """Captions that were all written before the kill are not written once more."""
    return work.name == "fixing captions" and "is there already and is not overwritten" in done.stderr


def kills(works, place, options):
    """Each work, killed many times -> figures by work."""
    result = {}
    for name, work in works.items():
        count = options.cheap if name in CHEAP else options.kills
        with ThreadPoolExecutor(AT_ONCE) as pool:
            calm = [pool.submit(undisturbed, work, place / f"calm{number}" / "work") for number in range(AT_ONCE)]
            (whole, span), (again, other) = (one.result() for one in calm)
            if whole != again:
                raise RuntimeError(f"{name}: two undisturbed runs differ")
            shortest = min(span, other)
            jobs = [
                pool.submit(trial, work, place / f"trial{number}" / "work", whole, shortest, [0, number])
                for number in range(count)
            ]
            trials = []
            for job in jobs:
                trials.append(job.result())
                print(f"\r{name}: {len(trials)} of {count}", end="", file=sys.stderr)
        print(file=sys.stderr)
        for folder in [*place.glob("trial*"), *place.glob("calm*")]:
            shutil.rmtree(folder)
        sums = {key: sum(one[key] for one in trials) for key in ("opens", "kept", "completes", "equal")}
        result[name] = {
            "kills": count,
            **sums,
            "half done": sum(0 < one["seen"] < one["of"] for one in trials),
            "drafts left by kills": sum(bool(one["left"]) for one in trials),
            "drafts left at the end": sum(bool(one["litter"]) for one in trials),
            "seconds": shortest,
            "problems": [one["problem"] for one in trials if one["problem"]],
        }
    return result


# Disks


@contextlib.contextmanager
def small_disk(place, kilobytes):
    """A disk in memory of that size; None where mounting is not allowed."""
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", place], capture_output=True)
    try:
        yield place if made.returncode == 0 else None
    finally:
        if made.returncode == 0:
            subprocess.run(["umount", "--lazy", place], check=True)
        place.rmdir()


def remount(place, options):
    subprocess.run(["mount", "-o", f"remount,{options}", place], check=True)


def used(place):
    """Kilobytes."""
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize // 1024


def sentence(done):
    """What a command said at its end; "" unless it is one sentence and a status of 1."""
    said = done.stderr.strip().splitlines()
    plain = done.returncode == 1 and said and said[-1].startswith("Error: ") and "Traceback" not in done.stderr
    return said[-1] if plain else ""


def take(work, disk):
    """A work on a disk with room -> its result, kilobytes at its beginning, and at most."""
    folder = disk / "work"
    work.begin(folder)
    first = most = used(disk)
    process = start(work.command(folder), folder)
    while process.poll() is None:
        most = max(most, used(disk))
        time.sleep(0.002)
    return work.stored(folder), first, most


def fill(work, disk, whole, size):
    """A work on a disk of `size` kilobytes, and once more with room -> what became of it."""
    folder = disk / "work"
    work.begin(folder)
    before = work.stored(folder)
    remount(disk, f"size={size}k")
    done = run(work.command(folder), folder)
    told = sentence(done)
    found = {"failed": done.returncode != 0, "told": told or done.stderr[-1000:]}
    remount(disk, "size=1g")
    found["problem"] = problem_of(work, folder)
    after = {} if found["problem"] else work.stored(folder)
    found["kept"] = all(held(work, key, value, after) for key, value in before.items()) and not found["problem"]
    found["clear"] = bool(told and "No space left" in told) if found["failed"] else after == whole
    again = run(work.command(folder), folder)
    found["completes"] = again.returncode == 0 or is_done(work, again)
    found["equal"] = work.stored(folder) == whole
    found["litter"] = drafts_in(folder)
    shutil.rmtree(folder)
    return found


def full(works, place, options):
    """Each work on disks that are too small -> figures by work; None where no disk can be made."""
    result = {}
    with small_disk(place / "disk", 2**20) as disk:
        if disk is None:
            return None
        for name, work in works.items():
            whole, first, most = take(work, disk)
            shutil.rmtree(disk / "work")
            rest = used(disk)
            sizes = [rest + round(first - rest + share * (most - first)) for share in ROOM]
            tried = [fill(work, disk, whole, max(size, 4)) for size in sizes]
            keys = ("failed", "clear", "kept", "completes", "equal")
            result[name] = {"tried": len(tried), **{key: sum(bool(one[key]) for one in tried) for key in keys}}
            result[name]["told"] = sorted({one["told"].replace(str(disk), "DISK") for one in tried if one["failed"]})
            result[name]["kilobytes"] = most - first
            print(f"full disk: {name}", file=sys.stderr)
    return result


def read_only(works, place, options):
    """An index and a run on a disk that can only be read -> by command: its status and what it said."""
    if set(works) != set(NAMES):
        return {}
    with small_disk(place / "disk", 2**20) as disk:
        if disk is None:
            return None
        folder = disk / "work"
        works["teaching a concept"].begin(folder)
        index = ["--index", folder / STORE]
        reading = {
            "find": [CLIPMATCH, "find", "a red circle", "--paths", *index],
            "find @rex": [CLIPMATCH, "find", "@rex", "--paths", *index],
            "duplicates": [CLIPMATCH, "duplicates", *index],
            "index --status": [CLIPMATCH, "index", "--status", *index],
            "concepts": [CLIPMATCH, "concepts", *index],
        }
        writing = {
            "index": works["indexing"].command(folder),
            "index --reembed": works["re-embedding"].command(folder),
            "teach": works["teaching a concept"].command(folder),
            "train": works["training"].command(folder),
            "data check --fix": works["fixing captions"].command(folder),
        }
        answers = {name: run(command, folder).stdout for name, command in reading.items()}
        remount(disk, "ro")
        result = {}
        for name, command in reading.items():
            done = run(command, folder)
            result[name] = {"as before": done.returncode == 0 and done.stdout == answers[name], "said": done.stderr}
        for name, command in writing.items():
            done = run(command, folder)
            result[name] = {"one sentence": bool(sentence(done)), "said": sentence(done) or done.stderr[-1000:]}
        remount(disk, "rw")
    return json.loads(json.dumps(result).replace(str(disk), "DISK"))


def clock(works, place, options):
    """The clock goes back by 400 days in the middle of each work -> whether its result is that of a calm one."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    if library is None:
        return None
    result = {}
    for name, work in works.items():
        whole, span = undisturbed(work, place / "calm" / "work")
        shutil.rmtree(place / "calm")
        folder, hands = place / "clock" / "work", place / "hands"
        work.begin(folder)
        hands.write_text("+0")
        own = {"LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(hands), "FAKETIME_NO_CACHE": "1"}
        own |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}
        command = list(map(str, work.command(folder)))
        process = subprocess.Popen(command, env={**environment(folder), **own}, stderr=subprocess.PIPE, text=True)
        begun(work, folder, process)
        time.sleep(span / 2)
        hands.write_text("-400d")
        _, said = process.communicate()
        result[name] = {"completes": process.returncode == 0, "equal": work.stored(folder) == whole}
        if process.returncode:
            result[name]["said"] = said[-1000:]
        shutil.rmtree(folder.parent)
    return result


# Order: what is on the disk when a file or folder takes its place

CALLS = (
    "openat,creat,write,pwrite64,writev,pwritev,ftruncate,fsync,fdatasync,sync,rename,renameat,renameat2,link,linkat"
)
LINE = re.compile(r"^(\d+)\s+(?:<\.\.\. (\w+) resumed>)?(.*)$")
PATHS = re.compile(r'"([^"]*)"|<([^>]*)>')


def calls(trace):
    """Lines of strace -f -y -> (call, paths) in the order in which they were done; failed ones are left out."""
    waiting = {}
    for line in trace.splitlines():
        process, _, rest = LINE.match(line).groups()
        if "<unfinished" in rest:
            waiting[process] = rest.partition("<unfinished")[0]
            continue
        rest = (waiting.pop(process, "") if "resumed>" in line else "") + rest
        name, _, arguments = rest.partition("(")
        if " = -1 " in rest or not arguments:
            continue
        yield name, [a or b for a, b in PATHS.findall(arguments.rpartition(" = ")[0]) if (a or b).startswith("/")]


def check_order(trace, place):
    """Lines of strace -> figures: renamings, those whose content was on the disk, those whose folder followed; commits
    to the log of a store, and those that were on the disk when the next call came that depends on them.
    """
    dirty, pending = {}, {}  # files and folders that were changed and not put on the disk; renamings, by folder
    found = {"renamed": 0, "content first": 0, "folder after": 0, "log synced": 0, "log not synced": 0}
    for name, paths in calls(trace):
        paths = [path for path in paths if path.startswith(str(place))]
        if name == "sync":
            dirty.clear()
        elif not paths:
            continue
        elif name == "ftruncate" and paths[0].endswith("-wal"):  # what was in the log has to be in the store by now
            found["log not synced"] += bool(dirty.get(paths[0].removesuffix("-wal")))
            dirty.pop(paths[0], None)
        elif name in ("write", "pwrite64", "writev", "pwritev", "ftruncate"):
            if paths[0].endswith(STORE) and dirty.get(f"{paths[0]}-wal"):  # what is in the log moves into the store
                found["log not synced"] += 1
            dirty[paths[0]] = True
        elif name in ("fsync", "fdatasync"):
            found["log synced"] += bool(dirty.pop(paths[0], False)) and paths[0].endswith("-wal")
            found["folder after"] += pending.pop(paths[0], 0)
        elif name in ("rename", "renameat", "renameat2", "link", "linkat"):
            old, new = paths[-2:]
            inside = [path for path in dirty if path == old or path.startswith(f"{old}/")]
            for path in inside:
                dirty[new + path[len(old) :]] = dirty.pop(path)
            if "clipmatch-old" in new or "clipmatch-draft/" in new:  # steps aside; is part of a draft
                continue
            found["renamed"] += 1
            found["content first"] += not inside
            folder = str(Path(new).parent)
            pending[folder] = pending.get(folder, 0) + 1
    found["log not synced"] += sum(path.endswith("-wal") for path in dirty)
    return found


def order(works, place, options):
    """The system calls of each work -> figures by work; None without strace."""
    if shutil.which("strace") is None:
        return None
    result = {}
    for name, work in works.items():
        folder, trace = place / "order" / "work", place / "trace.txt"
        work.begin(folder)
        strace = ["strace", "-f", "-y", "--seccomp-bpf", "-s", "0", "-e", f"trace={CALLS}", "-o", trace]
        done = run([*strace, *work.command(folder)], folder)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
        result[name] = check_order(trace.read_text(errors="replace"), folder)
        shutil.rmtree(folder.parent)
        print(f"order: {name}", file=sys.stderr)
    return result


# The whole


def show(result):
    print(machine_line(result["machine"]))
    heads = {
        "kills": ["kills", "half done", "opens", "kept", "completes", "equal"],
        "full disk": ["tried", "failed", "clear", "kept", "completes", "equal"],
        "clock": ["completes", "equal"],
        "order": ["renamed", "content first", "folder after", "log synced", "log not synced"],
    }
    for part, keys in heads.items():
        if result.get(part):
            print(f"\n{part}")
            print(table(["work", *keys], [[name, *(one[key] for key in keys)] for name, one in result[part].items()]))
        elif part in result:
            print(f"\n{part}: can't be tried here")
    if result.get("read-only"):
        print("\nread-only disk")
        rows = [
            [n, "as before" if one.get("as before") else one["said"].strip()] for n, one in result["read-only"].items()
        ]
        print(table(["command", "what it does"], rows))


PARTS = {"kills": kills, "full disk": full, "read-only": read_only, "clock": clock, "order": order}


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of training")
    parser.add_argument("--cheap", type=int, default=100, help="of each other work")
    parser.add_argument("--pictures", type=int, default=320)
    parser.add_argument("--concepts", type=int, default=60, help="that are imported")
    parser.add_argument("--works", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path, help="written as it goes; what other works and parts put there stays")
    return parser.parse_args(arguments)


def main():
    options = parse()
    known = options.json is not None and options.json.is_file()
    result = json.loads(options.json.read_text()) if known else {}
    result["machine"] = machine("onnxruntime", "torch")
    with tempfile.TemporaryDirectory(prefix="clipmatch-faults-") as scratch:
        place = Path(scratch)
        works = make_works(place, options.pictures, options.concepts, tuple(options.works))
        result["pictures"], result["concepts"] = options.pictures, options.concepts
        for part in options.parts:
            for some in [{name: work} for name, work in works.items()] if part == "kills" else [works]:
                found = PARTS[part](some, place, options)
                result[part] = found if found is None else {**(result.get(part) or {}), **found}
                write_json(options.json, result)
    show(result)


if __name__ == "__main__":
    main()
