"""Match text to images: train a CLIP of your own, measure it honestly, search your photographs with it.

Importing this loads nothing slow; each public name brings its module when it is first used.
"""

from importlib import import_module
from typing import Any

_HOME = {  # public name -> the module that defines it
    "CLIPModel": "model",
    "CaptionedImage": "data",
    "ClipmatchError": "errors",
    "DataConfig": "config",
    "ImageEncoder": "model",
    "ModelConfig": "config",
    "ProjectionHead": "model",
    "TextEncoder": "model",
    "TrainConfig": "config",
    "evaluate": "evaluation",
    "export_model": "export",
    "Filter": "store",
    "Index": "index",
    "find_matches": "index",
    "load_captions": "data",
    "load_model": "embedder",
    "similarity_plot": "report",
    "split_captions": "data",
    "train": "training",
    "training_curves": "report",
    "write_evaluation_card": "report",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("clipmatch")
    if name not in _HOME:
        raise AttributeError(f"module 'clipmatch' has no attribute {name!r}")
    return getattr(import_module(f"clipmatch.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
