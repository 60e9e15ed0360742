"""The custom CLIP: two towers, each projected by a residual head into one space.

In: pixels [b, 3, h, w] or token ids [b, t]. Out: unit vectors [b, d]. Knows nothing of files, words or training.

Letters: b batch, t tokens, h tower width, d embedding width (256).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from clipmatch.config import DEFAULT_IMAGE_TOWER, DEFAULT_TEXT_TOWER, ModelConfig
from clipmatch.errors import ClipmatchError, reason_of
from clipmatch.hub import hub_error, local_or_name, looks_local, offline, quiet_transformers
from clipmatch.preprocess import Transform
from clipmatch.tokenizer import Tokenizer
from clipmatch.trust import check_folder, check_settings

Tower: TypeAlias = str | dict[str, Any]  # a hub name or local folder with weights, or a Hugging Face config without


def build_backbone(tower: Tower | nn.Module) -> nn.Module:
    """A backbone with a `last_hidden_state`: Hugging Face's, pretrained from a folder or the hub or from a config; one
    that is built already stays as it is.

    Weights come from safetensors files only, in float32; no code of a hub repository is run. Raises ClipmatchError when
    the folder or the hub name can't be loaded or the config builds no plain encoder.
    """
    if isinstance(tower, nn.Module):
        return tower
    import clipmatch.efficientnet  # noqa: F401  (registers its model type)

    with quiet_transformers():
        return backbone_from_config(tower) if isinstance(tower, dict) else pretrained_backbone(tower)


def backbone_from_config(tower: dict[str, Any]) -> nn.Module:
    """A backbone with random weights."""
    from transformers import AutoConfig, AutoModel

    if "model_type" not in tower:
        raise ClipmatchError('A tower given as a config needs its "model_type", for example "vit".')
    check_settings(tower, f"The tower config of type {tower['model_type']!r}")
    values = {key: value for key, value in tower.items() if key != "model_type"}
    try:
        config = AutoConfig.for_model(tower["model_type"], **values)
    except Exception as error:  # unknown type: ValueError; a value of the wrong kind: a family of transformers' own
        reason = reason_of(error)
        raise ClipmatchError(f"The tower config of type {tower['model_type']!r} is wrong: {reason}") from error
    require_encoder(config, str(tower["model_type"]))
    model: nn.Module = AutoModel.from_config(
        config, dtype=torch.float32, trust_remote_code=False, **without_pooler(config)
    )
    return model


def pretrained_backbone(tower: str) -> nn.Module:
    """A backbone with the weights of a local folder or hub name."""
    from transformers import AutoConfig, AutoModel

    source = local_or_name(tower)
    if Path(source).is_dir():
        check_folder(Path(source))
    options = {"trust_remote_code": False, "local_files_only": source != tower or looks_local(tower) or offline()}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        asked = {name: getattr(config, name, None) for name in ("_attn_implementation", "quantization_config")}
        check_settings(asked, f"The tower {tower!r}")
        require_encoder(config, tower)
        model: nn.Module = AutoModel.from_pretrained(
            source, use_safetensors=True, dtype=torch.float32, **without_pooler(config), **options
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise hub_error(tower, error) from error
    return model


def require_encoder(config: Any, name: str) -> None:
    """Raise ClipmatchError for models of two towers, such as CLIP or T5: they have no single last_hidden_state."""
    if getattr(config, "is_encoder_decoder", False) or hasattr(config, "vision_config"):
        raise ClipmatchError(f"The tower {name!r} is more than one encoder; name a plain vision or text encoder.")


def without_pooler(config: Any) -> dict[str, bool]:
    """The keyword that leaves out a pooler which nothing here reads (it would be random and get no gradient)."""
    import inspect

    from transformers import AutoModel

    if type(config) not in AutoModel._model_mapping:
        raise ClipmatchError(f"The tower type {config.model_type!r} has no plain encoder; choose another.")
    kind = AutoModel._model_mapping[type(config)]
    kind = kind[0] if isinstance(kind, tuple) else kind
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind.__init__).parameters else {}


def hidden_width(backbone: nn.Module) -> int:
    """The width h of a backbone's `last_hidden_state`."""
    config: Any = backbone.config
    for name in ("hidden_size", "dim", "d_model"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    if getattr(backbone, "main_input_name", None) == "pixel_values":
        return measured_width(backbone)
    raise ClipmatchError(f"{type(backbone).__name__} does not say how wide its hidden states are.")


def measured_width(backbone: nn.Module) -> int:
    """The width by a look at one black picture: convolutional configs list stages, and not always the last layer."""
    size = getattr(backbone.config, "image_size", None)
    side = size if isinstance(size, int) else 224
    was_training = backbone.training
    with torch.no_grad():
        width = last_hidden_state(backbone.eval()(pixel_values=torch.zeros(1, 3, side, side)), backbone).shape[-1]
    backbone.train(was_training)
    return width


def leading_tokens(backbone: nn.Module) -> int:
    """How many hidden states come before those of the patches: class, distillation and register tokens."""
    embeddings: Any = getattr(backbone, "embeddings", None)
    names = ("cls_token", "class_embedding", "distillation_token")
    named = sum(getattr(embeddings, name, None) is not None for name in names)
    return named + int(getattr(backbone.config, "num_register_tokens", 0))


# Of the checkpoint that a tower came from: it decides nothing here, and ImageNet's labels alone are 60 kB.
NOT_ARCHITECTURE = ("_name_or_path", "transformers_version", "architectures", "dtype", "id2label", "label2id")


def tower_config(backbone: nn.Module) -> dict[str, Any]:
    """The Hugging Face config that builds this backbone again, as a dict."""
    config: Any = backbone.config
    values: dict[str, Any] = config.to_dict()
    return {key: value for key, value in values.items() if key not in NOT_ARCHITECTURE}


def blocks_of(backbone: nn.Module) -> nn.ModuleList:
    """The transformer blocks (or stages) of a backbone: its outermost list of modules."""
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ClipmatchError(f"{type(backbone).__name__} has no list of blocks; tune all of it or none.")
    return lists[0]


def trained_part(backbone: nn.Module, last: int) -> list[nn.Module]:
    """The last `last` blocks and the norm or layer that follows them; nothing for 0."""
    if not last:
        return []
    blocks = blocks_of(backbone)
    closing = [child for name, child in backbone.named_children() if "norm" in name.lower() or name == "head"]
    return [*blocks[len(blocks) - last :], *closing]


def last_hidden_state(output: Any, backbone: nn.Module) -> Tensor:
    """A backbone's output -> hidden states [b, t, h]; feature maps [b, h, y, x] become y * x tokens."""
    hidden: Tensor | None = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise ClipmatchError(f"{type(backbone).__name__} gives no last_hidden_state; choose a plain encoder.")
    return as_tokens(hidden)


def as_tokens(hidden: Tensor) -> Tensor:
    """Feature maps [b, h, y, x] -> tokens [b, y * x, h]; tokens stay as they are."""
    return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden


class Standardise(nn.Module):
    """Features [b, h] less their mean, over their spread; until the two are set, as they are.

    Frozen towers give features of any scale and offset. Standardised, each learns at the same pace, and dropout puts
    its mean in a feature's place rather than a zero that may lie far outside.
    """

    mean: Tensor  # [h]
    spread: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))

    def forward(self, features: Tensor) -> Tensor:
        """[b, h] -> [b, h]."""
        return (features - self.mean) / self.spread

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Model folders from before this layer lack its numbers."""
        for name, value in self.named_buffers():
            state_dict.setdefault(prefix + name, value)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def fold_standardisation(encoder: ImageEncoder | TextEncoder) -> None:
    """Let an encoder's linear layer do what its `Standardise` did: the same function, one layer less to export."""
    if isinstance(encoder.standardise, Standardise):
        with torch.no_grad():
            encoder.fc.weight.div_(encoder.standardise.spread)
            encoder.fc.bias.sub_(encoder.fc.weight @ encoder.standardise.mean)
        encoder.standardise = nn.Identity()


class ImageEncoder(nn.Module):
    """A vision backbone and a linear layer: pixels [b, 3, h, w] -> [b, d], not yet projected or normalised.

    tower: hub name or folder (pretrained), a config dict (no weights), or a backbone. pooling: "cls" takes the class
    token of `last_hidden_state`, "mean" the average of the patch tokens, "cls+mean" both side by side (DINOv2),
    "mean+max" average and maximum side by side (for feature maps: what there is everywhere, and what is anywhere).
    """

    def __init__(self, tower: Tower | nn.Module = DEFAULT_IMAGE_TOWER, embed_dim: int = 256, pooling: str = "cls"):
        super().__init__()
        self.backbone = build_backbone(tower)
        self.pooling = pooling
        parts = len(pooling.split("+"))
        self.fc = nn.Linear(hidden_width(self.backbone) * parts, embed_dim)
        self.standardise: nn.Module = Standardise(self.fc.in_features)

    def features(self, pixel_values: Tensor) -> Tensor:
        """Pixels [b, 3, h, w] -> pooled hidden state [b, h] (2 h with "cls+mean"): what `fc` sees."""
        return self.pool(last_hidden_state(self.backbone(pixel_values=pixel_values), self.backbone))

    def pool(self, hidden: Tensor) -> Tensor:
        """Hidden states [b, t, h] -> [b, h] or [b, 2 h]."""
        patches = hidden[:, leading_tokens(self.backbone) :]
        ways = {"cls": lambda: hidden[:, 0], "mean": lambda: patches.mean(dim=1), "max": lambda: patches.amax(dim=1)}
        return torch.cat([ways[part]() for part in self.pooling.split("+")], dim=1)

    def hidden_before(self, pixel_values: Tensor, last: int) -> Tensor:
        """Pixels [b, 3, h, w] -> hidden states ([b, t, h] or maps) that enter the last `last` blocks: the frozen part's
        work, done once and cached when only those blocks are trained.
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
        return self.pool(as_tokens(getattr(backbone, self.closing_layer)(hidden)))

    @property
    def closing_layer(self) -> str:
        """The name of the layer after the last block; "" for a backbone whose build is not known here."""
        config: Any = self.backbone.config
        known = {"vit": "layernorm", "deit": "layernorm", "vit_msn": "layernorm", "efficientnet_lite": "head"}
        return known.get(config.model_type, "")

    @property
    def splittable(self) -> bool:
        """Whether `hidden_before` and `features_from` know how this backbone is put together."""
        return bool(self.closing_layer)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pixels [b, 3, h, w] -> [b, d]."""
        projected: Tensor = self.fc(self.standardise(self.features(pixel_values)))
        return projected


class TextEncoder(nn.Module):
    """A text backbone and a linear layer: token ids and mask [b, t] -> [b, d], not yet projected or normalised.

    tower: as for `ImageEncoder`. pooling: "cls" takes the first token, "mean" the average of the unpadded tokens; in a
    causal tower (CLIP's own text model) the first token knows nothing of the others, so take "mean".
    """

    def __init__(self, tower: Tower | nn.Module = DEFAULT_TEXT_TOWER, embed_dim: int = 256, pooling: str = "cls"):
        super().__init__()
        self.backbone = build_backbone(tower)
        self.pooling = pooling
        self.fc = nn.Linear(hidden_width(self.backbone), embed_dim)
        self.standardise: nn.Module = Standardise(self.fc.in_features)

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
        projected: Tensor = self.fc(self.standardise(self.features(input_ids, attention_mask)))
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
    towers: backbones for pictures and texts instead of those that the config names.
    """

    def __init__(self, config: ModelConfig | None = None, towers: tuple[nn.Module, nn.Module] | None = None):
        super().__init__()
        self.config = config = config or ModelConfig()
        image, text = towers or (config.image_tower, config.text_tower)
        self.image_encoder = ImageEncoder(image, config.embed_dim, config.image_pooling)
        self.text_encoder = TextEncoder(text, config.embed_dim, config.text_pooling)
        self.feature_dropout = nn.Dropout(config.feature_dropout)
        self.image_projection = ProjectionHead(config.embed_dim, config.dropout)
        self.text_projection = ProjectionHead(config.embed_dim, config.dropout)
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(config.init_logit_scale)))
        # What a saved folder needs beside the weights; a `Checkpoint` sets them.
        self.tokenizer: Tokenizer | None = None
        self.transform: Transform | None = None
        self.about: dict[str, Any] = {}

    @property
    def logit_scale(self) -> Tensor:
        """The factor between cosine and logit, clamped to at most `max_logit_scale`; scalar."""
        # The parameter itself, as CLIP does it: a clamped output has no gradient, and the scale could never come down.
        ceiling = math.log(self.config.max_logit_scale) - 1e-6  # so that rounding does not lift exp above it
        with torch.no_grad():
            self.log_logit_scale.clamp_(max=ceiling)
        return self.log_logit_scale.exp()

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Pixels [b, 3, h, w] -> unit vectors [b, d], float32."""
        return self.project_image(self.image_encoder.features(pixel_values))

    def encode_places(self, pixel_values: Tensor) -> Tensor:
        """Pixels [b, 3, h, w] -> unit vectors [b, p, d] of the p places of each picture, float32."""
        backbone = self.image_encoder.backbone
        return self.project_places(last_hidden_state(backbone(pixel_values=pixel_values), backbone))

    @property
    def has_places(self) -> bool:
        """Whether a place's own features tell what is there, in terms that the head knows: averages and maxima of
        places are of their kind. Attention mixes places, so a place of a transformer may tell of any other.
        """
        encoder = self.image_encoder
        return "cls" not in encoder.pooling and not hasattr(encoder.backbone.config, "num_attention_heads")

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Ids and mask [b, t] -> unit vectors [b, d], float32."""
        return self.project_text(self.text_encoder.features(input_ids, attention_mask))

    def project_image(self, features: Tensor) -> Tensor:
        """Pooled image features [b, h] -> unit vectors [b, d], float32."""
        encoder = self.image_encoder
        return unit(self.image_projection(encoder.fc(self.feature_dropout(encoder.standardise(features)))))

    def project_places(self, hidden: Tensor) -> Tensor:
        """Hidden states [b, t, h] of an image backbone -> unit vectors [b, p, d] of its places, float32."""
        encoder = self.image_encoder
        places = hidden[:, leading_tokens(encoder.backbone) :]
        parts = len(encoder.pooling.split("+"))  # average and maximum of a single place are the place itself
        single = torch.cat([places] * parts, dim=-1).flatten(0, 1)  # [b * p, h]: as the head takes pooled features
        return self.project_image(single).view(*places.shape[:2], -1)

    def project_text(self, features: Tensor) -> Tensor:
        """Pooled text features [b, h] -> unit vectors [b, d], float32."""
        encoder = self.text_encoder
        return unit(self.text_projection(encoder.fc(self.feature_dropout(encoder.standardise(features)))))

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

    def save_pretrained(
        self,
        folder: str | Path,
        tokenizer: Tokenizer | None = None,
        transform: Transform | None = None,
        **about: Any,
    ) -> None:
        """Write a model folder. A model that came from one brings tokenizer and transform itself.

        about: goes into the free part of config.json, over what the model came with.
        Raises ClipmatchError when no tokenizer or transform is known, or the folder holds anything else.
        """
        from clipmatch.checkpoint import save_model

        save_model(self, folder, tokenizer, transform, **about)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> CLIPModel:
        """The model in a folder written by `save_pretrained`, or in a hub repository of such a folder; in eval mode."""
        from clipmatch.checkpoint import load_checkpoint

        return load_checkpoint(folder).model

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the model, as `save_pretrained` writes it, to the Hugging Face hub -> address of the commit.

        kwargs: `token`, `private`, and those of `huggingface_hub.HfApi.upload_folder`. Raises ClipmatchError as
        `save_pretrained` does, and when the hub can't be reached or refuses.
        """
        from clipmatch.checkpoint import push_to_hub

        return push_to_hub(self, repo_id, **kwargs)


def unit(vectors: Tensor) -> Tensor:
    """[b, d] -> unit vectors, in float32 whatever autocast ran before: cosines need the digits."""
    return nn.functional.normalize(vectors.float(), dim=-1)
