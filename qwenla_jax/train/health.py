"""Checks while a run trains: stop requests, stalls, an invalid first step, skipped updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.parallel.distributed import broadcast
from qwenla_jax.run.signals import Interrupt
from qwenla_jax.run.watchdog import Watchdog
from qwenla_jax.run.workdir import Hold
from qwenla_jax.train import step_dump
from qwenla_jax.train.stage import Stage
from qwenla_jax.train.train_state import TrainState

# How far the sampler's log-probabilities and the update's may lie apart on policy, mean over tokens, by the type that
# is computed in. Rounding alone was seen to stay below a hundredth of these.
LOGP_BOUNDS = {"float32": 1e-3, "bfloat16": 0.1}


class Failed(Exception):
    """A run that ended early; the message has the reason and what was saved."""


class Guard:
    """Watches a run while it trains.

    Args:
      options: of the run.
      workdir: where step dumps are written.
      hold: on that folder.
      interrupt, watchdog: entered by the run.
      done: steps done when this process began.
      announce: called with the name of each phase when it begins.
    """

    def __init__(
        self,
        options: RunOptions,
        workdir: Path,
        hold: Hold,
        interrupt: Interrupt,
        watchdog: Watchdog,
        done: int,
        announce: Callable[[str], None] = lambda doing: None,
    ) -> None:
        self.announce = announce
        self._options, self._workdir, self._hold, self._first = options, workdir, hold, done + 1
        self._interrupt, self._watchdog = interrupt, watchdog
        self._skipped = 0

    def heartbeat(self, doing: str) -> None:
        """Reports progress to the watchdog."""
        self._watchdog.heartbeat(doing)

    def check_stop(self, doing: str) -> None:
        """A safe point before `doing`.

        Raises:
          Stopped: the run was asked to end.
          WorkdirError: its folder is gone.
        """
        self._watchdog.heartbeat(doing)
        broadcast(self._hold.check)
        self._interrupt.check(f"before {doing}")
        self.announce(doing)

    def urgent(self, number: int) -> bool:
        """Whether the metrics of step `number` must be checked before the next step begins."""
        most = self._options.guard.max_skipped
        return self._skipped > 0 or most == 1 or (number == self._first and self._options.stage == "brpo")

    def check(self, number: int, metrics: Mapping[str, Any], stage: Stage, state: TrainState) -> None:
        """Checks the metrics of step `number`, whose names have no prefix.

        Raises:
          Failed: the first step is invalid, or too many updates in a row were skipped. In the second case a step dump
            of this step is written, from which it can be computed again.
        """
        if number == self._first and self._options.stage == "brpo" and self._options.guard.check_first_step:
            problems = first_step_problems(self._options, number, metrics)
            if problems:
                raise Failed(
                    f"step {number} is not what the first step of BRPO must be; nothing was saved. "
                    + "; ".join(problems)
                    + ". For more: --preflight; to continue all the same: config.guard.check_first_step=False"
                )
        self._skipped = self._skipped + 1 if float(metrics["skipped"]) == 1.0 else 0
        if self._skipped >= self._options.guard.max_skipped:
            folder = step_dump.write(self._workdir, self._options, stage.inputs, metrics, state)
            raise Failed(
                f"{self._skipped} updates in a row were skipped, the last at step {number}: {cause(metrics)}. "
                f"Parameters and optimizer are as they were before them; {folder} holds that step: "
                f"python launch/replay.py --step_dump={folder}"
            )


def first_step_problems(options: RunOptions, number: int, metrics: Mapping[str, Any]) -> list[str]:
    """Problems of the first step of a BRPO run, which is on policy; empty where there are none.

    Sampler and update compute the same log-probabilities, so their ratio is 1, unless the sampler's weights are int8;
    and at the very first step the policy is the reference, so their divergence is 0.
    """
    if not float(metrics["num_tokens"]) or float(metrics["skipped"]):
        return []  # no evidence; skipped updates are counted elsewhere
    bound = LOGP_BOUNDS[options.dtype]
    first = {name: float(metrics.get(f"first_update/{name}", metrics[name])) for name in ON_POLICY}
    checks = []
    if options.brpo.rollout_weights != "int8":
        checks += [
            ("the log-probabilities of sampler and trainer differ by", first["sampling_logp_difference"], bound),
            ("the probability ratio differs from 1 by", abs(first["ratio_mean"] - 1), bound),
        ]
    if number == 1 and options.brpo.beta:
        checks.append(("the divergence from the reference is", abs(first["kl"]), bound * bound))
    return [f"{text} {value:.2g}, expected at most {most:.2g}" for text, value, most in checks if not value <= most]


ON_POLICY = ("sampling_logp_difference", "ratio_mean", "kl")


def cause(metrics: Mapping[str, Any]) -> str:
    """Why an update was skipped, from its metrics."""
    if not float(metrics["num_tokens"]):
        errors = {name: int(value) for name, value in metrics.items() if name.startswith("reward_errors/") and value}
        message = ", ".join(f"{name} {count}" for name, count in errors.items())
        return "no token counted" + (f" ({message})" if message else "")
    wrong = [f"{name} is {float(value)}" for name, value in metrics.items() if not math.isfinite(float(value))]
    return ", ".join(wrong) or "the gradient was not finite"
