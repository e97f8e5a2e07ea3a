"""A small BRPO run that tells what it is about to do: python child.py WORKDIR

On standard output one line a phase. In WORKDIR/trace.jsonl one line a step: the step, a checksum of the sampled tokens,
and the rewards. For `kills.py`, which ends it at any moment.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np

from qwenla_jax.config.run_options import (
    BrpoOptions,
    CheckpointOptions,
    DataOptions,
    EvalOptions,
    GuardOptions,
    LogOptions,
    OptimOptions,
    PoolOptions,
    RewardOptions,
    RunOptions,
)
from qwenla_jax.run.signals import Stopped
from qwenla_jax.train import health, loop
from qwenla_jax.train.brpo import trainer
from qwenla_jax.train.health import Failed

OPTIONS = RunOptions(
    stage="brpo",
    steps=12,
    data=DataOptions(batch_size=2),
    optim=OptimOptions(learning_rate=1e-3, schedule="cosine"),
    # Two updates a step and questions in the place of those that teach nothing: more state that could be lost.
    brpo=BrpoOptions(group_size=4, inner_updates=2, drop_zero_std_groups=True, resample_rounds=2),
    rewards=RewardOptions(target_length=10.0, pool=PoolOptions(workers=1)),
    eval=EvalOptions(every=4, size=4, final_size=4, batch_size=4, attention=False),
    checkpoint=CheckpointOptions(every=3, keep=2),
    log=LogOptions(completions_every=5),
    guard=GuardOptions(stall_s=900.0),
)


def tell(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def main(workdir: Path) -> int:
    check_stop, step = health.Guard.check_stop, trainer.BrpoStage.step

    def told_pause(self, doing):
        tell(f"phase {doing}")
        check_stop(self, doing)

    def told_step(self, state, number, check_stop):
        state, metrics = step(self, state, number, check_stop)
        rollout_batch = self.inputs.batch[-1]
        tokens = np.concatenate([np.asarray(rollout_batch.ids_BxR).ravel(), np.asarray(rollout_batch.length_B).ravel()])
        rewards = [row["rewards"].get("total") for row in self.inputs.rows]
        line = {"step": number, "tokens": hashlib.sha256(tokens.tobytes()).hexdigest(), "rewards": rewards}
        with (workdir / "trace.jsonl").open("ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")
        return state, metrics

    health.Guard.check_stop, trainer.BrpoStage.step = told_pause, told_step
    tell("phase start")
    try:
        loop.run(OPTIONS, workdir)
    except Stopped as stopped:
        tell(f"stopped {stopped}")
        return 128 + stopped.number
    except (loop.RunRefused, Failed) as error:
        tell(f"refused {error}")
        return 1
    tell("done")
    return 0


if __name__ == "__main__":
    # The run's own console lines are not wanted between the phases.
    real, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115
    sys.exit(main(Path(sys.argv[1])))
