"""Beyond exact search: what approximate indexes of kept libraries give up, and what they save.

    python benchmarks/approximate.py --data DIR [--rows 100000 1000000] [--model NAME] [--json FILE]

DIR holds captioned pictures. A large gallery is made of their embeddings: each row lies somewhere between a picture and
one of its near neighbours, plus noise, so that it is clustered as photographs are. Queries are captions of the dev
split, which lie farther from any row than rows from each other. For each index: time to build it and its size, time to
open it, milliseconds a query on one thread, and which share of the exact ten and hundred best rows it finds (recall).
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import numpy as np

from clipmatch.data import load_captions, split_captions
from clipmatch.embedder import load_model
from clipmatch.runtime import usable_cores

PICTURES = 4000
NEIGHBOURS = 20
NOISE = 0.3  # of a row's length
QUERIES = 200
BEST = 100


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def grow(rows, count, rng):
    """Rows of pictures [n, d] -> [count, d] that are clustered alike."""
    near = np.argpartition(-(rows @ rows.T), NEIGHBOURS, axis=1)[:, : NEIGHBOURS + 1]
    made = np.empty((count, rows.shape[1]), np.float32)
    for start in range(0, count, 50_000):
        size = min(50_000, count - start)
        first = rng.integers(len(rows), size=size)
        second = near[first, rng.integers(NEIGHBOURS + 1, size=size)]
        share = rng.random((size, 1), np.float32)
        noise = unit(rng.standard_normal((size, rows.shape[1]), np.float32)) * NOISE
        made[start : start + size] = unit(rows[first] * share + rows[second] * (1 - share) + noise)
    return made


class Exact:
    """The memory-mapped product that clipmatch uses."""

    name = "exact, float32"

    def build(self, rows, path):
        np.save(path, rows)

    def open(self, path):
        self.rows = np.load(path, mmap_mode="r")

    def search(self, query):
        scores = self.rows @ query
        best = np.argpartition(-scores, BEST)[:BEST]
        return best[np.argsort(-scores[best])]


class Faiss:
    """A FAISS index by its factory's name; `setting` is how hard it looks."""

    def __init__(self, factory, setting, value):
        import faiss

        self.faiss, self.factory, self.setting, self.value = faiss, factory, setting, value
        self.name = f"faiss {factory}, {setting} {value}"

    def build(self, rows, path):
        self.faiss.omp_set_num_threads(usable_cores())
        index = self.faiss.index_factory(rows.shape[1], self.factory, self.faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            some = np.random.default_rng(0).permutation(len(rows))[:200_000]
            index.train(rows[np.sort(some)])
        index.add(rows)
        self.faiss.write_index(index, str(path))

    def open(self, path):
        self.faiss.omp_set_num_threads(1)
        self.index = self.faiss.read_index(str(path))
        self.faiss.ParameterSpace().set_index_parameter(self.index, self.setting, self.value)

    def search(self, query):
        return self.index.search(query[None], BEST)[1][0]


class USearch:
    """A usearch graph, memory-mapped."""

    def __init__(self, dtype, expansion):
        from usearch.index import Index

        self.Index, self.dtype, self.expansion = Index, dtype, expansion
        self.name = f"usearch {dtype}, expansion {expansion}"

    def build(self, rows, path):
        index = self.Index(ndim=rows.shape[1], metric="cos", dtype=self.dtype)
        index.add(np.arange(len(rows)), rows, threads=usable_cores())
        index.save(str(path))

    def open(self, path):
        self.index = self.Index.restore(str(path), view=True)
        self.index.expansion_search = self.expansion

    def search(self, query):
        return self.index.search(query, BEST, threads=1).keys


def engines(count):
    """Index -> how hard to look; indexes that differ in that alone are built once."""
    lists = 2 ** round(np.log2(4 * count**0.5))
    return [
        [Exact()],
        [Faiss("HNSW32", "efSearch", value) for value in (128, 512)],
        [Faiss(f"IVF{lists},SQ8", "nprobe", value) for value in (16, 64)],
        [USearch("f16", value) for value in (128, 512)],
    ]


def measure(group, rows, queries, folder):
    """An index with several settings -> their figures."""
    path, found = folder / "index", []
    start = time.perf_counter()
    group[0].build(rows, path)
    built = time.perf_counter() - start
    path = path if path.exists() else path.with_suffix(".npy")
    for engine in group:
        start = time.perf_counter()
        engine.open(path)
        opened = time.perf_counter() - start
        engine.search(queries[0])
        answers, times = [], []
        for query in queries:
            start = time.perf_counter()
            answers.append(engine.search(query))
            times.append(time.perf_counter() - start)
        row = {"index": engine.name, "build_s": built, "mb": path.stat().st_size / 1e6, "open_ms": 1e3 * opened}
        found.append(({**row, "query_ms": 1e3 * float(np.median(times))}, answers))
    path.unlink()
    return found


def recall(answers, right, best):
    shares = [
        len(set(one[:best].tolist()) & set(two[:best].tolist())) / best for one, two in zip(answers, right, strict=True)
    ]
    return float(np.mean(shares))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--model")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    splits = split_captions(load_captions(arguments.data))
    base = model.embed_images([row.path for row in splits.train[:PICTURES]]).rows
    captions = [row.captions[0] for row in splits.dev][:QUERIES]
    queries = model.embed_texts(captions)
    result = {
        "machine": {"cpu": platform.machine(), "cores": usable_cores()},
        "pictures": len(base),
        "queries": len(queries),
        "galleries": {},
    }
    for count in arguments.rows:
        rows = grow(base, count, np.random.default_rng(0))
        print(f"\n{count} rows of {rows.shape[1]} numbers, {len(queries)} queries")
        print(f"{'index':34s} build s      MB  open ms  query ms  recall@10  recall@100")
        listed, right = [], None
        for group in engines(count):
            with tempfile.TemporaryDirectory() as folder:
                for row, answers in measure(group, rows, queries, Path(folder)):
                    right = right or answers
                    row["recall@10"], row["recall@100"] = recall(answers, right, 10), recall(answers, right, 100)
                    listed.append(row)
                    cells = f"{row['build_s']:7.1f} {row['mb']:7.0f} {row['open_ms']:8.1f} {row['query_ms']:9.2f}"
                    print(f"{row['index']:34s} {cells} {row['recall@10']:10.3f} {row['recall@100']:11.3f}", flush=True)
        result["galleries"][str(count)] = listed
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
