"""The gradient of BRPO (paper, section BRPO): log-probabilities, reference and loss, in one program."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from qwenla_jax.config.run_options import BrpoOptions
from qwenla_jax.model.lora import adapted_kernels, base_of, joined
from qwenla_jax.model.qwen_vl import Params, QwenVL
from qwenla_jax.model.trainable import trainable_labels, trained_part
from qwenla_jax.reattention.options import TEXT_ONLY, ReattentionConfig, forced_tokens
from qwenla_jax.train.brpo.loss import brpo_loss, denominator, importance_ratio
from qwenla_jax.train.logprobs import response_logprobs
from qwenla_jax.train.sft.update import TRAIN_ALL, Rules, accumulate
from qwenla_jax.train.train_state import Gradient
from qwenla_jax.types import PromptBatch, VisionBatch


@struct.dataclass
class RolloutBatch:
    """Responses with their advantages.

    Attributes:
      ids_BxR, logp_BxR, length_B: as in `types.Rollout`.
      advantage_B: float32.
      counted_B: float32, 1 where the row counts as a response, 0 where it fills the batch, or has no reward.
      trained_B: float32, 1 where its tokens enter the loss; 0 also for truncated ones with `mask_truncated`.
      selected_BxExX: as in `types.Rollout`; None where nothing is inserted.
    """

    ids_BxR: Any
    logp_BxR: Any
    length_B: Any
    advantage_B: Any
    counted_B: Any
    trained_B: Any
    selected_BxExX: Any = None


def make_brpo_gradient(
    model: QwenVL,
    options: BrpoOptions,
    longest: int,
    trainable: Rules = TRAIN_ALL,
    reattention: ReattentionConfig = TEXT_ONLY,
) -> Gradient:
    """The gradient of the whole batch and its metrics; every array of the batch has a leading axis of A microbatches.

    With `options.group_parts` each microbatch is worked through in so many parts, which have the same questions and
    some of the responses to each; a sum over tokens does not depend on it.

    The reference's log-probabilities are computed here, in the gradient's program, so that they never leave the
    device; without a KL term (beta 0) they are not computed and the reference may be None. Policy and reference both
    see the rollout's insertions. `longest` is the most tokens that a response may have. The gradient is a tree of the
    trained part. Where the parameters have adapters, the reference is the same base without them, and the argument
    holds only the trained part of the base.
    """

    def gradient(
        params: Params,
        ref_params: Params | None,
        vision: VisionBatch,
        prompts: PromptBatch,
        rollout_batch: RolloutBatch,
        logit_bias_V: jax.Array,
    ) -> tuple[Any, dict[str, jax.Array]]:
        trained = trained_part(params, trainable_labels(params, trainable))
        if options.beta and adapted_kernels(params):
            ref_params = joined(base_of(params), ref_params or {})

        def part(batch: tuple[VisionBatch, PromptBatch, RolloutBatch]):
            vision, prompts, rollout_batch = batch
            slot_R = jnp.arange(rollout_batch.ids_BxR.shape[1])
            forced_BxR = forced_tokens(reattention, prompts, rollout_batch.ids_BxR, rollout_batch.length_B)
            mask_BxR = (slot_R < rollout_batch.length_B[:, None]) * ~forced_BxR * rollout_batch.trained_B[:, None]

            def logprobs(params: Params) -> tuple[jax.Array, jax.Array]:
                replayed = (reattention, rollout_batch.length_B, rollout_batch.selected_BxExX)
                return response_logprobs(
                    model, params, vision, prompts, rollout_batch.ids_BxR, logit_bias_V, options.temperature, *replayed
                )

            def loss(moving: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
                logp_BxR, entropy_BxR = logprobs(joined(params, moving))
                if options.beta:
                    assert ref_params is not None
                    ref_logp_BxR = jax.lax.stop_gradient(logprobs(ref_params)[0])
                else:
                    ref_logp_BxR = jax.lax.stop_gradient(logp_BxR)
                old_logp_BxR, importance = rollout_batch.logp_BxR, None
                if options.importance_sampling != "none":
                    old_logp_BxR = jax.lax.stop_gradient(logp_BxR)  # on policy: it is the only update
                    bounds = options.importance_min, options.importance_max
                    importance = importance_ratio(
                        old_logp_BxR, rollout_batch.logp_BxR, mask_BxR, options.importance_sampling, *bounds
                    )
                value, sums = brpo_loss(
                    logp_BxR,
                    old_logp_BxR,
                    ref_logp_BxR,
                    rollout_batch.advantage_B,
                    mask_BxR,
                    beta=options.beta,
                    clip_low=options.clip_low,
                    clip_high=options.clip_high,
                    norm=options.norm,
                    ratio=options.ratio,
                    kl=options.kl,
                    importance=importance,
                )
                gap_BxR = jnp.abs(logp_BxR - rollout_batch.logp_BxR)
                sums = sums | {"entropy": jnp.sum(entropy_BxR * mask_BxR), "gap": jnp.sum(gap_BxR * mask_BxR)}
                sums["tokens"] = jnp.sum(mask_BxR)
                if importance is not None:
                    sums["importance"] = jnp.sum(importance * mask_BxR)
                return value, sums

            (value, sums), grads = jax.value_and_grad(loss, has_aux=True)(trained)
            return grads, value, sums

        if options.group_parts == 1:
            grads, value, sums = accumulate(part, (vision, prompts, rollout_batch))
        else:
            asked, questions = (vision, prompts), prompts.ids_QxP.shape[:2]

            def group_part(batch: tuple[jax.Array, RolloutBatch]):
                return part((*jax.tree.map(lambda x: x[batch[0]], asked), batch[1]))

            rows = _split_groups(rollout_batch, questions, options.group_parts)
            grads, value, sums = accumulate(
                group_part, (jnp.repeat(jnp.arange(questions[0]), options.group_parts), rows)
            )
        tokens = jnp.maximum(sums["tokens"], 1.0)
        divisor = denominator(options.norm, rollout_batch.counted_B.sum(), sums["tokens"], longest)
        corrected = {"importance_ratio_mean": sums["importance"] / tokens} if "importance" in sums else {}
        return jax.tree.map(lambda g: g / divisor, grads), corrected | {
            "loss": value / divisor,
            "num_tokens": sums["tokens"],
            "kl": sums["kl"] / tokens,
            "entropy": sums["entropy"] / tokens,
            "clip_ratio/low_mean": sums["clip_low"] / tokens,
            "clip_ratio/high_mean": sums["clip_high"] / tokens,
            "ratio_mean": sums["ratio"] / tokens,
            # Between the sampler and this update: rounding alone, where the update is on policy (int8's included).
            "sampling_logp_difference": sums["gap"] / tokens,
        }

    return gradient


def _split_groups(rollout_batch: RolloutBatch, questions: tuple[int, int], parts: int) -> RolloutBatch:
    """[A, Q * G, ...] to [A * parts, Q * (G / parts), ...]; `questions` are A and Q."""

    def split(x_AxBx: jax.Array) -> jax.Array:
        A, Q = questions
        tail = x_AxBx.shape[2:]
        rows = x_AxBx.shape[1] // (Q * parts)
        return jnp.moveaxis(x_AxBx.reshape(A, Q, parts, rows, *tail), 2, 1).reshape(A * parts, Q * rows, *tail)

    return jax.tree.map(split, rollout_batch)
