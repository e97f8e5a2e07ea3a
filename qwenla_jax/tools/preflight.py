"""Preflight: checks before a run starts, on its own model, mesh and data, each with its measured value."""

from __future__ import annotations

import dataclasses
import os
import resource
import time
from typing import Any, cast

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.model.layers import LORA_B, LORA_SCALE
from qwenla_jax.model.lora import adapted_kernels, only_adapters
from qwenla_jax.parallel.sharding import replicated
from qwenla_jax.text.special_tokens import TAGS
from qwenla_jax.text.tokenizer import Tokenizer
from qwenla_jax.train.brpo.reference import make_reference
from qwenla_jax.train.brpo.reward_failures import RewardsFailed
from qwenla_jax.train.brpo.trainer import BrpoStage
from qwenla_jax.train.checkpointing import frozen_fingerprint
from qwenla_jax.train.health import LOGP_BOUNDS, ON_POLICY
from qwenla_jax.train.loop import RunRefused, first_state, state_plan
from qwenla_jax.train.programs import batch_shardings, gradient_of
from qwenla_jax.train.sft.trainer import SftStage
from qwenla_jax.train.stage import Stage
from qwenla_jax.train.train_runtime import TrainRuntime, build, make_run_source
from qwenla_jax.train.train_state import TrainState
from qwenla_jax.utils.compile_counter import CompileCounter

STEPS = 3  # steps taken: the first for its values, the others to see what is compiled again
MEMORY_SHARE = 0.95  # of a device's memory: above it, a larger batch of images would not fit


@dataclasses.dataclass(frozen=True)
class Check:
    """One check and its result."""

    name: str
    ok: bool
    result: str
    expected: str

    def __str__(self) -> str:
        return f"{'ok    ' if self.ok else 'FAILED'} {self.name}: {self.result} (expected {self.expected})"


def examine(options: RunOptions) -> list[Check]:
    """Takes a few steps of a run, without a folder, and checks them.

    Sampler and trainer must give the same log-probabilities (ratio 1), the policy must begin at its reference
    (divergence 0), an image must change the probabilities, the ten tags must be single tokens, programs may be compiled
    again for new shapes only, and memory must suffice.

    Args:
      options: checked settings.

    Raises:
      RunRefused: settings, files or records that cannot be used.
    """
    begin = time.perf_counter()
    try:
        source = make_run_source(options, "cold_start" if options.stage == "sft" else "train")
        runtime, params = build(options)
        reference = make_reference(runtime, params)
        optimizer, shardings = state_plan(runtime, params)
        before = frozen_fingerprint(params, options.optim.trainable) if adapted_kernels(params) else 0
        state = first_state(params, optimizer, shardings, keep=reference is params)
        stage: Stage
        if options.stage == "sft":
            stage = SftStage(runtime, optimizer, shardings, source, 0)
        else:
            stage = BrpoStage(runtime, optimizer, shardings, source, 0, reference, print)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise RunRefused(f"{type(error).__name__}: {error}") from error
    checks = [_tags(runtime.tokenizer)]
    try:
        shapes: list[Any] = []
        compiled = []
        metrics: dict[str, Any] = {}
        taught = False
        for step in range(STEPS):
            with CompileCounter() as counter:
                state, step_metrics = stage.step(state, step, lambda doing: None)
                step_metrics = jax.device_get(step_metrics)
            metrics = metrics or step_metrics
            taught |= float(step_metrics["grad_norm"]) > 0 and not step_metrics["skipped"]
            assert stage.inputs is not None
            shapes.append(_shapes(options, stage.inputs.batch))
            compiled.append(counter.count)
        checks += _first_step(options, metrics)
        checks.append(_compiles(shapes, compiled))
        assert stage.inputs is not None
        checks.append(_image(runtime, state.params, reference, stage.inputs.batch))
        checks += _adapters(state, before, taught, options)
        checks.append(_memory(state, reference))
    except RewardsFailed as error:
        checks.append(Check("rewards", False, str(error), "no errors"))
    finally:
        stage.close()
    checks.append(Check("time", True, f"{time.perf_counter() - begin:.1f} s for all of this", "any"))
    return checks


def _tags(tokenizer: Tokenizer) -> Check:
    """Each tag is one token, and encoding and decoding a response gives the same text."""
    response = "".join(f"{tag}a 1" if not tag.startswith("</") else tag for tag in TAGS)
    invalid = [tag for tag in TAGS if len(tokenizer.encode(tag)) != 1 or tokenizer.decode(tokenizer.encode(tag)) != tag]
    if tokenizer.decode(tokenizer.encode(response)) != response:
        invalid.append("a response with all of them")
    result = f"{len(TAGS) - len(invalid)} of {len(TAGS)} are" + (f"; not {', '.join(invalid)}" if invalid else "")
    return Check("tags", not invalid, result, "each to be one token and to come back from it")


def _first_step(options: RunOptions, metrics: dict[str, Any]) -> list[Check]:
    """What must hold on policy."""
    numbers = {name: float(value) for name, value in metrics.items()}
    message = ", ".join(f"{name} {numbers[name]:.4g}" for name in ("loss", "grad_norm", "num_tokens"))
    finite = [Check("first update", not numbers["skipped"], message, "finite numbers, and tokens")]
    if options.stage == "sft":
        return finite
    bound = LOGP_BOUNDS[options.dtype]
    gap, ratio, kl = (numbers.get(f"first_update/{name}", numbers[name]) for name in ON_POLICY)
    checks = [
        Check("sampler = trainer", gap <= bound, f"mean |difference| of log-probabilities {gap:.2g}", f"<= {bound:g}"),
        Check("ratio", abs(ratio - 1) <= bound, f"mean {ratio:.7f}", f"1 within {bound:g}"),
    ]
    if options.brpo.beta:
        checks.append(Check("KL", abs(kl) <= bound**2, f"mean {kl:.2g} nats a token", f"0 within {bound**2:g}"))
    errors = {name: value for name, value in numbers.items() if name.startswith("reward_errors/") and value}
    message = ", ".join(f"{name} {value:.0f}" for name, value in errors.items()) or "no errors"
    spread = 1 - numbers["frac_reward_zero_std"]
    checks.append(Check("rewards", not errors, f"{message}; {spread:.0%} of the groups differ in reward", "no errors"))
    return finite + checks


def _shapes(options: RunOptions, batch: tuple[Any, ...]) -> tuple[Any, Any]:
    """The shapes by which programs are compiled again: for sampling, and for the update."""
    shapes = tuple(x.shape for x in jax.tree.leaves(batch))
    asked = tuple(x.shape for x in jax.tree.leaves(batch[:-1])) if options.stage == "brpo" else None
    return asked, shapes


def _compiles(shapes: list[tuple[Any, Any]], compiled: list[int]) -> Check:
    """After the first step only new shapes may be compiled."""
    planned = 0
    for step, (asked, shape) in enumerate(shapes[1:], 1):
        planned += asked is not None and asked not in [a for a, _ in shapes[:step]]
        planned += shape not in [s for _, s in shapes[:step]]
    later = sum(compiled[1:])
    result = f"{compiled[0]} in the first step, {later} in the next {len(compiled) - 1}"
    return Check("compilations", later <= planned, result, f"at most {planned} after the first, for new shapes")


def _image(runtime: TrainRuntime, params: Any, reference: Any, batch: tuple[Any, ...]) -> Check:
    """The same responses with blank images must have other log-probabilities."""
    options, gradient = runtime.options, gradient_of(runtime)
    metrics_of = jax.jit(
        lambda *args: gradient(*args)[1],  # XLA drops the unused gradient
        in_shardings=(runtime.shardings, *batch_shardings(runtime)),
        out_shardings=replicated(runtime.mesh),
    )
    first = (reference,) if options.stage == "brpo" else ()
    name = "loss" if options.stage == "sft" else "sampling_logp_difference"
    vision, *rest = batch
    blank = vision.replace(patches_IxSxC=np.zeros_like(vision.patches_IxSxC))
    with runtime.context():
        values = [float(metrics_of(params, *first, v, *rest, runtime.logit_bias_V)[name]) for v in (vision, blank)]
    result = f"{name} {values[0]:.4g} with the images, {values[1]:.4g} with blank ones"
    ok = abs(values[1] - values[0]) > 1e-4
    return Check("the image matters", ok, result, "a change of more than 0.0001")


def _adapters(state: TrainState, before: int, taught: bool, options: RunOptions) -> list[Check]:
    """With adapters: they must have changed, and the frozen weights must be the same bit for bit.

    Where no step had a gradient, nothing can have changed.
    """
    kernels = adapted_kernels(state.params)
    if not kernels:
        return []
    own = cast(dict[str, Any], flatten_dict(only_adapters(state.params), sep="/"))
    still = [path for path, leaf in own.items() if path.endswith(LORA_B) and not np.any(leaf)]
    size = sum(leaf.size for path, leaf in own.items() if not path.endswith(LORA_SCALE))
    same = frozen_fingerprint(state.params, options.optim.trainable) == before
    result = (
        f"{len(kernels)} stacked kernels, {size:,} numbers, {len(still)} kernels have not moved; the frozen weights "
        f"are {'the same' if same else 'OTHERS'}"
    )
    ok = same and not (still and taught)
    return [Check("adapters", ok, result, "all to have moved, and the frozen weights to be the same")]


def _memory(state: Any, reference: Any) -> Check:
    """Memory that stays on the devices, by arithmetic, and their peak use as they report it."""
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    here = {id(x) for x in jax.tree.leaves(state.params)}
    stays = size(state) + size([x for x in jax.tree.leaves(reference) if id(x) not in here])
    planned = f"state and reference {stays / 1e9:.3f} GB over {jax.device_count()} devices"
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(s and "bytes_limit" in s for s in stats):
        share, peak = max((s["peak_bytes_in_use"] / s["bytes_limit"], s["peak_bytes_in_use"]) for s in stats)
        result = f"{planned}; at most {peak / 1e9:.2f} GB of a device, {share:.0%} of it"
    else:  # the host's memory is the device's
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        share = peak / (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        result = f"{planned}; the process took at most {peak / 1e9:.2f} GB, {share:.0%} of the machine's"
    return Check("memory", share <= MEMORY_SHARE, result, f"at most {MEMORY_SHARE:.0%}")
