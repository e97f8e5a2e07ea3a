"""Computes the step of a step dump again, and reports what was not finite."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwenla_jax.config.checks import from_config_dict
from qwenla_jax.model.trainable import param_paths, trainable_labels, trained_part
from qwenla_jax.parallel.sharding import replicated
from qwenla_jax.train import step_dump
from qwenla_jax.train.brpo.reference import make_reference
from qwenla_jax.train.brpo.trainer import brpo_sampler, sample_microbatches
from qwenla_jax.train.loop import abstract_state, state_plan
from qwenla_jax.train.programs import batch_shardings, gradient_of, update_program
from qwenla_jax.train.train_runtime import build
from qwenla_jax.train.train_state import to_keep
from qwenla_jax.train.train_state import whole as whole_state


@dataclasses.dataclass(frozen=True)
class Replay:
    """A step that was computed again.

    Attributes:
      step: its number, counted from 1.
      metrics: name -> (recorded, computed again) of all that the update computes.
      identical_responses: whether sampling again gave the same tokens; None where nothing is sampled or it cannot be
        checked.
      not_finite: parameters whose gradient is not finite, with the share of such entries.
    """

    step: int
    metrics: dict[str, tuple[float, float]]
    identical_responses: bool | None
    not_finite: dict[str, float]

    @property
    def reproduced(self) -> bool:
        """Whether all metrics are the same bit for bit, and the responses too."""
        same = all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in self.metrics.values())
        return same and self.identical_responses is not False

    def __str__(self) -> str:
        lines = [f"step {self.step}"]
        lines += [f"  {name}: {old:.9g} recorded, {new:.9g} now" for name, (old, new) in self.metrics.items()]
        if self.identical_responses is not None:
            lines.append(f"  responses sampled again: {'the same' if self.identical_responses else 'OTHERS'}")
        for name, share in self.not_finite.items():
            lines.append(f"  gradient of {name}: {share:.1%} of its entries are not finite")
        lines.append("reproduced bit for bit" if self.reproduced else "NOT reproduced")
        return "\n".join(lines)


def replay(folder: Path) -> Replay:
    """Computes a step dump's step again, on this machine's devices, with the step dump's settings.

    The checkpoint that the run started from must still exist: it is the reference of BRPO.

    Raises:
      ValueError: not a step dump, or settings, files or devices that do not fit any more.
    """
    saved = step_dump.read(folder)
    options = from_config_dict(saved.config)
    runtime, params = build(options)
    reference = make_reference(runtime, params)
    optimizer, shardings = state_plan(runtime, params)
    rules = options.optim.trainable
    state = whole_state(
        step_dump.read_state(folder, to_keep(abstract_state(params, optimizer, shardings), rules)), params
    )
    inputs = saved.inputs
    first = (reference,) if options.stage == "brpo" else ()
    moving = trained_part(runtime.shardings, trainable_labels(runtime.shardings, rules))
    alone = jax.jit(
        gradient_of(runtime),
        in_shardings=(runtime.shardings, *batch_shardings(runtime)),
        out_shardings=(moving, replicated(runtime.mesh)),
    )
    same_responses = _sampled_again(runtime, state.params, inputs) if options.stage == "brpo" else None
    with runtime.context():
        grads, _ = alone(state.params, *first, *inputs.batch, runtime.logit_bias_V)
        # The run's own program, since another may round differently; last, since it overwrites the state.
        _, metrics = update_program(runtime, optimizer, shardings)(state, *first, *inputs.batch, runtime.logit_bias_V)
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    bad = {
        name: float(1 - np.isfinite(np.asarray(leaf)).mean())
        for name, leaf in zip(param_paths(grads), jax.device_get(jax.tree.leaves(grads)), strict=True)
    }
    return Replay(
        step=inputs.step + 1,
        metrics={name: (saved.metrics[name], value) for name, value in metrics.items() if name in saved.metrics},
        identical_responses=same_responses,
        not_finite={name: share for name, share in bad.items() if share},
    )


def _sampled_again(runtime: Any, params: Any, inputs: step_dump.Inputs) -> bool | None:
    """Whether sampling again gives the same responses; None where they were sampled in several rounds."""
    options = runtime.options.brpo
    if options.resample_rounds:
        return None
    *batch, rollout_batch = inputs.batch
    lengths = np.asarray(rollout_batch.length_B).reshape(-1)
    rollout = sample_microbatches(brpo_sampler(runtime), params, tuple(batch), inputs.step, 0, len(lengths))
    recorded = np.asarray(rollout_batch.ids_BxR).reshape(len(lengths), -1)
    again = np.asarray(rollout.ids_BxR)[:, : recorded.shape[1]]
    return bool(np.array_equal(lengths, rollout.length_B) and np.array_equal(recorded, again))
