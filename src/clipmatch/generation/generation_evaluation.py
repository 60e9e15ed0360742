"""How well painted pictures show what was asked, and how much they look like real ones: pure functions on arrays.

In: unit rows of pictures and captions, distances. Out: figures. Knows nothing of models, files or generators.

Letters: n pictures, m pictures of another set, d embedding width, c captions to choose among.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from clipmatch.errors import ClipmatchError

Rows = NDArray[np.float32]


def draw_others(n: int, choices: int, seed: int) -> NDArray[np.int64]:
    """For each of n prompts the numbers of `choices` - 1 others [n, choices - 1], without repetition.

    Raises ClipmatchError if there are not so many.
    """
    if n < choices:
        raise ClipmatchError(f"To choose among {choices} prompts there must be as many; there are {n}.")
    rng = np.random.default_rng(seed)
    return np.stack([(row + 1 + rng.permutation(n - 1)[: choices - 1]) % n for row in range(n)])


def r_precision(pictures: Rows, captions: Rows, others: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Rows of pictures [n, d], of at least as many prompts in their order, and numbers of other prompts [n, c - 1] ->
    whether each picture is nearest to its own prompt [n]. R-precision@1 of Xu et al. (AttnGAN, CVPR 2018) is the mean.
    A tie is a miss.

    Raises ClipmatchError on rows that are not finite: no comparison with them would be true.
    """
    if not (np.isfinite(pictures).all() and np.isfinite(captions).all()):
        raise ClipmatchError("The judge's embeddings are not finite; choose another judge.")
    own = (pictures * captions[: len(pictures)]).sum(axis=1)  # [n]
    scores = np.einsum("nd,ncd->nc", pictures, captions[others[: len(pictures)]])
    hits: NDArray[np.bool_] = (own[:, None] > scores).all(axis=1)
    return hits


def interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n."""
    centre = share + z**2 / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return (centre - reach) / (1 + z**2 / n), (centre + reach) / (1 + z**2 / n)


def kernel_distance(painted: Rows, real: Rows) -> float:
    """Unit rows [n, d] and [m, d] -> squared maximum mean discrepancy, unbiased, with the kernel (cosine + 1)^3.

    The estimator and kernel of the Kernel Inception Distance (Binkowski et al., ICLR 2018), on other features: rows of
    length sqrt(d) give x.y / d = cosine. It is about 0 for two samples of the same pictures, and may be below.
    """

    def kernel(a: Rows, b: Rows) -> NDArray[np.float64]:
        values: NDArray[np.float64] = (a.astype(np.float64) @ b.T + 1) ** 3
        return values

    def within(a: Rows) -> float:
        values = kernel(a, a)
        return float((values.sum() - np.trace(values)) / (len(a) * (len(a) - 1)))

    return within(painted) + within(real) - 2 * float(kernel(painted, real).mean())


def nearest_distances(pictures: Rows, training: Rows) -> NDArray[np.float32]:
    """Rows [n, d] and [m, d] -> the distance of each to the nearest of the others [n]."""
    found = []
    lengths = (training**2).sum(axis=1)
    for start in range(0, len(pictures), 64):
        part = pictures[start : start + 64]
        squares = lengths - 2 * part @ training.T + (part**2).sum(axis=1, keepdims=True)
        found.append(np.sqrt(squares.min(axis=1).clip(min=0)))
    return np.concatenate(found)


def closer_share(samples: NDArray[np.float32], held_out: NDArray[np.float32], quantile: float) -> float:
    """Distances to the nearest training picture, of samples and of held-out real pictures -> the share of samples that
    are closer than that quantile of the real ones. Pictures that nobody copied give the quantile itself.
    """
    return float((samples < np.quantile(held_out, quantile)).mean())
