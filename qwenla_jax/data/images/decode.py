"""Opens images from untrusted files or bytes: decoded by fixed rules, or rejected with an error that names the image.

The rules, where formats leave a choice (paper silent on all of them):
- The content decides the format, not the file name. Only the formats of `FORMATS` are opened, so that no
  decoder runs an external program.
- EXIF (or XMP) orientation is applied, as transformers' `load_image` does. Metadata that cannot be read counts as none.
- Alpha and transparent colours are composited on white, as in transformers' image processor (its `load_image` drops
  alpha instead, which shows the colours below it).
- Palettes, greys, one-bit images, CMYK and YCbCr become RGB by Pillow's rule. Colour profiles are not applied:
  transformers applies none either.
- Greys of 16 bits keep their high byte. Integers of 32 bits and floats have no known range and are rejected.
- Of an animation, a burst or several pages the first is taken.
- A truncated file is rejected, even where most of it could be shown.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image

from qwenla_jax.data.images.preprocess import MAX_ASPECT, to_rgb

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Pillow's own bound. RGB of that size takes 0.36 GB; five times as much is held while alpha is composited.
MAX_PIXELS = 89_478_485
MAX_BYTES = 512 * 2**20
Reason = Literal["absent", "empty", "format", "invalid", "too_large", "aspect", "range"]

# How files of the common formats start, to tell a corrupt image from another kind of file.
_STARTS = {b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"BM": "BMP"}
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_METADATA = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")


class ImageError(ValueError):
    """An image that cannot be used.

    Attributes:
      name: which image.
      message: what is wrong with it and what would be right.
      reason: the kind of fault, for counting: "absent", "empty", "format" (no image, or none of `FORMATS`), "invalid",
        "too_large", "aspect" or "range" (of its values).
    """

    def __init__(self, name: str, reason: Reason, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name, self.message = name, message
        self.reason: Reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles with its three arguments, so that a data worker can return it."""
        return type(self), (self.name, self.reason, self.message)


def open_image(
    source: str | os.PathLike[str] | bytes, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """An image as a viewer shows it, upright RGB of a byte a channel, without its metadata.

    The header's size is checked before decoding, so that memory and time are bounded by `max_pixels` (20 bytes a pixel
    at most with alpha, 10 without) and not by the size that a small file declares.

    Args:
      source: path of a file, or a file's content.
      name: of the image in errors; None for the path, or the number of bytes.
      max_pixels: the most that width * height may be, at most Pillow's own bound.

    Returns:
      The image, loaded; nothing of the file stays open.

    Raises:
      ImageError: a ValueError that names the image, what is wrong with it and what would be right.
      TypeError: the source is neither a path nor bytes.
    """
    if not isinstance(source, str | os.PathLike | bytes | bytearray | memoryview):
        raise TypeError(f"an image comes as a path or as bytes, got {type(source).__name__}")
    is_path = isinstance(source, str | os.PathLike)
    if name is None:
        name = os.fspath(source) if is_path else f"image of {len(source)} bytes"
    with _stream(source, name) as stream:
        most = min(max_pixels, MAX_PIXELS)
        image = _header(stream, name, most)
        with image:
            _check_size(image, name, most)
            try:
                image.load()
                turned, opened_as = _upright(image), image.format
                image.close()  # frees its pixels, before more copies are made
                return _bytes_rgb(turned, opened_as, name)
            except ImageError:
                raise
            except Exception as error:  # decoders raise nearly anything on bytes that were tampered with
                what = f"{image.format} of {image.width}x{image.height}, mode {image.mode}"
                raise ImageError(
                    name, "invalid", f"the {what}, cannot be decoded ({_text(error)}); fetch or write the file again"
                ) from error


def read_image(path: str | os.PathLike[str], name: str | None = None) -> bytes:
    """The content of an image's file, as `open_image` would read it.

    Args:
      path: the file; only regular files of at most `MAX_BYTES` are read.
      name: of the image in errors; None for the path.

    Raises:
      ImageError: "absent", "empty" or "too_large".
    """
    with _stream(path, os.fspath(path) if name is None else name) as stream:
        return stream.read()


@contextmanager
def _stream(source: Any, name: str) -> Iterator[BinaryIO]:
    """The source as a file object: given a path, Pillow would map the file, and crash if the file shrinks."""
    if not isinstance(source, str | os.PathLike):
        size = len(source)
        opened: BinaryIO = io.BytesIO(source)
    else:
        path = Path(source)
        message = "" if name == os.fspath(source) else f"{path} "
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(name, "absent", f"{message}is no file; expected the file of an image")
            size = status.st_size
            opened = path.open("rb")
        except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
            if isinstance(error, ImageError):
                raise
            text = getattr(error, "strerror", None) or error
            raise ImageError(
                name, "absent", f"{message}cannot be read: {text}; expected an image, such as a PNG or a JPEG"
            ) from error
    with opened as stream:
        if size == 0:
            raise ImageError(name, "empty", "is empty, 0 bytes; expected an image")
        if size > MAX_BYTES:
            raise ImageError(name, "too_large", f"has {size} bytes; at most {MAX_BYTES} are read")
        yield stream


def _header(stream: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    """The image with its header read and nothing decoded."""
    known = set(Image.registered_extensions().values())  # older Pillows lack some
    formats = [each for each in FORMATS if each in known]
    start = stream.read(12)
    stream.seek(0)
    try:
        return Image.open(stream, formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        numbers = re.search(r"\((\d+) pixels\)", str(error))
        claim = f"claims {numbers[1]} pixels" if numbers else f"claims too many pixels ({_text(error)})"
        raise ImageError(name, "too_large", f"{claim}; at most {max_pixels} are decoded: scale it down") from error
    except Image.UnidentifiedImageError as error:
        like = next((kind for begin, kind in _STARTS.items() if start.startswith(begin)), None)
        if like is not None:
            raise ImageError(
                name, "invalid", f"starts like a {like} but its header is broken or cut off; fetch the file again"
            ) from error
        raise ImageError(
            name,
            "format",
            f"is no image that can be read (it starts with {start!r}); expected one of {', '.join(formats)}",
        ) from error
    except Exception as error:  # as for decoding
        raise ImageError(
            name, "invalid", f"its header cannot be read ({_text(error)}); fetch the file again"
        ) from error


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(name, "invalid", f"claims to be {width}x{height}; expected at least one pixel a side")
    if width * height > max_pixels:
        raise ImageError(
            name,
            "too_large",
            f"claims {width}x{height} = {width * height} pixels; at most {max_pixels} are decoded: scale it down",
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            name, "aspect", f"is {width}x{height}; its sides may differ by a factor of {MAX_ASPECT} at most: crop it"
        )


def _upright(image: Image.Image) -> Image.Image:
    """The loaded image in its metadata's orientation, without that metadata."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # parsers of metadata raise as decoders do, and a viewer shows such an image as it is stored
        orientation = 1
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    turned = image.copy() if turn is None else image.transpose(turn)
    for key in _METADATA:
        turned.info.pop(key, None)
    return turned


def _bytes_rgb(image: Image.Image, opened_as: str | None, name: str) -> Image.Image:
    """RGB of a byte a channel."""
    # Of these two formats Pillow, depending on its version, widens 16 bits to 32.
    if image.mode.startswith("I;16") or (image.mode == "I" and opened_as in ("PNG", "PPM")):
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        clear = image.info.get("transparency")
        if isinstance(clear, int):
            grey[values == clear] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        what = "whole numbers of 32 bits" if image.mode == "I" else "floats"
        raise ImageError(name, "range", f"has {what} for pixels, whose range is not known; save it with 8 or 16 bits")
    rgb = to_rgb(image)
    rgb.info.clear()
    return rgb


def _text(error: BaseException) -> str:
    """One line of an error of Pillow's, at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
