"""The objectives, as pure functions of log-probabilities."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def group_advantages(rewards_QxG: np.ndarray, std_eps: float) -> np.ndarray:
    """A_i = (r_i - mean) / (std + eps) within each group (paper, section BRPO).

    paper silent: which standard deviation and its floor; we divide by G - 1, as TRL does.

    Args:
      rewards_QxG: float, total rewards; G is at least 2.
      std_eps: floor that is added to the standard deviation.

    Returns:
      float32 [Q, G]; 0 throughout where all rewards of a group are equal.
    """
    centred = rewards_QxG - rewards_QxG.mean(axis=1, keepdims=True)
    return (centred / (rewards_QxG.std(axis=1, ddof=1, keepdims=True) + std_eps)).astype(np.float32)


def k3(logp: jax.Array, ref_logp: jax.Array) -> jax.Array:
    """The k3 estimate of KL(pi || ref): ref/pi - log(ref/pi) - 1, in float32, exact near 0 (paper, section BRPO)."""
    log_ratio = ref_logp.astype(jnp.float32) - logp.astype(jnp.float32)
    return jnp.expm1(log_ratio) - log_ratio


def brpo_loss(
    logp_BxR: jax.Array,
    old_logp_BxR: jax.Array,
    ref_logp_BxR: jax.Array,
    advantage_B: jax.Array,
    mask_BxR: jax.Array,
    *,
    beta: float,
    clip_low: float,
    clip_high: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The BRPO objective, negated: GRPO's clipped ratio minus beta times the k3 KL (paper, section BRPO).

    Each response counts equally and so does each of its tokens: the mean over a response's tokens, then the sum over
    responses. The caller divides by the number of responses of the whole batch.

    Args:
      logp_BxR: log-probabilities under the parameters that are trained.
      old_logp_BxR: under the parameters that sampled.
      ref_logp_BxR: under the frozen reference.
      advantage_B: group advantages.
      mask_BxR: 1 on the response's tokens, 0 behind its end.
      beta, clip_low, clip_high: settings.

    Returns:
      the loss summed over responses, and sums over tokens: `kl`, `clip_low`, `clip_high`, `ratio`.
    """
    mask = mask_BxR.astype(jnp.float32)
    ratio = jnp.exp((logp_BxR - old_logp_BxR) * mask)
    adv = advantage_B[:, None]
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    kl = k3(logp_BxR * mask, ref_logp_BxR * mask)
    token = jnp.minimum(ratio * adv, clipped * adv) - beta * kl
    tokens_B = jnp.maximum(mask.sum(-1), 1.0)
    loss = -jnp.sum((token * mask).sum(-1) / tokens_B)
    sums = {
        "kl": jnp.sum(kl * mask),
        "clip_low": jnp.sum((ratio < 1.0 - clip_low) * (adv < 0) * mask),
        "clip_high": jnp.sum((ratio > 1.0 + clip_high) * (adv > 0) * mask),
        "ratio": jnp.sum(ratio * mask),
    }
    return loss, sums
