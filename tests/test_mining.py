"""Hard negatives: who is whose neighbour, and who meets whom in a batch."""

import numpy as np
import torch
from torch.nn.functional import normalize

from clipmatch import mining
from clipmatch.mining import find_neighbours, gather_neighbours
from clipmatch.sources import EpochBatches


def angles(*degrees):
    radians = torch.deg2rad(torch.tensor(degrees, dtype=torch.float32))
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def test_neighbours_on_a_circle():
    assert find_neighbours(angles(0, 50, 10, 85), 2).tolist() == [[2, 1], [3, 2], [0, 1], [1, 2]]
    assert find_neighbours(angles(0, 50, 10), 16).tolist() == [[2, 1], [2, 0], [0, 1]]  # there are but two others


def test_neighbours_in_blocks_are_those_of_the_whole(monkeypatch):
    torch.manual_seed(0)
    rows = normalize(torch.randn(50, 8), dim=1)
    whole = find_neighbours(rows, 5)
    cosines = rows @ rows.T
    for item in range(50):
        others = sorted((other for other in range(50) if other != item), key=lambda other: -cosines[item, other])
        assert whole[item].tolist() == others[:5]
    monkeypatch.setattr(mining, "BLOCK", 7)
    assert torch.equal(find_neighbours(rows, 5), whole)


PAIRS = np.array(
    [[1], [0], [3], [2], [5], [4], [7], [6]], np.int32
)  # 0 and 1 are each other's neighbours, 2 and 3, ...


def test_half_a_batch_of_neighbours_by_hand():
    order = np.array([6, 1, 4, 3, 0, 7, 2, 5])
    assert gather_neighbours(order, PAIRS, 4, 0.5).tolist() == [6, 1, 7, 0, 4, 3, 5, 2]
    assert gather_neighbours(order, PAIRS, 4, 0.25).tolist() == [6, 1, 4, 7, 3, 0, 2, 5]
    assert gather_neighbours(order, PAIRS, 4, 0.0).tolist() == order.tolist()


def test_the_nearest_of_each_come_before_anybody_s_second():
    nearest = np.array([[2, 3], [4, 5], [0, 0], [0, 0], [0, 0], [0, 0]], np.int32)
    assert gather_neighbours(np.arange(6), nearest, 5, 0.6).tolist() == [0, 1, 2, 4, 3]


def test_where_neighbours_are_gone_the_next_step_in():
    same = np.zeros((6, 1), np.int32)  # everybody's neighbour is 0
    assert gather_neighbours(np.array([3, 0, 5, 1, 4, 2]), same, 3, 0.9).tolist() == [3, 0, 5, 1, 4, 2]


def test_an_epoch_of_neighbours_has_every_picture_once_and_continues_anywhere():
    torch.manual_seed(0)
    neighbours = find_neighbours(normalize(torch.randn(50, 8), dim=1)).numpy()
    mined = {"neighbours": neighbours, "share": 0.5}
    batches = list(EpochBatches(50, 8, epochs=2, seed=0, **mined))
    for epoch in (0, 1):
        items = [item for batch in batches for e, item in batch if e == epoch]
        assert len(items) == len(set(items)) == 48
    assert list(EpochBatches(50, 8, epochs=2, seed=0, start=8, **mined)) == batches[8:]
    assert list(EpochBatches(50, 8, epochs=2, seed=0)) != batches

    def met(batches):
        return sum(
            other in {item for _, item in batch} for batch in batches for _, i in batch for other in neighbours[i][:3]
        )

    assert met(batches) > 1.5 * met(EpochBatches(50, 8, epochs=2, seed=0))
