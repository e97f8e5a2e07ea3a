"""What the sampling loop carries from token to token, and how single rows of it are taken and put back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from qwenla_jax.model.kv_cache import KeyValues
from qwenla_jax.types import PromptBatch


@struct.dataclass
class SampleState:
    """All that decoding needs beside the parameters; every row stands on its own.

    Attributes:
      prompts: the Q questions; row b belongs to question b // G.
      prompt_QxPxD: embeddings of the prompts: insertions repeat them.
      prefix: keys and values of the prompts.
      allowed_B: int32, most insertions of each row.
      seed, step, sample_B: uint32; a token's random key is a function of these, the row's number and the token's.
      hidden_BxD: the hidden state that predicts each row's next token.
      cache: keys and values of the row's own tokens; `cache.length_B` is the next free slot.
      next_pos_B: int32, M-RoPE position of the next token. Carried, not derived from the length, because an image put
        into the sequence moves it by another amount than it moves the length.
      received_BxP: float32, attention that the row's tokens have paid to each slot of its prompt, summed; [B, 0] where
        nothing is chosen by it.
      pending_B: bool, the row has sampled a tag before which the images are to be put in, and they are not yet.
      closing_B: bool, the row's next token is `</REFLECTION>` whatever the model says.
      ids_BxR, logp_BxR, length_B, stopped_B, inserted_B, skipped_B, selected_BxExX: the growing `types.Rollout`.
    """

    prompts: PromptBatch
    prompt_QxPxD: jax.Array
    prefix: KeyValues
    allowed_B: jax.Array
    seed: jax.Array
    step: jax.Array
    sample_B: jax.Array
    hidden_BxD: jax.Array
    cache: KeyValues
    next_pos_B: jax.Array
    received_BxP: jax.Array
    pending_B: jax.Array
    closing_B: jax.Array
    ids_BxR: jax.Array
    logp_BxR: jax.Array
    length_B: jax.Array
    stopped_B: jax.Array
    inserted_B: jax.Array
    skipped_B: jax.Array
    selected_BxExX: jax.Array

    @property
    def live_B(self) -> jax.Array:
        """Rows with more to come, waiting ones included."""
        return ~self.stopped_B & (self.length_B < self.ids_BxR.shape[1])


class RowSubset:
    """Some rows of a batch whose rows lie over devices in equal runs: as many of each run, so that none moves.

    Args:
      wanted_B: bool, rows to choose.
      shards: runs of rows.
      rows: how many to choose, over all runs together; a multiple of `shards`.

    Attributes:
      row_C: int32, the chosen rows, the first wanted of each run; other rows fill up what is missing.
      wanted_C: bool, whether it is a wanted one.
    """

    def __init__(self, wanted_B: jax.Array, shards: int, rows: int) -> None:
        """Chooses."""
        self._shards = shards
        wanted_DxF = wanted_B.reshape(shards, -1)
        self._at_DxC = jnp.argsort(~wanted_DxF, axis=1, stable=True)[:, : rows // shards]
        self.wanted_C = jnp.take_along_axis(wanted_DxF, self._at_DxC, axis=1).reshape(-1)
        first_D = jnp.arange(shards) * wanted_DxF.shape[1]
        self.row_C = (first_D[:, None] + self._at_DxC).reshape(-1)

    def take(self, x: jax.Array, axis: int = 0, share: int = 1) -> jax.Array:
        """The chosen rows of `x`, whose `axis` is the rows' (or that of what `share` rows in a row have in common)."""
        split = self._split(x, axis)
        pick = lambda part, at: jnp.take(part, at // share, axis=axis)  # noqa: E731
        got = jax.vmap(pick, (axis, 0), axis)(split, self._at_DxC)
        return got.reshape(*x.shape[:axis], self._at_DxC.size, *x.shape[axis + 1 :])

    def _split(self, x: jax.Array, axis: int) -> jax.Array:
        return x.reshape(*x.shape[:axis], self._shards, x.shape[axis] // self._shards, *x.shape[axis + 1 :])

    def put(self, x: jax.Array, values: jax.Array, axis: int = 0) -> jax.Array:
        """`x` with the values in the chosen rows, where those were wanted."""
        split = self._split(x, axis)
        size = split.shape[axis + 1]
        at_DxC = jnp.where(self.wanted_C.reshape(self._at_DxC.shape), self._at_DxC, size)
        values = values.reshape(*x.shape[:axis], *at_DxC.shape, *x.shape[axis + 1 :]).astype(x.dtype)
        index = (slice(None),) * axis
        write = lambda part, at, new: part.at[(*index, at)].set(new, mode="drop")  # noqa: E731
        return jax.vmap(write, (axis, 0, axis), axis)(split, at_DxC, values).reshape(x.shape)
