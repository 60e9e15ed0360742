"""The contrastive loss: a pure function of embeddings, small enough to check by hand.

In: unit vectors of both kinds, row i of one belonging to row i of the other. Out: a scalar.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def contrastive_loss(images: Tensor, texts: Tensor, logit_scale: Tensor, image_ids: Tensor | None = None) -> Tensor:
    """Symmetric cross-entropy over the batch's pairs (Radford et al. 2021) -> scalar, in nats.

    images, texts: [b, d] unit vectors. image_ids: [b]; pairs with the same id show the same image, so their other
    captions are no negatives of it and drop out of the softmax: without this, a caption is pushed away from its own
    picture.
    """
    logits = logit_scale * images @ texts.T  # [b images, b texts]
    if image_ids is not None:
        siblings = image_ids[:, None] == image_ids[None, :]  # [b, b]
        siblings.fill_diagonal_(False)
        logits = logits.masked_fill(siblings, float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
