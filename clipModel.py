"""The model's public names in one place: `from clipModel import CLIPModel, tokenizer, transform`.

    transform(images=image)["pixel_values"][0]        -> float32 array [3, 224, 224]
    tokenizer(texts, padding="max_length", truncation=True, max_length=64, return_tensors="pt")
                                                      -> {"input_ids", "attention_mask"}, tensors [b, 64]

Both fit the default towers (google/vit-base-patch16-224 and distilbert-base-uncased). Importing this loads no weights
and needs no network; the tokenizer's vocabulary is fetched (or found in the local cache) when it is first called.
"""

from functools import lru_cache

from clipmatch.config import DEFAULT_TEXT_TOWER, PreprocessConfig
from clipmatch.model import CLIPModel, ImageEncoder, ProjectionHead, TextEncoder
from clipmatch.preprocess import Transform
from clipmatch.tokenizer import Tokenizer

__all__ = ["CLIPModel", "ImageEncoder", "ProjectionHead", "TextEncoder", "tokenizer", "transform"]

transform = Transform(PreprocessConfig())


@lru_cache(maxsize=1)
def _default_tokenizer() -> Tokenizer:
    from clipmatch.checkpoint import load_tokenizer

    return load_tokenizer(DEFAULT_TEXT_TOWER)


def tokenizer(texts, padding="max_length", truncation=True, max_length=64, return_tensors=None):
    """Texts -> input_ids and attention_mask, by the vocabulary of the default text tower."""
    return _default_tokenizer()(
        texts, padding=padding, truncation=truncation, max_length=max_length, return_tensors=return_tensors
    )
