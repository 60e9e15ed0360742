"""What smaller vectors cost in recall, at a million photographs: int8, and one bit a number with re-ranking.

    python benchmarks/quantised.py --data DIR [--rows 1000000] [--json FILE]

DIR holds captioned pictures, as for warm_query.py, by whose way the gallery is grown from their embeddings; queries are
captions of the dev split. Recall@10: the share of the ten nearest rows by float32 that a search finds which compares
only the smaller rows, and then, of the best R of those, the float32 (or int8) rows.
"""

import numpy as np
from common import machine, machine_line, table, write_json
from warm_query import grown

QUERIES = 200
BEST = 10
RANKED = (100, 500, 1000)
BLOCK = 50_000


def nearest(rows, queries, most, like=lambda block: block):
    """The places [q, most] of the rows nearest to queries by product; like: a block of rows as they are compared."""
    places = np.empty((len(queries), 0), np.int64)
    scores = np.empty((len(queries), 0), np.float32)
    for start in range(0, len(rows), BLOCK):
        block = like(rows[start : start + BLOCK])
        found = queries @ block.T  # [q, b]
        best = np.argpartition(-found, min(most, found.shape[1] - 1), axis=1)[:, :most]
        scores = np.concatenate([scores, np.take_along_axis(found, best, 1)], axis=1)
        places = np.concatenate([places, best + start], axis=1)
    order = np.argsort(-scores, axis=1)[:, :most]
    return np.take_along_axis(places, order, 1)


def ranked(rows, queries, places, most):
    """Places [q, r] -> the `most` of each whose rows are nearest."""
    found = np.empty((len(queries), most), np.int64)
    for at, (query, own) in enumerate(zip(queries, places, strict=True)):
        found[at] = own[np.argsort(-(rows[own] @ query))[:most]]
    return found


def recall(found, right):
    return float(np.mean([len(set(one) & set(two)) / len(two) for one, two in zip(found, right, strict=True)]))


def main():
    given, model, splits, rows = grown(__doc__)
    texts = [row.captions[0] for row in splits.dev][:QUERIES]
    queries = model.embed_texts(texts)
    scale = np.abs(rows).max(axis=0) / 127  # [d]
    whole = lambda block: np.rint(block / scale).clip(-127, 127) * scale  # noqa: E731
    right = nearest(rows, queries, BEST)
    figures = {"int8": recall(nearest(rows, queries, BEST, whole), right)}
    most = max(RANKED)
    by_bits = nearest(rows - rows.mean(axis=0), queries, most, np.sign)
    figures["1 bit"] = recall(by_bits[:, :BEST], right)
    eight = whole(rows)
    for count in RANKED:
        figures[f"1 bit, the best {count} by float32"] = recall(ranked(rows, queries, by_bits[:, :count], BEST), right)
        figures[f"1 bit, the best {count} by int8"] = recall(ranked(eight, queries, by_bits[:, :count], BEST), right)
    print(machine_line(machine("numpy")))
    print(table(["rows", "recall@10"], [[name, f"{value:.4f}"] for name, value in figures.items()]))
    write_json(given.json, {"machine": machine("numpy"), "rows": given.rows, "dim": rows.shape[1], "recall": figures})


if __name__ == "__main__":
    main()
