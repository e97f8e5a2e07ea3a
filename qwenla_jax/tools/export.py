"""A checkpoint of a training run as a Hugging Face folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from qwenla_jax.config.checks import from_config_dict
from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.config.shared_options import MeshOptions
from qwenla_jax.model.lora import adapted_kernels, base_of, joined, only_adapters
from qwenla_jax.model.qwen_vl import Params
from qwenla_jax.model.trainable import param_paths, trainable_labels, trained_part
from qwenla_jax.run.checkpoints import CHECKPOINT_FOLDER, Checkpoints
from qwenla_jax.run.model_card import model_card
from qwenla_jax.train.checkpointing import check_frozen
from qwenla_jax.train.loop import abstract_state, state_plan
from qwenla_jax.train.train_runtime import build
from qwenla_jax.train.train_state import to_keep
from qwenla_jax.weights.hf import save
from qwenla_jax.weights.hub import hub_name
from qwenla_jax.weights.peft import save_adapters


def export_run(
    workdir: Path,
    target: Path,
    step: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    adapter: bool = False,
) -> Path:
    """Writes the parameters of a run's checkpoint, adapters merged, and a model card; no optimizer state is read.

    Args:
      workdir: of the run. The checkpoint that it started from must still exist, for tokenizer and config.
      target: the folder to make.
      step: which checkpoint; None: the newest.
      dtype: of the stored weights; None: the run's compute type.
      overwrite: replace what is at `target`.
      adapter: write the run's adapters alone, as a folder of PEFT (`weights.peft`).

    Raises:
      FileNotFoundError: no run's folder.
      FileExistsError: there is something at `target` and overwrite is False.
      ValueError: no such checkpoint, or one that cannot be read, or whose frozen weights differ from those that the run
        started from; with `adapter`, a run without adapters, or one that trained other parameters too.
    """
    if not (workdir / CHECKPOINT_FOLDER).is_dir():
        raise FileNotFoundError(f"{workdir}: holds no params of convert/from_hf.py and no {CHECKPOINT_FOLDER} of a run")
    with Checkpoints(workdir, RunOptions()) as checkpoints:
        record = checkpoints.meta(step)
    options = dataclasses.replace(from_config_dict(record["config"]), mesh=MeshOptions())
    runtime, params = build(options)
    if adapted_kernels(params):
        check_frozen(params, options, record)
    if adapter:
        _check_adapters_alone(params, options, workdir)
    optimizer, shardings = state_plan(runtime, params)
    rules = options.optim.trainable
    like = {"params": to_keep(abstract_state(params, optimizer, shardings), rules).params}
    if not adapted_kernels(params):
        params = {}  # the checkpoint has them all
    place = workdir / CHECKPOINT_FOLDER / str(record["step"]) / "state"
    restore = jax.tree.map(lambda s: ocp.ArrayRestoreArgs(sharding=s.sharding, dtype=s.dtype), like)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        restored = reader.restore(
            place.absolute(), args=ocp.args.PyTreeRestore(item=like, restore_args=restore, partial_restore=True)
        )
    card = model_card(options, workdir, record["step"], adapter, runtime.model.config.family)
    if adapter:
        start = options.init_from or ""
        base, revision = hub_name(start) or (str(Path(start).absolute()) if Path(start).is_dir() else start, None)
        trained = joined(only_adapters(params), restored["params"])  # the scales are not in the checkpoint
        return save_adapters(target, runtime.model.config, trained, base, overwrite, card, revision)
    return save(
        target,
        runtime.model,
        joined(params, restored["params"]),
        tokenizer=runtime.tokenizer,
        processor=runtime.processor,
        system=options.data.system,
        dtype=dtype or options.dtype,
        overwrite=overwrite,
        card=card,
        reattention=options.reattention,
    )


def _check_adapters_alone(params: Params, options: RunOptions, workdir: Path) -> None:
    """Raises ValueError where the adapters are not all that a run trains."""
    if not adapted_kernels(params):
        raise ValueError(f"{workdir}: the run has no adapters: its config.lora.rank is none")
    more = param_paths(base_of(trained_part(params, trainable_labels(params, options.optim.trainable))))
    if more:
        raise ValueError(
            f"{workdir}: the run trained {', '.join(more)} too, which adapters alone do not hold; write it whole"
        )
