"""The compiled update of a stage, and the shardings of its batches."""

from __future__ import annotations

from typing import Any

import jax
import optax

from qwenla_jax.model.trainable import trainable_labels
from qwenla_jax.parallel.sharding import batch_sharding, replicated
from qwenla_jax.train.brpo.reference import reference_shardings, stored_reference_shardings
from qwenla_jax.train.brpo.update import make_brpo_gradient
from qwenla_jax.train.sft.update import make_sft_gradient
from qwenla_jax.train.train_runtime import TrainRuntime
from qwenla_jax.train.train_state import Gradient, TrainState, make_update


def gradient_of(runtime: TrainRuntime) -> Gradient:
    """The gradient of a run's stage."""
    options = runtime.options
    rules, reattention = options.optim.trainable, runtime.reattention()
    if options.stage == "sft":
        return make_sft_gradient(runtime.model, rules, reattention)
    gradient = make_brpo_gradient(runtime.model, options.brpo, options.data.max_response_tokens, rules, reattention)
    if options.brpo.reference == "device" or not options.brpo.beta:
        return gradient
    shardings = reference_shardings(runtime)
    return lambda params, stored, *rest: gradient(params, jax.device_put(stored, shardings), *rest)


def tower_is_frozen(runtime: TrainRuntime) -> bool:
    """Whether vision tower and merger are frozen, so that an image's visual tokens never change."""
    labels = trainable_labels(runtime.shardings, runtime.options.optim.trainable)
    return all(label == "freeze" for label in jax.tree.leaves(labels["visual"]))


def update_program(runtime: TrainRuntime, optimizer: optax.GradientTransformation, shardings: TrainState) -> Any:
    """The jitted update of a run's stage: (state, batch ...) -> new state, metrics. The old state is overwritten."""
    return jax.jit(
        make_update(gradient_of(runtime), optimizer),
        in_shardings=(shardings, *batch_shardings(runtime)),
        out_shardings=(shardings, replicated(runtime.mesh)),
        donate_argnums=0,
    )


def batch_shardings(runtime: TrainRuntime) -> tuple[Any, ...]:
    """Shardings of the arguments of a stage's gradient after the parameters.

    For BRPO: reference, images, prompts, responses, bias; for supervised training: the batch and the bias.
    """
    rows, whole = batch_sharding(runtime.mesh, leading=1), replicated(runtime.mesh)
    if runtime.options.stage == "sft":
        return *(rows,) * (3 if runtime.reattention().inserts else 2), whole
    return stored_reference_shardings(runtime) if runtime.options.brpo.beta else None, rows, rows, rows, whole
