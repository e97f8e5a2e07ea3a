"""M-RoPE positions of a prompt, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class VideoGrid:
    """The visual tokens of a video.

    Attributes:
      steps: temporal patches, each of `temporal_patch_size` frames.
      rows, cols: visual tokens of a step.
      second_per_grid: seconds from one step to the next (transformers' `second_per_grid_ts`).

    Raises:
      ValueError: an empty grid, or a time that is not positive and finite.
    """

    steps: int
    rows: int
    cols: int
    second_per_grid: float = 1.0

    def __post_init__(self) -> None:
        """Checks the sizes and the time."""
        if min(self.steps, self.rows, self.cols) < 1:
            raise ValueError(f"a video needs a step, a row and a column, got {self.steps}, {self.rows}, {self.cols}")
        if not 0 < self.second_per_grid < float("inf"):
            raise ValueError(f"second_per_grid must be positive and finite, got {self.second_per_grid}")


def visual_positions(
    ids: Sequence[int] | np.ndarray,
    image_token_id: int,
    video_token_id: int,
    grids: Sequence[tuple[int, int] | VideoGrid],
    tokens_per_second: float,
) -> tuple[np.ndarray, int]:
    """The (time, row, column) position of every token, of images and videos, by Qwen2.5-VL's rule.

    With p the next free position, a text token is at (p, p, p) and moves p by one; visual token (i, j) of an image is
    at (p, p + i, p + j) and the whole image moves p by max(rows, cols). A repeated image counts as one more image.
    Visual token (i, j) of step k of a video is at
    (p + floor(k * tokens_per_second * second_per_grid), p + i, p + j), in float32 as transformers computes it.

    The text after a video is at p + max(rows, cols), though later steps may have larger positions, as in transformers
    5.23 for prompts. (Earlier versions, and Qwen2.5-VL's own training code, put it past the largest position of the
    video.)

    Generated tokens continue after the last token, as in transformers' `generate`, and in `get_rope_index` for a prompt
    with its response: so training and sampling use the same positions of a response. The rope delta that transformers
    returns with a prompt's positions begins past the largest position of all; `generate` does not use it, and it
    differs where a late step of a video is beyond the text.

    Args:
      ids: [T], token ids.
      image_token_id, video_token_id: the ids that stand for one visual token of an image and of a video.
      grids: (rows, cols) of each image and a `VideoGrid` of each video, in the order of the sequence.
      tokens_per_second: the vision config's.

    Returns:
      pos_Tx3: int32, the positions.
      next_pos: the position of the token after the last, the same on all three axes; 0 for no tokens at all.

    Raises:
      ValueError: the visual tokens in `ids` are not one consecutive run of the right kind and length for each image
        and video.
    """
    ids_T = np.asarray(ids)
    if ids_T.ndim != 1:
        raise ValueError(f"ids must have one axis, got the shape {ids_T.shape}")
    visual_at = np.flatnonzero((ids_T == image_token_id) | (ids_T == video_token_id))
    pos_Tx3 = np.empty((len(ids_T), 3), np.int32)
    at = p = used = 0
    for number, grid in enumerate(grids):
        is_video = isinstance(grid, VideoGrid)
        steps, rows, cols = (grid.steps, grid.rows, grid.cols) if is_video else (1, *grid)
        count = steps * rows * cols
        start = int(visual_at[used]) if used < len(visual_at) else len(ids_T)
        run = ids_T[start : start + count]
        if len(run) < count or (run != (video_token_id if is_video else image_token_id)).any():
            what = f"video {number} ({steps}x{rows}x{cols})" if is_video else f"image {number} ({rows}x{cols})"
            raise ValueError(f"ids do not hold the {count} visual tokens of {what} side by side at {start}")
        pos_Tx3[at:start] = np.arange(p, p + start - at, dtype=np.int32)[:, None]
        p += start - at
        step, row, col = np.unravel_index(np.arange(count), (steps, rows, cols))
        if is_video:
            interval = np.float32(tokens_per_second) * np.float32(grid.second_per_grid)
            step = (step.astype(np.float32) * interval).astype(np.int32)
        pos_Tx3[start : start + count] = p + np.stack([step, row, col], axis=-1)
        p += max(rows, cols)
        at, used = start + count, used + count
    if used < len(visual_at):
        raise ValueError(f"ids hold {len(visual_at)} visual tokens but the images and videos {list(grids)} have {used}")
    pos_Tx3[at:] = np.arange(p, p + len(ids_T) - at, dtype=np.int32)[:, None]
    return pos_Tx3, p + len(ids_T) - at
