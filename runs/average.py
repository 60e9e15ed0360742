"""The mean of two models of one lineage: what one has learnt more, without all that it forgot on the way.

    python runs/average.py BEFORE AFTER OUT

BEFORE and AFTER are training runs (or model folders), the second of which went on from the first; OUT is written as a
model folder. Weights half way do better on pictures of other kinds than the last ones do, and hardly worse on those
that were trained on (Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022).
"""

import sys

import torch

from clipmatch.checkpoint import load_checkpoint, save_checkpoint
from clipmatch.modelfolder import find_folder


def main(before: str, after: str, out: str) -> None:
    """Load both, save their mean with the description of the second."""
    old, checkpoint = load_checkpoint(find_folder(before)), load_checkpoint(find_folder(after))
    values = old.model.state_dict()
    with torch.no_grad():
        for name, value in checkpoint.model.state_dict().items():
            if value.is_floating_point():
                value.lerp_(values[name], 0.5)
    save_checkpoint(checkpoint, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
