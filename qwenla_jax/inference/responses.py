"""From a rollout to token ids and texts."""

from __future__ import annotations

import numpy as np

from qwenla_jax.text.tokenizer import Tokenizer
from qwenla_jax.types import Rollout


def responses_of(rollout: Rollout) -> list[list[int]]:
    """Ids of the responses, without the stop token."""
    ids_BxR, length_B, stopped_B = (np.asarray(x) for x in (rollout.ids_BxR, rollout.length_B, rollout.stopped_B))
    ends = length_B - stopped_B.astype(length_B.dtype)
    return [ids[:end].tolist() for ids, end in zip(ids_BxR, ends, strict=True)]


def texts_of(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
    """Responses as text, without the stop token.

    Control tokens inside a response stay visible: outside of sections they violate the format, within one they are part
    of its text.
    """
    return [tokenizer.decode(ids) for ids in responses_of(rollout)]
