"""The parts of a response and the means over them, by hand."""

import numpy as np
import pytest

from qwenla_jax.inference.attention_mass import AttentionMass, parts_of, profile

OPEN, CLOSE, STOP = 7, 8, 9


def test_parts():
    ids = np.array([[1, 7, 2, 8, 3, 7, 8, 9], [1, 2, 3, 9, 0, 0, 0, 0], [7, 1, 1, 1, 1, 1, 1, 1]])
    parts = parts_of(ids, np.array([8, 4, 8]), OPEN, CLOSE)
    as_text = lambda name: ["".join("x" if on else "." for on in row) for row in parts[name]]  # noqa: E731
    assert as_text("before") == ["x.......", "xxx.....", "........"]
    assert as_text("in") == [".xxx.xx.", "........", "xxxxxxx."]
    assert as_text("after") == ["....x...", "........", "........"]
    assert as_text("all") == ["xxxxxxx.", "xxx.....", "xxxxxxx."]


def test_profile():
    where = np.array([[True, True, False]])
    mass = AttentionMass(
        original_BxR=np.array([[0.2, 0.4, 9.0]]),
        inserted_BxExR=np.array([[[0.0, 0.2, 9.0], [0.0, 0.1, 9.0]]]),
        even_original_BxR=np.array([[0.5, 0.25, 9.0]]),
        even_inserted_BxExR=np.array([[[0.0, 0.1, 9.0], [0.0, 0.05, 9.0]]]),
        image_BxRxP=None,
        again_BxRxP=None,
    )
    got = profile(mass, {"here": where, "nowhere": where & False})
    assert list(got) == ["here"]
    want = {"tokens": 2, "original": 0.3, "inserted": 0.15, "visual": 0.45, "even": 0.45, "ratio": 1.0}
    assert got["here"] == pytest.approx(want)
