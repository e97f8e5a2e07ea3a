"""The length study's analysis on results that are written by hand.

Oracle: variances by formula, a slow bootstrap written out in loops, and results of which each is broken in one way.
"""

import dataclasses
import json
import math

import numpy as np
import pytest
from length_studies import SCENES, content, folder_of

from qwenla_jax.study.collect import StudyError
from qwenla_jax.study.length_analysis import HELPS, HELPS_NOT, UNKNOWN, Study, contrast, right, verdict
from qwenla_jax.study.length_arms import BLANK, COPY, OTHER, TEXT
from qwenla_jax.study.length_report import write_length_report
from qwenla_jax.study.length_results import BLOCK, read_results, write_result
from qwenla_jax.study.statistics import Ratio


def study_of(path, **wanted):
    return Study.of(read_results(folder_of(path, **wanted)))


def ratios(rng, k, units, spread=0.0):
    """k seeds with shares around a half, whose true values differ by `spread`."""
    found = []
    for _ in range(k):
        values = (rng.random(units) < 0.5 + spread * rng.normal()).astype(float)
        found.append([(1.0, Ratio(values, np.ones(units)))])
    return found


def test_the_interval_has_both_levels():
    """Variance of the mean of k drawn seeds: (variance among the k + mean variance of each by scenes) / k."""
    for k, spread in ((5, 0.1), (2, 0.2), (6, 0.0)):
        models = ratios(np.random.default_rng([k, 3]), k, 500, spread)
        one = contrast([models])
        shares = np.array([part.over.mean() for ((_, part),) in models])
        scenes = np.mean(shares * (1 - shares)) / 500
        assert one.value == pytest.approx(shares.mean()) and one.every == pytest.approx(shares)
        assert one.spread == pytest.approx(shares.std(ddof=1)) and one.scenes_spread == pytest.approx(
            scenes**0.5, rel=0.1
        )
        assert one.scenes_high - one.scenes_low == pytest.approx(3.92 * math.sqrt(scenes / k), rel=0.1)
        if k > 2:  # of two seeds the mean has three values, which is no normal distribution
            assert one.high - one.low == pytest.approx(3.92 * math.sqrt((shares.var() + scenes) / k), rel=0.12)
        assert one.high - one.low >= 0.95 * (one.scenes_high - one.scenes_low)
    # Two base models: each by itself, then their mean.
    a, b = (ratios(np.random.default_rng(seed), 4, 300, 0.1) for seed in (1, 2))
    both, alone = contrast([a, b]), [contrast([one]) for one in (a, b)]
    assert both.value == pytest.approx(np.mean([one.value for one in alone]))
    widths = [one.high - one.low for one in alone]
    assert both.high - both.low == pytest.approx(math.hypot(*widths) / 2, rel=0.12)
    assert [len(base) for base in both.seeds] == [4, 4]


def test_against_a_bootstrap_in_loops():
    """A difference of two arms that share their scenes: pairing makes its interval a third as wide."""
    rng = np.random.default_rng(0)
    seeds = []
    for shift in (0.02, 0.08, 0.05, 0.11):
        hard = rng.random(200)
        seeds.append(((hard < 0.6 + shift).astype(float), (hard < 0.6).astype(float)))
    ones = np.ones(200)
    one = contrast([[[(1.0, Ratio(x, ones)), (-1.0, Ratio(y, ones))] for x, y in seeds]])
    drawn = []
    for _ in range(3000):
        total = 0.0
        for _ in seeds:
            x, y = seeds[rng.integers(len(seeds))]
            scenes = rng.integers(0, 200, 200)
            total += (x[scenes] - y[scenes]).mean()
        drawn.append(total / len(seeds))
    np.testing.assert_allclose([one.low, one.high], np.quantile(drawn, (0.025, 0.975)), atol=0.006)


@pytest.mark.parametrize(
    ("accuracy", "expected", "words"),
    [
        ({}, HELPS, "in every seed"),
        ({BLANK: {160: 0.7}}, UNKNOWN, "COPY - blank"),  # the tokens help, not the image
        ({OTHER: {160: 0.72}}, UNKNOWN, "COPY - another image"),  # the copy is ignored
        ({COPY: {160: 0.505}}, UNKNOWN, "COPY - text-only"),
        ({COPY: {160: 0.45}}, HELPS_NOT, "below 1%"),
        ({TEXT: {16: 0.4}}, UNKNOWN, "not learned"),
        ({TEXT: {160: 0.98}, COPY: {160: 1.0}}, UNKNOWN, "nothing to gain"),
        ({TEXT: {160: 0.02}, COPY: {160: 0.2}, BLANK: {160: 0.01}, OTHER: {160: 0.0}}, UNKNOWN, "break down"),
    ],
)
def test_the_rule(tmp_path, accuracy, expected, words):
    one = verdict(study_of(tmp_path, **accuracy))
    assert one.verdict == expected and words in one.reason
    assert one.differences.keys() == {TEXT, BLANK, OTHER}


def test_every_seed_has_to_agree(tmp_path):
    folder = folder_of(tmp_path, seeds=5)
    assert verdict(Study.of(read_results(folder))).verdict == HELPS
    write_result(folder / "a_4_COPY.json", content(COPY, 4, {160: 0.48}))
    one = verdict(Study.of(read_results(folder)))
    assert one.verdict == UNKNOWN and "in every seed" in one.reason and one.differences[TEXT].low > 0


def swapped(files):
    """Two arms' files under each other's name."""
    blank, copy = (next(f for f in files if f["arm"] == arm) for arm in (BLANK, COPY))
    blank["arm"], copy["arm"] = COPY, BLANK


def another_model(files):
    next(f for f in files if f["arm"] == COPY)["model"] = next(f for f in files if f["arm"] == BLANK)["model"]


def switched_off(files):
    one = next(f for f in files if f["arm"] == COPY)
    one["cells"]["chain/160"]["forced"]["inserted_tokens"] = [0.0] * (SCENES // BLOCK)


def hardly_off(files):
    """In one block of scenes of one arm a single look did not happen."""
    next(f for f in files if f["arm"] == BLANK)["cells"]["chain/16"]["forced"]["inserted_tokens"][3] -= 18


def continued_without(files):
    """Teacher-forced the arm looks; the answers that it continues were given without a look."""
    one = next(f for f in files if f["arm"] == COPY)
    one["cells"]["chain/16"]["continued"]["inserted_tokens"] = [0.0] * (SCENES // BLOCK)


def trained_on(files):
    files[0]["images"]["shared"] = 1


def trained_on_unknown(files):
    del files[0]["images"]["shared"]


def other_questions(files):
    files[1]["questions"] = "others"


def other_scenes(files):
    files[1]["used"]["scenes_seed"] = 7001


def other_base(files):
    files[2]["base_stamp"] = "another"


def other_length(files):
    files[2]["model"]["tokens"] = [11, 330]


def no_arm(files):
    files[0]["arm"] = "copy"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (swapped, "reattention.content='blank', expected 'image'"),
        (another_model, "has a model that was trained with reattention.content='blank'"),
        (switched_off, "chain/160: 0 tokens put in an answer (forced), expected 18 of COPY"),
        (hardly_off, "chain/16: 17.955 tokens put in an answer (forced), expected 18 of blank"),
        (continued_without, "chain/16: 0 tokens put in an answer (continued), expected 18 of COPY"),
        (trained_on, "1 of 400 test images were trained on"),
        (trained_on_unknown, "None of 400 test images"),
        (other_questions, "expected the same questions"),
        (other_scenes, "scenes_seed is 7001, expected 7000"),
        (other_base, "expected one base model"),
        (other_length, "model.tokens is [11, 330], expected [11, 32]"),
        (no_arm, "arm 'copy'; expected one of text-only"),
    ],
)
def test_what_is_broken_is_caught(tmp_path, spoil, message):
    folder_of(tmp_path, seeds=1)
    files = {path: json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))}
    spoil(list(files.values()))
    for path, one in files.items():
        path.write_text(json.dumps(one))
    with pytest.raises(StudyError) as caught:
        read_results(tmp_path)
    assert message in str(caught.value)


def test_the_same_arm_twice_and_files_that_are_none(tmp_path):
    folder_of(tmp_path, seeds=1)
    write_result(tmp_path / "again.json", content(COPY))
    with pytest.raises(StudyError, match="the same arm twice"):
        read_results(tmp_path)
    (tmp_path / "again.json").write_text("{")
    with pytest.raises(StudyError, match="again.json: not readable"):
        read_results(tmp_path)
    (tmp_path / "again.json").write_text("{}")
    with pytest.raises(StudyError, match="again.json: no version, base"):
        read_results(tmp_path)
    with pytest.raises(StudyError, match="holds no results"):
        read_results(tmp_path / "none")
    folder_of(tmp_path / "other", seeds=2)
    (tmp_path / "other" / "a_1_COPY.json").unlink()
    with pytest.raises(StudyError, match="base a, seed 1, short: no result of COPY"):
        verdict(Study.of(read_results(tmp_path / "other")))


def test_the_report_is_made_of_the_files(tmp_path):
    folder = folder_of(tmp_path / "results")
    head = write_length_report(folder, tmp_path / "new" / "report.md")
    assert "trained on short answers: **helps**" in head and "Provisional" in head
    text = (tmp_path / "new" / "report.md").read_text()
    study = Study.of(read_results(folder))
    one = study.difference("short", COPY, TEXT, right(160))
    assert f"| COPY - text-only | above 0 | {100 * one.value:+.1f} [{100 * one.low:+.1f}" in text
    values = [np.mean([content(arm, s)["cells"]["chain/160"]["continued"]["right"].count("1") for s in (0, 1)])
              for arm in (COPY, TEXT)]  # fmt: skip
    assert one.value == pytest.approx((values[0] - values[1]) / SCENES)
    assert "| COPY - vision-only | above 0 |  |  |  | not judged: no results of vision-only (short) |" in text
    assert f"| accuracy (continued) | {COPY} |" in text and "-> 7 \\| an answer" in text
    # A ratio of sums: one invented object of four.
    assert "| CHAIR_i after the look (continued) | COPY | 25.0 [25.0, 25.0] | 25.0 [25.0, 25.0] |" in text
    # Three of four objects named are there; beside them COPY leaves out three, and text-only one.
    assert "| COPY - text-only, left out | - | +25.0 [+25.0, +25.0] |" in text
    assert "| COPY - text-only, CHAIR_i | - | +0.0 [+0.0, +0.0] |" in text


def test_right_where_text_only_is_wrong(tmp_path):
    """By hand: an arm of accuracy a is right in the scenes whose hardness is below a, so that arms are nested."""
    write_length_report(folder_of(tmp_path / "results"), tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    rows = [
        line.split(" | ")
        for line in text[text.index("against text-only") :].splitlines()
        if line.startswith(("| right where", "| wrong where"))
    ]
    got = {(row[0].removeprefix("| "), row[1]): row[-1].split(" ")[0] for row in rows}
    hardness = np.stack([np.random.default_rng([seed, 5]).random(400) for seed in (0, 1)])
    share = lambda low, high: f"{100 * ((low <= hardness) & (hardness < high)).mean():.1f}"  # noqa: E731
    gained, lost = "right where text-only is wrong", "wrong where it is right"
    assert (got[gained, COPY], got[lost, COPY]) == (share(0.5, 0.7), "0.0")
    assert (got[gained, OTHER], got[lost, OTHER]) == ("0.0", share(0.3, 0.5))
    assert {arm for _, arm in got} == {BLANK, COPY, OTHER}


def test_a_difference_of_differences(tmp_path):
    study = study_of(tmp_path, seeds=3)
    far, near = right(160), right(16)
    one = study.weighed([(1.0, "short", COPY, far), (-1.0, "short", TEXT, far), (-1.0, "short", COPY, near),
                         (1.0, "short", TEXT, near)])  # fmt: skip
    parts = [study.difference("short", COPY, TEXT, of).value for of in (far, near)]
    assert one.value == pytest.approx(parts[0] - parts[1])
    assert dataclasses.asdict(study.share("short", COPY, near))["value"] == pytest.approx(0.8, abs=0.05)
