"""BRPO: one step, from the batch to the metrics (paper, section BRPO)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax

from qwenla_jax.data.batching.loader import RecordSource
from qwenla_jax.inference.read_examples import Records
from qwenla_jax.inference.runtime import insertion_buckets, response_buckets
from qwenla_jax.inference.sampler import Asked, Sampler
from qwenla_jax.model.qwen_vl import Params
from qwenla_jax.parallel.distributed import place
from qwenla_jax.parallel.sharding import batch_sharding
from qwenla_jax.rewards.weights import RewardScores
from qwenla_jax.run.completions import Completion
from qwenla_jax.train.brpo.dynamic_sampling import SampledGroups, fill, fit, further_records, join
from qwenla_jax.train.brpo.reward_failures import RewardFailures
from qwenla_jax.train.brpo.score import judge, reward_pool, reward_settings
from qwenla_jax.train.brpo.update import RolloutBatch
from qwenla_jax.train.optimizer import schedule
from qwenla_jax.train.programs import tower_is_frozen, update_program
from qwenla_jax.train.stage import CheckStop, Clock, Inputs
from qwenla_jax.train.train_runtime import TrainRuntime
from qwenla_jax.train.train_state import TrainState
from qwenla_jax.types import PromptBatch, Rollout


class BrpoStage:
    """BRPO: sample, reward, update (paper, section BRPO)."""

    def __init__(
        self,
        runtime: TrainRuntime,
        optimizer: optax.GradientTransformation,
        shardings: TrainState,
        source: RecordSource,
        first_step: int,
        reference: Params | None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        options = runtime.options
        self._runtime, self._reference = runtime, reference
        self._step = update_program(runtime, optimizer, shardings)
        self._sampler = brpo_sampler(runtime)
        self._rate = schedule(options.optim, options.steps * options.brpo.inner_updates)
        self._settings = reward_settings(options)
        self._rows = batch_sharding(runtime.mesh, leading=1)
        self._lengths = response_buckets(options.data.max_response_tokens)
        examples = runtime.usable(source, False, note)
        self._source: RecordSource = Records(examples)
        self._asked_rows = options.brpo.rollout_batch
        self._batches: Iterator[Any] = runtime.batches(examples, runtime.collate_prompts, first_step, self._asked_rows)
        self._encoder = runtime.encoder() if tower_is_frozen(runtime) else None
        self._last: SampledGroups | None = None
        self._failures = RewardFailures(note, first_step)
        self.inputs: Inputs | None = None
        self._pool = reward_pool(options)

    def _sample_groups(
        self, params: Params, batch: Any, records: list[Any], step: int, turn: int, clock: Clock
    ) -> SampledGroups:
        """Samples and scores G responses to each question; `turn` counts the step's samplings."""
        group = self._runtime.options.brpo.group_size
        rollout = sample_microbatches(self._sampler, params, batch, step, turn, len(records) * group)
        clock("reward")
        tokenizer, options = self._runtime.tokenizer, self._runtime.options.brpo
        scored = judge([rollout], records, tokenizer, self._pool, self._settings, options)
        self._failures.check(step, scored.scores)
        return SampledGroups(records, rollout, scored)

    def _see(self, params: Params, batch: Any) -> Any:
        """The batch with its images encoded, where the tower is frozen and a step's programs can share the tokens."""
        if self._encoder is None:
            return batch
        vision, *rest = batch
        return self._encoder(params, vision), *rest

    def step(self, state: TrainState, step: int, check_stop: CheckStop) -> tuple[TrainState, dict[str, Any]]:
        """Samples G responses to each question of the batch, scores them, and updates.

        Raises:
          RewardsFailed: no response has rewards.
        """
        run, options = self._runtime.options, self._runtime.options.brpo
        clock = Clock(check_stop)
        clock("data")
        batch, records, invalid = next(self._batches)
        batch, asked = (batch, batch) if self._asked_rows is None else batch
        clock("rollout")
        seen = self._see(state.params, batch)
        asked = seen if asked is batch else self._see(state.params, asked)
        first = groups = self._sample_groups(state.params, asked, records, step, 0, clock)
        resampled: dict[str, float] = {}
        if options.resample_rounds:

            def again(turn: int) -> SampledGroups:
                rounds = options.resample_rounds
                further = further_records(self._source, run.seed, step, turn, rounds, len(records))
                other = self._runtime.stack(further, self._runtime.collate_prompts, False, self._asked_rows)
                clock("rollout")
                return self._sample_groups(state.params, self._see(state.params, other), further, step, turn + 1, clock)

            groups, rounds = fill(first, again, options.resample_rounds)
            if rounds:
                batch = self._runtime.stack(groups.records, self._runtime.collate_prompts, False)
                seen = self._see(state.params, batch)
            resampled = {"resample/rounds": rounds, "resample/missing": groups.scored.zero_std_Q.mean()}
        self._last = groups
        rollout_batch = self._rollout_batch(groups, batch)
        self.inputs = Inputs(step, (*batch, rollout_batch), _rows(groups))
        clock("update")
        updates = []
        placed = place((*seen, rollout_batch), self._rows)
        with self._runtime.context():
            for _ in range(options.inner_updates):
                state, metrics = self._step(state, self._reference, *placed, self._runtime.logit_bias_V)
                updates.append(metrics)
        updates = jax.device_get(updates)
        # The first update is on policy: only there a difference from the sampler is an error.
        once = ("sampling_logp_difference", "ratio_mean", "kl")
        metrics = {name: np.mean([m[name] for m in updates]) for name in updates[0]}
        metrics |= {f"first_update/{name}": updates[0][name] for name in once} if options.inner_updates > 1 else {}
        timing = clock.seconds()
        rate = float(self._rate(step * options.inner_updates))
        host_metrics = first.scored.metrics() | resampled | {"data/invalid": invalid}
        host_metrics["perf/sampled_tokens_per_s"] = float(first.scored.length_B.sum()) / timing["timing_s/rollout"]
        if self._runtime.reattention().inserts:
            host_metrics["reattention/inserted_mean"] = first.rollout.inserted_B.mean()
            host_metrics["reattention/skipped_mean"] = first.rollout.skipped_B.mean()
        return state, host_metrics | metrics | timing | {"learning_rate": rate}

    def _rollout_batch(self, groups: SampledGroups, batch: Any) -> RolloutBatch:
        """The responses for the update, in the batch's microbatches, cut to the shortest bucket that fits."""
        rollout, scored = groups.rollout, groups.scored
        longest = next(n for n in self._lengths if n >= scored.length_B.max())
        selected = None
        if self._runtime.reattention().inserts:
            turns = insertion_buckets(rollout.selected_BxExX.shape[1])
            most = next((n for n in turns if n >= rollout.inserted_B.max()), 0)
            selected = fit(rollout.selected_BxExX[:, :most], block_slots(batch[1]))
        parts = len(batch[1].ids_QxP)
        rollout_batch = RolloutBatch(
            ids_BxR=rollout.ids_BxR[:, :longest],
            logp_BxR=rollout.logp_BxR[:, :longest],
            length_B=rollout.length_B,
            advantage_B=scored.advantage_B,
            counted_B=scored.counted_B,
            trained_B=scored.trained_B,
            selected_BxExX=selected,
        )
        return jax.tree.map(lambda x: x.reshape(parts, len(x) // parts, *x.shape[1:]), rollout_batch)

    def completions(self) -> list[Completion]:
        """The first `config.log.completions_rows` responses of the last step."""
        if self._last is None:
            return []
        records, scored = self._last.records, self._last.scored
        group = self._runtime.options.brpo.group_size
        rows = []
        for row in range(min(self._runtime.options.log.completions_rows, len(scored.texts))):
            record, earned = records[row // group], scored.scores[row]
            rewarded = isinstance(earned, RewardScores)
            cut = "" if scored.stopped_B[row] else f"cut off at {scored.length_B[row]} tokens"
            rows.append(
                Completion(
                    images=record.images,
                    prompt=record.question,
                    answer=record.answer,
                    response=scored.texts[row],
                    rewards=dict(earned.components) if rewarded else {},
                    reward=earned.total if rewarded else float("nan"),
                    advantage=float(scored.advantage_B[row]),
                    note=cut if rewarded else f"no rewards: {earned.name} {earned.kind}: {earned.message}",
                )
            )
        return rows

    def close(self) -> None:
        """Ends the processes of the rewards."""
        self._pool.close()


def brpo_sampler(runtime: TrainRuntime) -> Sampler:
    """The sampler of a BRPO run's rollouts: a microbatch of questions at once, or as many as the settings say."""
    options = runtime.options.brpo
    rows = options.rollout_batch or runtime.options.data.batch_size // runtime.options.optim.accumulation
    return Sampler(runtime, runtime.rollout_options(), rows)


def sample_microbatches(sampler: Sampler, params: Params, batch: Any, step: int, turn: int, rows: int) -> Rollout:
    """Responses to a batch in microbatches, concatenated by row, on the host.

    Sample numbers continue from turn to turn, so that no two rows of a step share their random keys.
    """
    parts = len(batch[1].ids_QxP)
    numbers = np.arange(turn * rows, (turn + 1) * rows, dtype=np.uint32).reshape(parts, -1)
    cut = (jax.tree.map(lambda x, i=i: x[i], batch) for i in range(parts))
    asked = (Asked(vision, prompts, step, one) for (vision, prompts), one in zip(cut, numbers, strict=True))
    return join(list(sampler.run(params, asked)))


def block_slots(prompts: PromptBatch) -> int:
    """X, the slots of the images' blocks of a batch in parts."""
    assert prompts.block is not None  # collated with the images' blocks
    return prompts.block.pos_QxXx3.shape[2]


def _rows(groups: SampledGroups) -> list[dict[str, Any]]:
    scored = groups.scored
    group = len(scored.texts) // len(groups.records)
    return [
        {
            "id": groups.records[row // group].id,
            "response": text,
            "rewards": dataclasses.asdict(scored.scores[row]),
            "advantage": float(scored.advantage_B[row]),
        }
        for row, text in enumerate(scored.texts)
    ]
