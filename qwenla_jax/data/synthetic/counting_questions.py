"""Questions about rendered scenes that are to be answered after counting down: a pure function of its arguments.

Paper silent: it has no such data. The countdown is reasoning of a chosen length that does not concern the image. The
caption only gives the number of objects, so that a response without a reflection answers at a glance; a reflection
describes every object, and the answer follows from it. So reflecting pays, the more the longer the reasoning is.
"""

from __future__ import annotations

import numpy as np

from qwenla_jax.data.synthetic.counting_options import CountingOptions
from qwenla_jax.data.synthetic.scene_questions import KINDS, MAKERS, Draft, SceneQuestion, caption_of
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
    if options.asks == "total":
        total = str(len(things))
        kind, draft = "total", Draft("How many objects are there?", "count objects", total, "objects", total, "")
    rng = np.random.default_rng([seed, split, index, 8])
    reflects = rng.random() < options.reflect and options.asks == "scene"
    numbers = int(rng.integers(options.low, options.high + 1))
    start = int(rng.integers(10 + numbers, 100))
    counted = ",".join(str(start - step) for step in range(numbers))
    countdown = f"From {start} to {start - numbers + 1} count. " if numbers else ""
    sections = [
        ("SUMMARY", draft.summary),
        ("CAPTION", f"{len(things)} object{'s' if len(things) > 1 else ''}"),
        ("REASONING", f"{counted}: {draft.glance}" if numbers else draft.glance),
        *([("REFLECTION", f"look again: {caption_of(scene)}")] if reflects else []),
        ("CONCLUSION", draft.answer),
    ]
    response = "".join(f"<{name}>{text}</{name}>" for name, text in sections)
    return SceneQuestion(kind, f"{countdown}{draft.question}", draft.answer, response, True)
