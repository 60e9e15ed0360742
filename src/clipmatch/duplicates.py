"""Photographs that show the same: copies, re-saved and resized ones, shots of one burst.

In: unit rows [n, d] and 64-bit picture hashes [n]. Out: which are near-duplicates, as groups of places. Knows nothing
of files, and deletes nothing.

Two are near-duplicates if the model sees nearly the same in both and their hashes agree in nearly all bits: a vector
alone takes two beaches for one, a hash alone two dark pictures.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from clipmatch.vectors import Rows

COSINE = 0.75  # at least, of two near-duplicates
BITS = 10  # of 64, that may differ at most
BLOCK = 2048  # rows compared with all at once


def are_near(
    row: NDArray[np.float32], hash: np.uint64, rows: NDArray[np.float32], hashes: NDArray[np.uint64]
) -> NDArray[np.bool_]:
    """One photograph against others [n] -> which are its near-duplicates [n]."""
    return (rows @ row >= COSINE) & (bits_apart(hashes, hash) <= BITS)


def bits_apart(hashes: NDArray[np.uint64], others: NDArray[np.uint64] | np.uint64) -> NDArray[np.int64]:
    """How many bits of hashes [n] differ from others [n], or from one."""
    different = np.bitwise_xor(hashes, others)
    bits: NDArray[np.int64] = np.unpackbits(different[:, None].view(np.uint8), axis=1).sum(axis=1, dtype=np.int64)
    return bits


def stack_places(
    places: NDArray[np.int64], rows: NDArray[np.float32], hashes: NDArray[np.uint64], most: int
) -> list[NDArray[np.int64]]:
    """Places, best first -> at most `most` stacks: each a place and its near-duplicates among those that follow.

    rows [n, d] and hashes [n] are those of the places, in their order.
    """
    free = np.ones(len(places), bool)
    stacks: list[NDArray[np.int64]] = []
    for at in range(len(places)):
        if len(stacks) == most:
            break
        if free[at]:
            near = free & are_near(rows[at], hashes[at], rows, hashes)
            near[: at + 1] = False
            free[near] = False
            stacks.append(np.concatenate([places[at : at + 1], places[near]]))
    return stacks


def group_near(rows: Rows | NDArray[np.float32], hashes: NDArray[np.uint64]) -> list[list[int]]:
    """All photographs -> groups of two or more that near-duplicates link, largest first; places rise within a group."""
    parent = np.arange(len(rows))

    def top(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = int(parent[place])
        return place

    starts = range(0, len(rows), BLOCK)
    for left, right in ((left, right) for left in starts for right in starts if left <= right):
        near = rows[left : left + BLOCK] @ rows[right : right + BLOCK].T >= COSINE  # [b, b]
        first, second = np.nonzero(np.triu(near, k=1) if left == right else near)
        close = bits_apart(hashes[left + first], hashes[right + second]) <= BITS
        for one, other in zip(left + first[close], right + second[close], strict=True):
            parent[top(int(other))] = top(int(one))
    groups: dict[int, list[int]] = {}
    for place in range(len(rows)):
        groups.setdefault(top(place), []).append(place)
    return sorted((group for group in groups.values() if len(group) > 1), key=lambda group: (-len(group), group[0]))
