"""Rewards that fail: reported once each, and an error where all of a step fail."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

from qwenla_jax.rewards.pool.pool import RewardError
from qwenla_jax.rewards.weights import RewardScores
from qwenla_jax.utils.visible import visible


class RewardsFailed(Exception):
    """No response of a step has rewards; the message names the rewards."""


class RewardFailures:
    """Checks the rewards of every step for failures.

    Args:
      note: called with the first failure of each reward and kind, with the traceback where there is one.
      first_step: the first step of this process, counted from 0.
    """

    def __init__(self, note: Callable[[str], None] | None, first_step: int) -> None:
        self._note = note or (lambda text: None)
        self._first_step = first_step
        self._reported: set[tuple[str, str]] = set()

    def check(self, step: int, scores: Sequence[RewardScores | RewardError]) -> None:
        """Checks the rewards of step `step`, counted from 0.

        Raises:
          RewardsFailed: there are none. After the first step, timeouts alone do not end a run: a machine may be busy
            for a while.
        """
        errors = [one for one in scores if isinstance(one, RewardError)]
        counts = collections.Counter((error.name, error.kind) for error in errors)
        for error in errors:
            if (which := (error.name, error.kind)) not in self._reported:
                self._reported.add(which)
                self._note(
                    f"step {step + 1}: {_name(error)} failed for {counts[which]} of {len(scores)} responses, which are "
                    f"not trained on. The first: {_reason(error)}"
                )
        late = step > self._first_step and all(error.kind == "timeout" for error in errors)
        if not errors or len(errors) < len(scores) or late:
            return
        firsts = {(error.name, error.kind): error for error in reversed(errors)}
        message = "; ".join(
            f"{_name(error)} for {counts[which]} ({visible(f'{error.kind}: {error.message}')})"
            for which, error in firsts.items()
        )
        raise RewardsFailed(f"step {step + 1}: the rewards failed for all {len(scores)} responses: {message}")


def _name(error: RewardError) -> str:
    return f"reward {error.name!r}" if error.name else "a reward"


def _reason(error: RewardError) -> str:
    if error.traceback:
        return "\n" + visible(error.traceback, keep="\n").rstrip()
    return visible(f"{error.kind}: {error.message}")
