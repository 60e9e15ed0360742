"""The custom CLIP: two towers, each projected by a residual head into one space.

In: pixels [b, 3, h, w] or token ids [b, t]. Out: unit vectors [b, d]. Knows nothing of files, words or training.

Letters: b batch, t tokens, h tower width, d embedding width (256).
"""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from clipmatch.config import DEFAULT_IMAGE_TOWER, DEFAULT_TEXT_TOWER, ModelConfig
from clipmatch.errors import ClipmatchError

Tower: TypeAlias = str | dict[str, Any]  # a hub name or local folder with weights, or a Hugging Face config without


def build_backbone(tower: Tower) -> nn.Module:
    """A Hugging Face backbone with a `last_hidden_state`: pretrained from a folder or the hub, or from a config.

    Raises ClipmatchError when the folder or the hub name can't be loaded.
    """
    from transformers import AutoConfig, AutoModel

    with quiet_transformers():
        if isinstance(tower, dict):
            if "model_type" not in tower:
                raise ClipmatchError('A tower given as a config needs its "model_type", for example "vit".')
            values = {key: value for key, value in tower.items() if key != "model_type"}
            config = AutoConfig.for_model(tower["model_type"], **values)
            model: nn.Module = AutoModel.from_config(config, **without_pooler(config))
        else:
            source = str(Path(tower).expanduser()) if Path(tower).expanduser().is_dir() else tower
            try:
                config = AutoConfig.from_pretrained(source)
                model = AutoModel.from_pretrained(source, **without_pooler(config))
            except (OSError, ValueError) as error:
                raise ClipmatchError(unreachable(tower)) from error
    return model


def without_pooler(config: Any) -> dict[str, bool]:
    """The keyword that leaves out a pooler which nothing here reads (it would be random and get no gradient)."""
    import inspect

    from transformers import AutoModel

    kind = AutoModel._model_mapping[type(config)]
    kind = kind[0] if isinstance(kind, tuple) else kind
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind.__init__).parameters else {}


def unreachable(tower: str) -> str:
    """The sentence for a tower or tokenizer that can't be had."""
    if tower.startswith((".", "/", "~")) or "\\" in tower or Path(tower).exists():
        return f"{tower!r} holds no Hugging Face model (config.json and model.safetensors); name another folder."
    return (
        f"The hub model {tower!r} can't be reached and is not in the local cache; connect to the network, "
        "or name a local model folder instead."
    )


@contextlib.contextmanager
def quiet_transformers() -> Any:
    """Loading bars and advice about unused weights say nothing that a person can act on here."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def hidden_width(backbone: nn.Module) -> int:
    """The width h of a backbone's `last_hidden_state`."""
    config: Any = backbone.config
    for name in ("hidden_size", "dim", "d_model"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    if getattr(config, "hidden_sizes", None):  # convolutional backbones list one width a stage
        return int(config.hidden_sizes[-1])
    raise ClipmatchError(f"{type(backbone).__name__} does not say how wide its hidden states are.")


def tower_config(backbone: nn.Module) -> dict[str, Any]:
    """The Hugging Face config that builds this backbone again, as a dict."""
    config: Any = backbone.config
    values: dict[str, Any] = config.to_dict()
    return {key: value for key, value in values.items() if key not in ("_name_or_path", "transformers_version")}


def blocks_of(backbone: nn.Module) -> nn.ModuleList:
    """The transformer blocks (or stages) of a backbone: its outermost list of modules."""
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ClipmatchError(f"{type(backbone).__name__} has no list of blocks; tune all of it or none.")
    return lists[0]


def last_hidden_state(output: Any, backbone: nn.Module) -> Tensor:
    """A backbone's output -> hidden states [b, t, h]; feature maps [b, h, y, x] become y * x tokens."""
    hidden: Tensor | None = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise ClipmatchError(f"{type(backbone).__name__} gives no last_hidden_state; choose a plain encoder.")
    return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden


class ImageEncoder(nn.Module):
    """A vision backbone and a linear layer: pixels [b, 3, h, w] -> [b, d], not yet projected or normalised.

    tower: hub name or folder (pretrained), or a config dict (no weights). pooling: "cls" takes the class token of
    `last_hidden_state`, "mean" the average of the patch tokens, "cls+mean" both side by side (DINOv2).
    """

    def __init__(self, tower: Tower = DEFAULT_IMAGE_TOWER, embed_dim: int = 256, pooling: str = "cls"):
        super().__init__()
        self.backbone = build_backbone(tower)
        self.pooling = pooling
        parts = len(pooling.split("+"))
        self.fc = nn.Linear(hidden_width(self.backbone) * parts, embed_dim)

    def features(self, pixel_values: Tensor) -> Tensor:
        """Pixels [b, 3, h, w] -> pooled hidden state [b, h] (2 h with "cls+mean"): what `fc` sees."""
        return self.pool(last_hidden_state(self.backbone(pixel_values=pixel_values), self.backbone))

    def pool(self, hidden: Tensor) -> Tensor:
        """Hidden states [b, t, h] -> [b, h] or [b, 2 h]."""
        if self.pooling == "cls":
            return hidden[:, 0]
        # Towers without a class token (feature maps) average over everything.
        has_class_token = hasattr(getattr(self.backbone, "embeddings", None), "cls_token")
        mean = hidden[:, int(has_class_token) :].mean(dim=1)
        return mean if self.pooling == "mean" else torch.cat([hidden[:, 0], mean], dim=1)

    def hidden_before(self, pixel_values: Tensor, last: int) -> Tensor:
        """Pixels [b, 3, h, w] -> hidden states [b, t, h] that enter the last `last` blocks: the frozen part's work,
        done once and cached when only those blocks are trained.
        """
        backbone: Any = self.backbone
        hidden = backbone.embeddings(pixel_values)
        for block in blocks_of(backbone)[: len(blocks_of(backbone)) - last]:
            hidden = block(hidden)
        return hidden  # type: ignore[no-any-return]

    def features_from(self, hidden: Tensor, last: int) -> Tensor:
        """Hidden states as `hidden_before` gives them -> pooled features [b, h], equal to `features` of the pixels."""
        backbone: Any = self.backbone
        for block in blocks_of(backbone)[len(blocks_of(backbone)) - last :]:
            hidden = block(hidden)
        return self.pool(backbone.layernorm(hidden))

    @property
    def splittable(self) -> bool:
        """Whether `hidden_before` and `features_from` know this backbone's parts: ViT and those built like it."""
        return all(hasattr(self.backbone, part) for part in ("embeddings", "layers", "layernorm"))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pixels [b, 3, h, w] -> [b, d]."""
        projected: Tensor = self.fc(self.features(pixel_values))
        return projected


class TextEncoder(nn.Module):
    """A text backbone and a linear layer: token ids and mask [b, t] -> [b, d], not yet projected or normalised.

    tower: as for `ImageEncoder`. pooling: "cls" takes the first token, "mean" the average of the unpadded tokens.
    """

    def __init__(self, tower: Tower = DEFAULT_TEXT_TOWER, embed_dim: int = 256, pooling: str = "cls"):
        super().__init__()
        self.backbone = build_backbone(tower)
        self.pooling = pooling
        self.fc = nn.Linear(hidden_width(self.backbone), embed_dim)

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Ids and mask [b, t] -> pooled hidden state [b, h]."""
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
        hidden = last_hidden_state(output, self.backbone)  # [b, t, h]
        if self.pooling == "cls":
            return hidden[:, 0]
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)  # [b, t, 1]
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Ids and mask [b, t] -> [b, d]."""
        projected: Tensor = self.fc(self.features(input_ids, attention_mask))
        return projected


class ProjectionHead(nn.Module):
    """Linear, GELU, linear, dropout, residual, layer norm: [b, d] -> [b, d]."""

    def __init__(self, embed_dim: int = 256, dropout: float = 0.1):
        super().__init__()
        self.linear_in = nn.Linear(embed_dim, embed_dim)
        self.gelu = nn.GELU()
        self.linear_out = nn.Linear(embed_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, vectors: Tensor) -> Tensor:
        """[b, d] -> [b, d]."""
        projected = self.linear_in(vectors)
        refined = self.dropout(self.linear_out(self.gelu(projected)))
        normed: Tensor = self.norm(projected + refined)
        return normed


class CLIPModel(nn.Module):
    """Both encoders and heads, and the learnt logit scale that their cosines are multiplied with.

    Each tower can be called alone: `encode_image(pixels)` and `encode_text(ids, mask)` give unit vectors [b, d].
    The design is CLIP's (Radford et al. 2021) with separately pretrained towers, as in Flickr8k-scale dual encoders.
    """

    def __init__(self, config: ModelConfig | None = None):
        super().__init__()
        self.config = config = config or ModelConfig()
        self.image_encoder = ImageEncoder(config.image_tower, config.embed_dim, config.image_pooling)
        self.text_encoder = TextEncoder(config.text_tower, config.embed_dim, config.text_pooling)
        self.image_projection = ProjectionHead(config.embed_dim, config.dropout)
        self.text_projection = ProjectionHead(config.embed_dim, config.dropout)
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(config.init_logit_scale)))

    @property
    def logit_scale(self) -> Tensor:
        """The factor between cosine and logit, clamped to at most `max_logit_scale`; scalar."""
        return self.log_logit_scale.exp().clamp(max=self.config.max_logit_scale)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Pixels [b, 3, h, w] -> unit vectors [b, d], float32."""
        return self.project_image(self.image_encoder.features(pixel_values))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Ids and mask [b, t] -> unit vectors [b, d], float32."""
        return self.project_text(self.text_encoder.features(input_ids, attention_mask))

    def project_image(self, features: Tensor) -> Tensor:
        """Pooled image features [b, h] -> unit vectors [b, d], float32."""
        return unit(self.image_projection(self.image_encoder.fc(features)))

    def project_text(self, features: Tensor) -> Tensor:
        """Pooled text features [b, h] -> unit vectors [b, d], float32."""
        return unit(self.text_projection(self.text_encoder.fc(features)))

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Images and texts -> logits [b images, b texts]: cosine times logit scale."""
        images, texts = self.encode_image(pixel_values), self.encode_text(input_ids, attention_mask)
        return self.logit_scale * images @ texts.T

    def architecture(self) -> ModelConfig:
        """The config that builds this model again without any pretrained weights or network."""
        from dataclasses import replace

        return replace(
            self.config,
            image_tower=tower_config(self.image_encoder.backbone),
            text_tower=tower_config(self.text_encoder.backbone),
        )

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write a model folder; see `clipmatch.checkpoint.save_model` for the keywords."""
        from clipmatch.checkpoint import save_model

        save_model(self, folder, **kwargs)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> CLIPModel:
        """The model in a folder written by `save_pretrained`, or in a hub repository of such a folder."""
        from clipmatch.checkpoint import load_checkpoint

        return load_checkpoint(folder).model

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the model folder to the Hugging Face hub; returns its address."""
        from clipmatch.checkpoint import push_to_hub

        return push_to_hub(self, repo_id, **kwargs)


def unit(vectors: Tensor) -> Tensor:
    """[b, d] -> unit vectors, in float32 whatever autocast ran before: cosines need the digits."""
    return nn.functional.normalize(vectors.float(), dim=-1)
