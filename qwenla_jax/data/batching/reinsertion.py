"""The insertion of a prompt's images into the response, prepared on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qwenla_jax.config.shared_options import ReattentionOptions


class Block(NamedTuple):
    """One prompt's part of a `types.ReinsertedImages`, without padding."""

    source_X: np.ndarray
    pos_Xx3: np.ndarray
    moves_X: np.ndarray
    span: int


def reinserted_images(
    visual_T: np.ndarray, pos_Tx3: np.ndarray, grids: Sequence[tuple[int, int]], options: ReattentionOptions
) -> Block:
    """All images of a prompt, one after the other.

    With p the next position, "again" gives `<|vision_start|>` p, visual token (i, j) (p+1, p+1+i, p+1+j), and
    `<|vision_end|>` p+1+max(rows, cols): as Qwen2.5-VL's rule for a further image.

    Args:
      visual_T: at least 0 where the prompt's token is a visual one; each image is between two delimiters.
      pos_Tx3: the prompt's positions.
      grids: (rows, cols) of visual tokens of each image, in the prompt's order.
      options: delimiters and positions.
    """
    at_M = np.flatnonzero(visual_T >= 0)
    source, pos, moves = [], [], []
    used = span = 0
    edge = int(options.delimiters)
    for rows, cols in grids:
        at = at_M[used : used + rows * cols]
        used += rows * cols
        i, j = np.divmod(np.arange(rows * cols, dtype=np.int32), cols)
        again = options.positions == "again"
        inner = np.stack([0 * i, i, j], axis=1) + span + edge if again else pos_Tx3[at]
        extent = max(rows, cols) if again else 0
        if edge:
            ends = np.array([[span] * 3, [span + 1 + extent] * 3], np.int32)
            source += [at[:1] - 1, at, at[-1:] + 1]
            pos += [ends[:1], inner, ends[1:]]
            moves += [[1], [int(again)] * len(at), [1]]
        else:
            source, pos, moves = [*source, at], [*pos, inner], [*moves, [int(again)] * len(at)]
        span += 2 * edge + extent

    def join(parts: list, *tail: int) -> np.ndarray:
        return np.concatenate([np.zeros((0, *tail)), *parts]).astype(np.int32)

    return Block(join(source), join(pos, 3), join(moves), span)
