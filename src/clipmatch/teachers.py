"""What other models make of the training pairs: how well each caption fits each picture, to be learnt by a smaller one.

In: names of models, and the rows to learn from. Out: the cosine of any picture and any caption, by number. Each teacher
sees every picture and caption once; the vectors lie in the run's folder, so a resumed run asks nobody again.

Knowledge distillation (Hinton et al. 2015): the student learns the teachers' softmax over a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from clipmatch.data import CaptionedImage
from clipmatch.embedder import BatchedEmbedder, TorchEmbedder, load_model
from clipmatch.errors import ClipmatchError
from clipmatch.runlog import note
from clipmatch.runtime import Precision

FILE = "teachers.safetensors"


@dataclass(frozen=True, eq=False)
class Teachers:
    """images [n, d], texts [m, d]: the teachers' unit vectors side by side, in half precision; fingerprints: whose."""

    images: Tensor
    texts: Tensor
    fingerprints: tuple[str, ...]

    def cosines(self, image_ids: Tensor, text_ids: Tensor) -> Tensor:
        """Numbers [b], [b] -> float32 [b images, b texts].

        That of several teachers is the sum of theirs over the root of their count: opinions that agree are surer than
        one, and of independent ones the sum scatters by that root.
        """
        products: Tensor = self.images[image_ids].float() @ self.texts[text_ids].float().T
        return products / math.sqrt(len(self.fingerprints))


def ask_teachers(
    names: Sequence[str],
    rows: Sequence[CaptionedImage],
    run: Path,
    *,
    device: str | None,
    precision: Precision,
    progress: bool,
) -> Teachers:
    """Models by name and the rows of a run -> their teachings, kept in the run's folder.

    precision: the run's own, for teachers that PyTorch runs. Raises ClipmatchError if a model can't be loaded.
    """
    models = [load_model(name, device) for name in names]
    for model in models:
        if isinstance(model, TorchEmbedder):
            model.precision = precision
    fingerprints = tuple(model.fingerprint for model in models)
    saved = read_teachers(run / FILE)
    if saved is not None and saved.fingerprints == fingerprints:
        return saved
    images, texts = [], []
    for name, model in zip(names, models, strict=True):
        note(f"teacher: {name}")
        images.append(embed_pictures(model, [row.path for row in rows], progress))
        texts.append(model.embed_texts([caption for row in rows for caption in row.captions], progress))
    teachers = Teachers(half(images), half(texts), fingerprints)
    tensors = {"images": teachers.images, "texts": teachers.texts}
    save_file(tensors, run / FILE, {"fingerprints": " ".join(fingerprints)})
    return teachers


def embed_pictures(model: BatchedEmbedder, paths: Sequence[Path], progress: bool) -> NDArray[np.float32]:
    """Paths -> rows [n, d]. What can't be read is zero: the student can't read it either, so no batch holds it."""
    found = model.embed_images(paths, progress)
    row_of = {path: number for number, path in enumerate(found.paths)}
    rows = np.zeros((len(paths), model.dim), np.float32)
    for number, path in enumerate(paths):
        if path in row_of:
            rows[number] = found.rows[row_of[path]]
    return rows


def half(parts: list[NDArray[np.float32]]) -> Tensor:
    """Each teacher's rows [n, d] -> side by side, float16."""
    return torch.from_numpy(np.concatenate(parts, axis=1)).half()


def read_teachers(path: Path) -> Teachers | None:
    """What `ask_teachers` kept, if it is there and whole."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            fingerprints = tuple(file.metadata()["fingerprints"].split())
            return Teachers(file.get_tensor("images"), file.get_tensor("texts"), fingerprints)
    except Exception as error:
        raise ClipmatchError(f"{path} is damaged ({error}); delete it, and the teachers are asked again.") from error
