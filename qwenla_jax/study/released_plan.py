"""What the length study of a released model costs, by arithmetic: nothing is loaded, compiled or run.

Every prompt, response and image is as large as the settings allow. The seconds are the roofline's, below which no
program is; real ones take several times as long, and what chips send each other is not in them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax
import numpy as np

from qwenla_jax.model.config import ModelConfig
from qwenla_jax.model.qwen_vl import init_params
from qwenla_jax.planner.chips import Topology, parse_topology
from qwenla_jax.planner.fit_report import HEADROOM, roofline
from qwenla_jax.planner.flops import Work, decode, decoder_forward, head, vision_forward
from qwenla_jax.study.length_arms import ROUTE_50
from qwenla_jax.study.released_prefix import CHUNK
from qwenla_jax.study.released_run import ANSWER_TOKENS, RELEASED_ARMS, Released

MACHINES = ("h100:1", "v5e:2x4")  # one GPU of 80 GB; v5e-8
_VALUE = 2  # bytes of a number in bfloat16


@dataclasses.dataclass(frozen=True)
class Plan:
    """The study on a machine.

    Attributes:
      topology: the machine's name.
      tensor: devices that split heads.
      rows: questions at once that its memory holds, of those that were asked for.
      weights, cache: bytes a chip, of the parameters, and of keys and values of its rows.
      parts: (operations, bytes moved, seconds, what bounds them) of all chips by part of the study.
    """

    topology: str
    tensor: int
    rows: int
    weights: float
    cache: float
    parts: dict[str, tuple[float, float, float, str]]

    @property
    def hours(self) -> float:
        """Of all parts."""
        return sum(seconds for _, _, seconds, _ in self.parts.values()) / 3600


def plan(settings: Released, config: ModelConfig, topology: Topology, question_tokens: int = 128) -> Plan:
    """The study's costs on a machine.

    Args:
      settings: what is run; `tensor` is not read, the plan sets it.
      config: the model.
      topology: the machine.
      question_tokens: of a question without its image.

    Raises:
      ValueError: the model does not fit.
    """
    text, chip = config.text, topology.chip
    side = config.vision.patch_size * config.vision.spatial_merge_size
    visual = settings.max_pixels // side**2
    question, longest = visual + question_tokens, max(settings.lengths)
    weights = _parameters(config) * _VALUE
    kv = 2 * text.num_layers * text.num_kv_heads * text.head_dim * _VALUE
    row = kv * (question + longest + visual + ANSWER_TOKENS + CHUNK)
    heads = math.gcd(text.num_heads, config.vision.num_heads)
    splits = [tensor for tensor in (1, 2, 4, 8, 16) if not (topology.chips % tensor or heads % tensor)]
    room = chip.hbm_bytes * (1 - HEADROOM)
    for tensor in splits:
        # Keys and values of heads that do not divide are repeated. A batch's prefill needs about as much again.
        shards, row_bytes = topology.chips // tensor, row / (tensor if text.num_kv_heads % tensor == 0 else 1)
        fit = math.floor((room - weights / tensor) / (2 * row_bytes))
        if fit > 0 and fit * shards >= min(shards, settings.batch_size):
            break
    else:
        size = f"{weights / 1e9:.1f} GB of parameters and {row / 1e9:.1f} GB of keys and values of a question"
        raise ValueError(f"{topology.name}: {size} do not fit")
    rows = min(fit, math.ceil(settings.batch_size / shards))  # of a shard
    batches = math.ceil(settings.size / (rows * shards))
    see = vision_forward(config.vision, np.full((1, max(1, visual // 16)), 64.0), _VALUE)

    def prefill(tokens: int, images: int = 1) -> Work:
        """A shard's prompts."""
        pairs = rows * tokens * (tokens + 1) / 2
        return see * (rows * images) + decoder_forward(text, rows * tokens, pairs, rows * tokens, _VALUE)

    def generate(prompt: int, tokens: int) -> Work:
        return decode(text, np.full(rows, prompt), np.full(rows, tokens), 1, _VALUE) + head(text, rows, _VALUE) * tokens

    reasoning, answers = Work(), Work()
    if longest:
        reasoning = sum((prefill(question + at) for at in range(0, longest, CHUNK)), generate(question, longest))
    for _, tokens in settings.cells():
        for arm in RELEASED_ARMS:
            end = question + tokens + visual
            # Prefilled for the greedy answer, and once more for the right answer's log-probability.
            answers += prefill(end, 2) * 2 + generate(end, ANSWER_TOKENS)
            answers += prefill(question + tokens) if arm == ROUTE_50 else Work()
    timed = {}
    for name, work in (("reasoning", reasoning * batches), ("insertions and answers", answers * batches)):
        seconds, bound = roofline(chip, work * (1 / tensor), 0.0)
        timed[name] = (work.flops * shards, work.bytes * shards, seconds, bound)
    return Plan(topology.name, tensor, rows * shards, weights / tensor, rows * row_bytes, timed)


def _parameters(config: ModelConfig) -> int:
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def describe_plan(settings: Released, config: ModelConfig) -> Iterator[str]:
    """The costs on `MACHINES`, as lines of a table. They are estimates."""
    lengths = ", ".join(map(str, settings.lengths))
    what = f"{settings.size} questions, N = {lengths}, {len(RELEASED_ARMS)} arms"
    yield f"{settings.name}: {what}. Estimates by arithmetic; nothing was run.\n"
    yield "| machine | part | PFLOP | TB moved | hours at the roofline | bound by |"
    yield "|---|---|---|---|---|---|"
    for name in MACHINES:
        try:
            one = plan(settings, config, parse_topology(name))
        except ValueError as error:
            yield f"| {name} | {error} | | | | |"
            continue
        for part, (flops, moved, seconds, bound) in one.parts.items():
            yield f"| {name} | {part} | {flops / 1e15:.0f} | {moved / 1e12:.0f} | {seconds / 3600:.2f} | {bound} |"
        memory = f"{one.weights / 1e9:.1f} GB of parameters, {one.cache / 1e9:.1f} GB of keys and values a chip"
        yield f"| {name} | all; tensor={one.tensor}, {one.rows} questions at once; {memory} | | | {one.hours:.2f} | |"
