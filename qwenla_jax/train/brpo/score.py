"""From sampled tokens to rewards and advantages, on the host."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from qwenla_jax.config.run_options import BrpoOptions, RunOptions
from qwenla_jax.data.record import Record
from qwenla_jax.inference.responses import responses_of
from qwenla_jax.parallel.distributed import gather, share
from qwenla_jax.rewards.pool.pool import RewardError, RewardPool
from qwenla_jax.rewards.reward_record import RewardRecord
from qwenla_jax.rewards.weights import RewardScores, RewardSettings
from qwenla_jax.text.token_counts import reflection_tokens
from qwenla_jax.text.tokenizer import Tokenizer
from qwenla_jax.train.brpo.loss import advantages
from qwenla_jax.types import Rollout

ERROR_KINDS = ("timeout", "crash", "raised", "value")


@dataclasses.dataclass(frozen=True)
class ScoredRollout:
    """Responses of a step with their rewards and advantages; row b answers record b // G.

    Attributes:
      texts: responses without their stop token.
      scores: rewards by row, or the error.
      advantage_B: float32; 0 for a response without rewards.
      counted_B: float32, 1 for responses that count in the loss's mean: those with rewards, and, where zero-std groups
        are dropped, in no such group.
      trained_B: float32, 1 for those of them whose tokens enter the loss.
      zero_std_Q: bool, groups whose rewards are all equal.
      length_B: int, tokens with the stop token.
      stopped_B: bool, ended by a stop token.
    """

    texts: list[str]
    scores: list[RewardScores | RewardError]
    advantage_B: np.ndarray
    counted_B: np.ndarray
    trained_B: np.ndarray
    zero_std_Q: np.ndarray
    length_B: np.ndarray
    stopped_B: np.ndarray

    def metrics(self) -> dict[str, float]:
        """Means over the step under TRL's names, without the `train/` prefix.

        Rewards are means over the responses that have them, nan where none has.
        """
        valid = [s for s in self.scores if isinstance(s, RewardScores)]
        group_size = len(self.scores) // len(self.zero_std_Q)
        totals = [s.total if isinstance(s, RewardScores) else np.nan for s in self.scores]
        spread = [np.std(group[~np.isnan(group)], ddof=1) for group in np.reshape(totals, (-1, group_size))
                  if (~np.isnan(group)).sum() > 1]  # fmt: skip
        names = valid[0].components if valid else ()
        mean = lambda values: float(np.mean(values)) if len(values) else float("nan")  # noqa: E731
        result = {f"rewards/{name}/mean": mean([s.components[name] for s in valid]) for name in names}
        kinds = collections.Counter(s.kind for s in self.scores if isinstance(s, RewardError))
        return result | {
            "reward": mean([s.total for s in valid]),
            "reward_std": mean(spread),
            "frac_reward_zero_std": float(self.zero_std_Q.mean()),
            **{f"reward_errors/{kind}": float(kinds[kind]) for kind in ERROR_KINDS},
            "completions/mean_length": float(self.length_B.mean()),
            "completions/max_length": float(self.length_B.max()),
            "completions/clipped_ratio": float(1 - self.stopped_B.mean()),
            "reflection/count_mean": mean([s.num_reflections for s in valid]),
            "reflection/tokens_mean": mean([s.reflection_tokens for s in valid]),
        }


def reward_settings(options: RunOptions) -> RewardSettings:
    """The rewards' own settings from a run's."""
    rewards = options.rewards
    return RewardSettings.from_options(rewards, rewards.extra, options.data.max_response_tokens)


def reward_pool(options: RunOptions) -> RewardPool:
    """The pool of processes that compute a run's rewards. Raises as `RewardPool`."""
    pool = options.rewards.pool
    return RewardPool(
        reward_settings(options),
        workers=pool.workers,
        deadline_s=pool.deadline_s,
        step_deadline_s=pool.step_deadline_s,
        memory_mb=pool.memory_mb,
    )


def judge(
    rollouts: Sequence[Rollout],
    records: Sequence[Record],
    tokenizer: Tokenizer,
    pool: RewardPool,
    settings: RewardSettings,
    options: BrpoOptions,
) -> ScoredRollout:
    """Rewards and group advantages of a step's responses, which may come in several rollouts.

    Args:
      rollouts: in the records' order.
      records: the questions; G rows answer each.
      tokenizer: turns tokens to text.
      pool: where the rewards are computed.
      settings: the pool's.
      options: how rewards become advantages, and which responses are trained on.
    """
    responses = [ids for rollout in rollouts for ids in responses_of(rollout)]
    texts = [tokenizer.decode(ids) for ids in responses]
    length_B = np.concatenate([np.asarray(r.length_B) for r in rollouts])
    stopped_B = np.concatenate([np.asarray(r.stopped_B) for r in rollouts])
    group_size = len(texts) // len(records)
    asked = [records[row // group_size] for row in range(len(texts))]
    wanted = [
        RewardRecord(
            id=record.id,
            question=record.question,
            answer=record.answer,
            kind=record.kind,
            response=text,
            reflection_tokens=reflection_tokens(ids, tokenizer),
            num_tokens=int(length),
            finished=bool(stopped),
            options=record.options,
            columns=record.columns,
        )
        for record, ids, text, length, stopped in zip(asked, responses, texts, length_B, stopped_B, strict=True)
    ]
    # Each process computes a share; all processes get all scores and failures.
    scores = [one for part in gather(pool.score(wanted[share(len(wanted))])) for one in part]
    weights = settings.weights()
    valid_B = np.array([isinstance(s, RewardScores) for s in scores])
    none = dict.fromkeys(weights, np.nan)
    earned = [s.components if isinstance(s, RewardScores) else none for s in scores]
    rewards_BxN = np.array([[one[name] for name in weights] for one in earned], np.float64)
    advantage_B, zero_std_Q = advantages(
        rewards_BxN,
        np.array(list(weights.values()), np.float64),
        valid_B,
        group_size,
        std_eps=options.std_eps,
        std_floor=options.std_floor,
        scale=options.scale,
        total=options.reward_total,
    )
    counted_B = valid_B & ~(np.repeat(zero_std_Q, group_size) & options.drop_zero_std_groups)
    trained_B = counted_B & (stopped_B | (not options.mask_truncated))
    return ScoredRollout(
        texts=texts,
        scores=scores,
        advantage_B=advantage_B,
        counted_B=counted_B.astype(np.float32),
        trained_B=trained_B.astype(np.float32),
        zero_std_Q=zero_std_Q,
        length_B=length_B,
        stopped_B=stopped_B,
    )
