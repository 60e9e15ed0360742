"""Batches in which similar pictures meet: hard negatives, mined by the model that is to learn from them.

In: unit vectors of the training pictures, as the model sees them now. Out: each picture's nearest others, and an
epoch's order in which a share of every batch are neighbours of the rest. Knows nothing of models, files or losses.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NEIGHBOURS = 16  # of each picture that are known
BLOCK = 1024  # pictures that are compared with all at a time


def find_neighbours(rows: Tensor, count: int = NEIGHBOURS) -> Tensor:
    """Unit vectors [n, d] -> int32 [n, k]: the numbers of the `count` nearest others of each (all, if fewer), nearest
    first.
    """
    found = []
    for start in range(0, len(rows), BLOCK):
        cosines = rows[start : start + BLOCK] @ rows.T  # [block, n]
        cosines.diagonal(start).fill_(-torch.inf)  # nobody is a neighbour of himself
        found.append(cosines.topk(min(count, len(rows) - 1)).indices.int().cpu())
    return torch.cat(found)


def gather_neighbours(
    order: NDArray[np.int64], neighbours: NDArray[np.int32], batch_size: int, share: float
) -> NDArray[np.int64]:
    """An epoch's order -> one of whole batches, no picture twice: the first of each batch are the next of `order` that
    are left; `share` of it are neighbours of these, each one's nearest that is left before anybody's second.

    neighbours [n, k]: as `find_neighbours` gives them. Where all neighbours are gone, the next of `order` step in.
    """
    used = np.zeros(len(order), bool)
    left = (item for item in order.tolist() if not used[item])
    seeds = max(1, batch_size - round(share * batch_size))
    gathered: list[int] = []
    for _ in range(len(order) // batch_size):
        batch: list[int] = []
        while len(batch) < seeds:
            add(next(left), batch, used)
        for item in neighbours[batch].T.ravel().tolist():
            if len(batch) == batch_size:
                break
            if not used[item]:
                add(item, batch, used)
        while len(batch) < batch_size:
            add(next(left), batch, used)
        gathered += batch
    return np.array(gathered, np.int64)


def add(item: int, batch: list[int], used: NDArray[np.bool_]) -> None:
    """Put a picture into a batch."""
    used[item] = True
    batch.append(item)
