"""Which part of a run's state its checkpoints hold, and how the whole state is restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.model.lora import adapted_kernels
from qwenla_jax.model.qwen_vl import Params
from qwenla_jax.model.trainable import trainable_labels
from qwenla_jax.run.checkpoints import CheckpointError, Checkpoints
from qwenla_jax.train.train_state import TrainState, fingerprint, to_keep, whole


class TrainCheckpointer:
    """Saves and restores the state of a run.

    Without adapters that is the whole state. With adapters it is the trained part; the frozen weights are loaded again
    from where the run started, and a fingerprint in the checkpoint verifies that they are the same.

    Args:
      checkpoints: of the run.
      options: of the run.
      params: that the run starts from.
    """

    def __init__(self, checkpoints: Checkpoints, options: RunOptions, params: Params) -> None:
        self.checkpoints = checkpoints
        self._options, self._rules = options, options.optim.trainable
        self._meta = _frozen_meta(params, options) if adapted_kernels(params) else {}

    def save(self, step: int, state: TrainState) -> None:
        """`Checkpoints.save` of the stored part of the state."""
        self.checkpoints.save(step, to_keep(state, self._rules), self._meta)

    def restore(self, like: TrainState, params: Params) -> tuple[TrainState, int]:
        """The newest state that can be read, and its step.

        Args:
          like: the whole state, abstract.
          params: that the run starts from; frozen ones become the state's.

        Raises:
          CheckpointError: as `Checkpoints.restore_newest`; or the frozen weights differ from those that the
            adapters were trained on.
        """
        stored, done = self.checkpoints.restore_newest(to_keep(like, self._rules))
        if not self._meta:
            return stored, done
        _compare(self.checkpoints.meta(done), self._meta, self._options)
        return whole(stored, params), done


def check_frozen(params: Params, options: RunOptions, record: Mapping[str, Any]) -> None:
    """Raises CheckpointError where the frozen weights are not those that a checkpoint's adapters were trained on.

    Args:
      params: that the run starts from, with adapters.
      options: of the run.
      record: `Checkpoints.meta` of the checkpoint.
    """
    _compare(record, _frozen_meta(params, options), options)


def _frozen_meta(params: Params, options: RunOptions) -> dict[str, Any]:
    return {"frozen_weights": frozen_fingerprint(params, options.optim.trainable)}


def _compare(record: Mapping[str, Any], meta: dict[str, Any], options: RunOptions) -> None:
    if record["extra"] != meta:
        raise CheckpointError(
            f"config.init_from: the weights of {options.init_from!r} are not those that the adapters in the "
            f"checkpoint of step {record['step']} were trained on"
        )


def frozen_fingerprint(params: Params, rules: tuple[tuple[str, str], ...]) -> int:
    """`train_state.fingerprint` of the frozen parameters."""
    labels = trainable_labels(params, rules)
    return fingerprint(jax.tree.map(lambda x, label: x if label == "freeze" else None, params, labels))
