"""Videos in the vision tower's layout: one row of the tower for every temporal patch.

The released model joins `temporal_patch_size` frames (2) in a patch, and patches do not attend across such steps, not
even in its "full attention" layers. So each step is a row, as an image is; an image is a step whose frames are all the
same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from qwenla_jax.data.batching.mrope_positions import VideoGrid
from qwenla_jax.data.images.preprocess import FramePatches, ImageLayout, ProcessorSettings, image_to_patches


@dataclass(frozen=True)
class VideoPatches:
    """One video in the tower's layout.

    Attributes:
      steps: a row of the tower for each temporal patch, in order; their visual tokens follow one another.
      second_per_grid: seconds from one step to the next.
    """

    steps: tuple[FramePatches, ...]
    second_per_grid: float

    @property
    def grid(self) -> VideoGrid:
        """Steps, rows and columns of visual tokens, as the positions need them."""
        return VideoGrid(len(self.steps), self.steps[0].rows, self.steps[0].cols, self.second_per_grid)

    @property
    def num_visual_tokens(self) -> int:
        """The number of the video's visual tokens."""
        return sum(step.num_visual_tokens for step in self.steps)


def video_to_patches(
    frames: np.ndarray | Sequence[np.ndarray | Image.Image],
    fps: float,
    settings: ProcessorSettings,
    layout: ImageLayout,
    total_pixels: int | None = None,
) -> VideoPatches:
    """Resizes, normalises and cuts the frames of a video, and lays each temporal patch out as a row of the tower.

    Every frame is processed as an image. transformers' video processor resizes with torchvision instead of Pillow:
    without a resize the values are equal to its own; with one, some bytes differ by one or two steps of 255.

    Args:
      frames: [F, H, W, 3] of bytes, or F arrays [H, W, 3] of bytes or images, all of one size. Where F is no multiple
        of the temporal patch size, the last frame is repeated.
      fps: frames a second, of the frames given (not of the file that they were sampled from).
      settings: the checkpoint's processor; its bounds hold for every frame.
      layout: the vision tower's numbers.
      total_pixels: bound on the pixels of all steps together; None for none. Each frame gets an even share of it, but
        always at least 1.05 times the settings' min_pixels (the rule of Qwen's own utilities).

    Raises:
      ValueError: a model without videos, no frames, frames of different sizes or of another kind than described, a
        rate that is not positive, or a frame that cannot be used; the message names the frame.
    """
    if not layout.tokens_per_second:
        raise ValueError("videos are not supported for this model (Qwen3-VL); give it the frames as images")
    if not 0 < fps < math.inf:
        raise ValueError(f"fps must be positive and finite, got {fps}")
    images = [_image(frame, number) for number, frame in enumerate(frames)]
    if not images:
        raise ValueError("a video needs at least one frame, got none")
    for number, image in enumerate(images):
        if image.size != images[0].size:
            (w, h), (w0, h0) = image.size, images[0].size
            raise ValueError(f"frame {number} is {w}x{h} but frame 0 is {w0}x{h0}: all frames must have one size")
    together = layout.temporal_patch_size
    images += [images[-1]] * (-len(images) % together)
    if total_pixels is not None:
        if total_pixels < 1:
            raise ValueError(f"total_pixels must be positive, got {total_pixels}")
        share = total_pixels * together // len(images)
        bound = max(min(settings.max_pixels, share), int(settings.min_pixels * 1.05))
        settings = dataclasses.replace(settings, max_pixels=bound)
    steps = []
    for first in range(0, len(images), together):
        try:
            steps.append(_step(images[first : first + together], settings, layout))
        except ValueError as error:
            raise ValueError(f"frames {first} to {first + together - 1}: {error}") from error
    return VideoPatches(tuple(steps), together / fps)


def _step(images: Sequence[Image.Image], settings: ProcessorSettings, layout: ImageLayout) -> FramePatches:
    """One temporal patch: the first frame's patches with the other frames in their places."""
    first = image_to_patches(images[0], settings, layout)
    shape = (len(first.valid_S), 3, layout.temporal_patch_size, layout.patch_size**2)
    patches = first.patches_SxC.reshape(shape)
    for at, image in enumerate(images[1:], 1):
        if image is not images[0]:
            patches[:, :, at] = image_to_patches(image, settings, layout).patches_SxC.reshape(shape)[:, :, at]
    return dataclasses.replace(first, patches_SxC=patches.reshape(first.patches_SxC.shape))


def _image(frame: np.ndarray | Image.Image, number: int) -> Image.Image:
    if isinstance(frame, Image.Image):
        return frame
    array = np.asarray(frame)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(
            f"frame {number} is {array.dtype} of the shape {list(array.shape)}; expected uint8 [height, width, 3]"
        )
    return Image.fromarray(array)
