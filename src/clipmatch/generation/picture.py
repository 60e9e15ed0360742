"""Paintings as files: PNG that say how they were made, GIF and MP4 of how they came about.

In: tensors of pictures, and what is to be remembered of them. Out: files. Knows nothing of models.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from clipmatch.atomic import atomic_file
from clipmatch.errors import ClipmatchError

FRAMES = 100  # of an animation, at most
SECONDS = 8.0  # that they take; the last one stays for LINGER
LINGER = 2.0


def to_image(picture: Tensor) -> Image.Image:
    """A picture [3, h, w] in 0..1 -> RGB."""
    pixels = (picture.detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)  # [h, w, 3]
    return Image.fromarray(pixels.numpy())


def save_png(path: Path, picture: Tensor, facts: Mapping[str, object]) -> None:
    """Write a picture [3, h, w] in 0..1 with facts as text in the file: name -> value. Raises ClipmatchError."""
    try:
        with atomic_file(path) as draft, draft.open("wb") as file:  # who looks at previews never sees half of one
            write_png(file, picture, facts)
    except OSError as error:
        raise unwritable(path, error) from error


def write_png(file: BinaryIO, picture: Tensor, facts: Mapping[str, object]) -> None:
    """The same into an open file."""
    notes = PngInfo()
    for name, value in facts.items():
        notes.add_text(name, str(value))
    to_image(picture).save(file, "PNG", pnginfo=notes)


def check_writable(path: Path) -> None:
    """Raise ClipmatchError if a file can't be written there: better than after an hour of painting."""
    draft = path.with_name(path.name + ".draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.touch()
        draft.unlink()
    except OSError as error:
        raise unwritable(path, error) from error


class Film:
    """The frames of an animation: every one, until there are more than `FRAMES`; then every second, and so on.

    Raises ClipmatchError at once for a file that could not be written at the end.
    """

    def __init__(self, path: Path):
        self.path, self.every = path, 1
        self.frames: list[NDArray[np.uint8]] = []  # each [n, h, w, 3]
        if path.suffix.lower() not in (".gif", ".mp4"):
            raise ClipmatchError(f"The animation {path} can be a .gif or a .mp4; name it so.")
        if path.suffix.lower() == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
            raise ClipmatchError(
                f"To write {path} takes two more packages; install them with: pip install imageio imageio-ffmpeg, "
                "or name a .gif."
            )
        check_writable(path)

    def add(self, step: int, pictures: Tensor) -> None:
        """Pictures [n, 3, h, w] in 0..1 as they are after that step."""
        if step % self.every == 0:
            frame = (pictures.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)  # [n, h, w, 3]
            self.frames.append(frame.numpy())
        if len(self.frames) > FRAMES:
            self.frames, self.every = self.frames[::2], 2 * self.every

    def save(self, number: int, last: Tensor) -> None:
        """Write the frames of the picture of that number, and what became of it [3, h, w] as the last one.

        Raises ClipmatchError if the file can't be written.
        """
        frames = [*(frame[number] for frame in self.frames), np.asarray(to_image(last))]
        rate = len(frames) / SECONDS  # frames a second
        try:
            if self.path.suffix.lower() == ".gif":
                save_gif(self.path, frames, rate)
            else:
                save_mp4(self.path, [*frames, *frames[-1:] * round(rate * LINGER)], rate)
        except OSError as error:
            raise unwritable(self.path, error) from error


def save_gif(path: Path, frames: list[NDArray[np.uint8]], rate: float) -> None:
    """Frames [h, w, 3], so many a second -> an animation that begins anew for ever."""
    first, *rest = [Image.fromarray(frame) for frame in frames]
    pause = round(1000 / rate)  # milliseconds
    first.save(path, save_all=True, append_images=rest, duration=[*[pause] * len(rest), 1000 * LINGER], loop=0)


def save_mp4(path: Path, frames: list[NDArray[np.uint8]], rate: float) -> None:
    """Frames [h, w, 3], so many a second -> a film in H.264, as every browser shows it."""
    import imageio.v2 as imageio

    writer: Any = imageio.get_writer(path, fps=rate, codec="libx264", macro_block_size=1)
    height, width, _ = frames[0].shape
    with writer:
        for frame in frames:  # players want even sides
            writer.append_data(np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), "edge"))


def unwritable(path: Path, error: OSError) -> ClipmatchError:
    """The sentence for a file that can't be written."""
    return ClipmatchError(f"The file {path} can't be written ({error.strerror or error}); name another.")
