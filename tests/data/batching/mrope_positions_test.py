"""M-RoPE positions against transformers."""

from types import SimpleNamespace

import numpy as np
import pytest

from qwenla_jax.data.batching.mrope_positions import visual_positions

IMAGE = 99


def _official(ids, grids):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    # The method reads nothing but two numbers of the configuration, so no weights need be made.
    model = modeling.Qwen2_5_VLModel.__new__(modeling.Qwen2_5_VLModel)
    torch.nn.Module.__init__(model)
    model.config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2))
    ids = torch.tensor([ids])
    grid_thw = torch.tensor([[1, rows * 2, cols * 2] for rows, cols in grids]) if grids else None
    pos, delta = model.get_rope_index(ids, (ids == IMAGE).int(), image_grid_thw=grid_thw)
    return pos[:, 0].T.numpy(), int(delta[0]) + ids.shape[1]


@pytest.mark.parametrize("seed", range(30))
def test_positions_equal_transformers(seed):
    rng = np.random.default_rng(seed)
    grids = [tuple(int(n) for n in rng.integers(1, 9, 2)) for _ in range(seed % 4)]
    ids = [1] * int(rng.integers(0 if grids else 1, 6))
    for rows, cols in grids:
        ids += [IMAGE] * (rows * cols) + [2] * int(rng.integers(1, 6))
    if seed % 5 == 0 and grids:
        while ids[-1] == 2:
            ids.pop()
    pos, next_pos = visual_positions(ids, IMAGE, -1, grids, 1)
    official_pos, official_next = _official(ids, grids)
    np.testing.assert_array_equal(pos, official_pos)
    assert pos.dtype == np.int32
    assert next_pos == official_next == pos.max() + 1


def test_positions_by_hand():
    pos, next_pos = visual_positions([7, IMAGE, IMAGE, IMAGE, 8], IMAGE, -1, [(1, 3)], 1)
    assert pos.tolist() == [[0, 0, 0], [1, 1, 1], [1, 1, 2], [1, 1, 3], [4, 4, 4]]
    assert next_pos == 5


def test_wrong_counts_are_refused():
    with pytest.raises(ValueError, match=r"do not hold the 4 visual tokens of image 0 \(2x2\)"):
        visual_positions([IMAGE, IMAGE], IMAGE, -1, [(2, 2)], 1)
    with pytest.raises(ValueError, match="hold 4 visual tokens but .* have 2"):
        visual_positions([IMAGE, IMAGE, 1, IMAGE, IMAGE], IMAGE, -1, [(1, 2)], 1)
    with pytest.raises(ValueError, match="visual tokens of image 0 .* side by side"):
        visual_positions([IMAGE, 1, IMAGE], IMAGE, -1, [(1, 2)], 1)
