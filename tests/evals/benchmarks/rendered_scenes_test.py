"""Scores of answers about scenes, counted by hand."""

import pytest

from qwenla_jax.evals.benchmarks.rendered_scenes import judge_answer, said_details, said_objects, summarise

CAPTION = "small red circle, big blue square, big blue square"


def response(caption, conclusion, reflections=0):
    reattention = "<REFLECTION>look again</REFLECTION>" * reflections
    return (
        f"<SUMMARY>s</SUMMARY><CAPTION>{caption}</CAPTION><REASONING>r</REASONING>{reattention}"
        f"<CONCLUSION>{conclusion}</CONCLUSION>"
    )


def test_one_answer():
    got = judge_answer(response("small red circle, big red square", "2", 2), "2", "count", CAPTION)
    assert (got.kind, got.right, got.well_formed, got.reflections) == ("count", True, True, 2)
    # Named: the circle, which is there, and a red square, which is not; the blue one, twice there, is missed once.
    assert (got.named, got.invented, got.missed) == (2, 1, 1)


def test_objects_do_not_reach_over_commas():
    got = judge_answer(response("small, red circle", "2"), "2", "count", CAPTION)
    assert (got.named, got.invented, got.missed) == (0, 0, 2)


def test_a_plain_response_is_its_own_answer():
    right = judge_answer("2", "2", "count", CAPTION)
    assert right.right and not right.well_formed and right.named == 0
    assert not judge_answer("2 or 3", "2", "count", CAPTION).right
    # Once there is any tag, only the conclusion counts.
    assert not judge_answer("<CAPTION>x</CAPTION>2", "2", "count", CAPTION).right
    described = judge_answer("small red circle, big blue circle", CAPTION, "describe", CAPTION)
    assert (described.named, described.invented, described.missed) == (2, 1, 1)


def test_where_objects_are_named():
    said = response("small red circle, big red square, small red circle", "2", 1)
    got = said_objects(said, CAPTION)
    assert [(said[: one.end].rpartition("<CAPTION>")[2], one.right) for one in got] == [
        ("small red circle", True),
        ("small red circle, big red square", False),
    ]
    plain = "small red circle\nsmall, red circle\nbig blue square: \\boxed{1}"  # the first line sums up the question
    assert [(plain[: one.end], one.right) for one in said_objects(plain, CAPTION)] == []  # a colon is part of a word
    plain = plain.replace(":", ",")
    assert [(plain[: one.end][-15:], one.right) for one in said_objects(plain, CAPTION)] == [("big blue square", True)]


def test_details_that_a_response_tells():
    there = ("small red circle black", "big blue square none")
    said = "what mark is on the big blue square?<REFLECTION>look again: small red circle black: black</REFLECTION>black"
    assert said_details(said, there) == (1, 0)
    assert said_details(said.replace("circle black", "circle gray"), there) == (1, 1)
    # Told twice is told once; another object's mark is wrong; over a comma, and by two words, nothing is told.
    twice = "small red circle black, small red circle black: 1\nbig blue square gray, "
    twice += "big blue square, none, red circle gray"
    assert said_details(twice, there) == (2, 1)
    assert said_details("small red circle", there) == said_details("", ()) == (0, 0)


def test_means():
    answers = [
        judge_answer(response("small red circle, big red square", "2", 1), "2", "count", CAPTION),
        judge_answer(response("big blue square", "no"), "yes", "existence", CAPTION),
        judge_answer(response("", "3"), "3", "count", CAPTION),
        judge_answer(response("small red circle, big blue square", "4"), "3", "count", CAPTION),
    ]
    got = summarise(answers)
    assert got["accuracy"] == 0.5 and got["accuracy/existence"] == 0
    assert got["accuracy/count"] == pytest.approx(2 / 3)
    assert got["format"] == 0.75  # an empty caption breaks the format
    assert got["reflections"] == 0.25
    # The captions name 2, 1, 0 and 2 objects; one object of the first is invented; 8 objects are in their scenes.
    assert (got["chair_i"], got["chair_s"]) == (pytest.approx(1 / 5), pytest.approx(1 / 4))
    assert got["recall"] == pytest.approx(4 / 8)
    assert "chair_i" not in summarise([judge_answer("2", "2", "count", CAPTION)])
    with pytest.raises(ValueError, match="no answers"):
        summarise([])
