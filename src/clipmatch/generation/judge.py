"""The judge of painted pictures: a model that shares nothing with the guide.

In: a folder and a seed. Out: scenes that the guide's set does not contain, and a CLIP trained on them: other weights,
another kind of image tower (a ResNet; the guide has a ViT), other pictures. Shared are the drawing and the grammar of
the captions, and the text tower's shape. Knows nothing of generators.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from clipmatch.config import ModelConfig
from clipmatch.data import Splits, load_captions, split_captions
from clipmatch.demo_train import SIZE, learn_tokenizer, small_model, train_small
from clipmatch.errors import ClipmatchError
from clipmatch.runstate import is_finished
from clipmatch.scenes import generate

GUIDE_SCENES = 8500  # of the guide's set, train and dev, that the judge's leaves out
SCENES = "judge-scenes"  # folders beside the guide's
RUN = "judge"
DEV = (
    1000  # scenes of the judge's set that nobody has learnt from: the real pictures that painted ones are held against
)


def judge_model(vocab_size: int) -> ModelConfig:
    """A ResNet for pictures instead of the guide's ViT, and the guide's kind of text tower."""
    tower = {
        "model_type": "resnet",
        "image_size": SIZE,  # of the preprocessing; the tower itself takes any
        "embedding_size": 48,
        "hidden_sizes": [64, 128, 256],
        "depths": [2, 2, 2],
        "layer_type": "basic",
    }
    return replace(small_model(vocab_size), image_tower=tower)


def make_judge(out: Path, seed: int = 0, train: int = 8000, progress: bool = True) -> tuple[Path, Splits]:
    """Draw the judge's scenes and train it, as far as that is not done -> its run's folder, its scenes.

    seed: of the guide; the judge's is the next. Raises ClipmatchError when Ctrl-C stopped it.
    """
    folder = generate(out / SCENES, train, DEV, SIZE, seed, progress, skip=GUIDE_SCENES)
    splits = split_captions(load_captions(folder))
    if is_finished(out / RUN):
        return out / RUN, splits
    tokenizer = learn_tokenizer(splits.train)
    if not train_small(out / RUN, splits, seed + 1, judge_model(tokenizer.vocab_size)):
        raise ClipmatchError("The judge's training was stopped; the same command goes on where it was.")
    return out / RUN, splits
