"""Log-probabilities of given tokens, for every loss: chunked over tokens and vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from qwenla_jax.model.qwen_vl import Params, QwenVL, head_matrix
from qwenla_jax.parallel.sharding import row_shards
from qwenla_jax.reattention.options import TEXT_ONLY, ReattentionConfig
from qwenla_jax.reattention.splice import embed_with_sources, replay_selection, splice
from qwenla_jax.sampling.prefill import encode_prompts, text_positions
from qwenla_jax.types import PromptBatch, VisionBatch

TOKEN_CHUNK = 4096  # on one device
VOCAB_CHUNK = 16384


def token_logprobs(
    hidden_BxTxD: jax.Array,
    head_DxV: jax.Array,
    ids_BxT: jax.Array,
    logit_bias_V: jax.Array | np.ndarray,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of given tokens and the entropy of their distributions; [B, T, V] never exists whole.

    The chunks run along T and V and never along B: rows are sharded over the devices, and a loop over them would make
    every device compute all of them.

    Args:
      hidden_BxTxD: hidden states that predict the tokens.
      head_DxV: output matrix.
      ids_BxT: int32 tokens.
      logit_bias_V: float32 added to the logits (`sampling.token.suppression_bias`).
      temperature: divides the logits; > 0.

    Returns:
      float32 [B, T] natural log-probabilities and float32 [B, T] entropies in nats. No gradient flows through the
      entropy.
    """
    B, T, D = hidden_BxTxD.shape
    V = head_DxV.shape[1]
    vocab = max(size for size in range(1, min(V, VOCAB_CHUNK) + 1) if V % size == 0)
    if vocab * 16 < min(V, VOCAB_CHUNK):  # V is nearly prime: its divisors are too small to be chunks
        vocab = V
    # Counted by device: every chunk gathers the matrix again, so the number of chunks must not grow with the mesh.
    rows = max(1, B // row_shards())
    chunks = -(-T // max(1, TOKEN_CHUNK // rows))
    length = -(-T // chunks)

    @jax.checkpoint
    def vocab_chunk(hidden: jax.Array, ids: jax.Array, carry: tuple[jax.Array, ...], start: jax.Array):
        top, total, weighted, chosen = carry
        head = jax.lax.dynamic_slice_in_dim(head_DxV, start, vocab, axis=1).astype(hidden.dtype)
        bias = jax.lax.dynamic_slice_in_dim(logit_bias_V, start, vocab)
        logits = (jnp.dot(hidden, head, preferred_element_type=jnp.float32) + bias) / temperature
        new_top = jax.lax.stop_gradient(jnp.maximum(top, logits.max(-1)))
        scale, e = jnp.exp(top - new_top), jnp.exp(logits - new_top[:, None])
        # A product with a mask, not a gather: its gradient is a product too and not a scatter.
        here = jnp.arange(vocab)[None, :] == (ids - start)[:, None]
        chosen = chosen + jnp.sum(jnp.where(here, logits, 0.0), -1)
        weighted = weighted * scale + jax.lax.stop_gradient(jnp.sum(e * logits, -1))
        return new_top, total * scale + e.sum(-1), weighted, chosen

    @jax.checkpoint
    def token_chunk(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, ids = inputs[0].reshape(-1, D), inputs[1].reshape(-1)
        zeros = jnp.zeros(ids.shape, jnp.float32)
        carry = (zeros - jnp.inf, zeros, zeros, zeros)
        if vocab == V:
            carry = vocab_chunk(hidden, ids, carry, jnp.zeros((), jnp.int32))
        else:
            starts = jnp.arange(0, V, vocab, dtype=jnp.int32)
            carry, _ = jax.lax.scan(lambda c, s: (vocab_chunk(hidden, ids, c, s), None), carry, starts)
        top, total, weighted, chosen = carry
        lse = top + jnp.log(total)
        entropy = jax.lax.stop_gradient(lse - weighted / total)
        return (chosen - lse).reshape(B, -1), entropy.reshape(B, -1)

    if chunks == 1:
        return token_chunk((hidden_BxTxD, ids_BxT))
    pad = [(0, 0), (0, chunks * length - T)]
    hidden = jnp.pad(hidden_BxTxD, [*pad, (0, 0)]).reshape(B, chunks, length, D)
    ids = jnp.pad(ids_BxT, pad).reshape(B, chunks, length)
    logp, entropy = jax.lax.map(token_chunk, (jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(ids, 1, 0)))
    whole = lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1)[:, :T]  # noqa: E731
    return whole(logp), whole(entropy)


def response_states(
    model: QwenVL,
    params: Params,
    vision: VisionBatch,
    prompts: PromptBatch,
    ids_BxR: jax.Array,
    reattention: ReattentionConfig = TEXT_ONLY,
    length_B: jax.Array | None = None,
    selected_BxExX: jax.Array | None = None,
) -> jax.Array:
    """The hidden states that predict each token of given responses: prompts once, responses over the shared prompts.

    Args:
      model, reattention: static.
      params: parameters, the ones trained or the reference.
      vision, prompts: Q questions.
      ids_BxR: int32 responses, B = Q * G; row b answers question b // G.
      length_B: int32, tokens of the responses; needed where `reattention` inserts anything.
      selected_BxExX: bool, what each insertion shows, as a `types.Rollout` records it or `replay_selection` computes
        it; needed where `reattention` inserts anything.

    Returns:
      [B, R, D]. A tag after an insertion is predicted by the token before the insertion, as it was sampled; inserted
      tokens predict nothing. After a response's end the states have no meaning.
    """
    B, R = ids_BxR.shape
    G = B // prompts.ids_QxP.shape[0]
    variables = {"params": params}
    last_QxD, prefix, prompt_QxPxD = encode_prompts(model, params, vision, prompts, reattention.content)
    last_Bx1xD = jnp.repeat(last_QxD, G, axis=0)[:, None]
    if not reattention.inserts:
        x_BxTxD = model.apply(variables, ids_BxR[:, :-1], None, None, method="embed")
        pos_BxTx3 = text_positions(jnp.repeat(prompts.next_pos_Q, G), R - 1)
        hidden_BxTxD = model.apply(variables, x_BxTxD, pos_BxTx3, prefix, method="decode").hidden_BxTxD
    else:
        if length_B is None or selected_BxExX is None:
            raise ValueError(f"mode {reattention.mode!r} needs the responses' lengths and what each insertion shows")
        tokens = splice(reattention, prompts, ids_BxR[:, :-1], length_B, selected_BxExX)
        x_BxTxD = embed_with_sources(model, params, tokens.ids_BxT, tokens.source_BxT, prompt_QxPxD)
        decoded = model.apply(variables, x_BxTxD, tokens.pos_BxTx3, prefix, None, tokens.bias_BxT, method="decode")
        hidden_BxTxD = jnp.take_along_axis(decoded.hidden_BxTxD, tokens.slot_BxR[..., None], axis=1)
    # The prompt's last state predicts the first token; every token's state predicts the next one.
    return jnp.concatenate([last_Bx1xD, hidden_BxTxD], axis=1)


def response_selection(
    model: QwenVL,
    params: Params,
    vision: VisionBatch,
    prompts: PromptBatch,
    ids_BxR: jax.Array,
    length_B: jax.Array,
    reattention: ReattentionConfig,
    max_insertions: int,
) -> jax.Array:
    """What each insertion shows in responses without a record of it; bool [B, E, X], E = `max_insertions`.

    See `reattention.splice.replay_selection`. No gradient flows.
    """
    params = jax.lax.stop_gradient(params)
    _, prefix, prompt_QxPxD = encode_prompts(model, params, vision, prompts, reattention.content)
    # The last token is never run: the sampler did not need it either.
    return replay_selection(
        reattention, model, params, prompts, prefix, prompt_QxPxD, ids_BxR[:, :-1], length_B, max_insertions
    )


def response_logprobs(
    model: QwenVL,
    params: Params,
    vision: VisionBatch,
    prompts: PromptBatch,
    ids_BxR: jax.Array,
    logit_bias_V: jax.Array | np.ndarray,
    temperature: float,
    reattention: ReattentionConfig = TEXT_ONLY,
    length_B: jax.Array | None = None,
    selected_BxExX: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of responses, as the sampler computed them.

    Args:
      logit_bias_V: float32, see `sampling.token.suppression_bias`.
      temperature: the sampler's.
      model, params, vision, prompts, ids_BxR, reattention, length_B, selected_BxExX: see `response_states`.

    Returns:
      float32 [B, R] log-probabilities and entropies; after a response's end they have no meaning.
    """
    pred_BxRxD = response_states(model, params, vision, prompts, ids_BxR, reattention, length_B, selected_BxExX)
    return token_logprobs(pred_BxRxD, head_matrix(params), ids_BxR, logit_bias_V, temperature)
