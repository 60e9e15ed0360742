"""Sets of photographs to index: as they are, or upscaled and encoded anew to the size of a camera's.

In: a folder of pictures. Out: folders of JPEG files in the cache, made once.
"""

from __future__ import annotations

import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from clipmatch.crawl import list_images
from clipmatch.pipeline import in_order
from clipmatch.runtime import cache_folder, usable_cores

QUALITY = 90  # of JPEG
SIZES = {"as they are": None, "1 to 4 megapixels": (1.0, 4.0), "4 megapixels": (4.0, 4.0)}


def photograph_set(data: Path, size: str, count: int) -> Path:
    """`count` files of a size, of the first photographs below `data`; fewer where there are fewer."""
    found = list_images(data)[:count]
    name = f"{data.absolute().as_posix().strip('/').replace('/', '-')}-{size.replace(' ', '-')}-{len(found)}"
    folder = cache_folder() / "benchmarks" / name
    if folder.exists():
        return folder
    draft = folder.with_name(f"{name}.{os.getpid()}")
    draft.mkdir(parents=True)
    sides = SIZES[size] and np.linspace(*SIZES[size], len(found))  # megapixels of each
    work = partial(write_photograph, draft, found, sides)
    with ThreadPoolExecutor(usable_cores()) as pool:
        for _ in in_order(work, range(len(found)), pool, 2 * usable_cores()):
            pass
    draft.rename(folder)
    return folder


def write_photograph(folder: Path, found: list[Path], megapixels: np.ndarray | None, number: int) -> None:
    """One file of a set."""
    path = folder / f"{number:06d}{found[number].suffix}"
    if megapixels is None:
        shutil.copyfile(found[number], path)
        return
    with Image.open(found[number]) as image:
        scale = math.sqrt(megapixels[number] * 1e6 / (image.width * image.height))
        side = (round(image.width * scale), round(image.height * scale))
        image.convert("RGB").resize(side, Image.Resampling.BICUBIC).save(path.with_suffix(".jpg"), quality=QUALITY)


def describe(folder: Path) -> dict[str, float]:
    """How many files, the mean of their bytes and of their pixels."""
    files = list_images(folder)
    return {
        "files": len(files),
        "mean_bytes": float(np.mean([path.stat().st_size for path in files])),
        "mean_megapixels": float(np.mean([math.prod(Image.open(path).size) / 1e6 for path in files])),
    }
