"""Questions about rendered scenes that are to be answered after counting down: a pure function of its arguments.

Paper silent: it has no such data. The countdown is reasoning of a chosen length that does not concern the image. The
caption only gives the number of objects, so that a response without a reflection answers at a glance; a reflection
describes every object, and the answer follows from it. So reflecting pays, the more the longer the reasoning is.
"""

from __future__ import annotations

import numpy as np

from qwenla_jax.data.synthetic.counting_options import CountingOptions
from qwenla_jax.data.synthetic.scene_questions import KINDS, MAKERS, SceneQuestion, caption_of
from qwenla_jax.data.synthetic.scenes import Scene


def ask(scene: Scene, seed: int, split: int, index: int, options: CountingOptions) -> SceneQuestion:
    """The question of a scene. What is asked about it does not depend on `options`.

    Args:
      scene: `make_scene(seed, split, index)`.
      seed, split, index: the scene's; everything is drawn from them.
      options: of countdown and response.
    """
    things = scene.in_order()
    rng = np.random.default_rng([seed, split, index, 7])
    kind = KINDS[rng.integers(len(KINDS))]
    draft = MAKERS[kind](things, rng)
    if draft is None:  # no object is unique by two words
        kind, draft = "count", MAKERS["count"](things, rng)
    assert draft is not None
    rng = np.random.default_rng([seed, split, index, 8])
    reflects = rng.random() < options.reflect
    numbers = int(rng.integers(options.low, options.high + 1))
    start = int(rng.integers(10 + numbers, 100))
    counted = [str(start - step) for step in range(numbers)]
    countdown = f"From {counted[0]} to {counted[-1]} count." if counted else ""
    answer = draft.answer if options.asks else counted[-1]
    reasoning = [",".join(counted)] * bool(counted) + [draft.glance] * options.asks
    sections = [
        ("SUMMARY", draft.summary if options.asks else "count"),
        ("CAPTION", f"{len(things)} object{'s' if len(things) > 1 else ''}"),
        ("REASONING", ": ".join(reasoning)),
        *([("REFLECTION", f"look again: {caption_of(scene)}")] if reflects and options.asks else []),
        ("CONCLUSION", answer),
    ]
    response = "".join(f"<{name}>{text}</{name}>" for name, text in sections)
    question = " ".join(filter(None, [countdown, draft.question if options.asks else ""]))
    return SceneQuestion(kind if options.asks else "countdown", question, answer, response, True)
