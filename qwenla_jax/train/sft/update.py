"""Supervised training on responses: the cold start, and with re-inserted images (paper, stages 1 and 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qwenla_jax.model.lora import joined
from qwenla_jax.model.qwen_vl import Params, QwenVL, head_matrix
from qwenla_jax.model.trainable import trainable_labels, trained_part
from qwenla_jax.reattention.options import TEXT_ONLY, ReattentionConfig, forced_tokens
from qwenla_jax.train.logprobs import response_logprobs, response_selection
from qwenla_jax.train.token_logprobs import token_logprobs
from qwenla_jax.train.train_state import Gradient
from qwenla_jax.types import PromptBatch, ResponseBatch, TokenBatch, VisionBatch

Rules = Sequence[tuple[str, str]]
TRAIN_ALL: Rules = ((".*", "train"),)


def sft_loss(
    model: QwenVL, params: Params, vision: VisionBatch, tokens: TokenBatch, logit_bias_V: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood summed over the response's tokens.

    Returns:
      two float32 scalars: the weighted sum of -log p, and the weighted sum of p (for a mean token probability).
    """
    hidden_BxTxD = model.apply({"params": params}, vision, tokens.ids_BxT, tokens.pos_BxTx3, tokens.visual_BxT)
    # The state before a token predicts it.
    pred_BxRxD = jnp.take_along_axis(hidden_BxTxD, tokens.target_BxR[..., None] - 1, axis=1)
    ids_BxR = jnp.take_along_axis(tokens.ids_BxT, tokens.target_BxR, axis=1)
    logp_BxR, _ = token_logprobs(pred_BxRxD, head_matrix(params), ids_BxR, logit_bias_V)
    return -jnp.sum(logp_BxR * tokens.loss_BxR), jnp.sum(jnp.exp(logp_BxR) * tokens.loss_BxR)


def reattention_sft_loss(
    model: QwenVL,
    params: Params,
    vision: VisionBatch,
    prompts: PromptBatch,
    responses: ResponseBatch,
    logit_bias_V: jax.Array,
    reattention: ReattentionConfig,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """`sft_loss` with images re-inserted into the responses (paper, section Visual re-attention, stage 4).

    Inserted tokens carry no loss. ROUTE's selection is computed under the given responses and the current parameters.

    Returns:
      three float32 scalars: the sum of -log p over the responses' tokens, and the sum of p and their number.
    """
    ids_BxR, length_B = responses.ids_BxR, responses.length_B
    selected_BxExX = response_selection(
        model, params, vision, prompts, ids_BxR, length_B, reattention, responses.insertion_BxE.shape[1]
    )
    logp_BxR, _ = response_logprobs(
        model, params, vision, prompts, ids_BxR, logit_bias_V, 1.0, reattention, length_B, selected_BxExX
    )
    mask_BxR = (jnp.arange(ids_BxR.shape[1]) < length_B[:, None]) & ~forced_tokens(
        reattention, prompts, ids_BxR, length_B
    )
    logp_BxR = jnp.where(mask_BxR, logp_BxR, 0.0)
    return -jnp.sum(logp_BxR), (jnp.sum(jnp.exp(logp_BxR) * mask_BxR), jnp.sum(mask_BxR, dtype=jnp.float32))


def make_sft_gradient(
    model: QwenVL, trainable: Rules = TRAIN_ALL, reattention: ReattentionConfig = TEXT_ONLY
) -> Gradient:
    """The gradient of the whole batch and its metrics.

    The batch comes in A microbatches (leading axis A on every array), computed one after the other; the sum of losses
    is divided by the loss weight of the whole batch, so the gradient does not depend on A. `trainable` are the rules of
    `config.optim.trainable`; the gradient is a tree of the trained part. The batch is (VisionBatch, TokenBatch), or
    where `reattention` inserts anything (VisionBatch, PromptBatch, ResponseBatch); the bias of the logits comes last.
    """

    def gradient(params: Params, *args: Any) -> tuple[Any, dict[str, jax.Array]]:
        *batch, logit_bias_V = args
        trained = trained_part(params, trainable_labels(params, trainable))

        def part(batch: tuple[Any, ...]):
            def loss(moving: Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
                whole = joined(params, moving)
                if reattention.inserts:
                    return reattention_sft_loss(
                        model, whole, *batch, logit_bias_V=logit_bias_V, reattention=reattention
                    )
                nll, prob = sft_loss(model, whole, *batch, logit_bias_V=logit_bias_V)
                return nll, (prob, batch[1].loss_BxR.sum())

            (nll, (prob, weight)), grads = jax.value_and_grad(loss, has_aux=True)(trained)
            return grads, {"loss": nll, "mean_token_probability": prob, "num_tokens": weight}

        grads, sums = accumulate(part, tuple(batch))
        weight = jnp.maximum(sums["num_tokens"], 1.0)
        means = {name: value / weight for name, value in sums.items()}
        return jax.tree.map(lambda g: g / weight, grads), means | {"num_tokens": sums["num_tokens"]}

    return gradient


def accumulate(part: Callable, batch: tuple) -> tuple:
    """Sums `part` over the leading axis of every array in `batch`, in float32; one microbatch costs nothing extra."""
    parts = jax.tree.leaves(batch)[0].shape[0]
    if parts == 1:
        return part(jax.tree.map(lambda x: x[0], batch))
    # All microbatches inside the loop: with the first before it, the program would hold the same code twice.
    shapes = jax.eval_shape(part, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
    add = lambda total, b: (jax.tree.map(jnp.add, total, part(b)), None)  # noqa: E731
    return jax.lax.scan(add, zeros, batch)[0]
