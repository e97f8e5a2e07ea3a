"""The objectives, as pure functions of log-probabilities and rewards."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def advantages(
    rewards_BxN: np.ndarray,
    weights_N: np.ndarray,
    valid_B: np.ndarray,
    group_size: int,
    *,
    std_eps: float,
    std_floor: float = 0.0,
    scale: str = "group",
    total: str = "raw",
) -> tuple[np.ndarray, np.ndarray]:
    """Group advantages: A_i = (r_i - mean) / (std + eps) within each group (paper, section BRPO).

    paper silent: which standard deviation and its floor; we divide by G - 1, as TRL does. Responses without a valid
    reward count in no mean and no deviation, and their advantage is 0.

    Args:
      rewards_BxN: float, N rewards of each response, before their weights; groups are neighbouring rows.
      weights_N: float, the rewards' weights.
      valid_B: bool, responses that have rewards.
      group_size: G, at least 2.
      std_eps: added to the standard deviation.
      std_floor: least standard deviation, before `std_eps`.
      scale: what the centred reward is divided by: the standard deviation of its "group", that of the whole "batch",
        or "none" (Dr.GRPO, arXiv 2503.20783).
      total: "raw": the weighted rewards are summed, then normalised by `scale`; "normalised": each is normalised within
        its group first, and their weighted sum over the batch (GDPO, arXiv 2601.05242), so that a reward of large
        spread does not dominate the others. Then `scale` has no effect.

    Returns:
      float32 [B] advantages, and bool [Q]: groups whose valid totals, formed by `total`, are all equal: they have
      no policy gradient.
    """
    grouped_QxGxN = np.where(valid_B[:, None], rewards_BxN, np.nan).reshape(-1, group_size, len(weights_N))
    total_QxG = grouped_QxGxN @ weights_N
    if total == "normalised":
        centred = grouped_QxGxN - _mean(grouped_QxGxN, axis=1)
        spread = np.maximum(_std(grouped_QxGxN, axis=1), std_floor)
        total_QxG = (centred / (spread + std_eps)) @ weights_N
        std_Qx1 = _std(total_QxG, axis=1)
        result = (total_QxG - _mean(total_QxG)) / (np.maximum(_std(total_QxG), std_floor) + std_eps)
    else:
        std_Qx1 = _std(total_QxG, axis=1)
        result = total_QxG - _mean(total_QxG, axis=1)
        if scale != "none":
            spread = std_Qx1 if scale == "group" else _std(total_QxG)
            result = result / (np.maximum(spread, std_floor) + std_eps)
    # Only invalid rows become 0: rewards that overflow must show in the loss, which skips the update.
    return np.where(valid_B, result.reshape(-1), 0.0).astype(np.float32), np.isclose(std_Qx1[:, 0], 0.0)


def _mean(x: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Mean of what is not nan, 0 where nothing is; the axis stays."""
    number = np.maximum((~np.isnan(x)).sum(axis=axis, keepdims=True), 1)
    return np.nansum(x, axis=axis, keepdims=True) / number


def _std(x: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Standard deviation, with n - 1, of what is not nan; 0 where less than two are; the axis stays."""
    number = np.maximum((~np.isnan(x)).sum(axis=axis, keepdims=True) - 1, 1)
    return np.sqrt(np.nansum((x - _mean(x, axis)) ** 2, axis=axis, keepdims=True) / number)


def kl_estimate(logp: jax.Array, ref_logp: jax.Array, form: str = "k3") -> jax.Array:
    """An estimate of KL(pi || ref) from samples of pi, in float32.

    With d = log ref - log pi: "k3" is exp(d) - d - 1, exact near 0 (paper, section BRPO); "k2" is d^2 / 2; "k1" is -d.
    All three estimate the divergence, and only their gradients count in a loss. On policy that of k2 is the
    divergence's own gradient in expectation, that of k3 is the gradient of KL(ref || pi), which agrees with it near 0,
    and that of k1 is zero: a KL term with k1 in the loss does not constrain the policy, and only adds noise.
    """
    d = ref_logp.astype(jnp.float32) - logp.astype(jnp.float32)
    return {"k1": lambda: -d, "k2": lambda: 0.5 * d * d, "k3": lambda: jnp.expm1(d) - d}[form]()


def importance_ratio(
    logp_BxR: jax.Array, sampler_logp_BxR: jax.Array, mask_BxR: jax.Array, mode: str, low: float, high: float
) -> jax.Array:
    """Importance-sampling correction of responses whose sampler is not the policy: its rounding, or int8 weights.

    Truncated and masked ratios as in TRL's `vllm_importance_sampling_mode` (paper silent).

    Args:
      logp_BxR: log-probabilities under the parameters that sampled, by the trainer's own pass.
      sampler_logp_BxR: by the sampler.
      mask_BxR: 1 on the tokens that count.
      mode: "token_truncate", "token_mask", "sequence_truncate" or "sequence_mask": the ratio of each token, or the
        product over the response; beyond the bounds it is cut to them, or 0.
      low, high: bounds of the ratio.

    Returns:
      float32 [B, R], or [B, 1] by sequence.
    """
    level, beyond = mode.split("_")
    log_ratio = (logp_BxR - sampler_logp_BxR) * mask_BxR
    ratio = jnp.exp(log_ratio.sum(-1, keepdims=True) if level == "sequence" else log_ratio)
    if beyond == "truncate":
        return jnp.clip(ratio, low, high)
    return jnp.where((ratio >= low) & (ratio <= high), ratio, 0.0)


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
    norm: str = "sequence",
    ratio: str = "token",
    kl: str = "k3",
    importance: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The BRPO objective, negated: GRPO's clipped ratio minus beta times the KL divergence (paper, section BRPO).

    The caller divides the sum by `denominator` of the whole batch, so that the batch may come in microbatches.

    Args:
      logp_BxR: log-probabilities under the parameters that are trained.
      old_logp_BxR: under the parameters that sampled.
      ref_logp_BxR: under the frozen reference.
      advantage_B: group advantages.
      mask_BxR: 1 on the tokens that count, 0 after a response's end.
      beta, clip_low, clip_high: settings.
      norm: "sequence": the mean over a response's tokens, so that each response counts equally (paper); "token" and
        "constant": the sum, see `denominator`.
      ratio: "token": every token has its own probability ratio (paper); "sequence": all tokens of a response have their
        geometric mean (GSPO, arXiv 2507.18071).
      kl: see `kl_estimate`.
      importance: of `importance_ratio`; the clipped ratio is multiplied by it, the KL divergence is not.

    Returns:
      the loss summed over responses, and sums over tokens: `kl`, `clip_low`, `clip_high`, `ratio`.
    """
    mask = mask_BxR.astype(jnp.float32)
    tokens_B = jnp.maximum(mask.sum(-1), 1.0)
    log_ratio = (logp_BxR - old_logp_BxR) * mask
    if ratio == "sequence":
        log_ratio = jnp.broadcast_to((log_ratio.sum(-1) / tokens_B)[:, None], mask.shape)
    ratio_BxR = jnp.exp(log_ratio)
    adv = advantage_B[:, None]
    # Not jnp.clip, which halves the gradient where a ratio is on a bound: on policy, with a clip of 0.
    clipped = jnp.where(ratio_BxR > 1.0 + clip_high, 1.0 + clip_high, ratio_BxR)
    clipped = jnp.where(ratio_BxR < 1.0 - clip_low, 1.0 - clip_low, clipped)
    kl_BxR = kl_estimate(logp_BxR * mask, ref_logp_BxR * mask, kl)
    gain = jnp.minimum(ratio_BxR * adv, clipped * adv)
    token = (gain if importance is None else gain * importance) - beta * kl_BxR
    loss_B = -(token * mask).sum(-1)
    sums = {
        "kl": jnp.sum(kl_BxR * mask),
        "clip_low": jnp.sum((ratio_BxR < 1.0 - clip_low) * (adv < 0) * mask),
        "clip_high": jnp.sum((ratio_BxR > 1.0 + clip_high) * (adv > 0) * mask),
        "ratio": jnp.sum(ratio_BxR * mask),
    }
    return jnp.sum(loss_B / tokens_B if norm == "sequence" else loss_B), sums


def denominator(norm: str, responses: jax.Array, tokens: jax.Array, longest: int) -> jax.Array:
    """What the summed loss of the whole batch, over all microbatches and devices, is divided by; never 0.

    "sequence": the responses (GRPO, the paper's); "token": their tokens that count (DAPO, arXiv 2503.14476);
    "constant": the responses times the most tokens that one may have (Dr.GRPO, arXiv 2503.20783).
    """
    return jnp.maximum({"sequence": responses, "token": tokens, "constant": responses * longest}[norm], 1.0)
