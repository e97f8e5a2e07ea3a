"""Images that nobody has checked: 100 odd ones made here, against Pillow's and transformers' own conversions."""

import io
import os
import pickle
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from qwenla_jax.data.datasets.raw_record import FileImage, RecordError
from qwenla_jax.data.images import decode
from qwenla_jax.data.images.decode import MAX_PIXELS, ImageError, open_image, read_image
from qwenla_jax.data.images.preprocess import ImageLayout, ProcessorSettings, image_to_patches

SETTINGS = ProcessorSettings(3136, 100_000, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
LAYOUT = ImageLayout()


def _noise(rng, width, height, mode="RGB"):
    """Coarse noise, so that a lossy format keeps something of it."""
    small = rng.integers(0, 256, (max(1, height // 8), max(1, width // 8), 4), dtype=np.uint8)
    image = Image.fromarray(small, "RGBA").resize((width, height), Image.Resampling.NEAREST)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def _save(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _oriented(image, kind, orientation, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return _save(image, kind, exif=exif, **options)


def _chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width, height, depth, colour, rows, *chunks):
    """A PNG written byte by byte; Pillow does not write all of these."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [_chunk(b"IHDR", header), *chunks, _chunk(b"IDAT", zlib.compress(rows)), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _gif_bomb():
    content = bytearray(_save(Image.new("P", (4, 4)), "GIF"))
    content[6:10] = struct.pack("<HH", 65535, 65535)
    return bytes(content)


def _bmp_bomb():
    content = bytearray(_save(Image.new("RGB", (4, 4)), "BMP"))
    content[18:26] = struct.pack("<ii", 2**31 - 1, 2**30)
    return bytes(content)


def _good(rng):
    """(name, bytes) of images that are odd but whole."""
    rgb, rgba = _noise(rng, 90, 70), _noise(rng, 90, 70, "RGBA")
    for orientation in range(1, 9):
        yield f"jpeg turned {orientation}", _oriented(rgb, "JPEG", orientation)
    for kind in ("PNG", "WEBP", "TIFF"):
        yield f"{kind} turned 6", _oriented(rgba, kind, 6)
    yield "orientation 9", _oriented(rgb, "JPEG", 9)
    yield "orientation 0", _oriented(rgb, "PNG", 0)
    yield "palette turned 8", _oriented(rgb.convert("P"), "PNG", 8, transparency=7)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        source = rgba.convert(mode) if mode != "LA" else rgba.convert("LA")
        yield f"png {mode}", _save(source, "PNG")
    yield "palette, one clear colour", _save(rgb.convert("P"), "PNG", transparency=3)
    yield "palette, many alphas", _save(rgb.convert("P"), "PNG", transparency=bytes(range(256)))
    yield "rgb, one clear colour", _save(rgb, "PNG", transparency=rgb.getpixel((5, 5)))
    yield "grey, one clear value", _save(rgb.convert("L"), "PNG", transparency=rgb.convert("L").getpixel((5, 5)))
    yield "palette of 2 colours", _save(rgb.quantize(2), "PNG", bits=1)
    for mode in ("L", "RGB", "CMYK"):
        yield f"jpeg {mode}", _save(rgb.convert(mode), "JPEG")
    yield "jpeg progressive", _save(rgb, "JPEG", progressive=True)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"):
        yield f"tiff {mode}", _save(rgba.convert("RGB").convert(mode) if mode != "RGBA" else rgba, "TIFF")
    # Pillow 12.3 cannot read an uncompressed one, its own neither.
    yield "tiff YCbCr", _save(rgb.convert("YCbCr"), "TIFF", compression="tiff_lzw")
    yield "tiff lzw", _save(rgb, "TIFF", compression="tiff_lzw")
    yield "tiff pages", _save(rgb, "TIFF", save_all=True, append_images=[rgba.convert("RGB"), rgb.rotate(90)])
    moving = [_noise(rng, 60, 40) for _ in range(3)]
    for kind in ("GIF", "WEBP", "PNG"):
        yield f"{kind} animated", _save(moving[0], kind, save_all=True, append_images=moving[1:], duration=50)
    yield "gif, clear colour", _save(rgb.convert("P"), "GIF", transparency=2)
    yield "webp lossless with alpha", _save(rgba, "WEBP", lossless=True)
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        yield f"bmp {mode}", _save(rgba.convert(mode), "BMP")
    yield "ppm", _save(rgb, "PPM")
    yield "two jpegs in one", _save(rgb, "MPO", save_all=True, append_images=[rgb.rotate(180)])
    yield "jpeg 2000", _save(rgba, "JPEG2000")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield "png with a profile", _save(rgb, "PNG", icc_profile=srgb)
    yield "jpeg with a wrong profile", _save(rgb, "JPEG", icc_profile=profile)
    yield "jpeg with a profile of rubbish", _save(rgb, "JPEG", icc_profile=b"rubbish" * 9)
    yield "one pixel", _save(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")
    yield "1x200", _save(_noise(rng, 1, 200), "PNG")
    yield "600x3", _save(_noise(rng, 600, 3), "BMP")
    yield "jpeg and something behind it", _save(rgb, "JPEG") + b"PK\x03\x04" * 100
    rows = b"".join(b"\0" + rng.bytes(40 * 3 * 2) for _ in range(30))
    yield "png rgb of 16 bits", _png(40, 30, 16, 2, rows)
    yield "png without its end", _save(rgb, "PNG")[:-12]


def _bad(rng):
    """(name, reason, bytes) of what cannot be an image."""
    rgb = _noise(rng, 90, 70)
    yield "nothing", "empty", b""
    yield "one byte", "format", b"\x89"
    yield "text.png", "format", b"<html>404 Not Found</html>"
    yield "postscript.jpg", "format", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    yield "svg", "format", b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"/>'
    yield "zeros", "format", bytes(4096)
    yield "noise", "format", b"\x01\x02" + rng.bytes(4096)
    yield "icon", "format", _save(rgb, "ICO")
    yield "1x5000", "aspect", _save(_noise(rng, 1, 5000), "PNG")
    yield "5000x1", "aspect", _save(_noise(rng, 5000, 1), "PNG")
    yield "201x1", "aspect", _save(_noise(rng, 201, 1), "JPEG")
    yield "floats", "range", _save(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF")
    yield "whole numbers", "range", _save(Image.fromarray(np.full((9, 9), 70_000, np.int32)), "TIFF")
    yield "whole numbers, small", "range", _save(Image.fromarray(np.full((9, 9), 70, np.int32)), "TIFF")
    yield "png bomb", "too_large", _png(60_000, 60_000, 8, 2, b"")
    yield "png bomb, small", "too_large", _png(9_460, 9_460, 1, 0, bytes(1184 * 9460))
    yield "png bomb, thin", "too_large", _png(2**31 - 1, 2**31 - 1, 8, 2, b"")
    yield "gif bomb", "too_large", _gif_bomb()
    yield "bmp bomb", "too_large", _bmp_bomb()
    yield "png of 0x0", "invalid", _png(0, 0, 8, 2, b"")
    yield (
        "png text bomb",
        "invalid",
        _png(9, 9, 8, 0, bytes(90), _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200 * 2**20)))),
    )
    for kind, mode in (("JPEG", "RGB"), ("PNG", "RGB"), ("WEBP", "RGB"), ("GIF", "P"), ("BMP", "RGB"), ("TIFF", "RGB")):
        content = _save(_noise(rng, 90, 70).convert(mode), kind)
        yield f"half a {kind}", "invalid", content[: len(content) // 2]
    header = _save(rgb, "PNG")
    yield "png header alone", "invalid", header[:33]
    yield "png with wrong sums", "invalid", header[:60] + bytes([header[60] ^ 255]) + header[61:]


def _corrupt(rng):
    """(name, bytes): cut or overwritten anywhere, so that nobody knows what will come of them."""
    kinds = [("JPEG", "RGB"), ("PNG", "P"), ("GIF", "P"), ("WEBP", "RGBA"), ("TIFF", "RGB"), ("JPEG2000", "RGB")]
    kinds += [("BMP", "RGB"), ("PPM", "RGB"), ("AVIF", "RGB")]
    for number in range(36):
        kind, mode = kinds[number % len(kinds)]
        try:
            content = bytearray(_oriented(_noise(rng, 50, 40).convert(mode), kind, 3))
        except (KeyError, OSError):  # this Pillow does not write the format
            content = bytearray(_save(_noise(rng, 50, 40), "PNG"))
        if number % 2:
            del content[int(rng.integers(1, len(content))) :]
        else:
            for _ in range(12):
                content[int(rng.integers(0, min(len(content), 600)))] = int(rng.integers(256))
        yield f"corrupt {number} {kind}", bytes(content)


def _both(image):
    """Our patches in transformers' order, and transformers' own."""
    pil = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    official = pil.Qwen2VLImageProcessorPil(
        size={"shortest_edge": SETTINGS.min_pixels, "longest_edge": SETTINGS.max_pixels},
        image_mean=list(SETTINGS.image_mean),
        image_std=list(SETTINGS.image_std),
    )(images=[image], return_tensors="np")
    frame = image_to_patches(image, SETTINGS, LAYOUT)
    ours = frame.patches_SxC.reshape(-1, 4, frame.patches_SxC.shape[-1])[frame.gather_M]
    return ours.reshape(-1, ours.shape[-1]), official["pixel_values"]


def _plain(image):
    assert image.mode == "RGB" and type(image) is Image.Image and not image.info and not image.getexif()
    return np.asarray(image)


GOOD = list(_good(np.random.default_rng(1)))
BAD = list(_bad(np.random.default_rng(2)))
CORRUPT = list(_corrupt(np.random.default_rng(3)))


def test_there_are_a_hundred():
    names = [case[0] for case in [*GOOD, *BAD, *CORRUPT]]
    assert len(set(names)) == len(names) >= 100, len(names)


@pytest.mark.parametrize("name, content", GOOD, ids=[case[0] for case in GOOD])
def test_an_odd_image_is_decoded_as_transformers_does(name, content):
    convert_to_rgb = pytest.importorskip("transformers.image_transforms").convert_to_rgb
    image = open_image(content, name)
    raw = Image.open(io.BytesIO(content))
    expected = convert_to_rgb(ImageOps.exif_transpose(raw), return_numpy=True)
    np.testing.assert_array_equal(_plain(image), expected)
    np.testing.assert_array_equal(*_both(image))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name, reason, content", BAD, ids=[case[0] for case in BAD])
def test_what_is_no_image_is_refused_by_name(name, reason, content):
    with pytest.raises(ImageError) as error:
        open_image(content, f"record 7: {name}")
    assert str(error.value).startswith(f"record 7: {name}: ") and len(str(error.value)) < 600
    assert error.value.reason == reason, str(error.value)
    again = pickle.loads(pickle.dumps(error.value))
    assert str(again) == str(error.value) and again.reason == reason and again.name == error.value.name


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name, content", CORRUPT, ids=[case[0] for case in CORRUPT])
def test_a_corrupt_image_is_decoded_or_refused(name, content):
    try:
        image = open_image(content, name)
    except ValueError as error:
        assert isinstance(error, ImageError) and str(error).startswith(f"{name}: ")
    else:
        _plain(image)
        np.testing.assert_array_equal(*_both(image))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_greys_of_sixteen_bits_keep_their_high_byte(kind):
    values = np.random.default_rng(0).integers(0, 65536, (9, 11), dtype=np.uint16)
    values[0, :3] = 0, 256, 65535
    image = open_image(_save(Image.fromarray(values), kind))
    np.testing.assert_array_equal(_plain(image), np.repeat((values // 256)[..., None], 3, axis=2))
    np.testing.assert_array_equal(*_both(image))


def test_greys_of_sixteen_bits_turned_and_with_a_clear_value():
    values = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    turned = open_image(_oriented(Image.fromarray(values), "PNG", 6))
    np.testing.assert_array_equal(_plain(turned)[..., 0], np.rot90(values // 256, -1))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    clear = open_image(_png(4, 3, 16, 0, rows, _chunk(b"tRNS", struct.pack(">H", 15000))))
    expected = values // 256
    expected[0, 3] = 255
    np.testing.assert_array_equal(_plain(clear)[..., 0], expected)


def test_alpha_is_laid_over_white_by_hand():
    image = open_image(_save(Image.new("RGBA", (2, 1), (10, 20, 30, 0)), "PNG"))
    assert image.getpixel((0, 0)) == (255, 255, 255)
    half = open_image(_save(Image.new("LA", (1, 1), (0, 51)), "PNG"))
    assert half.getpixel((0, 0)) == (204, 204, 204)  # 255 * (1 - 51 / 255)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_metadata_that_cannot_be_read_counts_as_none():
    image = _noise(np.random.default_rng(0), 40, 30)
    for exif in (b"Exif\0\0rubbish", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\xff\xff\xff\xff\0\0\0\0", b"II"):
        content = _save(image, "PNG", exif=exif)
        np.testing.assert_array_equal(_plain(open_image(content)), np.asarray(image))


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "green", "blue")]
    for kind in ("GIF", "PNG", "TIFF"):
        content = _save(frames[0], kind, save_all=True, append_images=frames[1:])
        assert open_image(content).getpixel((3, 3)) == (255, 0, 0), kind


def test_paths(tmp_path):
    image = _noise(np.random.default_rng(0), 40, 30)
    path = tmp_path / "really a png.jpg"
    image.save(path, "PNG")
    for source in (path, str(path)):
        np.testing.assert_array_equal(_plain(open_image(source)), np.asarray(image))
    os.remove(path)  # nothing of it is open
    with pytest.raises(ImageError, match="really a png.jpg: .*cannot be read: No such file"):
        open_image(path)
    with pytest.raises(ImageError, match="row 3: .*is no file"):
        open_image(tmp_path, "row 3")
    with pytest.raises(ImageError, match="cannot be read"):
        open_image("a\0b.png")
    (tmp_path / "zero.png").write_bytes(b"")
    with pytest.raises(ImageError, match="zero.png: is empty, 0 bytes"):
        open_image(tmp_path / "zero.png")
    with pytest.raises(TypeError, match="as a path or as bytes, got Image"):
        open_image(image)


@pytest.mark.parametrize("read", [open_image, read_image, lambda path: FileImage(path).read()])
def test_what_is_no_file_is_not_waited_for_nor_read(tmp_path, read):
    """A pipe that nobody writes to, a device without an end, and 40 GB of a sparse file."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(40 << 30)
    seen = []

    def run():
        for name in ("pipe", "zero", "sparse"):
            try:
                read(tmp_path / f"{name}.png")
            except (ImageError, RecordError) as error:
                seen.append(error.reason.removeprefix("image_"))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(5)
    assert seen == ["absent", "absent", "too_large"]


def test_bounds(tmp_path, monkeypatch):
    content = _save(Image.new("RGB", (100, 50)), "PNG")
    assert open_image(content, max_pixels=5000).size == (100, 50)
    with pytest.raises(ImageError, match="claims 100x50 = 5000 pixels; at most 4999") as error:
        open_image(content, max_pixels=4999)
    assert error.value.reason == "too_large"
    # Pillow's bound lifted by somebody else does not lift this one.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match=f"at most {MAX_PIXELS}"):
        open_image(_png(60_000, 60_000, 8, 2, b""), max_pixels=10**12)
    monkeypatch.setattr(decode, "MAX_BYTES", 10)
    with pytest.raises(ImageError, match="at most 10 are read"):
        open_image(content)


@pytest.mark.filterwarnings("error")
def test_a_bomb_is_refused_where_warnings_are_errors():
    with pytest.raises(ImageError, match="claims 120000000 pixels"):
        open_image(_png(12_000, 10_000, 8, 2, b""))


def test_a_bomb_takes_no_memory():
    import tracemalloc

    tracemalloc.start()
    for content in (_png(60_000, 60_000, 8, 2, b""), _gif_bomb(), _bmp_bomb()):
        with pytest.raises(ImageError):
            open_image(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20
