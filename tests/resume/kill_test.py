"""A few kills of `kills.py`; the long form is `python tests/resume/kills.py --kills=100`."""

import os

import pytest
from resume import kills


@pytest.mark.slow
def test_a_run_that_was_killed_is_the_run_that_was_not(tmp_path):
    number = int(os.environ.get("QWENLA_KILLS", "2"))
    hits = kills.torture(number, int(os.environ.get("QWENLA_KILLS_SEED", "1")), tmp_path)
    assert sum(hits.values()) == number
