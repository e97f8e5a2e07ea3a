"""Videos against transformers: its image processor on frames, its video processor where it runs, its positions."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from qwenla_jax.data.batching.mrope_positions import VideoGrid, visual_positions
from qwenla_jax.data.images.preprocess import ImageLayout, ProcessorSettings, image_to_patches
from qwenla_jax.data.images.video import video_to_patches

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LAYOUT = ImageLayout()
SETTINGS = ProcessorSettings(56 * 56, 200 * 200, MEAN, STD)
IMAGE, VIDEO = 98, 99


def _frames(count, width, height, seed=0):
    """Frames of coarse noise, each another."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, height // 7 + 1, width // 7 + 1, 3), dtype=np.uint8)
    return small.repeat(7, axis=1).repeat(7, axis=2)[:, :height, :width]


def _merge_order(video):
    """All patches in transformers' order: step by step, visual tokens in raster order, four patches each."""
    return np.concatenate(
        [
            step.patches_SxC.reshape(-1, 4, step.patches_SxC.shape[1])[step.gather_M].reshape(-1, 1176)
            for step in video.steps
        ]
    )


def _official_image(image, settings):
    pil = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    size = {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}
    processor = pil.Qwen2VLImageProcessorPil(size=size, image_mean=list(MEAN), image_std=list(STD))
    return processor(images=[image], return_tensors="np")["pixel_values"]


@pytest.mark.parametrize("count, size", [(2, (140, 84)), (5, (140, 84)), (1, (60, 60)), (4, (333, 210)), (3, (20, 30))])
def test_patches_are_the_image_processors_frame_by_frame(count, size):
    """Each frame's values are those that transformers gives the frame as an image; the last frame is repeated."""
    frames = _frames(count, *size)
    video = video_to_patches(frames, 2.0, SETTINGS, LAYOUT)
    ours = _merge_order(video).reshape(len(video.steps), -1, 3, 2, 196)
    images = [_official_image(Image.fromarray(frame), SETTINGS).reshape(-1, 3, 2, 196) for frame in frames]
    images += [images[-1]] * (count % 2)
    assert len(video.steps) == len(images) // 2 and video.second_per_grid == 1.0
    for number, image in enumerate(images):
        np.testing.assert_array_equal(ours[number // 2, :, :, number % 2], image[:, :, number % 2])
    assert video.num_visual_tokens * 4 == len(ours) * ours.shape[1]
    for step in video.steps:
        assert not step.patches_SxC[~step.valid_S].any()


def test_a_still_video_is_its_image():
    frame = _frames(1, 150, 90)[0]
    video = video_to_patches([frame] * 6, 4.0, SETTINGS, LAYOUT)
    image = image_to_patches(Image.fromarray(frame), SETTINGS, LAYOUT)
    assert len(video.steps) == 3 and video.second_per_grid == 0.5
    for step in video.steps:
        np.testing.assert_array_equal(step.patches_SxC, image.patches_SxC)
        np.testing.assert_array_equal(step.hw_Sx2, image.hw_Sx2)


def test_the_share_of_a_frame_by_hand():
    frames = _frames(8, 280, 280)
    whole = video_to_patches(frames, 2.0, SETTINGS, LAYOUT).grid
    assert (whole.rows, whole.cols) == (7, 7)  # 200 * 200 pixels
    # 8 frames are 4 steps; a quarter of 4 * 112 * 112.
    assert video_to_patches(frames, 2.0, SETTINGS, LAYOUT, 4 * 112 * 112).grid.rows == 4
    # However small the share, a frame keeps 1.05 times the least: 3292 pixels, 56 * 56 after the floor.
    assert video_to_patches(frames, 2.0, SETTINGS, LAYOUT, 1).grid.rows == 2


def test_frames_may_be_images():
    frames = _frames(3, 100, 80)
    ours = video_to_patches([Image.fromarray(f).convert("RGBA") for f in frames], 1.0, SETTINGS, LAYOUT)
    np.testing.assert_array_equal(_merge_order(ours), _merge_order(video_to_patches(frames, 1.0, SETTINGS, LAYOUT)))
    assert ours.second_per_grid == 2.0 and ours.grid == VideoGrid(2, ours.steps[0].rows, ours.steps[0].cols, 2.0)


@pytest.mark.parametrize(
    "frames, fps, message",
    [
        ([], 1.0, "at least one frame"),
        (_frames(2, 40, 40), 0.0, "fps must be positive"),
        (_frames(2, 40, 40), float("nan"), "fps must be positive"),
        ([_frames(1, 40, 40)[0], _frames(1, 40, 47)[0]], 1.0, "frame 1 is 40x47 but frame 0 is 40x40"),
        (_frames(2, 40, 40).astype(np.float32), 1.0, "frame 0 is float32 of the shape"),
        (_frames(2, 40, 40)[..., 0], 1.0, r"frame 0 is uint8 of the shape \[40, 40\]"),
        (np.zeros((2, 2, 900, 3), np.uint8), 1.0, "frames 0 to 1: an image's sides"),
    ],
)
def test_what_is_no_video_is_refused(frames, fps, message):
    with pytest.raises(ValueError, match=message):
        video_to_patches(frames, fps, SETTINGS, LAYOUT)


def _official_positions(ids, grids, tokens_per_second):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    # The method reads nothing but two numbers of the configuration, so no weights need be made.
    model = modeling.Qwen2_5_VLModel.__new__(modeling.Qwen2_5_VLModel)
    torch.nn.Module.__init__(model)
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=tokens_per_second)
    model.config = SimpleNamespace(vision_config=vision)
    images = [[1, g[0] * 2, g[1] * 2] for g in grids if not isinstance(g, VideoGrid)]
    videos = [g for g in grids if isinstance(g, VideoGrid)]
    # With a token more: of the sequence, not the delta, which is another thing.
    ids = torch.tensor([[*ids, 1]])
    pos, _ = model.get_rope_index(
        ids,
        (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor([[g.steps, g.rows * 2, g.cols * 2] for g in videos]) if videos else None,
        second_per_grid_ts=torch.tensor([g.second_per_grid for g in videos]) if videos else None,
    )
    return pos[:, 0, :-1].T.numpy(), int(pos[0, 0, -1])


def _mixed(rng, number):
    grids = []
    for _ in range(number % 4):
        rows, cols = (int(n) for n in rng.integers(1, 7, 2))
        seconds = float(rng.choice([0.5, 1.0, 2.0, 2 / 3, 2 / 29.97, 0.1, 7.3]))
        grids.append(VideoGrid(int(rng.integers(1, 9)), rows, cols, seconds) if rng.random() < 0.7 else (rows, cols))
    ids = [1] * int(rng.integers(0 if grids else 1, 6))
    for grid in grids:
        count = grid.steps * grid.rows * grid.cols if isinstance(grid, VideoGrid) else grid[0] * grid[1]
        ids += [VIDEO if isinstance(grid, VideoGrid) else IMAGE] * count + [2] * int(rng.integers(1, 6))
    while number % 5 == 0 and grids and ids[-1] == 2:
        ids.pop()
    return ids, grids


@pytest.mark.parametrize("seed", range(60))
def test_positions_equal_transformers(seed):
    rng = np.random.default_rng(seed)
    ids, grids = _mixed(rng, seed)
    rate = int(rng.choice([1, 2, 4, 25]))
    pos, next_pos = visual_positions(ids, IMAGE, VIDEO, grids, rate)
    official_pos, official_next = _official_positions(ids, grids, rate)
    np.testing.assert_array_equal(pos, official_pos)
    assert pos.dtype == np.int32 and next_pos == official_next


def test_long_videos_equal_transformers():
    """Thousands of steps: the product of float32 numbers rounds as theirs does."""
    for seconds in (2 / 29.97, 0.1, 1 / 3, 0.7):
        grid = VideoGrid(3000, 1, 1, seconds)
        ids = [1] + [VIDEO] * 3000 + [2]
        np.testing.assert_array_equal(
            visual_positions(ids, IMAGE, VIDEO, [grid], 2)[0], _official_positions(ids, [grid], 2)[0]
        )


def test_the_rule_by_hand():
    """The example in the docstring of transformers: 3 steps of 2x2, 25 positions a second, 2 seconds a step."""
    ids, grid = [VIDEO] * 12 + [5, 5], VideoGrid(3, 2, 2, 2.0)
    pos, next_pos = visual_positions(ids, IMAGE, VIDEO, [grid], 25)
    assert pos[:12, 0].tolist() == [0] * 4 + [50] * 4 + [100] * 4
    assert pos[:4, 1].tolist() == [0, 0, 1, 1] and pos[:4, 2].tolist() == [0, 1, 0, 1]
    assert pos[12:].tolist() == [[2] * 3, [3] * 3] and next_pos == 4


@pytest.mark.parametrize(
    "ids, grids, message",
    [
        ([VIDEO] * 3, [VideoGrid(2, 1, 2)], r"the 4 visual tokens of video 0 \(2x1x2\) side by side at 0"),
        ([VIDEO, 1, VIDEO], [VideoGrid(2, 1, 1)], "video 0"),
        ([IMAGE] * 2, [VideoGrid(2, 1, 1)], "video 0"),
        ([VIDEO] * 2, [(1, 2)], "image 0"),
        ([VIDEO] * 2 + [1] + [IMAGE], [VideoGrid(2, 1, 1)], "hold 3 visual tokens but .* have 2"),
        ([1], [(1, 1)], "image 0"),
        ([[1]], [], "one axis"),
    ],
)
def test_wrong_ids_are_refused(ids, grids, message):
    with pytest.raises(ValueError, match=message):
        visual_positions(ids, IMAGE, VIDEO, grids, 2)


def test_wrong_grids_are_refused():
    with pytest.raises(ValueError, match="a step, a row and a column"):
        VideoGrid(0, 1, 1)
    with pytest.raises(ValueError, match="second_per_grid"):
        VideoGrid(1, 1, 1, 0.0)
