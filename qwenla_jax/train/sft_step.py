"""Supervised training on responses: the cold start (paper, section 3, stage 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from qwenla_jax.model.qwen_vl import Params, QwenVL, head_matrix
from qwenla_jax.train.logprobs import token_logprobs
from qwenla_jax.train.optimizer import stop_frozen
from qwenla_jax.train.state import TrainState, apply_gradients, as_float32
from qwenla_jax.types import TokenBatch, VisionBatch

Rules = Sequence[tuple[str, str]]
TRAIN_ALL: Rules = ((".*", "train"),)
Step = Callable[[TrainState, VisionBatch, TokenBatch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


def sft_loss(
    model: QwenVL, params: Params, vision: VisionBatch, tokens: TokenBatch, bias_V: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood summed over the response's tokens.

    Returns:
      two float32 scalars: the weighted sum of -log p, and the weighted sum of p (for a mean token probability).
    """
    hidden_BxTxD = model.apply({"params": params}, vision, tokens.ids_BxT, tokens.pos_BxTx3, tokens.visual_BxT)
    # The state at T - 1 predicts the token at T.
    logp_BxT, _ = token_logprobs(hidden_BxTxD[:, :-1], head_matrix(params), tokens.ids_BxT[:, 1:], bias_V)
    weight_BxT = tokens.loss_BxT[:, 1:]
    return -jnp.sum(logp_BxT * weight_BxT), jnp.sum(jnp.exp(logp_BxT) * weight_BxT)


def make_sft_step(model: QwenVL, optimizer: optax.GradientTransformation, trainable: Rules = TRAIN_ALL) -> Step:
    """The update, to be jitted with the run's layouts.

    The batch comes in A parts (leading axis A on every array), worked through one after the other; the sum of losses is
    divided by the loss weight of the whole batch, so the gradient does not depend on A. `trainable` are the rules of
    `config.optim.trainable`.
    """

    def step(
        state: TrainState, vision: VisionBatch, tokens: TokenBatch, bias_V: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        weight = jnp.maximum(tokens.loss_BxT[:, :, 1:].sum(), 1.0)

        def part(batch: tuple[VisionBatch, TokenBatch]):
            loss = lambda params: sft_loss(model, stop_frozen(params, trainable), *batch, bias_V)  # noqa: E731
            (nll, prob), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
            return grads, {"loss": nll, "mean_token_probability": prob}

        grads, sums = accumulate(part, (vision, tokens))
        state, metrics = apply_gradients(state, jax.tree.map(lambda g: g / weight, grads), optimizer)
        return state, metrics | {name: value / weight for name, value in sums.items()} | {"num_tokens": weight}

    return step


def accumulate(part: Callable, batch: tuple) -> tuple:
    """Sums `part` over the leading axis of every array in `batch`, in float32; a single part costs nothing extra."""
    parts = jax.tree.leaves(batch)[0].shape[0]
    first = part(jax.tree.map(lambda x: x[0], batch))
    if parts == 1:
        return first
    rest = jax.tree.map(lambda x: x[1:], batch)
    add = lambda total, b: (jax.tree.map(jnp.add, total, part(b)), None)  # noqa: E731
    return jax.lax.scan(add, as_float32(first), rest)[0]
