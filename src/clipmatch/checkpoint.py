"""A model is a folder: folder <-> (model, tokenizer, transform, config), in PyTorch.

Loading gives model, tokenizer and transform together, builds from the saved config and downloads nothing. Knows
nothing of training loops or image folders.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from clipmatch.adapters import plain_state
from clipmatch.atomic import atomic_folder, remove_drafts
from clipmatch.config import ModelConfig, PreprocessConfig, from_json, to_json
from clipmatch.errors import ClipmatchError, reason_of, unwritable
from clipmatch.hub import hub_error, local_or_name, looks_local, offline, quiet_transformers
from clipmatch.model import CLIPModel, Tower
from clipmatch.modelfolder import (
    CALIBRATION,
    CONFIG,
    FILES,
    IMAGE_GRAPH,
    TOKENIZER,
    WEIGHTS,
    config_values,
    find_folder,
    fingerprint_of,
    read_config,
    write_json,
)
from clipmatch.preprocess import Transform
from clipmatch.tokenizer import Tokenizer
from clipmatch.trust import check_folder

PREPROCESSING = "preprocessor_config.json"  # of a Hugging Face tower


@dataclass(frozen=True)
class Checkpoint:
    """A model with the words and pixels that it understands. `about` is config.json's free part: training data,
    settings, figures.
    """

    model: CLIPModel
    tokenizer: Tokenizer
    transform: Transform
    about: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""  # of the folder that it was read from; a new model has none

    def __post_init__(self) -> None:
        # So that the model alone can be saved again: `CLIPModel.from_pretrained(a).save_pretrained(b)`.
        self.model.tokenizer, self.model.transform, self.model.about = self.tokenizer, self.transform, self.about

    def save(self, folder: str | Path, extra: dict[str, Any] | None = None) -> str:
        """Write the model folder (`save_checkpoint`); a model that is kept in another form does it in its own way."""
        return save_checkpoint(self, folder, extra)


def create_checkpoint(config: ModelConfig, tokenizer: Tokenizer | None = None, **preprocess: Any) -> Checkpoint:
    """A new model with the tokenizer and preprocessing that its towers came with.

    tokenizer: instead of the text tower's own. preprocess: settings that override the image tower's own.
    Raises ClipmatchError when a tower can't be loaded or no tokenizer is known.
    """
    if tokenizer is None:
        if isinstance(config.text_tower, dict):
            raise ClipmatchError("A text tower given as a config has no tokenizer; pass one.")
        tokenizer = load_tokenizer(config.text_tower)
    settings = load_preprocessing(config.image_tower)
    return Checkpoint(CLIPModel(config), tokenizer, Transform(replace(settings, **preprocess)))


def load_tokenizer(tower: str) -> Tokenizer:
    """The tokenizer of a hub name or local folder. Raises ClipmatchError when there is none."""
    from transformers import AutoTokenizer

    source = local_or_name(tower)
    local = source != tower or looks_local(tower) or offline()
    if Path(source).is_dir():
        check_folder(Path(source))
    try:
        with quiet_transformers():
            fast = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local)
        if set(fast.get_vocab()) <= set(fast.all_special_tokens):  # what transformers makes up if there are no files
            raise ValueError("no words")
    except Exception as error:  # a damaged tokenizer.json raises bare Exception
        if Path(source).is_dir():
            raise ClipmatchError(f"The folder {source} holds no tokenizer that can be read; copy one there.") from error
        raise hub_error(tower, error) from error
    backend = getattr(fast, "backend_tokenizer", None)
    if backend is None:
        raise ClipmatchError(f"The tokenizer of {tower!r} has no tokenizer.json form; choose another text tower.")
    return Tokenizer(backend)


def load_preprocessing(tower: Tower) -> PreprocessConfig:
    """The preprocessing that an image tower was trained with, from its `preprocessor_config.json`.

    A tower from a config has none: ViT's defaults at the config's image size.
    """
    if isinstance(tower, dict):
        return PreprocessConfig(size=int(tower.get("image_size", 224)))
    folder = Path(tower).expanduser()
    path = folder / PREPROCESSING if folder.is_dir() else hub_file(tower, PREPROCESSING)
    if path is None or not path.exists():
        return PreprocessConfig()
    try:
        return parse_preprocessing(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ClipmatchError(f"The file {path} can't be used ({error}); mend or delete it.") from error


def hub_file(repo_id: str, name: str) -> Path | None:
    """A file of a hub repository -> its local copy; None if the repository has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, name, local_files_only=offline()))
    except RemoteEntryNotFoundError:
        return None
    except (OSError, ValueError, LocalEntryNotFoundError) as error:
        raise hub_error(repo_id, error) from error


def parse_preprocessing(values: dict[str, Any]) -> PreprocessConfig:
    """Hugging Face's preprocessor_config.json -> PreprocessConfig."""
    size = values.get("crop_size") if values.get("do_center_crop") else values.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    default = PreprocessConfig()
    plain = values.get("do_normalize") is False
    return PreprocessConfig(
        size=int(size or default.size),
        mean=(0, 0, 0) if plain else tuple(values.get("image_mean") or default.mean),
        std=(1, 1, 1) if plain else tuple(values.get("image_std") or default.std),
        resample={1: "lanczos", 3: "bicubic"}.get(values.get("resample", 2), "bilinear"),
        fit="crop" if values.get("do_center_crop") else "stretch",
    )


def save_checkpoint(checkpoint: Checkpoint, folder: str | Path, extra: dict[str, Any] | None = None) -> str:
    """Write the model folder in one step: readers see the old folder or the new one. Returns the fingerprint.

    extra: further files for the folder, as `write_extra` takes them.
    Raises ClipmatchError when the folder can't be written or holds files of anything but an earlier save.
    """
    extra = extra or {}
    folder = Path(folder).expanduser().resolve()
    refuse_foreign(folder, {CONFIG, WEIGHTS, TOKENIZER, CALIBRATION, *extra})
    with model_draft(folder) as draft:
        tensors = {name: value.detach().cpu().contiguous() for name, value in plain_state(checkpoint.model).items()}
        save_file(tensors, draft / WEIGHTS)
        checkpoint.tokenizer.save(draft / TOKENIZER)
        architecture = to_json(checkpoint.model.architecture())
        preprocess = to_json(checkpoint.transform.config)
        fingerprint = fingerprint_of([draft / WEIGHTS, draft / TOKENIZER], [architecture, preprocess])
        write_json(draft / CONFIG, config_values(architecture, preprocess, checkpoint.about, fingerprint))
        write_extra(draft, extra)
    return fingerprint


def write_extra(folder: Path, extra: dict[str, Any]) -> None:
    """Further files: name -> dict of tensors (safetensors) or JSON value."""
    for name, value in extra.items():
        if name.endswith(".safetensors"):
            save_file(value, folder / name)
        else:
            write_json(folder / name, value)


def refuse_foreign(folder: Path, names: set[str]) -> None:
    """Raise ClipmatchError for a folder that holds more than a saved model: saving replaces it as a whole."""
    if not folder.is_dir():
        return
    remove_drafts(folder)  # of a calibration, by a process that was killed
    found = {path.name for path in folder.iterdir()}
    foreign = sorted(found - names)
    if not foreign and found:
        try:
            read_config(folder)
        except ClipmatchError:
            foreign = [CONFIG]
    if foreign:
        raise ClipmatchError(f"{folder} holds other files ({', '.join(foreign[:3])}); save to a new or empty folder.")


def save_model(
    model: CLIPModel,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    transform: Transform | None = None,
    **about: Any,
) -> str:
    """Write a model folder from its parts, by default those that the model came with. Returns the fingerprint.

    about: goes into the free part of config.json, over what the model came with.
    """
    tokenizer, transform = tokenizer or model.tokenizer, transform or model.transform
    if tokenizer is None or transform is None:
        raise ClipmatchError(
            "This model was not loaded from a folder and so has no tokenizer or transform; pass both as tokenizer= and "
            "transform= (those that it was trained with)."
        )
    return save_checkpoint(Checkpoint(model, tokenizer, transform, {**model.about, **about}), folder)


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """A model folder, a training run's folder (its best model) or a hub repository -> Checkpoint, in eval mode.

    Raises ClipmatchError when the folder is missing, incomplete, or from a newer version.
    """
    folder = find_folder(folder)
    values = read_config(folder)
    if not (folder / WEIGHTS).exists() and (folder / IMAGE_GRAPH).exists():
        raise ClipmatchError(
            f"The model in {folder} is in ONNX form already and has no PyTorch weights; search with it as it is or name"
            " the folder that it was exported from."
        )
    try:
        model = CLIPModel(model_config(values["model"]))
        model.load_state_dict(load_file(folder / WEIGHTS))
        tokenizer = Tokenizer.from_file(folder / TOKENIZER)
        transform = Transform(from_json(PreprocessConfig, values["preprocess"]))
    except (ClipmatchError, OSError, LookupError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        reason = reason_of(error)
        raise ClipmatchError(f"The model folder {folder} is damaged ({reason}); copy or train it again.") from error
    return Checkpoint(model.eval(), tokenizer, transform, values.get("about", {}), values["fingerprint"])


def model_config(values: dict[str, Any]) -> ModelConfig:
    """The "model" part of config.json, whose towers must be configs: a name would be looked for on the hub."""
    config = from_json(ModelConfig, values)
    if not (isinstance(config.image_tower, dict) and isinstance(config.text_tower, dict)):
        raise ValueError(f"{CONFIG} does not describe its towers")
    return config


def push_to_hub(model: CLIPModel, repo_id: str, folder: str | Path | None = None, **kwargs: Any) -> str:
    """Upload a model to the Hugging Face hub -> address of the commit.

    folder: an already saved model folder to upload; by default the model is saved for it. kwargs: `token`, `private`,
    and those of `HfApi.upload_folder`. Raises ClipmatchError when the hub can't be reached or refuses.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as draft:
        if folder is None:
            save_model(model, draft)
        source = str(find_folder(folder or draft))
        api = HfApi(token=kwargs.pop("token", None))
        try:
            api.create_repo(repo_id, exist_ok=True, private=kwargs.pop("private", None))
            return str(api.upload_folder(repo_id=repo_id, folder_path=source, allow_patterns=list(FILES), **kwargs))
        except (OSError, ValueError, RuntimeError) as error:
            reason = reason_of(error)
            raise ClipmatchError(
                f"The hub did not take the model {repo_id!r} ({reason}); check the name and log in by: hf auth login"
            ) from error


@contextmanager
def model_draft(folder: Path) -> Iterator[Path]:
    """Context: `atomic_folder` for a model's. Raises ClipmatchError when it can't be written."""
    try:
        with atomic_folder(folder) as draft:
            yield draft
    except OSError as error:
        raise unwritable(f"The folder {folder}", error, "choose another") from error
    except SafetensorError as error:  # which has no number of the system's, only what it said
        full = "os error 28" in str(error)
        system = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if full else OSError(reason_of(error))
        raise unwritable(f"The folder {folder}", system, "choose another") from error
