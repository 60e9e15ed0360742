"""What other models make of the training pairs: how well each caption fits each picture, to be learnt by a smaller one.

In: names of models, and the rows to learn from. Out: a logit of any picture and any caption, by number. Each teacher
sees every picture and caption once; the vectors lie in the run's folder, so a resumed run asks nobody again.

Knowledge distillation (Hinton et al. 2015): the student learns the teachers' softmax over a batch, softened by a
temperature. A teacher's logits are its cosines times the logit scale that it has learnt itself.
"""

from __future__ import annotations

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
TEMPERATURE = 1.25  # above 1: the second and third likely caption are heard too


@dataclass(frozen=True, eq=False)
class Teachers:
    """images [n, d], texts [m, d]: the teachers' vectors side by side, in half precision; fingerprints: whose.

    Those of captions are unit vectors, those of pictures as long as the teacher's word weighs.
    """

    images: Tensor
    texts: Tensor
    fingerprints: tuple[str, ...]

    def logits(self, image_ids: Tensor, text_ids: Tensor) -> Tensor:
        """Numbers [b], [b] -> float32 [b images, b texts]: the sum of the teachers' logits."""
        products: Tensor = self.images[image_ids].float() @ self.texts[text_ids].float().T
        return products


def ask_teachers(
    names: Sequence[str],
    rows: Sequence[CaptionedImage],
    run: Path,
    *,
    device: str | None,
    precision: Precision,
    progress: bool,
) -> Teachers:
    """Models by name, the most trusted first, and the rows of a run -> their teachings, kept in the run's folder.

    The logits of the second count half, of the third a third, and so on: opinions that agree are surer than one.
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
    for rank, (name, model) in enumerate(zip(names, models, strict=True), 1):
        note(f"teacher: {name}")
        weight = model.logit_scale / TEMPERATURE / rank
        images.append(weight * embed_pictures(model, [row.path for row in rows], progress))
        texts.append(model.embed_texts([caption for row in rows for caption in row.captions], progress))
    teachers = Teachers(half(images), half(texts), fingerprints)
    tensors = {"weighted_images": teachers.images, "texts": teachers.texts}
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
            return Teachers(file.get_tensor("weighted_images"), file.get_tensor("texts"), fingerprints)
    except Exception as error:
        raise ClipmatchError(f"{path} is damaged ({error}); delete it, and the teachers are asked again.") from error
