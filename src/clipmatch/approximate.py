"""The rows of a very large gallery that are probably nearest to a query, without looking at all of them.

In: a gallery, a query's row [d]. Out: places in the gallery, which the search then compares exactly. Derived from the
store like its vectors: STORE.CONTENT.ivf, where CONTENT is the store's token, so one that is out of date is never
read; without it every row is compared.

An inverted file of 8-bit rows (FAISS): of the kept libraries it finds the most at a million photographs, is built in a
minute and takes a quarter of the vectors' room (benchmarks/results/approximate.md). It has no filter, and needs none:
a search among photographs that pass a filter compares all of them.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipmatch.runtime import usable_cores
from clipmatch.vectors import Gallery

LEAST = 300_000  # rows; fewer are compared exactly within 12 ms
CANDIDATES = 2000
LISTS = 4  # for each root of the number of rows
TRAINED = 40  # rows that each list is placed by
PROBES = 64  # lists that a query looks into


def approximate_file(store: Path, content: str) -> Path:
    """Where the index of a store with that content token lies."""
    return store.with_name(f"{store.name}.{content}.ivf")


def build_approximate(store: Path, content: str, gallery: Gallery) -> bool:
    """Make the index of a large gallery, unless it is there, and remove older ones -> False where it can't be made:
    without FAISS (the extra `scale`), or on a full disk.
    """
    path = approximate_file(store, content)
    for other in store.parent.glob(f"{store.name}.*.ivf"):
        if other != path:
            with contextlib.suppress(OSError):
                other.unlink()
    if len(gallery) < LEAST or path.is_file():
        return True
    faiss = load_faiss()
    if faiss is None:
        return False
    lists = max(1, round(LISTS * len(gallery) ** 0.5))
    faiss.omp_set_num_threads(usable_cores())
    index = faiss.index_factory(gallery.rows.shape[1], f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    some = np.random.default_rng(0).permutation(len(gallery))[: TRAINED * lists]
    index.train(gallery.rows[np.sort(some)])
    index.add(gallery.rows)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        faiss.write_index(index, str(draft))
        draft.replace(path)
    except (OSError, RuntimeError):  # a full disk; faiss has no kind of its own
        return False
    finally:
        draft.unlink(missing_ok=True)
    return True


def nearest(store: Path, content: str, gallery: Gallery, row: NDArray[np.float32], most: int) -> NDArray[np.int64]:
    """A unit row [d] -> places of about `most` rows that are probably nearest, rising; all places without an index."""
    everything = np.arange(len(gallery))
    path = approximate_file(store, content)
    faiss = load_faiss() if len(gallery) >= LEAST and most < len(gallery) and path.is_file() else None
    if faiss is None:
        return everything
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    except RuntimeError:  # damaged
        return everything
    if index.ntotal != len(gallery) or index.d != len(row):
        return everything
    faiss.omp_set_num_threads(usable_cores())
    index.nprobe = PROBES
    found: NDArray[np.int64] = index.search(row[None], most)[1][0]
    return np.sort(found[found >= 0])


def load_faiss() -> Any:
    """The library; None where it is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss
