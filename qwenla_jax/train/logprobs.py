"""Log-probabilities of responses to prompts with images, as the sampler computed them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from qwenla_jax.model.qwen_vl import Params, QwenVL, head_matrix
from qwenla_jax.reattention.options import TEXT_ONLY, ReattentionConfig
from qwenla_jax.reattention.splice import embed_with_sources, replay_selection, splice
from qwenla_jax.sampling.prefill import encode_prompts, text_positions
from qwenla_jax.train.token_logprobs import token_logprobs
from qwenla_jax.types import PromptBatch, VisionBatch


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
