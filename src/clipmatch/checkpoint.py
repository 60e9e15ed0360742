"""A model is a folder: folder <-> (model, tokenizer, transform, config).

    config.json        schema, architecture, preprocessing, how it was trained, figures, fingerprint
    model.safetensors  weights (never pickle)
    tokenizer.json     the text side's words

Loading gives model, tokenizer and transform together, builds from the saved config and downloads nothing. Knows
nothing of training loops or image folders.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from clipmatch.config import ModelConfig, PreprocessConfig, from_json, to_json
from clipmatch.errors import ClipmatchError
from clipmatch.model import CLIPModel, Tower, quiet_transformers, unreachable
from clipmatch.preprocess import Tokenizer, Transform

SCHEMA = 1
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


@dataclass(frozen=True)
class Checkpoint:
    """A model with the words and pixels that it understands. `about` is config.json's free part: training data,
    settings, figures.
    """

    model: CLIPModel
    tokenizer: Tokenizer
    transform: Transform
    about: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""


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
    """The tokenizer of a hub name or local folder."""
    from transformers import AutoTokenizer

    source = str(Path(tower).expanduser()) if Path(tower).expanduser().is_dir() else tower
    try:
        with quiet_transformers():
            fast = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ClipmatchError(unreachable(tower)) from error
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
    path = Path(tower).expanduser() / "preprocessor_config.json"
    if not Path(tower).expanduser().is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            path = Path(hf_hub_download(tower, "preprocessor_config.json"))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            raise ClipmatchError(unreachable(tower)) from error
    return parse_preprocessing(json.loads(path.read_text())) if path.exists() else PreprocessConfig()


def parse_preprocessing(values: dict[str, Any]) -> PreprocessConfig:
    """Hugging Face's preprocessor_config.json -> PreprocessConfig."""
    size = values.get("crop_size") if values.get("do_center_crop") else values.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    default = PreprocessConfig()
    return PreprocessConfig(
        size=int(size or default.size),
        mean=tuple(values.get("image_mean") or default.mean),
        std=tuple(values.get("image_std") or default.std),
        resample={1: "lanczos", 2: "bilinear", 3: "bicubic"}.get(int(values.get("resample", 2)), "bilinear"),
        fit="crop" if values.get("do_center_crop") else "stretch",
    )


def save_checkpoint(checkpoint: Checkpoint, folder: str | Path, extra: dict[str, Any] | None = None) -> str:
    """Write the model folder in one step: readers see the old folder or the new one. Returns the fingerprint.

    extra: further files for the folder, name -> dict of tensors (safetensors) or JSON value.
    """
    folder = Path(folder)
    with atomic_folder(folder) as draft:
        tensors = {name: value.detach().cpu().contiguous() for name, value in checkpoint.model.state_dict().items()}
        save_file(tensors, draft / WEIGHTS)
        checkpoint.tokenizer.save(draft / TOKENIZER)
        architecture = to_json(checkpoint.model.architecture())
        preprocess = to_json(checkpoint.transform.config)
        fingerprint = fingerprint_of(draft / WEIGHTS, draft / TOKENIZER, architecture, preprocess)
        values = {
            "schema": SCHEMA,
            "format": "clipmatch",
            "model": architecture,
            "preprocess": preprocess,
            "about": checkpoint.about,
            "fingerprint": fingerprint,
        }
        write_json(draft / CONFIG, values)
        for name, value in (extra or {}).items():
            if name.endswith(".safetensors"):
                save_file(value, draft / name)
            else:
                write_json(draft / name, value)
    return fingerprint


def save_model(model: CLIPModel, folder: str | Path, tokenizer: Tokenizer, transform: Transform, **about: Any) -> str:
    """Write a model folder from its parts; `about` lands in config.json. Returns the fingerprint."""
    return save_checkpoint(Checkpoint(model, tokenizer, transform, about), folder)


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """A model folder, a training run's folder (its best model) or a hub repository -> Checkpoint, in eval mode.

    Raises ClipmatchError when the folder is missing, incomplete, or from a newer version.
    """
    folder = find_folder(folder)
    values = read_config(folder)
    try:
        model = CLIPModel(from_json(ModelConfig, values["model"]))
        model.load_state_dict(load_file(folder / WEIGHTS))
        tokenizer = Tokenizer.from_file(folder / TOKENIZER)
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ClipmatchError(f"The model folder {folder} is damaged ({reason}); copy or train it again.") from error
    transform = Transform(from_json(PreprocessConfig, values["preprocess"]))
    return Checkpoint(model.eval(), tokenizer, transform, values.get("about", {}), values["fingerprint"])


def find_folder(folder: str | Path) -> Path:
    """The local folder that holds the model: itself, its `best` (a training run), or the hub's copy of it."""
    path = Path(folder).expanduser()
    for candidate in (path, path / "best", path.with_name(path.name + ".old")):
        if (candidate / CONFIG).is_file():
            return candidate
    name = str(folder)
    if not path.exists() and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return download(name)
    why = "has no config.json" if path.is_dir() else "does not exist"
    raise ClipmatchError(f"The model folder {path} {why}; train one with: clipmatch train --out {path}")


def download(repo_id: str) -> Path:
    """A hub repository of a clipmatch model folder -> its local copy."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(repo_id, allow_patterns=[CONFIG, WEIGHTS, TOKENIZER])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ClipmatchError(f"No folder {repo_id!r} here, and {unreachable(repo_id)[0].lower()}"
                             f"{unreachable(repo_id)[1:]}") from error  # fmt: skip
    return Path(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, checked for kind and version."""
    try:
        values: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ClipmatchError(f"The file {folder / CONFIG} can't be read ({error}); copy the model again.") from error
    if not isinstance(values, dict) or values.get("format") != "clipmatch":
        raise ClipmatchError(f"{folder} is no clipmatch model folder (its config.json is of another program).")
    if values.get("schema", 0) > SCHEMA:
        raise ClipmatchError(
            f"The model in {folder} was saved by a newer clipmatch; upgrade with: pip install -U clipmatch"
        )
    missing = {"model", "preprocess", "fingerprint"} - values.keys()
    if missing:
        raise ClipmatchError(f"The file {folder / CONFIG} lacks {', '.join(sorted(missing))}; copy the model again.")
    return values


def push_to_hub(model: CLIPModel, repo_id: str, folder: str | Path, **kwargs: Any) -> str:
    """Upload the model folder to the Hugging Face hub (keywords: `token`, `private`, ...) -> address of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=kwargs.pop("token", None))
    api.create_repo(repo_id, exist_ok=True, private=kwargs.pop("private", None))
    return str(api.upload_folder(repo_id=repo_id, folder_path=str(find_folder(folder)), **kwargs))


def fingerprint_of(weights: Path, tokenizer: Path, architecture: dict[str, Any], preprocess: dict[str, Any]) -> str:
    """16 hex digits of SHA-256 over all that decides an embedding."""
    digest = hashlib.sha256()
    for path in (weights, tokenizer):
        digest.update(path.read_bytes())
    digest.update(json.dumps([architecture, preprocess], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Write JSON that a person can read."""
    path.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")


class atomic_folder:
    """Context: fill a draft folder, which then takes the place of `folder`; on an error nothing changes.

    A folder can't be replaced in one system call everywhere, so the old one steps aside as NAME.old for a moment;
    `find_folder` looks there if a crash falls into that moment.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.draft = folder.with_name(folder.name + ".draft")
        self.old = folder.with_name(folder.name + ".old")

    def __enter__(self) -> Path:
        shutil.rmtree(self.draft, ignore_errors=True)
        try:
            self.draft.mkdir(parents=True)
        except OSError as error:
            raise ClipmatchError(
                f"The folder {self.folder} can't be written ({error.strerror}); choose another."
            ) from error
        return self.draft

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self.draft, ignore_errors=True)
            return
        for path in self.draft.iterdir():  # on disk before the switch, or a power cut leaves an empty file
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(self.old, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(self.old)
        self.draft.rename(self.folder)
        shutil.rmtree(self.old, ignore_errors=True)
