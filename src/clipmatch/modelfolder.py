"""A model folder on disk: where it is, what kind it is, what its config.json says.

    config.json        schema, architecture, preprocessing, how it was trained, figures, fingerprint
    tokenizer.json     the text side's words
    model.safetensors  weights for PyTorch, never pickle; and/or
    image.onnx, text.onnx  the two towers for ONNX Runtime
    calibration.json   how sure a cosine makes, once the model has been evaluated

In: a folder or a hub name. Out: a local folder, the checked values of its config.json. Knows nothing of PyTorch, ONNX
or what the numbers mean.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipmatch.atomic import aside
from clipmatch.errors import ClipmatchError, newer, own_version
from clipmatch.hub import hub_error, looks_local, offline
from clipmatch.trust import check_folder

SCHEMA = 1
FORMAT = "clipmatch"
SAVED_BY = "clipmatch"  # the version that saved it, and so can read it
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
IMAGE_GRAPH, TEXT_GRAPH, CALIBRATION = "image.onnx", "text.onnx", "calibration.json"
FILES = (CONFIG, TOKENIZER, WEIGHTS, IMAGE_GRAPH, TEXT_GRAPH, CALIBRATION)
LOG_SCALE = "log_logit_scale"  # in "about" of an ONNX folder, whose graphs have no need of it: training goes on from it
LOGIT_BIAS = "logit_bias"  # in "about" of a model trained with the sigmoid loss: training goes on from it
FINGERPRINT = re.compile("[0-9a-f]{16}")  # files are named by it
EMBEDDED = Path(__file__).parent / "embedded"  # the model that comes with the package ...
EMBEDDED_NAME = "embedded"  # ... and its name wherever one is asked for; a folder of that name is "./embedded"


# Finding it


def find_folder(name: str | Path) -> Path:
    """The local folder that holds the model: itself, its `best` (a training run), or the hub's copy of it.

    Raises ClipmatchError when there is none, or the hub repository is not of a clipmatch model.
    """
    folder = find_local(name)
    if folder is not None:
        return folder
    path = Path(name).expanduser()
    if is_hub_name(name):
        return download(str(name))
    if path.is_dir():
        raise ClipmatchError(f"{path} is no model folder (it has no {CONFIG}); name one that clipmatch train made.")
    raise ClipmatchError(f"The model folder {path} does not exist; train one with: clipmatch train --out {path}")


def find_local(name: str | Path) -> Path | None:
    """The folder on this machine that has the config.json: itself or its `best`; None if there is none.

    What has stepped aside is left behind by a save that was cut off in its last moment.
    """
    path = EMBEDDED if name == EMBEDDED_NAME else Path(name).expanduser()
    candidates = (path, path / "best", aside(path / "best"), aside(path.absolute()))
    return next((candidate for candidate in candidates if (candidate / CONFIG).is_file()), None)


def is_hub_name(name: str | Path) -> bool:
    """Whether a name that is no model folder here can be one of a hub repository: OWNER/MODEL."""
    return str(name).count("/") == 1 and not looks_local(str(name)) and not Path(name).expanduser().exists()


def download(repo_id: str) -> Path:
    """A hub repository of a clipmatch model folder -> its local copy; the weights of another kind are not fetched."""
    from huggingface_hub import snapshot_download

    if kind_of(hub_config(repo_id)) != FORMAT:
        raise ClipmatchError(f"The hub repository {repo_id!r} is not of a clipmatch model; name another.")
    try:
        folder = snapshot_download(repo_id, allow_patterns=list(FILES), local_files_only=offline())
    except (OSError, ValueError) as error:
        raise not_here(repo_id, error) from error
    return Path(folder)


def hub_config(repo_id: str) -> Path:
    """The config.json of a hub repository, as a local file: one request, none if it is in the hub's cache."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        cached = try_to_load_from_cache(repo_id, CONFIG)
        if isinstance(cached, str):
            return Path(cached)
        return Path(hf_hub_download(repo_id, CONFIG, local_files_only=offline()))
    except RemoteEntryNotFoundError as error:
        raise ClipmatchError(f"The hub repository {repo_id!r} has no {CONFIG}; name another model.") from error
    except (OSError, ValueError) as error:
        raise not_here(repo_id, error) from error


def not_here(repo_id: str, error: Exception) -> ClipmatchError:
    """The sentence for a name that is neither a folder nor can be had from the hub."""
    return ClipmatchError(f"There is no folder {repo_id} here. {hub_error(repo_id, error)}")


# Reading it


def kind_of(config: Path) -> str | None:
    """Whose a config.json is: "clipmatch", "transformers" (it names an architecture), or None for anything else."""
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    return FORMAT if values.get("format") == FORMAT else "transformers" if "model_type" in values else None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, checked for kind and version; and the folder, for what leads out of it."""
    if folder != EMBEDDED:  # which is as trustworthy as this code, and may be links if an installer made it so
        check_folder(folder)
    path = folder / CONFIG
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ClipmatchError(f"The file {path} can't be read ({error}); copy the model again.") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ClipmatchError(f"{folder} is no clipmatch model folder (its config.json is of another program).")
    schema = values.get("schema", 0)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise newer(f"The model in {folder}", values.get(SAVED_BY))
    missing = {"model", "preprocess", "fingerprint"} - values.keys()
    if missing:
        raise ClipmatchError(f"The file {path} lacks {', '.join(sorted(missing))}; copy the model again.")
    wrong = next(
        (name for name in ("model", "preprocess", "about") if not isinstance(values.get(name, {}), dict)), None
    )
    if wrong or not FINGERPRINT.fullmatch(str(values["fingerprint"])):
        why = f"{CONFIG} has a wrong {wrong or 'fingerprint'}"
        raise ClipmatchError(f"The model folder {folder} is damaged ({why}); copy it again.")
    return values


# Writing it


def config_values(
    model: dict[str, Any], preprocess: dict[str, Any], about: dict[str, Any], fingerprint: str
) -> dict[str, Any]:
    """The content of config.json. `about` is the free part: training data, settings, figures, licence."""
    return {
        "schema": SCHEMA,
        "format": FORMAT,
        SAVED_BY: own_version(),
        "model": model,
        "preprocess": preprocess,
        "about": about,
        "fingerprint": fingerprint,
    }


def fingerprint_of(files: Sequence[Path], settings: Any) -> str:
    """16 hex digits of SHA-256 over all that decides an embedding."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Write JSON that a person can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
