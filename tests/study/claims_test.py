"""Verdicts on studies whose numbers were chosen: both ways, undecided, and where something is missing."""

import math

import pytest
from scipy import stats
from studies import attention, line, records, write_run

from qwenla_jax.study.claims import FAILS, HOLDS, NOT_JUDGED, UNKNOWN, decide, verdicts, written
from qwenla_jax.study.collect import BASE, COLD, COPY, ROUTE, TEXT, VISION, ZERO, collect
from qwenla_jax.study.statistics import Estimate


@pytest.mark.parametrize(
    ("low", "high", "sign", "verdict"),
    [
        (0.01, 0.03, +1, HOLDS),
        (0.01, 0.03, -1, FAILS),
        (-0.03, -0.01, -1, HOLDS),
        (-0.03, -0.01, +1, FAILS),
        (-0.01, 0.03, +1, UNKNOWN),
        (0.0, 0.03, +1, UNKNOWN),
        (-0.03, 0.0, -1, UNKNOWN),
        (0.0, 0.0, +1, UNKNOWN),
        (math.nan, math.nan, +1, NOT_JUDGED),
    ],
)
def test_the_rule(low, high, sign, verdict):
    assert decide(Estimate((low + high) / 2, low, high), sign) == verdict


def judged(study):
    return {verdict.number: verdict for verdict in verdicts(study)}


@pytest.fixture(scope="module")
def favourable(tmp_path_factory):
    """Two seeds in which the paper is right about accuracy, attention, hallucination and time."""
    folder = tmp_path_factory.mktemp("favourable")
    right = {COLD: 10, ZERO: 20, TEXT: 18, COPY: 36, ROUTE: 28, VISION: 12, "route 25": 8, "route 75": 32}
    right |= {"no BRPO + COPY": 20, "no BRPO + ROUTE": 10}
    for seed in (0, 1):
        asked = records(seed)
        clean = [line(r, i < 36, ((4, True), (12, i % 4 != 0)), wrong_details=0) for i, r in enumerate(asked)]
        silent = [line(r, i < 10, reflections=0, reflection_tokens=0) for i, r in enumerate(asked)]
        write_run(
            folder / f"seed_{seed}",
            seed,
            right=right,
            cold_start={"lines": silent},
            copy={"lines": clean, "attention": attention(inside=0.35), "batch_s": (0.63, 0.64, 0.635)},
            route={"attention": attention(inside=0.2), "batch_s": (0.52, 0.525, 0.515)},
        )
    return collect([folder / "seed_0", folder / "seed_1"])


def test_claims_that_hold(favourable):
    got = judged(favourable)
    # 3 would need places and lengths that matter, 2b fewer reflection tokens than none.
    expected = {"1", "2a", "4a", "4b", "4c", "4d", "5a", "5b", "5c", "6a", "6b", "6c", "7a", "7c", "8", "9a", "9b"}
    expected |= {"10a", "10b", "10c", "11a", "11b", "11c"}
    assert {n for n in got if got[n].verdict == HOLDS and "'" not in n} - {"3a", "3b"} == expected
    assert got["2b"].verdict == FAILS and got["2b"].result.value == pytest.approx(10)
    assert all(got[number].agreeing == 2 for number in expected)


def test_their_numbers(favourable):
    """Counted by hand from what the fixture wrote."""
    got = judged(favourable)
    assert got["1"].result.value == pytest.approx(10 / 40) and got["1"].seeds == (0.25, 0.25)
    assert got["1"].result.p == pytest.approx(stats.binomtest(0, 20).pvalue)
    assert got["6a"].result.value == pytest.approx(18 / 40) and got["10b"].result.value == pytest.approx(4 / 40)
    # Text-only invents the second of two objects always, COPY in every fourth answer: 10 of 80 against 40 of 80.
    assert got["7a"].result.value == pytest.approx(10 / 80 - 40 / 80)
    assert got["7b"].verdict == UNKNOWN and got["7b"].result[:3] == (0, 0, 0)
    assert got["7c"].result.value == -0.5 and got["7d"].verdict == UNKNOWN  # one of two marks, or none
    # The bins hold as many tokens each: the first is one third, the first two are two; a tie, and the first wins.
    assert got["4a"].result.value == pytest.approx((0.3 + 0.2) / 2 - 0.4)
    assert got["4b"].result.value == pytest.approx(((0.3 + 0.2) / 2 - 0.4) / 0.25)
    assert got["4c"].result.value == pytest.approx(0.15 - 0.3)
    assert got["5a"].result.value == pytest.approx(0.35 - 0.15)
    assert got["5c'"].result.value == pytest.approx((0.35 - 0.2) / 0.25)
    assert got["11a"].result.value == pytest.approx((0.63 + 0.64 + 0.635) / 1.5 - 1)
    assert got["11a"].seeds == (pytest.approx(0.27), pytest.approx(0.27))
    assert got["11c"].result.value == pytest.approx(1.905 / 1.56 - 1)
    # The object before the middle (token 12 of 4 and 12: 8) is never invented, the one behind it always.
    assert got["3a'"].result.value == pytest.approx(1)
    assert got["6a"].sentence().startswith("Holds: +45.0 points [")
    assert got["6a"].sentence().endswith("p < 0.001; on the claim's side in 2 of 2 seeds.")


def test_claims_that_do_not_hold(tmp_path):
    """COPY is worse, invents more, looks less and is quicker; one seed."""
    asked = records(0)
    worse = [line(r, i < 5, ((4, False), (12, False))) for i, r in enumerate(asked)]
    rising = attention(early=0.2, middle=0.3, late=0.4, inside=0.45)
    write_run(
        tmp_path,
        systems=(BASE, TEXT, COPY),
        right={TEXT: 30},
        base={"attention": rising},
        text_only={"attention": rising},
        copy={"lines": worse, "attention": attention(inside=0.1), "batch_s": (0.4, 0.41, 0.4)},
    )
    got = judged(collect([tmp_path]))
    wanted = ("4a", "4b", "4c", "4d", "5a", "5a'", "6a", "7a", "11a")
    assert [got[number].verdict for number in wanted] == [FAILS] * len(wanted)
    assert got["6a"].agreeing == 0 and got["6a"].sentence().startswith("Does not hold: -62.5 points")
    assert got["6b"].verdict == NOT_JUDGED and "no evaluation of route in" in got["6b"].sentence()


def test_claims_that_cannot_be_told(tmp_path):
    """One question more of forty, and half of the objects invented on both sides of the middle."""
    lines = [line(r, True, ((4, i % 2 == 0), (12, i % 2 == 1))) for i, r in enumerate(records(0))]
    write_run(tmp_path, systems=(BASE, TEXT, COPY), right={TEXT: 39}, base={"lines": lines})
    got = judged(collect([tmp_path]))
    assert got["6a"].verdict == UNKNOWN and got["6a"].result.value == pytest.approx(1 / 40)
    assert got["6a"].result.p == 1 and "Cannot be told (the interval holds 0): +2.5 points" in got["6a"].sentence()
    assert got["3a'"].verdict == UNKNOWN and got["3a'"].result.value == 0
    # All answers are as long: none is longer than the median.
    assert got["3a"].verdict == NOT_JUDGED and "too little was counted" in got["3a"].reason


def test_hallucination_by_length(tmp_path):
    """Twenty answers of 20 tokens with one object of two invented, twenty of 30 with all."""
    lines = [line(r, True, ((4, i >= 20), (12, False)), 20 if i >= 20 else 30) for i, r in enumerate(records(0))]
    write_run(tmp_path, systems=(BASE,), base={"lines": lines})
    got = judged(collect([tmp_path]))["3a"]
    assert got.verdict == HOLDS and got.result.value == pytest.approx(0.5) and got.agreeing == 1


def test_times_of_other_batches(tmp_path):
    write_run(tmp_path, systems=(TEXT, COPY), copy={"batch_s": (0.5, 0.5)})
    assert "not timed in the same batches" in judged(collect([tmp_path]))["11a"].reason


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0153, "points", "+1.5 points"),
        (-0.0004, "points", "0.0 points"),
        (0.0004, "points", "0.0 points"),
        (-0.0006, "points", "-0.1 points"),
        (-0.004, "", "0.00"),
        (0.5, "%", "+50.0%"),
        (math.nan, "points", "-"),
    ],
)
def test_differences_as_they_are_written(value, unit, text):
    assert written(value, unit) == text
