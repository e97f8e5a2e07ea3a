"""The page of figures: results on disk and back, and rows by hand."""

import dataclasses
import json

import pytest
from fit_options import LARGE

from qwenla_jax.planner import scale
from qwenla_jax.planner.chips import parse_topology
from qwenla_jax.planner.compiled import Load
from qwenla_jax.planner.fit_report import Fit, Phase

PHASES = {
    "rollout": Phase(2e12, 3e9, {"all-gather": 4e9}, {"all-gather": 1}, 5e9, 0.5, "memory", 1, 1, 0, 10.0, 20.0),
    "update": Phase(6e12, 7e9, {"all-reduce": 8e9}, {"all-reduce": 2}, 9e9, 1.5, "compute", 1, 1, 0, 30.0, 40.0),
}
FIT = Fit("v5p:2x2x4", 16, (1, 8, 2), "compiled", 102e9, {"parameters": 9e9}, 9e9, 0.9, True, PHASES, 2.0)
QUICK = dataclasses.replace(FIT, source="compiled quickly", peak_bytes=8e9)


@pytest.fixture
def cases(monkeypatch):
    """One case of each table, and one that fits nowhere."""
    planned = dataclasses.replace(FIT, source="arithmetic", peak_bytes=1e9)
    fit = scale.Case("fit", "7b", "8,192 in all", LARGE, parse_topology("v5p:2x2x4"), planned)
    grown = dataclasses.replace(fit, table="scaling")
    rows = [("7b", "v5p", "8,192 in all", fit), ("72b", "v5e", "8,192 in all", None)]
    monkeypatch.setattr(scale, "fit_cases", lambda preset, results: rows)
    monkeypatch.setattr(scale, "scaling_cases", lambda preset: [grown])
    return fit, grown


def test_a_result_comes_back_from_its_file(tmp_path, cases, monkeypatch):
    monkeypatch.setattr(scale, "compile_fit", lambda options, topology, load, quick: (FIT, QUICK)[quick])
    path = tmp_path / "new" / "results.jsonl"
    assert scale.read_results(path) == {}
    for case in cases:
        scale.compile_case(case, path)
        scale.compile_case(case, path, True)
    result = scale.read_results(path)
    assert result == {(case.key, one.source): one for case in cases for one in (FIT, QUICK)}
    assert [scale.best(case, result).peak_bytes for case in cases] == [9e9, 9e9]
    assert len({case.key for case in cases}) == 2


@pytest.mark.parametrize("line", ["{", "[]", json.dumps({"case": "x", "fit": {"phases": {"update": {"flops": 1}}}})])
def test_a_line_that_is_no_result_is_named(tmp_path, line):
    (tmp_path / "results.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="results.jsonl:1: is no result"):
        scale.read_results(tmp_path / "results.jsonl")


def test_what_was_compiled_and_is_too_small_gives_way(monkeypatch):
    """By hand: two slices fit by arithmetic with either setting; results strike them out one after another."""
    monkeypatch.setattr(scale, "LOADS", {"1,024 new tokens": scale.Table(Load(512))})
    monkeypatch.setattr(scale, "CHIPS", ("v5p",))
    monkeypatch.setattr(scale, "published_sizes", lambda: ("7b",))
    both = [(parse_topology(name), FIT) for name in ("v5p:2x2x1", "v5p:2x2x2")]
    monkeypatch.setattr(scale, "fitting", lambda options, chip, load: iter(both))
    result, order = {}, []
    for free in (0.05, 0.02, 0.07, 0.01):
        ((_, _, _, case),) = scale.fit_cases(lambda size: LARGE, result)
        order.append((case.topology.name, case.options.optim.accumulation))
        result[case.key, "compiled quickly"] = dataclasses.replace(QUICK, fits=False, headroom=free)
    parts = LARGE.optim.accumulation
    assert order == [(name, n) for n in (parts, 1) for name in ("v5p:2x2x1", "v5p:2x2x2")] and parts != 1
    ((_, _, _, case),) = scale.fit_cases(lambda size: LARGE, result)  # none fits; the one with 7% free is told
    assert (case.topology.name, case.options.optim.accumulation) == ("v5p:2x2x1", 1)
    result[case.key, "compiled"] = FIT  # at full effort it does
    ((_, _, _, case),) = scale.fit_cases(lambda size: LARGE, result)
    assert case.topology.name == "v5p:2x2x1"


def test_rows_say_where_they_are_from(cases):
    fit, grown = cases
    text = scale.page(lambda size: LARGE, {(fit.key, "compiled"): FIT}, "a machine")
    assert (
        "| 7b | v5p:2x2x4 | 16 | 1, 8, 2 | 2 | every token | 9.0 | 90% | 2.0 | memory / compute | 40 (60) | compiled |"
    ) in text
    assert "| 72b | v5e: no slice |" in text
    assert "| 16 | 16 | 8.0 | 4.0 | 8.0 | all-reduce 8 | 1.0 | 2.00 | arithmetic |" in text
    columns = {line.count("|") for line in text.splitlines() if line.startswith(("| 7b", "| 72b", "| model"))}
    assert len(columns) == 1
    assert "three ways" not in text


def test_rows_of_earlier_programs_are_marked(cases):
    before = {name: dataclasses.replace(phase, moved_bytes=None) for name, phase in PHASES.items()}
    result = {(cases[0].key, "compiled"): dataclasses.replace(FIT, phases=before)}
    assert "| 40 (60) | compiled* |" in scale.page(lambda size: LARGE, result, "a machine")


def test_what_was_compiled_both_ways_is_compared(cases):
    fit, grown = cases
    text = scale.page(lambda size: LARGE, {(fit.key, one.source): one for one in (FIT, QUICK)}, "a machine")
    assert "| 9.0 | 90% | 2.0 | memory / compute | 40 (60) | compiled |" in text
    table = text[text.index("three ways") :].splitlines()[4:]
    assert [row.split(" | ")[2:] for row in table] == [
        ["compiled", "5.0 / 9.0", "4.0 / 8.0", "40 (60) |"],
        ["compiled quickly", "5.0 / 9.0", "4.0 / 8.0", "40 (60) |"],
        ["arithmetic", "5.0 / 9.0", "4.0 / 8.0", "- |"],
    ]
    quick = scale.page(lambda size: LARGE, {(grown.key, QUICK.source): QUICK}, "a machine")
    assert "| all-reduce 8 | 8.0 | 2.00 | compiled quickly |" in quick


def test_more_chips_are_told_at_one_effort(cases, monkeypatch):
    _, grown = cases
    more = dataclasses.replace(grown, topology=parse_topology("v5p:4x8x8"))
    monkeypatch.setattr(scale, "scaling_cases", lambda preset: [grown, more])
    one = [(grown.key, "compiled"), (grown.key, "compiled quickly"), (more.key, "compiled quickly")]
    result = dict(zip(one, (FIT, QUICK, QUICK), strict=True))
    head = "## More chips"
    rows = scale.page(lambda size: LARGE, result, "a machine").split(head)[1].split("##")[0].splitlines()[-3:-1]
    assert [row.split(" | ")[-1] for row in rows] == ["compiled quickly |"] * 2
    del result[grown.key, "compiled quickly"]  # without one: the most exact of each
    rows = scale.page(lambda size: LARGE, result, "a machine").split(head)[1].splitlines()[-2:]
    assert [row.split(" | ")[-1] for row in rows] == ["compiled |", "compiled quickly |"]
