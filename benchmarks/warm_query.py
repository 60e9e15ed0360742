"""A query of a process that has answered some already, at growing numbers of photographs.

    python benchmarks/warm_query.py --data DIR [--rows 10000 100000 1000000] [--out FOLDER]

DIR holds captioned pictures. A large gallery is made of their embeddings: each row lies somewhere between a picture and
one of its near neighbours, plus noise, so that it is clustered as photographs are. Queries are captions of the dev
split, which lie farther from any row than rows from each other. They are embedded beforehand, so what is timed is the
search: `Index.answer` down to the photographs of the first page, every row compared or only candidates, without a
filter and with filters that let 1 %, half and 99 % of the photographs pass (chosen at random, asked before: the first
time SQLite has to look for them, which is reported too). Beside it, in turns in the same process:

    product     NumPy: all rows, float32 in memory, times the query; what every ratio is to
    faiss       IndexFlatIP; HNSW32; and the inverted file of clipmatch's own index, without what clipmatch adds
    usearch     an HNSW graph of float16 rows, if that package is installed

Recall@10 of clipmatch is of the photographs on the page, by confidence, against comparing all rows; that of the others
is of the nearest rows by cosine. Memory is what a process of its own holds that has opened index and model and answered
all queries (known on Linux). Writes warm_query.json, warm_query.md and warm_query.png into FOLDER.
"""

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import in_turns, machine, machine_line, ratio, run, table, timed, write_json

from clipmatch import approximate, collection, search
from clipmatch.data import load_captions, split_captions
from clipmatch.embedder import load_model
from clipmatch.index import Index, name_of
from clipmatch.photo import Metadata, Photo, Stamp
from clipmatch.query import Query, parse_query
from clipmatch.runtime import usable_cores
from clipmatch.search import Request
from clipmatch.store import Filter

PICTURES = 5000  # that a gallery is grown from by `grown`
NEIGHBOURS = 20
NOISE = 0.3  # of a row's length
BEST = 10
ASKED = 20  # queries that are timed together
STORED = 20_000  # photographs that are stored at once
PASSING = {"1 % pass": 0.01, "half pass": 0.5, "99 % pass": 0.99}
PROBES = 48  # of faiss's inverted file alone, as many as clipmatch takes
EXPANSION = 512  # of the graphs

READER = """
import json, sys
from pathlib import Path
from clipmatch.index import Index
from clipmatch.search import Request
from clipmatch.query import parse_query
with Index.open(sys.argv[1], create=False) as index:
    for text in json.load(open(sys.argv[2])):
        index.answer(parse_query(text), Request(top_k=10, duplicates="show"))
    statm = Path("/proc/self/statm")
    print(int(statm.read_text().split()[1]) * 4096 / 1e6 if statm.exists() else "nan")
"""


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


def grown(description):
    """The options --data, --rows and --json of a script -> these, a model, captioned pictures, rows [n, d]."""
    parser = argparse.ArgumentParser(description=description.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    splits, model = split_captions(load_captions(given.data)), load_model()
    base = model.embed_images([row.path for row in splits.train[:PICTURES]]).rows
    return given, model, splits, grow(base, given.rows, np.random.default_rng(0))


class Remembered:
    """A model that has embedded the queries before, so that a search is timed alone."""

    def __init__(self, model, texts):
        self.name, self.fingerprint, self.dim, self.calibration = model.name, model.fingerprint, model.dim, None
        self.calibration = model.calibration
        self.rows = dict(zip(texts, model.embed_texts(texts), strict=True))

    def embed_texts(self, texts, progress=False):
        return np.stack([self.rows[text] for text in texts])


def fill(index, rows, rng, metadata=lambda number: Metadata(width=8, height=8)):
    """Store photographs with these rows; their sizes are the numbers from 0 on in some order, for the filters."""
    store, sizes = index.store, rng.permutation(len(rows))
    store.bind(name_of(index.embedder))
    for start in range(0, len(rows), STORED):
        photos = [
            Photo(
                Path(f"/photos/{number // 1000}/{number}.jpg"),
                hashlib.sha256(str(number).encode()).hexdigest(),
                Stamp(int(sizes[number]), 1, 0),
                metadata(number),
                number,
            )
            for number in range(start, min(start + STORED, len(rows)))
        ]
        vectors = {photo.digest: rows[start + at] for at, photo in enumerate(photos)}
        store.upsert(photos, index.embedder.fingerprint, vectors, {})


def answers(index, texts, where=None):
    """The photographs of the first page, for each text."""
    request = Request(top_k=BEST, where=where or Filter(), duplicates="show")
    return [[match.path for match in index.answer(parse_query(text), request)] for text in texts]


def recall(found, right):
    """The mean share of what is right that was found."""
    pairs = zip(found, right, strict=True)
    return float(np.mean([len(set(one) & set(two)) / max(len(set(two)), 1) for one, two in pairs]))


def megabytes(*paths):
    return sum(path.stat().st_size for path in paths) / 1e6


class Peers:
    """The other libraries' indexes of the same rows: for each how to ask it, how to ask many, and what it costs."""

    def __init__(self, rows, folder, own):
        self.ask, self.many, self.costs = {}, {}, {}
        self.faiss(rows, folder, own)
        try:
            from usearch.index import Index as Graph
        except ImportError:
            print("usearch is not installed; it is left out", file=sys.stderr)
            return
        graph = Graph(ndim=rows.shape[1], metric="ip", dtype="f16")
        built = timed(lambda: graph.add(np.arange(len(rows)), rows, threads=usable_cores()))
        graph.save(str(folder / "graph"))
        graph.expansion_search = EXPANSION
        name = f"usearch HNSW f16, expansion {EXPANSION}"
        self.add(name, lambda query: graph.search(query, BEST, threads=1).keys, built, folder / "graph")
        self.many[name] = lambda queries: graph.search(queries, BEST, threads=usable_cores()).keys

    def faiss(self, rows, folder, own):
        import faiss

        faiss.omp_set_num_threads(usable_cores())
        flat = faiss.IndexFlatIP(rows.shape[1])
        built = timed(lambda: flat.add(rows))
        self.add("faiss IndexFlatIP", lambda query: flat.search(query[None], BEST)[1][0], built, None)
        self.costs["faiss IndexFlatIP"]["disk_mb"] = rows.nbytes / 1e6
        graph = faiss.IndexHNSWFlat(rows.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
        built = timed(lambda: graph.add(rows))
        graph.hnsw.efSearch = EXPANSION
        faiss.write_index(graph, str(folder / "hnsw"))
        name = f"faiss HNSW32, efSearch {EXPANSION}"
        self.add(name, lambda query: graph.search(query[None], BEST)[1][0], built, folder / "hnsw")
        lists = faiss.read_index(str(own))
        lists.nprobe = PROBES
        name = f"faiss IVF,SQ8, nprobe {PROBES}"
        self.add(name, lambda query: lists.search(query[None], BEST)[1][0], None, own)
        self.many = {
            "faiss IndexFlatIP": lambda queries: flat.search(queries, BEST)[1],
            name: lambda queries: lists.search(queries, BEST)[1],
        }

    def add(self, name, ask, built, path):
        self.ask[name] = ask
        self.costs[name] = {"build_s": built, "disk_mb": megabytes(path) if path else None}


def measure(count, base, model, texts, rounds, folder):
    """One size of the gallery -> its figures."""
    rows = grow(base, count, np.random.default_rng(0))
    path = folder / "photos.sqlite"
    approximate.LEAST = count  # the index of candidates is made for small galleries too
    quick = Index.open(path, model)
    fill(quick, rows, np.random.default_rng(1))
    built = timed(quick.derive)
    own = approximate.approximate_file(path, quick.store.content)
    vectors = folder / "photos.sqlite.vectors"
    approximate.LEAST = count + 1
    slow = Index.open(path, model)
    filters = {name: Filter(min_size=count - round(share * count)) for name, share in PASSING.items()}
    right = answers(slow, texts)
    approximate.LEAST = count
    assert quick._open().near
    found = {"candidates": {"recall": recall(answers(quick, texts), right)}, "all rows": {"recall": 1.0}}
    first_filter = {}
    for name, where in filters.items():
        start = time.perf_counter()
        answers(quick, texts[:1], where)
        first_filter[name] = time.perf_counter() - start
        found[f"candidates, {name}"] = {"recall": recall(answers(quick, texts, where), answers(slow, texts, where))}
        found[f"all rows, {name}"] = {"recall": 1.0}
    found["candidates"] |= {"build_s": built, "disk_mb": megabytes(own, vectors)}
    found["all rows"] |= {"disk_mb": megabytes(vectors)}
    queries = model.embed_texts(texts)
    peers = Peers(rows, folder, own)
    nearest = [np.argpartition(-(rows @ query), BEST)[:BEST].tolist() for query in queries]
    for name, ask in peers.ask.items():
        found[name] = {"recall": recall([ask(query).tolist() for query in queries], nearest), **peers.costs[name]}

    some, asked = queries[:ASKED], texts[:ASKED]
    cases = {"product": lambda: [rows @ query for query in some]}
    cases |= {"candidates": lambda: answers(quick, asked), "all rows": lambda: answers(slow, asked)}
    for name, where in filters.items():
        cases[f"candidates, {name}"] = lambda where=where: answers(quick, asked, where)
        cases[f"all rows, {name}"] = lambda where=where: answers(slow, asked, where)
    cases |= {name: lambda ask=ask: [ask(query) for query in some] for name, ask in peers.ask.items()}
    near = quick._open().near
    cases["product, batch"] = lambda: rows @ some.T
    cases["candidates, batch"] = lambda: near.index.search(some, search.CANDIDATES)
    cases |= {f"{name}, batch": lambda ask=ask: ask(some) for name, ask in peers.many.items()}
    near.index.nprobe = approximate.PROBES
    times = in_turns({name: lambda case=case: timed(case) / ASKED for name, case in cases.items()}, rounds)
    for name, seconds in times.items():
        base_name = "product, batch" if name.endswith("batch") else "product"
        figures = {"ms": 1e3 * statistics.median(seconds), "best_ms": 1e3 * min(seconds)}
        found[name] = {**found.get(name, {}), **figures, "ratio": ratio(seconds, times[base_name])}
    quick.close()
    slow.close()
    return {"rows": count, "cases": found, "first_filter_s": first_filter}


def memory_of(path, texts, folder):
    """Megabytes of a process after it has answered all queries from that index, and of one whose index is empty."""
    asked, empty = folder / "queries.json", folder / "empty.sqlite"
    asked.write_text(json.dumps(texts))
    with Index.open(path) as index, Index.open(empty, index.embedder) as other:
        other.store.bind(index.store.model)
    full, bare = (run([sys.executable, "-c", READER, file, asked]) for file in (path, empty))
    return {"resident_mb": float(full.stdout), "empty_mb": float(bare.stdout), "peak_mb": full.peak_mb}


STAGES = {
    "embed the sentence": (Query, "vectors"),
    "find candidates": (collection, "narrow"),
    "weigh candidates": (search, "rank_narrowed"),
    "compare and weigh all rows": (search, "rank"),
    "stack near-duplicates": (search, "arrange"),
    "look up photographs": (search, "matches_of"),
}


def stages_of(path, model, texts, rounds):
    """`Index.answer` with its default settings, from the sentence to the page -> milliseconds, whole and by stage."""
    spent = dict.fromkeys(STAGES, 0.0)
    kept = {name: getattr(owner, attribute) for name, (owner, attribute) in STAGES.items()}

    def watched(name):
        def call(*given):
            start = time.perf_counter()
            try:
                return kept[name](*given)
            finally:
                spent[name] += time.perf_counter() - start

        return call

    asked, found = [parse_query(text) for text in texts[:ASKED]], []
    with Index.open(path, model) as index:
        for query in asked[:3]:
            index.answer(query, Request())
        for name, (owner, attribute) in STAGES.items():
            setattr(owner, attribute, watched(name))
        for query in asked * rounds:
            spent.update(dict.fromkeys(spent, 0.0))
            whole = timed(lambda query=query: index.answer(query, Request()))
            found.append({"whole": whole, **spent, "the rest": whole - sum(spent.values())})
        for name, (owner, attribute) in STAGES.items():
            setattr(owner, attribute, kept[name])
    return {name: 1e3 * statistics.median(row[name] for row in found) for name in found[0]}


def number(value, form="{:.3g}"):
    return "" if value is None else form.format(value)


def report(result):
    """The figures as Markdown."""
    lines = [f"# Queries of a warm process\n\n{machine_line(result['machine'])}\n"]
    for size in result["sizes"]:
        lines += [f"## {size['rows']:,} photographs\n"]
        rows = []
        for name, case in size["cases"].items():
            cells = (case.get("ms"), case.get("best_ms"), case.get("ratio"), case.get("recall"))
            costs = (case.get("build_s"), case.get("disk_mb"))
            cells = [number(cell) for cell in cells[:3]] + [number(cells[3], "{:.4f}")]
            rows.append([name, *cells, *(number(cost, "{:.0f}") for cost in costs)])
        header = ["search", "ms a query", "at best", "ratio to product", "recall@10", "build s", "disk MB"]
        lines += [table(header, rows), ""]
        first = ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in size["first_filter_s"].items())
        half = size["rows"] * result["dim"] * 2 / 1e6
        lines += [
            f"A filter for the first time: {first}. A process that has answered {result['queries']} queries holds "
            f"{size['memory']['resident_mb']:.0f} MB, with an empty index {size['memory']['empty_mb']:.0f} MB; the "
            f"vectors in half precision are {half:.0f} MB.\n",
            "`Index.answer` as it is called, from the sentence on: "
            + ", ".join(f"{name} {spent:.2f} ms" for name, spent in size["stages_ms"].items() if spent)
            + ".\n",
        ]
    return "\n".join(lines)


def draw(result, path):
    """Time against the number of photographs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    counts = [size["rows"] for size in result["sizes"]]
    shown = {"product": "product (NumPy)", "all rows": "clipmatch, all rows", "candidates": "clipmatch, candidates"}
    shown |= {"candidates, half pass": "clipmatch, candidates, half pass a filter"}
    for name in result["sizes"][0]["cases"]:
        if name.startswith(("faiss", "usearch")) and not name.endswith("batch"):
            shown[name] = name
    for name, label in shown.items():
        axes.plot(counts, [size["cases"][name]["ms"] for size in result["sizes"]], marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="photographs", ylabel="milliseconds a query")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--pictures", type=int, default=4000, help="that the galleries are grown from")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="FOLDER")
    chosen = parser.parse_args()
    model = load_model()
    splits = split_captions(load_captions(chosen.data))
    base = model.embed_images([row.path for row in splits.train[: chosen.pictures]]).rows
    texts = [row.captions[0] for row in splits.dev][: chosen.queries]
    known = Remembered(model, texts)
    result = {
        "machine": machine("numpy", "faiss-cpu", "usearch", "onnxruntime"),
        "pictures": len(base),
        "dim": model.dim,
        "queries": len(texts),
        "rounds": chosen.rounds,
        "sizes": [],
    }
    least = approximate.LEAST
    for count in chosen.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            size = measure(count, base, known, texts, chosen.rounds, folder)
            approximate.LEAST = least
            path = folder / "photos.sqlite"
            size["memory"] = memory_of(path, texts, folder)
            size["stages_ms"] = stages_of(path, model, texts, chosen.rounds)
        result["sizes"].append(size)
        write_json(chosen.out / "warm_query.json", result)
    (chosen.out / "warm_query.md").write_text(report(result))
    draw(result, chosen.out / "warm_query.png")
    print(report(result))


if __name__ == "__main__":
    main()
