"""M-RoPE positions of a prompt, on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mrope_positions(
    ids: Sequence[int] | np.ndarray, image_token_id: int, grids: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, int]:
    """The (time, row, column) position of every token.

    With p the next free position, a text token stands at (p, p, p) and moves p by one; visual token (i, j) of a picture
    stands at (p, p + i, p + j) and the whole picture moves p by max(rows, cols). A picture that stands in the sequence
    a second time is just one more picture. This is Qwen2.5-VL's rule for still pictures.

    Args:
      ids: [T], token ids.
      image_token_id: the id that stands for one visual token.
      grids: (rows, cols) of visual tokens of each picture, in the order of the sequence.

    Returns:
      pos_Tx3: int32, the positions.
      next_pos: the position of the token after the last, the same on all three axes; 0 for no tokens at all.

    Raises:
      ValueError: the visual tokens in `ids` are not one consecutive run of rows * cols for each picture.
    """
    ids_T = np.asarray(ids)
    if ids_T.ndim != 1:
        raise ValueError(f"ids must have one axis, got the shape {ids_T.shape}")
    is_visual_T = ids_T == image_token_id
    found, wanted = int(is_visual_T.sum()), sum(rows * cols for rows, cols in grids)
    if found != wanted:
        raise ValueError(f"ids hold {found} visual tokens but the pictures {list(grids)} have {wanted}")
    pos_Tx3 = np.empty((len(ids_T), 3), np.int32)
    at = next_pos = 0
    visual_at = np.flatnonzero(is_visual_T)
    used = 0
    for number, (rows, cols) in enumerate(grids):
        start, count = int(visual_at[used]), rows * cols
        if visual_at[used + count - 1] != start + count - 1:
            raise ValueError(f"the {count} visual tokens of picture {number} do not stand side by side in ids")
        text = np.arange(start - at, dtype=np.int32)
        pos_Tx3[at:start] = text[:, None] + next_pos
        next_pos += len(text)
        i, j = np.divmod(np.arange(count, dtype=np.int32), cols)
        pos_Tx3[start : start + count, 0] = next_pos
        pos_Tx3[start : start + count, 1] = next_pos + i
        pos_Tx3[start : start + count, 2] = next_pos + j
        next_pos += max(rows, cols)
        at, used = start + count, used + count
    rest = np.arange(len(ids_T) - at, dtype=np.int32)
    pos_Tx3[at:] = rest[:, None] + next_pos
    return pos_Tx3, next_pos + len(rest)
