"""Models of other makers by name: CLIP, SigLIP and their relatives, through `transformers`.

In: a hub name or a Hugging Face folder. Out: an `Embedder` with the rows that the model's own processor and functions
give. Weights come from safetensors files only, and no code of a repository is run. Knows nothing of clipmatch's own
model folders. PyTorch and transformers are imported when a model is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clipmatch.config import PreprocessConfig
from clipmatch.embedder import BatchedEmbedder, missing_training_extra
from clipmatch.errors import ClipmatchError, reason_of
from clipmatch.hub import hub_error, local_or_name, offline, quiet_transformers
from clipmatch.modelfolder import CONFIG, WEIGHTS, hub_config, is_hub_name
from clipmatch.preprocess import RESAMPLE, Picture, Transform, as_picture, to_rgb
from clipmatch.runtime import choose_device, choose_precision, reuse_memory
from clipmatch.trust import check_folder

if TYPE_CHECKING:
    import torch

# Architectures whose texts are padded to the longest of a batch, the padding masked.
MASKED = ("altclip", "chinese_clip", "clip", "metaclip_2")
# SigLIP was trained on lower-case texts that are always padded to full length, and it looks at the padding: its text
# embedding is the state of the last position. The fixed-resolution SigLIP 2 models are of this architecture too.
FULL_LENGTH = ("siglip",)
PROCESSORS = ("CLIPImageProcessor", "ChineseCLIPImageProcessor", "SiglipImageProcessor", "ViTImageProcessor")
RESAMPLE_NAMES = {int(value): name for name, value in RESAMPLE.items()}

SHARDS = "model-*-of-*.safetensors"
SETTINGS = (  # what decides an embedding beside the weights
    CONFIG,
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
FILES = (*SETTINGS, WEIGHTS, WEIGHTS + ".index.json", SHARDS)
CONVERTER = "SFconvertbot"  # the hub's own account that offers older weights in safetensors form


def load_pretrained(name: str, device: str | None = None, precision: str | None = None) -> PretrainedEmbedder:
    """A hub name or Hugging Face folder of a CLIP-like model -> something that embeds.

    device, precision: as for `load_model`. A model that is not in the hub's local cache is downloaded into it.
    Raises ClipmatchError if there is no such model, it is of another kind or incomplete, or a package is missing.
    """
    try:
        return PretrainedEmbedder(name, find_files(name), device, precision)
    except ModuleNotFoundError as error:
        raise missing_training_extra(error) from error


class PretrainedEmbedder(BatchedEmbedder):
    """An `Embedder` around a CLIP-like model of transformers. name: for messages; folder: its files."""

    def __init__(self, name: str, folder: Path, device: str | None = None, precision: str | None = None):
        check_folder(folder)
        self.full_length = architecture_of(name, folder / CONFIG) in FULL_LENGTH
        self.device = choose_device(device)
        self.precision = choose_precision(self.device, precision or "float32")
        self.transform = load_transform(name, folder)
        self.tokenizer = load_tokenizer(name, folder)
        self.model = load_weights(name, folder).to(self.device).eval()
        reuse_memory()
        side, expected = self.transform.config.size, self.model.config.vision_config.image_size
        if expected not in (side, [side, side], (side, side)):
            raise ClipmatchError(
                f"The model {name!r} looks at pictures of {expected} pixels and its preprocessing makes {side}; choose "
                "another."
            )
        self.max_length = longest_text(self.model.config, self.tokenizer)
        self.dim = self.encode_strings(["a"]).shape[1]
        self.fingerprint = fingerprint_of(folder)
        self.logit_scale = float(self.model.logit_scale.detach().exp())

    def encode_pixels(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [b, s, s, 3] -> unit rows [b, d]."""
        import torch

        values = torch.from_numpy(self.transform.normalise(pixels))  # [b, 3, s, s]
        return self._run(self.model.get_image_features, {"pixel_values": values})

    def encode_strings(self, texts: list[str]) -> NDArray[np.float32]:
        """B strings -> unit rows [b, d]."""
        # half a surrogate pair (a stray byte of the command line) is no UTF-8: it becomes "?"
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        tokens = self.tokenizer(
            [text.lower() for text in clean] if self.full_length else clean,
            padding="max_length" if self.full_length else "longest",
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=not self.full_length,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        return self._run(self.model.get_text_features, dict(tokens))

    def _run(self, encode: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> NDArray[np.float32]:
        """Inputs by name -> unit rows [b, d] of the projected pooled output."""
        import torch

        from clipmatch.model import unit

        dtype = self.precision.dtype
        with torch.inference_mode(), torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            output = encode(**{key: value.to(self.device) for key, value in inputs.items()})
            rows: NDArray[np.float32] = unit(output.pooler_output).cpu().numpy()
        return rows


# Finding the files


def find_files(name: str) -> Path:
    """The local folder with a model's files: itself, or the hub's copy of it, downloaded when it is not there."""
    folder = Path(local_or_name(name))
    if folder.is_dir():
        return folder
    if not is_hub_name(name):
        raise ClipmatchError(f"The model folder {name} does not exist; name one, or a model of the hub (OWNER/MODEL).")
    return download(name)


def download(name: str) -> Path:
    """A hub model -> its local copy. The hub's library shows its progress on stderr."""
    from huggingface_hub import snapshot_download

    architecture_of(name, hub_config(name))  # before hundreds of megabytes are fetched
    local = offline()
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(FILES), local_files_only=local))
        revision = None if weight_files(folder) else stored_conversion(folder) if local else find_conversion(name)
        if revision:
            folder = Path(
                snapshot_download(name, revision=revision, allow_patterns=list(FILES), local_files_only=local)
            )
    except Exception as error:  # the hub's errors and those of its HTTP library have no common base
        raise hub_error(name, error) from error
    if local and not weight_files(folder):
        raise hub_error(name, FileNotFoundError(WEIGHTS))
    return folder


def find_conversion(name: str) -> str | None:
    """The revision in which the hub offers a model's weights in safetensors form, where its owner does not.

    That is a pull request of the hub's own account, made for the newest commit. openai/clip-vit-base-patch32 needs it.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    newest = hub.list_repo_commits(name)[0].commit_id
    requests = hub.get_repo_discussions(
        name, author=CONVERTER, discussion_type="pull_request", discussion_status="open"
    )
    for revision in (request.git_reference for request in requests):
        if newest in [commit.commit_id for commit in hub.list_repo_commits(name, revision=revision)]:
            return str(revision)
    return None


def stored_conversion(folder: Path) -> str | None:
    """The same from the hub's local cache, where `folder` is REPOSITORY/snapshots/COMMIT."""
    requests = folder.parents[1] / "refs" / "refs" / "pr"
    found = sorted(requests.iterdir(), key=lambda path: path.stat().st_mtime) if requests.is_dir() else []
    return f"refs/pr/{found[-1].name}" if found else None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that are loaded: one, or several shards; none if there are no such weights."""
    whole = folder / WEIGHTS
    return [whole] if whole.is_file() else sorted(folder.glob(SHARDS))


def fingerprint_of(folder: Path) -> str:
    """16 hex digits of SHA-256 over weights, architecture, tokenizer and preprocessing."""
    digest = hashlib.sha256()
    for path in [folder / name for name in SETTINGS if (folder / name).is_file()] + weight_files(folder):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()[:16]


# Reading the files


def architecture_of(name: str, config: Path) -> str:
    """The architecture that a config.json names. Raises ClipmatchError for one that is not handled here."""
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        kind = str(values.get("model_type"))
    except (OSError, ValueError, AttributeError) as error:
        raise hub_error(name, error) from error
    if kind == "siglip2":
        raise ClipmatchError(
            f"The model {name!r} is a NaFlex one, which takes pictures of any shape; choose a SigLIP 2 of fixed "
            "resolution, such as google/siglip2-base-patch16-224."
        )
    if kind not in MASKED + FULL_LENGTH:
        known = ", ".join(sorted(MASKED + FULL_LENGTH))
        raise ClipmatchError(f"The model {name!r} is of the kind {kind!r}; choose one of these kinds: {known}.")
    return kind


def load_weights(name: str, folder: Path) -> Any:
    """A folder -> the model of transformers, in float32. Raises ClipmatchError when weights are missing or damaged."""
    import torch
    from transformers import AutoModel

    if not weight_files(folder):
        raise ClipmatchError(f"The model {name!r} has no weights in safetensors form ({WEIGHTS}); choose another.")
    options = {"use_safetensors": True, "trust_remote_code": False, "local_files_only": True}
    try:
        with quiet_transformers():
            model, report = AutoModel.from_pretrained(
                str(folder), dtype=torch.float32, output_loading_info=True, **options
            )
    except Exception as error:  # safetensors, PyTorch and the checks of configs have no common base
        raise ClipmatchError(f"The model {name!r} can't be loaded ({reason_of(error)}); choose another.") from error
    # Factor and bias of the training loss, which no embedding depends on.
    missing = sorted(key for key in report["missing_keys"] if key not in ("logit_scale", "logit_bias"))
    if missing:
        raise ClipmatchError(
            f"The model {name!r} lacks {len(missing)} of its weights ({missing[0]}, ...); copy it again or choose "
            "another."
        )
    return model


def load_tokenizer(name: str, folder: Path) -> Any:
    """A folder -> its tokenizer, padding and cutting on the right. Raises ClipmatchError when it can't be read."""
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # made up where there are no files
            raise ValueError("it has no words")
        if tokenizer.pad_token_id is None:
            raise ValueError("it has no padding token")
    except ImportError as error:
        raise ClipmatchError(
            f"The tokenizer of {name!r} is in sentencepiece's form; install what reads it with: "
            "pip install sentencepiece protobuf"
        ) from error
    except Exception as error:  # a damaged tokenizer.json raises bare Exception
        raise ClipmatchError(
            f"The tokenizer of {name!r} can't be read ({reason_of(error)}); choose another model."
        ) from error
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def longest_text(config: Any, tokenizer: Any) -> int:
    """The number of tokens, special ones included, that the text side has room for."""
    room = config.text_config.max_position_embeddings
    if config.model_type == "altclip":
        room -= config.text_config.pad_token_id + 1  # RoBERTa counts its positions from the padding id on
    return int(min(room, tokenizer.model_max_length))


def load_transform(name: str, folder: Path) -> HubTransform:
    """A folder -> its preprocessing. Raises ClipmatchError when it can't be read or does what is not known here."""
    from transformers import AutoImageProcessor

    try:
        with quiet_transformers():
            processor = AutoImageProcessor.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        return transform_of(json.loads(processor.to_json_string()))
    except Exception as error:  # whatever a file of another maker can cause
        raise ClipmatchError(
            f"The preprocessing of {name!r} can't be used ({reason_of(error)}); choose another model."
        ) from error


def transform_of(values: dict[str, Any]) -> HubTransform:
    """Settings of an image processor of transformers -> the same as a transform. Raises ValueError for unknown ones."""
    kind = values["image_processor_type"].removesuffix("Fast").removesuffix("Pil")
    if kind not in PROCESSORS:
        raise ValueError(f"{kind} is not known")
    if not all(values.get(step) for step in ("do_resize", "do_rescale", "do_normalize")):
        raise ValueError("it leaves out resizing or normalising")
    size = values["size"]
    side = square(values["crop_size"] if values.get("do_center_crop") else size)
    edge = size["shortest_edge"] if set(size) == {"shortest_edge"} else square(size)
    fit = "crop" if "shortest_edge" in size else "stretch"
    if edge < side or (fit == "stretch" and edge != side):
        raise ValueError(f"it resizes to {edge} pixels and then cuts out {side}")
    mean, std = tuple(values["image_mean"]), tuple(values["image_std"])
    return HubTransform(PreprocessConfig(side, mean, std, RESAMPLE_NAMES[values["resample"]], fit), edge)


def square(size: dict[str, int]) -> int:
    """{"height": s, "width": s} -> s. Raises ValueError for anything else."""
    if set(size) != {"height", "width"} or size["height"] != size["width"]:
        raise ValueError(f"its pictures are not square: {size}")
    return size["height"]


class HubTransform(Transform):
    """The pixels of an image processor of transformers: with "crop" the shorter side is resized to `edge` pixels and
    the other to a whole number, then the middle is cut out at whole pixels. One or two in ten thousand values differ
    by a grey level, because Pillow keeps the corners of a cut in single precision.
    """

    def __init__(self, config: PreprocessConfig, edge: int) -> None:
        super().__init__(config)
        self.edge = edge

    def pixels(self, image: Picture) -> NDArray[np.uint8]:
        """Picture -> uint8 [s, s, 3]: made square and resized, not normalised."""
        if self.config.fit == "stretch":
            return super().pixels(image)
        picture, side = to_rgb(as_picture(image)), self.config.size
        (left, right), (top, bottom) = (self.span(length, min(picture.size)) for length in picture.size)
        # Resizing only what is kept is the same as cutting afterwards, without a huge picture on the way.
        picture = picture.resize((side, side), RESAMPLE[self.config.resample], (left, top, right, bottom))
        return np.asarray(picture, dtype=np.uint8)  # [s, s, 3]

    def span(self, length: int, short: int) -> tuple[float, float]:
        """Of a side of `length` pixels, the part that is kept; short: the length of the shorter side."""
        resized = self.edge * length // short
        start = (resized - self.config.size) // 2
        return start * length / resized, (start + self.config.size) * length / resized
