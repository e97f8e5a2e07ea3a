"""Reads videos: files by PyAV (extra `video`), and folders of frame images, which need no extra."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qwenla_jax.data.images.decode import MAX_PIXELS, open_image
from qwenla_jax.data.record import Clip

FPS = 2.0
LEAST_FRAMES, MOST_FRAMES = 4, 768
# 90% of 128,000 visual tokens of 28 x 28 pixels. This and the numbers above are those of Qwen's own utilities.
TOTAL_PIXELS = 115_200 * 28 * 28


def read_video(source: str | os.PathLike[str], fps: float = FPS) -> Clip:
    """A video as a model takes it.

    Args:
      source: a video file, of which `fps` frames a second are taken, or a folder of images, which are all taken, in the
        order of the numbers in their names. A rotation that a file asks for is not applied, as in transformers.
      fps: frames a second; of the folder's images, too.

    Raises:
      ValueError: the source cannot be read; the message names it.
      ModuleNotFoundError: a file, without the package `av`.
    """
    path = Path(source)
    if not 0 < fps < math.inf:
        raise ValueError(f"fps: got {fps}, expected a positive number")
    if path.is_dir():
        return _read_folder(path, fps)
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder; expected a video, or a folder of its frames as images")
    try:
        import av
        from av.error import FFmpegError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path}: a video file needs a package: pip install av, or the extra `video`; a folder of frames needs none"
        ) from error
    try:
        with av.open(str(path)) as container:
            return _read_stream(path, container, fps)
    except (FFmpegError, IndexError) as error:  # IndexError: no video stream
        raise ValueError(f"{path}: is no video that can be read ({error}); expected MP4, WebM, ...") from error


def frame_indices(total: int, file_fps: float, fps: float, together: int = 2) -> np.ndarray:
    """The frames that are taken of a file: evenly spaced, as `sample_frames` of transformers for Qwen2.5-VL.

    That computes multiples of a float32, which round to the neighbouring frame now and then; these are exact.

    Args:
      total: frames of the file.
      file_fps: frames a second of the file.
      fps: frames a second that are wanted.
      together: frames of a temporal patch; so many are taken, or a multiple, or the one that there is.

    Returns:
      int64, ascending.
    """
    number = min(max(total / file_fps * fps, LEAST_FRAMES), MOST_FRAMES, total)
    number = max(1, math.floor(number / together) * together)
    return np.arange(number) * total // number


def _read_folder(folder: Path, fps: float) -> Clip:
    def numbers(path: Path) -> list[Any]:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]

    paths = sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=numbers)
    if not 1 <= len(paths) <= MOST_FRAMES:
        raise ValueError(f"{folder}: has {len(paths)} frames, expected 1 to {MOST_FRAMES} images")
    frames = tuple(open_image(path) for path in paths)
    for path, frame in zip(paths, frames, strict=True):
        if frame.size != frames[0].size:
            raise ValueError(f"{path}: has {frame.size} pixels, but {paths[0].name} has {frames[0].size}")
    return Clip(frames, fps, TOTAL_PIXELS)


def _read_stream(path: Path, container: Any, fps: float) -> Clip:
    stream = container.streams.video[0]
    if not stream.average_rate or not 0 < stream.width * stream.height <= MAX_PIXELS:
        size = f"{stream.width}x{stream.height}"
        raise ValueError(f"{path}: {size} pixels at a rate of {stream.average_rate}; expected at most {MAX_PIXELS}")

    def decoded() -> Iterator[Any]:
        container.seek(0)
        yield from container.decode(stream)

    # Counted by decoding: a header may state no number, or a wrong one.
    total = sum(1 for _ in decoded())
    if not total:
        raise ValueError(f"{path}: has no frame")
    wanted = frame_indices(total, float(stream.average_rate), fps)
    taken = set(wanted.tolist())
    frames: tuple[Image.Image, ...] = tuple(
        frame.to_image() for number, frame in enumerate(decoded()) if number in taken
    )
    return Clip(frames, len(wanted) / total * float(stream.average_rate), TOTAL_PIXELS)
