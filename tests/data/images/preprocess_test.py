"""Images against transformers' image processor and its window index."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from qwenla_jax.data.images.preprocess import (
    ImageLayout,
    ProcessorSettings,
    frame_index,
    image_to_patches,
    smart_resize,
    to_rgb,
)

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
LAYOUT = ImageLayout()
SETTINGS = ProcessorSettings(min_pixels=56 * 56, max_pixels=400 * 400, image_mean=MEAN, image_std=STD)


def _noise(rng, width, height, mode="RGB"):
    channels = len(Image.new(mode, (1, 1)).getbands())
    array = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(array.squeeze(-1) if channels == 1 else array, mode=None).convert(mode)


def _official(settings):
    pil = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    return pil.Qwen2VLImageProcessorPil(
        size={"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels},
        image_mean=list(settings.image_mean),
        image_std=list(settings.image_std),
        patch_size=settings.patch_size,
        merge_size=settings.merge_size,
        temporal_patch_size=settings.temporal_patch_size,
    )


def _merge_order(frame, layout):
    """Our patches back in transformers' order: visual tokens in raster order, four patches each."""
    merged = frame.patches_SxC.reshape(-1, layout.merge_size**2, frame.patches_SxC.shape[-1])
    return merged[frame.gather_M].reshape(-1, frame.patches_SxC.shape[-1])


def _check_against(image, settings, layout):
    expected = _official(settings)(images=[image], return_tensors="np")
    frame = image_to_patches(image, settings, layout)
    merge = layout.merge_size
    assert expected["image_grid_thw"].tolist() == [[1, frame.rows * merge, frame.cols * merge]]
    np.testing.assert_array_equal(_merge_order(frame, layout), expected["pixel_values"])
    assert not frame.patches_SxC[~frame.valid_S].any()
    assert frame.valid_S.sum() == len(expected["pixel_values"])
    assert len(frame.valid_S) == layout.frame_slots(frame.rows, frame.cols)


@pytest.mark.parametrize(
    "size", [(112, 112), (64, 64), (1, 1), (30, 500), (613, 97), (1000, 900), (41, 43), (198, 70), (280, 168)]
)
def test_pixel_values_equal_transformers(size):
    _check_against(_noise(np.random.default_rng(sum(size)), *size), SETTINGS, LAYOUT)


def test_other_numbers_than_the_released_ones():
    layout = ImageLayout(patch_size=8, merge_size=3, temporal_patch_size=1, window_size=48)
    settings = ProcessorSettings(1000, 40000, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 8, 1, 3)
    for size in ((100, 100), (333, 51)):
        _check_against(_noise(np.random.default_rng(1), *size), settings, layout)


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "CMYK", "1"])
def test_modes_equal_transformers(mode):
    rng = np.random.default_rng(0)
    if mode in ("RGBA", "CMYK"):
        image = _noise(rng, 90, 70, mode)
    elif mode == "LA":
        image = _noise(rng, 90, 70, "RGBA").convert("LA")
    else:
        image = _noise(rng, 90, 70).convert(mode)
    _check_against(image, SETTINGS, LAYOUT)


def test_palette_with_transparency_equals_transformers():
    image = _noise(np.random.default_rng(0), 90, 70).convert("P")
    image.info["transparency"] = 3
    _check_against(image, SETTINGS, LAYOUT)


def test_real_images_equal_transformers(shared_data):
    paths = sorted((shared_data / "mathvision" / "images").iterdir())[:24]
    assert paths
    for path in paths:
        _check_against(Image.open(path), SETTINGS, LAYOUT)


def test_smart_resize_equals_transformers():
    pil = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    rng = np.random.default_rng(0)
    for _ in range(500):
        height, width = (int(n) for n in np.exp(rng.uniform(0, 8, 2)))
        bounds = sorted(int(n) for n in np.exp(rng.uniform(6, 14, 2)))
        if max(height, width) / min(height, width) > 200:
            with pytest.raises(ValueError, match=f"{width}x{height}"):
                smart_resize(height, width, 28, *bounds)
        else:
            assert smart_resize(height, width, 28, *bounds) == pil.smart_resize(height, width, 28, *bounds)


@pytest.mark.parametrize("grid", [(4, 4), (1, 1), (8, 4), (5, 7), (3, 9), (1, 13), (12, 2)])
def test_slots_follow_the_official_windows(grid):
    torch = pytest.importorskip("torch")
    vision_utils = pytest.importorskip("transformers.vision_utils")
    rows, cols = grid
    thw = torch.tensor([[1, rows * 2, cols * 2]])
    window_index, cumulative = vision_utils.get_vision_window_index(thw, 2, 112, 14)
    official_hw = vision_utils.get_vision_position_ids(thw, 2).reshape(-1, 4, 2)[window_index].reshape(-1, 2)
    patch_N, slot_N, hw_Sx2, valid_S, gather_M = frame_index(rows, cols, LAYOUT)
    np.testing.assert_array_equal(hw_Sx2[valid_S], official_hw.numpy())
    np.testing.assert_array_equal(patch_N, hw_Sx2[slot_N, 0] * cols * 2 + hw_Sx2[slot_N, 1])
    np.testing.assert_array_equal(valid_S.reshape(-1, 64).sum(1), np.diff(cumulative.numpy()))
    # The compacted merged slots, read through gather_M, undo the official permutation.
    compact = np.cumsum(valid_S[::4]) - 1
    np.testing.assert_array_equal(compact[gather_M], torch.argsort(window_index).numpy())


def test_exif_orientation_is_applied():
    image = _noise(np.random.default_rng(0), 60, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    shown = to_rgb(Image.open(buffer))
    np.testing.assert_array_equal(np.asarray(shown), np.rot90(np.asarray(image), -1))


def test_grey_of_sixteen_bits_is_scaled():
    image = Image.fromarray(np.array([[0, 256, 65535]], np.uint16))
    assert np.asarray(to_rgb(image))[0].tolist() == [[0] * 3, [1] * 3, [255] * 3]
    with pytest.raises(ValueError, match="'F'"):
        to_rgb(Image.new("F", (4, 4)))


def test_settings_of_the_released_file(shared_data):
    settings = ProcessorSettings.from_json(shared_data / "configs" / "preprocessor_config.json")
    assert (settings.min_pixels, settings.max_pixels) == (3136, 12845056)
    assert settings.image_mean == MEAN and settings.image_std == STD
    assert (settings.patch_size, settings.temporal_patch_size, settings.merge_size) == (14, 2, 2)


def test_settings_survive_transformers(tmp_path):
    pil = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SETTINGS.to_dict()))
    assert ProcessorSettings.from_json(tmp_path / "preprocessor_config.json") == SETTINGS
    official = pil.Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    image = _noise(np.random.default_rng(0), 700, 500)
    frame = image_to_patches(image, SETTINGS, LAYOUT)
    np.testing.assert_array_equal(
        _merge_order(frame, LAYOUT), official(images=[image], return_tensors="np")["pixel_values"]
    )
    official.save_pretrained(tmp_path / "again")
    assert ProcessorSettings.from_json(tmp_path / "again" / "preprocessor_config.json") == SETTINGS


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_mean": None}, "image_mean is missing"),
        ({"image_std": [1.0, 2.0]}, "image_std must be three numbers"),
        ({"patch_size": "14"}, "patch_size must be"),
        ({"min_pixels": None, "size": None}, "neither min_pixels nor size.shortest_edge"),
        ({"do_resize": False}, "do_resize is false"),
        ({"resample": 9}, "resample must be"),
        ({"min_pixels": 10**9}, "larger than max_pixels"),
    ],
)
def test_bad_settings_name_file_and_key(tmp_path, change, message):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(SETTINGS.to_dict() | change))
    with pytest.raises(ValueError, match=message) as error:
        ProcessorSettings.from_json(path)
    assert str(path) in str(error.value)


def test_broken_or_absent_settings_file(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        ProcessorSettings.from_json(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="broken.json: not JSON"):
        ProcessorSettings.from_json(tmp_path / "broken.json")


def test_layout_and_settings_must_agree():
    with pytest.raises(ValueError, match="patch_size is 14 .* but 16"):
        image_to_patches(Image.new("RGB", (64, 64)), SETTINGS, ImageLayout(patch_size=16, window_size=128))
