"""Results of the length study as its run writes them, with numbers that a test chooses."""

import itertools

import numpy as np

from qwenla_jax.config.schema import to_dict
from qwenla_jax.study.length_arms import ARMS, BLANK, COPY, OTHER, ROUTE_25, SIZES, SQUEEZED, TEXT
from qwenla_jax.study.length_results import encode, write_result

SCENES = 400
QUICK = SIZES["quick"].arms
TRUE = {TEXT: 0.5, BLANK: 0.5, COPY: 0.7, OTHER: 0.3, SQUEEZED: 0.6, ROUTE_25: 0.6}  # accuracy at 160 tokens


def content(arm, seed=0, accuracy=None, base="a", slots=None):
    """What a run writes about an arm that is as right as `accuracy` says by N."""
    rng = np.random.default_rng([seed, 5])  # the same for all arms: scenes are hard for all of them or for none
    hardness = rng.random(SCENES)
    accuracy = {16: 0.8, 160: TRUE[arm], **(accuracy or {})}
    slots = (0 if arm in (TEXT, SQUEEZED) else 6 if arm == ROUTE_25 else 18) if slots is None else slots
    ones = np.ones(SCENES)
    cells = {}
    for tokens, share in accuracy.items():
        answered = {"kind": rng.integers(0, 3, SCENES), "right": hardness < share, "worked": ones, "tokens": 40 * ones}
        answered["inserted_tokens"] = slots * ones
        answered |= {
            "named": 4 * ones,
            "invented": ones,
            "missed": ones * (3 if arm == COPY else 1),
            "details": 4 * ones,
            "wrong_details": 0 * ones,
        }
        forced = {"inserted_tokens": slots * ones, "colours": 4 * ones, "right_colours": 4 * (hardness < share)}
        cells[f"chain/{tokens}"] = {"continued": encode(answered), "forced": encode(forced)}
    model = ARMS[ARMS[arm].model or arm]
    return {
        "base": base,
        "base_stamp": f"of {base}",
        "seed": seed,
        "condition": "short",
        "arm": arm,
        "used": {
            "reattention": to_dict(ARMS[arm].reattention),
            "squeezed": ARMS[arm].squeezed,
            "words": ARMS[arm].words,
            "order": "after",
            "scenes_seed": seed + 7000,
            "visual_tokens": 16,
        },
        "model": {
            "reattention": to_dict(model.reattention),
            "words": model.words,
            "order": "after",
            "tokens": [11, 32],
            "seed": seed,
            "steps": 160,
        },
        "images": {"tested": SCENES, "trained": 9000, "shared": 0},
        "questions": f"of seed {seed}",
        "cells": cells,
        "seconds": {"training": 60.0, "measuring": 30.0},
        "answers": {"chain/16": {"continued": ["a question -> 7 | an answer"]}},
    }


def folder_of(path, seeds=2, arms=QUICK, bases="a", **accuracy):
    for base, seed, arm in itertools.product(bases, range(seeds), arms):
        name = f"{base}_{seed}_{arm.replace(' ', '')}.json"
        write_result(path / name, content(arm, seed, accuracy.get(arm), base))
    return path
