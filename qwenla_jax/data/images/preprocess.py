"""Images in the vision tower's layout: resized, normalised, cut into patches, in padded window slots.

Everything here runs on the host with NumPy and Pillow. The arithmetic is that of the released image processor, so
that the pixel values are the same float32 numbers; only the order of the patches differs (see `frame_index`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from qwenla_jax.utils.json_files import read_json

_EXIF_ORIENTATION = 0x0112
MAX_ASPECT = 200


@dataclass(frozen=True)
class ImageLayout:
    """The vision tower's numbers that decide how patches are laid out.

    Attributes:
      patch_size: pixels of a patch's side.
      merge_size: patches of a visual token's side.
      temporal_patch_size: frames of a patch; an image is repeated that many times in it.
      window_size: pixels of an attention window's side.
      tokens_per_second: steps of the time position in a second of video; 0: videos are not supported.

    Raises:
      ValueError: a number is not positive, or the window holds no whole number of visual tokens.
    """

    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    window_size: int = 112
    tokens_per_second: int = 2

    def __post_init__(self) -> None:
        """Checks that the sizes are positive and consistent."""
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < (name != "tokens_per_second"):
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        if self.window_size < self.token_pixels:
            raise ValueError(
                f"window_size {self.window_size} is smaller than one visual token of {self.token_pixels} pixels"
            )

    @property
    def token_pixels(self) -> int:
        """Pixels of a visual token's side; both sides of a resized image are multiples of it."""
        return self.patch_size * self.merge_size

    @property
    def window_tokens(self) -> int:
        """Visual tokens of a window's side (the quotient is floored, as in the released model)."""
        return self.window_size // self.merge_size // self.patch_size

    @property
    def window_slots(self) -> int:
        """Patch slots of one window: 64 for the released models."""
        return (self.window_tokens * self.merge_size) ** 2

    def frame_slots(self, rows: int, cols: int) -> int:
        """Slots of a frame of rows x cols visual tokens, padding of its windows included."""
        return math.ceil(rows / self.window_tokens) * math.ceil(cols / self.window_tokens) * self.window_slots


@dataclass(frozen=True)
class ProcessorSettings:
    """How an image becomes pixel values: the content of a checkpoint's preprocessor_config.json.

    Attributes:
      min_pixels, max_pixels: bounds of height * width after the resize.
      image_mean, image_std: of each of the three channels, on values scaled to [0, 1].
      patch_size, temporal_patch_size, merge_size: as in `ImageLayout`.
      rescale_factor: what a byte is multiplied with.
      resample: Pillow's number of the resize filter; 3 is bicubic.

    Raises:
      ValueError: a value of the wrong kind, named by its key.
    """

    min_pixels: int
    max_pixels: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    rescale_factor: float = 1 / 255
    resample: int = int(Image.Resampling.BICUBIC)

    def __post_init__(self) -> None:
        """Checks the values; the message names the key."""
        for name in ("min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is larger than max_pixels {self.max_pixels}")
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) != 3 or not all(_is_number(v) for v in value):
                raise ValueError(f"{name} must be three numbers, one a colour channel, got {value!r}")
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std must be positive, got {self.image_std}")
        if not _is_number(self.rescale_factor) or self.rescale_factor <= 0:
            raise ValueError(f"rescale_factor must be a positive number, got {self.rescale_factor!r}")
        if self.resample not in set(Image.Resampling):
            raise ValueError(f"resample must be one of Pillow's filters 0 to 5, got {self.resample!r}")

    @classmethod
    def from_json(cls, path: str | Path) -> ProcessorSettings:
        """Reads preprocessor_config.json, or processor_config.json with its `image_processor` part.

        The bounds may be given as `min_pixels` and `max_pixels` (which take precedence, as in transformers), or in
        `size` as `shortest_edge` and `longest_edge`.

        Raises:
          ValueError: the file is absent or no JSON object, a key is absent or has a wrong value, or a step that this
            package always applies is switched off; the message names the file and the key.
        """
        path = Path(path)
        try:
            content = read_json(path)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
        if isinstance(content, dict) and isinstance(content.get("image_processor"), dict):
            content = content["image_processor"]
        if not isinstance(content, dict):
            raise ValueError(f"{path}: must hold a JSON object, got {type(content).__name__}")
        for key in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            if content.get(key) is False:
                raise ValueError(f"{path}: {key} is false, but only true is supported")
        values: dict[str, Any] = {
            "min_pixels": _pixel_bound(content, "min_pixels", "shortest_edge", path),
            "max_pixels": _pixel_bound(content, "max_pixels", "longest_edge", path),
        }
        for key in ("image_mean", "image_std"):
            value = _required(content, key, path)
            if not isinstance(value, list):
                raise ValueError(f"{path}: {key} must be a list of three numbers, got {value!r}")
            values[key] = tuple(value)
        for key in ("patch_size", "temporal_patch_size", "merge_size"):
            values[key] = _required(content, key, path)
        for key in ("rescale_factor", "resample"):
            if content.get(key) is not None:
                values[key] = content[key]
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The content of a preprocessor_config.json that transformers reads, with both spellings of the bounds."""
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "patch_size": self.patch_size,
            "temporal_patch_size": self.temporal_patch_size,
            "merge_size": self.merge_size,
            "rescale_factor": self.rescale_factor,
            "resample": self.resample,
        }


@dataclass(frozen=True)
class FramePatches:
    """One image in the tower's layout. S = slots of its windows, C = values of a patch, M = rows * cols.

    All arrays but `patches_SxC` are shared between images of the same grid and are read-only.

    Attributes:
      patches_SxC: float32, normalised values of each patch (channel, frame, row, column), 0 in padding.
      hw_Sx2: int32, row and column of the patch in the grid of patches, 0 in padding.
      valid_S: bool, True where the slot holds a patch.
      gather_M: int32, merged slot of each visual token in raster order.
      rows, cols: the grid of visual tokens.
    """

    patches_SxC: np.ndarray
    hw_Sx2: np.ndarray
    valid_S: np.ndarray
    gather_M: np.ndarray
    rows: int
    cols: int

    @property
    def num_visual_tokens(self) -> int:
        """M, the number of the image's visual tokens."""
        return self.rows * self.cols


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The (height, width) in pixels that an image is resized to.

    Both are multiples of `factor` and close to the image's own, within the bounds on their product. The rule and its
    rounding (halves to the even multiple) are the released image processor's.

    Raises:
      ValueError: an empty image, or one side more than 200 times the other.
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image needs at least one pixel a side, got {width}x{height}")
    aspect = max(height, width) / min(height, width)
    if aspect > MAX_ASPECT:
        raise ValueError(f"an image's sides may differ by a factor of {MAX_ASPECT} at most, got {width}x{height}")
    rows, cols = round(height / factor), round(width / factor)
    if rows * cols * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        cols = max(1, math.floor(width / shrink / factor))
    elif rows * cols * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor)
        cols = math.ceil(width * grow / factor)
    return rows * factor, cols * factor


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as a viewer shows it: upright, three channels of a byte.

    The EXIF orientation is applied (paper silent: a photograph's question is about what a person sees; transformers
    does so where it loads a file, not where it is given an image). Transparency is composited on white and palettes and
    greys are expanded, as in transformers. Greys of 16 bits are scaled down to 8 rather than clipped.

    Raises:
      ValueError: pixels of 32 bits, whose range is not known.
    """
    if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F"):
        raise ValueError(f"an image of mode {image.mode!r} has no known range: convert it to 8 bits a channel first")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


@lru_cache(maxsize=1024)
def frame_index(
    rows: int, cols: int, layout: ImageLayout
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The window slots of the patches of a grid of rows x cols visual tokens.

    A window is a square of visual tokens and takes all its slots, in place: a token outside of the image leaves its
    slots empty. Slots go window by window in raster order, in a window token by token in raster order, in a token
    patch by patch in raster order. Without the empty slots this is the order of the released model's windows.

    Returns:
      patch_N: int32, raster index of the patch in each filled slot, N = rows * cols * merge_size**2, in slot order.
      slot_N: int32, the filled slots, ascending.
      hw_Sx2, valid_S, gather_M: as in `FramePatches`. All are read-only.
    """
    merge, side = layout.merge_size, layout.window_tokens
    down, across = -(-rows // side), -(-cols // side)
    # One axis a level: window, token in the window, patch in the token.
    h = np.arange(down * side * merge).reshape(down, 1, side, 1, merge, 1)
    w = np.arange(across * side * merge).reshape(1, across, 1, side, 1, merge)
    shape = (down, across, side, side, merge, merge)
    h_S = np.broadcast_to(h, shape).reshape(-1)
    w_S = np.broadcast_to(w, shape).reshape(-1)
    valid_S = (h_S < rows * merge) & (w_S < cols * merge)
    hw_Sx2 = (np.stack([h_S, w_S], axis=-1) * valid_S[:, None]).astype(np.int32)
    slot_N = np.flatnonzero(valid_S).astype(np.int32)
    patch_N = (h_S * (cols * merge) + w_S)[slot_N].astype(np.int32)
    first_T = slot_N[:: merge**2]  # the first patch of every visual token, in slot order
    token_T = hw_Sx2[first_T, 0] // merge * cols + hw_Sx2[first_T, 1] // merge
    gather_M = np.empty(rows * cols, np.int32)
    gather_M[token_T] = first_T // merge**2
    arrays = (patch_N, slot_N, hw_Sx2, valid_S, gather_M)
    for array in arrays:
        array.flags.writeable = False
    return arrays


def image_to_patches(image: Image.Image, settings: ProcessorSettings, layout: ImageLayout) -> FramePatches:
    """Resizes, normalises and cuts an image, and lays its patches out in window slots.

    Args:
      image: of any mode that `to_rgb` takes.
      settings: the checkpoint's image processor.
      layout: the vision tower's numbers.

    Returns:
      The image's patches; the pixel values equal those of transformers' Qwen2VL image processor to the bit.

    Raises:
      ValueError: settings and layout disagree, or the image cannot be used (see `smart_resize` and `to_rgb`).
    """
    for name in ("patch_size", "merge_size", "temporal_patch_size"):
        if getattr(settings, name) != getattr(layout, name):
            raise ValueError(
                f"{name} is {getattr(settings, name)} for the image processor but {getattr(layout, name)} for the"
                " vision tower: both must come from the same checkpoint"
            )
    image = to_rgb(image)
    height, width = smart_resize(
        image.height, image.width, layout.token_pixels, settings.min_pixels, settings.max_pixels
    )
    if (image.width, image.height) != (width, height):
        image = image.resize((width, height), resample=Image.Resampling(settings.resample))
    rows, cols = height // layout.token_pixels, width // layout.token_pixels
    patch_N, slot_N, hw_Sx2, valid_S, gather_M = frame_index(rows, cols, layout)

    side = layout.patch_size
    pixels = np.asarray(image).reshape(height // side, side, width // side, side, 3)
    bytes_Nx3xP = pixels.transpose(0, 2, 4, 1, 3).reshape(-1, 3, side * side)
    if len(patch_N) == len(valid_S):
        out = np.empty((len(valid_S), 3, layout.temporal_patch_size, side * side), np.float32)
    else:
        out = np.zeros((len(valid_S), 3, layout.temporal_patch_size, side * side), np.float32)
    for channel, table in enumerate(_normalised_bytes(settings)):
        out[slot_N, channel] = table[bytes_Nx3xP[patch_N, channel]][:, None]
    return FramePatches(out.reshape(len(valid_S), -1), hw_Sx2, valid_S, gather_M, rows, cols)


@lru_cache(maxsize=16)
def _normalised_bytes(settings: ProcessorSettings) -> np.ndarray:
    """float32 [3, 256], what each byte becomes in each channel; the steps round as transformers' do."""
    scaled = (np.arange(256, dtype=np.float64) * settings.rescale_factor).astype(np.float32)
    mean = np.array(settings.image_mean, np.float32)[:, None]
    std = np.array(settings.image_std, np.float32)[:, None]
    return (scaled[None] - mean) / std


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _required(content: Mapping[str, Any], key: str, path: Path) -> Any:
    if content.get(key) is None:
        raise ValueError(f"{path}: {key} is missing")
    return content[key]


def _pixel_bound(content: Mapping[str, Any], key: str, size_key: str, path: Path) -> Any:
    size = content.get("size")
    size = size if isinstance(size, dict) else {}
    for source, name in ((content, key), (size, size_key), (size, key)):
        if source.get(name) is not None:
            return source[name]
    raise ValueError(f"{path}: neither {key} nor size.{size_key} is given")
