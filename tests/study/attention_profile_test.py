"""What an image tells: nothing where all images are the same, and more than nothing where they are not."""

import dataclasses

import pytest

from qwenla_jax.config.inference_config import InferenceConfig
from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.data.synthetic.source import SceneSource
from qwenla_jax.inference.runtime import build
from qwenla_jax.study.attention_profile import attention_profile, image_swap_probe, theorem_numbers


class OneImage(SceneSource):
    """Different questions to one image."""

    def __getitem__(self, index):
        return dataclasses.replace(super().__getitem__(index), images=super().__getitem__(0).images)


class Blind(SceneSource):
    """No image in the third question."""

    def __getitem__(self, index):
        record = super().__getitem__(index)
        return dataclasses.replace(record, id="image_swap", images=()) if index == 2 else record


@pytest.fixture(scope="module")
def model(describing):
    return build(InferenceConfig(init_from=str(describing), batch_size=8, reattention=ReattentionOptions(mode="copy")))


def test_a_swapped_image(model):
    same = image_swap_probe(*model, OneImage(3, "held_out"), 8)
    assert same["logp_drop"] == pytest.approx(0, abs=1e-6) and same["accuracy"] == same["accuracy_swapped"]
    other = image_swap_probe(*model, SceneSource(3, "held_out"), 48)
    assert other["logp_drop"] > 0.3 and other["accuracy"] > other["accuracy_swapped"]


def test_theorem_numbers(model):
    same = theorem_numbers(*model, OneImage(3, "held_out"), 8, swaps=2)
    assert all(row["information"] == pytest.approx(0, abs=1e-5) for row in same["positions"])
    other = theorem_numbers(*model, SceneSource(3, "held_out"), 16, swaps=2)
    most = max(row["information"] for row in other["positions"])
    assert 0.05 < most < 1.0986123 + 1e-6  # log 3: no more can be told apart among three images
    for row in other["positions"]:
        assert row["bound"] <= row["entropy"] and 0 < row["r"] < 1
    assert other["insertions"]["rose"] == other["insertions"]["count"] > 0
    with pytest.raises(ValueError, match="'image_swap' has 0 images"):
        image_swap_probe(*model, Blind(3, "held_out"), 8)
    with pytest.raises(ValueError, match="swaps"):
        theorem_numbers(*model, SceneSource(3, "held_out"), 8, swaps=8)


def test_profile_of_a_checkpoint(model):
    got = attention_profile(*model, SceneSource(3, "held_out"), 8)
    whole = got["parts"]["all"]
    assert whole["tokens"] == sum(row["tokens"] for row in got["positions"])
    assert 0 < whole["visual"] < 1 and whole["ratio"] == pytest.approx(whole["visual"] / whole["even"])
    even = [row["even"] for row in got["positions"]]
    assert even == sorted(even, reverse=True)  # theorem 3.1: the visual tokens' share falls, without insertions
