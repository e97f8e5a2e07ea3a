"""What the length study compares: its arms, its conditions, its sizes. docs/study-protocol.md says why.

Paper silent: of these it has text-only, COPY, ROUTE and vision-only, and no control.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from qwenla_jax.config.run_options import (
    CheckpointOptions,
    DataOptions,
    EvalOptions,
    LogOptions,
    OptimOptions,
    RunOptions,
)
from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.data.synthetic.length_options import LONG_TOKENS, SHORT_TOKENS, WORKINGS, LengthOptions
from qwenla_jax.reattention.options import exact_ratio

TEXT, PAUSE, BLANK, COPY = "text-only", "pause", "blank", "COPY"
ROUTE_25, ROUTE_50, ROUTE_75, VISION = "ROUTE 25", "ROUTE 50", "ROUTE 75", "vision-only"
OTHER, SQUEEZED = "another image", "text-only, squeezed"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
      name: as the protocol has it.
      reattention: what stands before the reflection, in training and when it is measured.
      words: whether reflections have words.
      model: the arm whose model is measured; its own where it is trained.
      squeezed: whether positions are squeezed, see `teacher_forced`; such an arm generates nothing.
    """

    name: str
    reattention: ReattentionOptions
    words: bool = True
    model: str = ""
    squeezed: bool = False

    @property
    def trained(self) -> bool:
        """Whether it has a model of its own."""
        return not self.model

    def inserted(self, visual: int) -> int:
        """Tokens that an insertion of so many visual tokens has, delimiters included."""
        if self.reattention.mode == "none":
            return 0
        ratio = exact_ratio(self.reattention.keep_ratio) if self.reattention.mode == "route" else 1
        return math.ceil(ratio * visual) + 2 * self.reattention.delimiters


def _copy(content: str = "image", mode: str = "copy", keep_ratio: float = 0.5) -> ReattentionOptions:
    return ReattentionOptions(mode=mode, keep_ratio=keep_ratio, content=content, max_insertions=1)


ARMS = {
    arm.name: arm
    for arm in (
        Arm(TEXT, ReattentionOptions()),
        Arm(PAUSE, _copy("pause")),
        Arm(BLANK, _copy("blank")),
        Arm(COPY, _copy()),
        Arm(ROUTE_25, _copy(mode="route", keep_ratio=0.25)),
        Arm(ROUTE_50, _copy(mode="route", keep_ratio=0.5)),
        Arm(ROUTE_75, _copy(mode="route", keep_ratio=0.75)),
        Arm(VISION, _copy(mode="vision_only"), words=False),
        Arm(OTHER, _copy("other"), model=COPY),
        Arm(SQUEEZED, ReattentionOptions(), model=TEXT, squeezed=True),
    )
}


@dataclasses.dataclass(frozen=True)
class Condition:
    """How stage 4 is trained, and in which order its answers are.

    Attributes:
      name: of folders and results.
      low, high: tokens of reasoning in stage 4 where the image is asked about.
      order: "after" or "paper", see `LengthOptions`.
    """

    name: str
    low: int
    high: int
    order: str = "after"


SHORT = Condition("short", *SHORT_TOKENS)
LONG = Condition("long", *LONG_TOKENS)
PAPER = Condition("paper-order", *SHORT_TOKENS, "paper")
CONDITIONS = {condition.name: condition for condition in (SHORT, LONG, PAPER)}
PRIMARY_TOKENS, TRAINED_TOKENS = 160, 16  # N of the primary hypothesis, and a length that every training covers


@dataclasses.dataclass(frozen=True)
class Base:
    """A base model.

    Attributes:
      name: of folders and results.
      init_from: what its trainings start from.
      steps: of its two trainings, see `base_options`.
    """

    name: str
    init_from: str
    steps: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Size:
    """What is run.

    Attributes:
      name: "quick" or "full".
      bases, seeds, arms, conditions: each with each.
      tokens: N, tokens of reasoning that is measured.
      scenes: fresh ones a seed; the same for every arm, N and working.
      profiled: of these, on how many attention is measured.
      steps: of stage 4.
    """

    name: str
    bases: tuple[Base, ...]
    seeds: int
    arms: tuple[str, ...]
    conditions: tuple[Condition, ...]
    tokens: tuple[int, ...]
    scenes: int = 1000
    profiled: int = 256
    steps: int = 160

    def divided(self, by: int) -> Size:
        """The same with shorter trainings and fewer scenes, for a trial."""
        if by == 1:
            return self
        return dataclasses.replace(
            self,
            bases=tuple(
                dataclasses.replace(base, steps=(max(1, base.steps[0] // by), max(1, base.steps[1] // by)))
                for base in self.bases
            ),
            steps=max(1, self.steps // by),
            scenes=max(ROWS, self.scenes // by),
            profiled=max(ROWS, self.profiled // by),
        )


ROWS = 64  # scenes measured at once
_FIRST, _SECOND = Base("a", "tiny", (4000, 1200)), Base("b", "random:tiny", (8000, 2400))
SIZES = {
    size.name: size
    for size in (
        Size("quick", (_FIRST,), 2, (TEXT, BLANK, COPY, OTHER, SQUEEZED), (SHORT,), (16, 160)),
        Size("full", (_FIRST, _SECOND), 5, tuple(ARMS), tuple(CONDITIONS.values()), (16, 64, 160, 320)),
    )
}

FRESH_SEED = 7_000  # added to the seeds of test scenes: no training has such
# Tokens of an answer beside its reasoning, and of what stands behind the reasoning; of a question with its image.
REST, AFTER, QUESTION = 112, 80, 128
# Unlike the paper's stage 4 the whole embedding moves, in every arm: the pause token has a row of it.
TRAINABLE = (("visual/.*", "freeze"), (".*", "train"))


def base_options(base: Base, number: int, trainings: Sequence[RunOptions], first: str) -> list[RunOptions]:
    """The trainings of a base model, in their order.

    Args:
      base: the base model.
      number: its place among the size's; no two have the same data.
      trainings: on short reasoning, which costs three fifths and teaches to see and to conclude, and on long one.
      first: the model that the first one makes, from which the second starts.
    """
    change = dataclasses.replace
    made = zip(trainings, base.steps, (base.init_from, first), strict=True)
    quiet = EvalOptions(every=0, final_size=0)
    return [change(one, init_from=start, steps=steps, seed=one.seed + number, eval=quiet) for one, steps, start in made]


def stage_options(arm: Arm, condition: Condition, size: Size, base_model: str, seed: int) -> RunOptions:
    """Stage 4 of an arm. Answers, their order, steps and learning rate do not depend on the arm, but for `words`.

    Raises:
      ValueError: an arm that has no model of its own.
    """
    if not arm.trained:
        raise ValueError(f"{arm.name} is not trained; expected an arm with a model of its own")
    lengths = LengthOptions(condition.low, condition.high, WORKINGS, (condition.order,), arm.words)
    return RunOptions(
        stage="sft",
        steps=size.steps,
        seed=seed,
        init_from=base_model,
        remat="dots",
        reattention=arm.reattention,
        data=DataOptions(
            source=training_source(lengths),
            batch_size=32,
            length_group=8,
            max_prompt_tokens=QUESTION,
            max_response_tokens=LONG_TOKENS[1] + REST,
        ),
        optim=OptimOptions(
            learning_rate=1e-3,
            b2=0.999,
            warmup_ratio=0.05,
            schedule="cosine",
            weight_decay=0.01,
            trainable=TRAINABLE,
        ),
        eval=EvalOptions(every=0, final_size=0, batch_size=ROWS),
        checkpoint=CheckpointOptions(every=500),
        log=LogOptions(every=10),
    )


def training_source(lengths: LengthOptions) -> str:
    """The setting of a training: three quarters such answers, and an eighth each of two kinds with reasoning of every
    length, told scenes and cut responses.

    Without told scenes what stands behind a long reasoning is never written: tested at 160 tokens, answers broke off
    there, whatever had been seen. Without cut responses nothing but told scenes has a long working. They were to make
    models keep that of other questions going, which they did not (docs/study.md, "The third run").
    """
    told, cut = (
        dataclasses.replace(lengths, low=LONG_TOKENS[0], high=LONG_TOKENS[1], **kind)
        for kind in ({"told": True}, {"cut": True})
    )
    return f"{lengths.setting()}*6,{told.setting()}*1,{cut.setting()}*1"
