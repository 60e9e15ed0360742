"""Bring an index up to date with very many pictures, on a Ray cluster.

In: folders, addresses of object storage, WebDataset archives (.tar), Parquet files. Out: a `Summary`. What a worker
does with its share is what one machine does with all (`ingest.take_in`); here is only how work is listed and shared
out.

The driver lists files, a part at a time; Ray Data hands them to a pool of actors, each with the model and the store
open. An actor asks the store which of its files are unchanged, embeds the others and commits them. So a run that is
started again does only what is missing, and when a worker or a machine is lost, its share is done again by another:
what it had stored is found unchanged then, and what it was storing has the same numbers, so nothing is there twice.
"""

from __future__ import annotations

import logging
import socket
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from numpy.typing import NDArray
from tqdm import tqdm

from clipmatch.comparison import Comparison, Summary, is_below, sort_out
from clipmatch.crawl import Found, walk
from clipmatch.embedder import Embedder, load_model
from clipmatch.errors import ClipmatchError, Failure, reason_of
from clipmatch.index import check_folders, name_of
from clipmatch.ingest import take_in
from clipmatch.lancerows import below, number_of, path_of, text_of
from clipmatch.lancestore import LanceStore
from clipmatch.leave import give
from clipmatch.listing import ARCHIVES, GONE, files_at, is_archive, pictures_in, taken_once
from clipmatch.photo import Stamp
from clipmatch.remote import absolute, is_remote
from clipmatch.runtime import usable_cores
from clipmatch.storage import is_lance
from clipmatch.store import Filter, Root, check_model

LISTED = 1_000_000  # files that the driver holds at once
SHARE = 256  # files that an actor is given at once, commits at once, and does again if it is lost
LOST = 5  # times that workers may be lost before anything is done again
PATIENCE = 10  # seconds to reach a cluster
PAUSE = 2  # seconds, times how often they were lost in turn: the cluster takes a while to notice
FILES = pa.schema(  # of what is found; reason: why it can't be used
    [
        ("path", pa.string()),
        *((name, pa.int64()) for name in ("size", "mtime", "sidecar")),
        *((name, pa.string()) for name in ("caption", "reason")),
    ]
)
COUNTS = ("added", "changed", "unchanged")


def update(
    place: Path | str,
    folders: Sequence[str | Path],
    exclude: Sequence[str] = (),
    *,
    model: str | None = None,
    device: str | None = None,
    address: str | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Summary:
    """Make an index of Lance tables what folders (also of object storage) and archives are now.

    address: of a Ray cluster, whose machines reach the same files, store and model; None: one is started here, for as
    long as it takes. workers: how many embed at once; None: as many as there are cores but one, or GPUs with
    `device` "cuda". Raises ClipmatchError when the place is none of Lance tables, a source does not exist, the index
    holds the vectors of another model, or there is no such cluster.
    """
    if not is_lance(place):
        raise ClipmatchError(
            f"--engine ray writes Lance tables, and {place} is an SQLite file; name an address (s3://bucket/index) or "
            "a folder that ends in .lance with --store."
        )
    roots = [absolute(folder) for folder in folders]
    check_folders([root for root in roots if not is_remote(root)])
    with LanceStore.open(place, create=True) as store, store.writer():
        bound = store.model
        model = model or (bound.name if bound else None)
        embedder = load_model(model, device)
        check_model(store, embedder)
        if bound is None:
            store.bind(name_of(embedder))
        for root in roots:
            store.add_root(Root(root, tuple(exclude)))
        give(store.path, roots)
        known = store.roots() if not roots else [root for root in store.roots() if root.path in roots]
        if not known:
            raise ClipmatchError("This index keeps up with no folder yet; name one: clipmatch index DIR --engine ray")
        with connected(address, workers):
            summary = Job(store, embedder, model, device, workers, progress).run(known)
        store.tidy()
    return summary


@contextmanager
def connected(address: str | None, workers: int | None = None) -> Iterator[None]:
    """Within it Ray is connected to a cluster, or to one that is started here. Raises ClipmatchError if it can't be."""
    warnings.filterwarnings("ignore", category=UserWarning, module="ray")
    warnings.filterwarnings("ignore", message=".*ray_remote_args_fn")  # the one way yet to place actors anew
    warnings.filterwarnings("ignore", message="lancedb fork support")  # Ray's children don't touch it
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        raise ClipmatchError("This process is connected to a Ray cluster already; disconnect with ray.shutdown().")
    try:
        if address:
            host, _, port = address.rpartition(":")
            with socket.create_connection((host, int(port)), PATIENCE):  # Ray itself would try for minutes
                pass
        # Started here it has a core more than work: workers that have all would leave none to those who read.
        cores = None if address else max(usable_cores(), workers or 0) + 1
        ray.init(address or "local", num_cpus=cores, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClipmatchError(f"There is no Ray cluster at {address} ({reason_of(error)}).") from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    with redirect_stdout(sys.stderr):  # where Ray tells of workers that died, perhaps of another job
        try:
            yield
        finally:
            ray.shutdown()


class Job:
    """An update of a store on the cluster that Ray is connected to."""

    def __init__(
        self,
        store: LanceStore,
        embedder: Embedder,
        model: str | None,
        device: str | None,
        workers: int | None,
        progress: bool,
    ):
        self.store, self.workers, self.progress = store, workers, progress
        self.on_gpus = str(getattr(embedder, "device", "cpu")).startswith("cuda")
        self.given = {"place": str(store.path), "model": model, "device": device}

    def run(self, roots: Sequence[Root]) -> Summary:
        """Take in all that is new below the roots, forget what is gone."""
        summary = Summary()
        for root in roots:
            seen: list[NDArray[np.int64]] = []
            kept: set[Path] = set()  # what lies below can't be told to be gone
            before = len(summary.failures)
            listed = self.files(root, summary, kept)
            with tqdm(desc=f"photographs of {root.path.name}", unit="img", disable=not self.progress) as bar:
                while part := list(islice(listed, LISTED)):
                    bar.total = bar.n + len(part)
                    seen.append(self.embed(part, summary, bar))
                    self.store.tidy()  # rows that no index knows yet are looked at one by one
            failures = summary.failures[before:]
            kept |= {failure.path for failure in failures if is_archive(failure.path)}
            gone = {failure.path for failure in failures if failure.reason == GONE}
            self.forget_gone(root.path, np.concatenate([np.empty(0, np.int64), *seen]), kept, gone, summary)
        return summary

    def files(self, root: Root, summary: Summary, kept: set[Path]) -> Iterator[Found]:
        """The pictures and archives below a root."""
        if is_remote(root.path):
            yield from files_at(root.path, root.exclude)
            return
        for item in walk(root.path, root.exclude, root.follow_links, also=ARCHIVES):
            if isinstance(item, Failure):
                summary.failures.append(item)
                kept.add(item.path)
            else:
                yield item

    def embed(self, files: Sequence[Found], summary: Summary, bar: Any) -> NDArray[np.int64]:
        """Have some files embedded; count what became of them -> the numbers [n] of the paths of all pictures.

        When a worker is lost, what it and those after it had is shared out anew among those that are there.
        """
        left, numbers, lost = list(files), [np.empty(0, np.int64)], 0
        done = numbers[0]
        while True:
            before = len(numbers)
            try:
                for row in self.share_out(left, done):
                    for name in COUNTS:
                        setattr(summary, name, getattr(summary, name) + row[name])
                    summary.failures += [Failure(path_of(bad["path"]), bad["reason"]) for bad in row["failures"]]
                    numbers.append(np.array(row["numbers"], np.int64))
                    bar.update(len(row["numbers"]))
                return np.concatenate(numbers)
            except ray.exceptions.RayError as error:
                if own := own_error(error):
                    raise own from error
                lost = 1 if len(numbers) > before else lost + 1
                if lost > LOST:
                    raise ClipmatchError(
                        f"The Ray cluster has lost its workers {LOST} times in turn ({reason_of(error)}); what is "
                        "stored stays, so start it again once the cluster is well."
                    ) from error
                bar.write(f"A worker was lost; its share is done again ({type(error).__name__}).", file=sys.stderr)
            done = np.sort(np.concatenate(numbers))
            left = [item for item in left if is_archive(item.path) or not is_in(number_of(item.path), done)]
            time.sleep(lost * PAUSE)

    def share_out(self, files: Sequence[Found], done: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
        """Files -> what became of each share, as soon as it is known. Raises RayError if a worker is lost.

        done: as `open_archives` takes it.
        """
        room = self.room()
        data = ray.data.from_arrow([as_table(files[at : at + SHARE]) for at in range(0, len(files), SHARE)])
        if any(is_archive(item.path) for item in files):
            data = data.map_batches(open_archives, fn_kwargs={"done": done}, batch_size=None, batch_format="pyarrow")
        made = data.map_batches(
            Worker,
            fn_constructor_kwargs=self.given,
            batch_size=SHARE,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(self.workers or room, room)),
            num_cpus=1,
            num_gpus=1 if self.on_gpus else None,
            runtime_env={"env_vars": {} if self.on_gpus else {"CLIPMATCH_THREADS": "1"}},
            ray_remote_args_fn=actor_settings,
        )
        for batch in made.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from batch.to_pylist()

    def room(self) -> int:
        """How many workers the cluster has room for now."""
        have = ray.cluster_resources()
        return max(1, int(have.get("GPU", 0)) if self.on_gpus else int(have.get("CPU", 1)) - 1)  # one core reads

    def forget_gone(
        self, root: Path, seen: NDArray[np.int64], kept: AbstractSet[Path], gone: set[Path], summary: Summary
    ) -> None:
        """Forget photographs and failures below a root whose files are not there any more, and those that a table named
        (`gone`), wherever they were.
        """
        condition = below(root)
        if not len(seen):
            there = self.store.count(Filter(folders=(root,)))
            if there:
                reason = f"it is empty now; its {there} photographs stay until it is removed: clipmatch index --remove"
                summary.failures.append(Failure(root, reason))
            return
        hashes = np.unique(seen)
        gone |= {
            path
            for name in ("photos", "failures")
            for path in self.store.paths_where(name, condition)
            if not is_in(number_of(path), hashes) and not is_below(path, kept)
        }
        if gone:
            summary.removed += len(self.store.numbers_of(gone))
            self.store.delete(gone)


class Worker:
    """An actor: a model and a store, and what is done with a share of the files."""

    def __init__(self, place: str, model: str | None, device: str | None):
        self.store = LanceStore.open(place if "://" in place else Path(place))
        self.embedder = load_model(model, device)
        check_model(self.store, self.embedder)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Files -> one row that counts them."""
        listed = from_table(batch)
        files = taken_once(listed)
        there, summary = Comparison(), Summary()
        known, broken = self.store.stamps_of(item.path for item in files)
        there.known |= known.keys()
        for item in files:
            if isinstance(item, Failure):
                summary.failures.append(item)
            else:
                sort_out(item, known, broken, there, summary)
        take_in(self.store, self.embedder, there, summary, progress=False, batch=SHARE)
        row = {name: getattr(summary, name) for name in COUNTS}
        bad = [{"path": text_of(failure.path), "reason": failure.reason} for failure in summary.failures]
        return pa.Table.from_pylist(
            [{**row, "failures": bad, "numbers": [number_of(item.path) for item in listed]}], schema=DONE
        )


DONE = pa.schema(
    [
        *((name, pa.int64()) for name in COUNTS),
        ("failures", pa.list_(pa.struct([("path", pa.string()), ("reason", pa.string())]))),
        ("numbers", pa.list_(pa.int64())),
    ]
)


def as_table(files: Iterable[Found | Failure]) -> pa.Table:
    """What is found as rows."""
    return pa.Table.from_pylist(
        [
            {"path": text_of(item.path), "reason": item.reason}
            if isinstance(item, Failure)
            else {"path": text_of(item.path), **vars(item.stamp), "caption": item.caption}
            for item in files
        ],
        schema=FILES,
    )


def from_table(rows: pa.Table) -> list[Found | Failure]:
    """The inverse of `as_table`."""
    return [
        Failure(path_of(row["path"]), row["reason"])
        if row["reason"] is not None
        else Found(path_of(row["path"]), Stamp(row["size"], row["mtime"], row["sidecar"]), row["caption"])
        for row in rows.to_pylist()
    ]


def open_archives(batch: pa.Table, done: NDArray[np.int64]) -> Iterator[pa.Table]:
    """Files, among them archives -> the other files, then the pictures in each archive.

    done: [n], rising: the numbers of paths that are left out, because a worker was lost only after them.
    """
    files = from_table(batch)
    yield as_table(item for item in files if not is_archive(item.path))
    for item in files:
        if is_archive(item.path):
            yield as_table(found for found in pictures_in(item.path) if not is_in(number_of(found.path), done))


def actor_settings() -> dict[str, Any]:
    """On all machines; never restarted: what waits for one that has no room any more would wait for ever."""
    return {"max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": "SPREAD"}


def own_error(error: BaseException | None) -> ClipmatchError | None:
    """What clipmatch itself has said in a worker, if that is the cause of an error of Ray."""
    while error is not None and not isinstance(error, ClipmatchError):
        error = getattr(error, "cause", None) or error.__cause__
    return error


def is_in(value: int, values: NDArray[np.int64]) -> bool:
    """Whether a number is one of others, which rise."""
    at = int(np.searchsorted(values, value))
    return at < len(values) and int(values[at]) == value
