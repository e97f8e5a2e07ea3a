"""Draws docs/figures/countdown.svg: right answers of the embedded checkpoint against the length of its reasoning.

    python docs/figures/countdown.py [MODEL [SCENES]]

Questions about fresh scenes after a countdown, the same ones at every length; in training no countdown before a
question had more than ten numbers. Greedy answers with the same parameters: text-only, with COPY, and with COPY of a
blank image, the control. Prints the table that docs/MEASUREMENTS.md has. Needs the extra `report`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from qwenla_jax.config.inference_config import InferenceConfig
from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.data.sources.factory import make_source
from qwenla_jax.data.synthetic.source import SceneSource
from qwenla_jax.inference.runtime import build
from qwenla_jax.study.figures import STYLE, require_matplotlib, to_bytes
from qwenla_jax.study.length_arms import BLANK, COPY, TEXT
from qwenla_jax.study.length_figure import LINES
from qwenla_jax.study.length_measures import answer_sampler, generated
from qwenla_jax.utils.intervals import wilson

NUMBERS, SEED = (5, 10, 20, 30, 40), 20261130
TOKENS = 3  # of a number
MODES = {
    TEXT: ReattentionOptions(),
    COPY: ReattentionOptions(mode="copy", max_insertions=1),
    BLANK: ReattentionOptions(mode="copy", content="blank", max_insertions=1),
}


def measure(model: str, scenes: int) -> dict[str, dict[int, np.ndarray]]:
    """Whether each answer is right, by mode and numbers of the countdown; prints a line for each."""
    right: dict[str, dict[int, np.ndarray]] = {}
    for mode, reattention in MODES.items():
        config = InferenceConfig(init_from=model, batch_size=64, max_response_tokens=192, reattention=reattention)
        runtime, params = build(config)
        sampler = answer_sampler(runtime, 192, given=False)
        right[mode] = {}
        for numbers in NUMBERS:
            source = make_source(f"counting_scenes#numbers={numbers}&reflect=1", "held_out", seed=SEED, size=scenes)
            assert isinstance(source, SceneSource)
            one = generated(runtime, params, source, False, sampler).numbers
            right[mode][numbers] = one["right"]
            interval = wilson(int(one["right"].sum()), scenes)
            print(
                f"{mode}, {numbers} numbers: {one['right'].mean():.1%} [{interval.low:.1%}, {interval.high:.1%}], ",
                end="",
            )
            print(f"{one['reflections'].mean():.2f} reflections, {one['worked'].mean():.1%} count right")
    for numbers in NUMBERS:
        rescued, lost = (sum(right[a][numbers] > right[b][numbers]) for a, b in ((COPY, TEXT), (TEXT, COPY)))
        print(f"{numbers} numbers: COPY alone is right in {rescued}, text-only alone in {lost} of {scenes}")
    return right


def draw(right: dict[str, dict[int, np.ndarray]]) -> bytes:
    """The figure, as SVG."""
    matplotlib = require_matplotlib()
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(5.4, 2.9), layout="constrained")
        axis = figure.subplots()
        for mode, by_numbers in right.items():
            shares, low, high = np.transpose([wilson(int(one.sum()), len(one)) for one in by_numbers.values()]) * 100
            color, marker, dash = LINES[mode]
            label = "COPY of a blank image" if mode == BLANK else mode
            x = [TOKENS * numbers for numbers in by_numbers]
            ends = shares - low, high - shares
            axis.errorbar(x, shares, ends, color=color, marker=marker, ls=dash, label=label, capsize=2)
        axis.axvspan(TOKENS, 10 * TOKENS, color="#eeeeee", zorder=0)
        axis.set_xlabel("tokens of reasoning before the reflection (grey: trained lengths)")
        axis.set_ylabel("right answers (%)")
        axis.legend(loc="lower left")
    return to_bytes(figure)


if __name__ == "__main__":
    arguments = [*sys.argv[1:], *("tiny", "1000")[len(sys.argv) - 1 :]]
    Path(__file__).with_suffix(".svg").write_bytes(draw(measure(arguments[0], int(arguments[1]))))
