"""An index of a million photographs in Lance tables: size, time of a query, recall, with filters and without.

    python benchmarks/lance_query.py --data DIR [--rows 1000000] [--json FILE]

DIR, gallery, queries and filters as for warm_query.py; needs the extra `distributed`. A query is `Index.answer` down to
the photographs of the first page; recall@10 is of the nearest rows among the candidates, against comparing all rows.
Photographs have captions of the train split, dates, places and cameras; bytes are those of the latest version alone.
"""

import statistics
import tempfile
import time
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
from common import machine, machine_line, table, timed, write_json
from warm_query import PASSING, Remembered, answers, fill, grown

from clipmatch import approximate
from clipmatch.index import Index
from clipmatch.lancestore import LanceStore
from clipmatch.photo import Metadata
from clipmatch.store import Filter

QUERIES = 50
BEST = 10
LEAST = 200  # candidates


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def metadata(number, captions):
    """What a camera with a receiver writes, and a caption."""
    taken = datetime(2020, 1, 1) + timedelta(seconds=997 * number)
    place = (number * 0.7548776662 % 1 * 180 - 90, number * 0.5698402910 % 1 * 360 - 180)
    return Metadata(8, 8, taken, *place, f"Canon EOS {number % 7}D", captions[number % len(captions)])


def recall(index, rows, sizes, texts, least):
    """The mean share of the ten nearest rows, of those whose photographs are large enough, among the candidates."""
    passing = np.flatnonzero(sizes >= least)
    seen, found = index._open(), []
    for text in texts:
        row = index.embedder.embed_texts([text])[0]
        products = rows[passing] @ row
        right = passing[np.argpartition(-products, BEST)[:BEST]]
        where = Filter(min_size=least) if least else Filter()
        narrowed = seen.narrowed(row[None], where, np.empty(0, np.int64), LEAST)
        near = narrowed.gallery if narrowed else seen.all_of(where)
        best = near.numbers[np.argsort(-near.rows.cosines(row))[:BEST]]
        names = {int(photo.path.stem) for photo in index.store.photos_of(best.tolist())}
        found.append(len(names & set(right.tolist())) / BEST)
    return float(np.mean(found))


def main():
    given, model, splits, rows = grown(__doc__)
    texts = [row.captions[0] for row in splits.dev][:QUERIES]
    approximate.LEAST = min(approximate.LEAST, given.rows)  # a few rows are searched by the index too, for the test
    sizes = np.random.default_rng(1).permutation(given.rows)
    result = {"machine": machine("lancedb", "numpy"), "rows": given.rows, "dim": rows.shape[1], "cases": {}}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "photos.lance"
        with LanceStore.open(place, create=True) as store, Index.open(place, Remembered(model, texts)) as index:
            rng, captions = np.random.default_rng(1), [text for row in splits.train for text in row.captions]
            result["fill_s"] = timed(lambda: fill(index, rows, rng, lambda number: metadata(number, captions)))
            result["tidy_s"] = timed(store.tidy)
            store.tables.table("photos").optimize(cleanup_older_than=timedelta(0), delete_unverified=True)
            photos = place / "photos.lance"
            parts = {path.name: size_of(path) for path in (photos / "_indices").iterdir()}
            names = {one.index_uuid: one.columns[0] for one in store.tables.table("photos").list_indices()}
            data = size_of(photos / "data") / given.rows
            result["caption_characters"] = statistics.mean(
                len(captions[at % len(captions)]) for at in range(given.rows)
            )
            result["bytes_a_row"] = {
                "data": data,
                "data: vector": 4 * rows.shape[1],
                "data: the rest": data - 4 * rows.shape[1],
                **{f"index of {names.get(key, 'an older version')}": size / given.rows for key, size in parts.items()},
            }
            for name, share in {"all": 1.0, **PASSING}.items():
                least = given.rows - round(share * given.rows)
                where = Filter(min_size=least) if least else Filter()
                answers(index, texts[:3], where)
                spent = []
                for text in texts:
                    start = time.perf_counter()
                    answers(index, [text], where)
                    spent.append(time.perf_counter() - start)
                found = {"ms": 1e3 * statistics.median(spent), "recall": recall(index, rows, sizes, texts, least)}
                result["cases"][name] = found
    print(machine_line(result["machine"]))
    print({key: result[key] for key in ("fill_s", "tidy_s", "caption_characters", "bytes_a_row")})
    lines = [[name, f"{case['ms']:.1f}", f"{case['recall']:.4f}"] for name, case in result["cases"].items()]
    print(table(["photographs that pass", "ms a query", "recall@10"], lines))
    write_json(given.json, result)


if __name__ == "__main__":
    main()
