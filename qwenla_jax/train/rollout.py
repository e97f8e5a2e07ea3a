"""From sampled tokens to rewards and advantages, on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from qwenla_jax.data.sources import Record
from qwenla_jax.rewards.total import RewardScores, RewardSettings, score
from qwenla_jax.text.tokenizer import Tokenizer
from qwenla_jax.train.losses import group_advantages
from qwenla_jax.train.options import RewardOptions
from qwenla_jax.types import Rollout


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """Responses of a step with what they earned; row b answers record b // G.

    Attributes:
      texts: responses without their stop token.
      scores: rewards by row.
      advantage_B: float32.
      length_B: int, tokens with the stop token.
      stopped_B: bool, ended by a stop token.
    """

    texts: list[str]
    scores: list[RewardScores]
    advantage_B: np.ndarray
    length_B: np.ndarray
    stopped_B: np.ndarray

    def metrics(self, group_size: int) -> dict[str, float]:
        """Means over the step under DESIGN's names (those of TRL), without the `train/` prefix."""
        column = lambda name: np.array([getattr(s, name) for s in self.scores], np.float64)  # noqa: E731
        totals_QxG = column("total").reshape(-1, group_size)
        found = {f"rewards/{name}/mean": column(name).mean() for name in ("format", "accuracy", "balance")}
        return found | {
            "reward": totals_QxG.mean(),
            "reward_std": totals_QxG.std(axis=1, ddof=1).mean(),
            "frac_reward_zero_std": np.isclose(totals_QxG.std(axis=1), 0).mean(),
            "completions/mean_length": self.length_B.mean(),
            "completions/max_length": self.length_B.max(),
            "completions/clipped_ratio": 1 - self.stopped_B.mean(),
            "reflection/count_mean": column("num_reflections").mean(),
            "reflection/tokens_mean": column("reflection_tokens").mean(),
        }


def reward_settings(options: RewardOptions) -> RewardSettings:
    """The rewards' own settings from a run's."""
    return RewardSettings(
        options.format,
        options.accuracy,
        options.balance,
        options.target_length,
        options.balance_floor,
        options.balance_only_if_correct,
    )


def texts_of(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
    """Responses as text, without the stop token. Control tokens inside a response stay visible and break its format."""
    ids_BxR, length_B, stopped_B = (np.asarray(x) for x in (rollout.ids_BxR, rollout.length_B, rollout.stopped_B))
    ends = length_B - stopped_B.astype(length_B.dtype)
    return [tokenizer.decode(ids[:end].tolist()) for ids, end in zip(ids_BxR, ends, strict=True)]


def judge(
    rollouts: Sequence[Rollout],
    records: Sequence[Record],
    tokenizer: Tokenizer,
    settings: RewardSettings,
    std_eps: float,
) -> Verdicts:
    """Rewards and group advantages of a step's responses, which may come in several parts.

    Args:
      rollouts: the parts, in the records' order.
      records: the questions; G rows answer each.
      tokenizer: turns tokens to text, and counts the tokens of a reflection.
      settings: the rewards'.
      std_eps: see `losses.group_advantages`.
    """
    texts = [text for rollout in rollouts for text in texts_of(rollout, tokenizer)]
    group_size = len(texts) // len(records)
    count = lambda text: len(tokenizer.encode_plain(text))  # noqa: E731
    scores = [score(text, records[row // group_size].answer, settings, count) for row, text in enumerate(texts)]
    rewards_QxG = np.array([s.total for s in scores], np.float64).reshape(-1, group_size)
    return Verdicts(
        texts=texts,
        scores=scores,
        advantage_B=group_advantages(rewards_QxG, std_eps).reshape(-1),
        length_B=np.concatenate([np.asarray(r.length_B) for r in rollouts]),
        stopped_B=np.concatenate([np.asarray(r.stopped_B) for r in rollouts]),
    )
