"""Videos read from disk. Oracle: transformers' rule for the frames, its reader by PyAV, and frames that we wrote."""

import ast
import math
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from qwenla_jax.data.images.video_file import LEAST_FRAMES, MOST_FRAMES, frame_indices, read_video


@pytest.fixture(scope="module")
def official_indices():
    """`Qwen2VLVideoProcessor.sample_frames`, taken from its file: importing the class needs torchvision."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    file = Path(transformers.__file__).parent / "models" / "qwen2_vl" / "video_processing_qwen2_vl.py"
    nodes = ast.walk(ast.parse(file.read_text()))
    method = next(node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == "sample_frames")
    scope = {"math": math, "torch": torch, "VideoMetadata": object}
    exec(compile(ast.Module([method], []), str(file), "exec"), scope)  # noqa: S102
    own = SimpleNamespace(
        num_frames=None, fps=2.0, temporal_patch_size=2, min_frames=LEAST_FRAMES, max_frames=MOST_FRAMES
    )
    return lambda total, rate, fps: scope["sample_frames"](
        own, SimpleNamespace(total_num_frames=total, fps=rate), fps=fps
    ).tolist()


def test_frames_are_those_that_transformers_takes(official_indices):
    """But for float32, which takes a neighbouring frame where a multiple is rounded up, and one beyond the last."""
    rng = np.random.default_rng(0)
    equal = 0
    for _ in range(400):
        total, rate = int(rng.integers(2, 20_000)), float(rng.choice([23.976, 25, 29.97, 60, 7.5]))
        fps = float(rng.choice([0.5, 1, 2, 3.7, 30]))
        ours, official = frame_indices(total, rate, fps), np.array(official_indices(total, rate, fps))
        assert len(official) - len(ours) in (0, 1)
        differ = np.abs(ours - official[: len(ours)])
        assert differ.max() <= 1 and differ.mean() < 0.1
        equal += not differ.any()
    assert equal > 200
    assert frame_indices(1, 25, 2).tolist() == [0]  # transformers takes none


@pytest.fixture
def file(tmp_path):
    """A film of 25 frames at 10 frames a second."""
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "film.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(25):
            image = Image.new("RGB", (64, 48), (10 * number, 255 - 10 * number, 40))
            for packet in stream.encode(av.VideoFrame.from_image(image)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return tmp_path / "film.mp4"


def test_a_file(file, official_indices):
    video_utils = pytest.importorskip("transformers.video_utils")

    def chosen(metadata, **kwargs):
        return official_indices(metadata.total_num_frames, metadata.fps, 4.0)

    want, metadata = video_utils.read_video_pyav(str(file), chosen)
    clip = read_video(file, 4.0)
    np.testing.assert_array_equal(np.stack([np.asarray(frame) for frame in clip.frames]), want)
    assert len(want) == 10 and clip.fps == pytest.approx(metadata.sampled_fps)


def test_a_folder(tmp_path):
    colors = [(10 * number, 0, 0) for number in range(12)]
    for number, color in enumerate(colors):
        Image.new("RGB", (30, 20), color).save(tmp_path / f"shot {number}.png")
    (tmp_path / ".hidden").write_text("")
    clip = read_video(tmp_path, 3.0)
    assert [frame.getpixel((0, 0)) for frame in clip.frames] == colors and clip.fps == 3.0
    Image.new("RGB", (30, 21)).save(tmp_path / "shot 5.png")
    with pytest.raises(ValueError, match=r"shot 5.png: has \(30, 21\) pixels, but shot 0.png has \(30, 20\)"):
        read_video(tmp_path)
    (tmp_path / "shot 5.png").write_text("text")
    with pytest.raises(ValueError, match="shot 5.png: is no image"):
        read_video(tmp_path)


def test_what_is_refused(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: has 0 frames, expected 1 to 768"):
        read_video(tmp_path / "empty")
    with pytest.raises(ValueError, match="none: no such file or folder"):
        read_video(tmp_path / "none")
    with pytest.raises(ValueError, match="fps: got 0"):
        read_video(tmp_path, 0)
    film = tmp_path / "film.mp4"
    film.write_text("text")
    pytest.importorskip("av")
    with pytest.raises(ValueError, match="film.mp4: is no video that can be read"):
        read_video(film)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ModuleNotFoundError, match="film.mp4: a video file needs a package: pip install av"):
        read_video(film)
