"""Verifiers on texts whose verdicts are worked out by hand."""

import dataclasses

import pytest

from qwenla_jax.distill.distill_options import DistillOptions, JudgeOptions, VerifyOptions
from qwenla_jax.distill.verify import (
    Status,
    Vote,
    agreement_verdicts,
    assess,
    best,
    format_verdict,
    judges_verdict,
    reflection_verdict,
    rule_verdict,
)


def response(conclusion, reasoning="r"):
    return (
        f"<SUMMARY>s</SUMMARY><CAPTION>c</CAPTION><REASONING>{reasoning}</REASONING>"
        f"<CONCLUSION>{conclusion}</CONCLUSION>"
    )


@pytest.mark.parametrize(
    "text, answer, passed, code, reason",
    [
        (response("3"), "3", True, "ok", "right answer"),
        (response("three"), "3", True, "ok", "right answer"),
        (response("4"), "3", False, "wrong_answer", "concludes '4', the right answer is '3'"),
        (response("3") + "!", "3", False, "format_stray_text", "character 90"),  # 20 + 20 + 24 + 26
        (response("3")[:-1], "3", False, "format_unclosed", "breaks"),
        ("3", "3", False, "format_no_tags", "character 0"),
        (response("3", "<|im_end|>"), "3", False, "control_token", "<|im_end|>"),
        (response("3", "<|box_start|>"), "3", False, "control_token", "<|box_start|>"),
    ],
)
def test_rule(text, answer, passed, code, reason):
    verdict = rule_verdict(text, answer)
    assert (verdict.verifier, verdict.passed, verdict.code) == ("rule", passed, code)
    assert reason in verdict.reason


LOOK = "<REFLECTION>I look again.</REFLECTION>"


@pytest.mark.parametrize(
    "row, passed, code",
    [
        ({}, True, "ok"),
        ({"text": ""}, None, "pending"),
        ({"text": "", "error": "HTTP 500"}, False, "no_reply"),
        ({"reflection_tokens": 9}, False, "reflection_length"),
        ({"reflection_tokens": 201}, False, "reflection_length"),
        ({"tokens": 65}, False, "too_long"),
        # What no reflection can mend: a response that has one, breaks the format, or concludes wrongly.
        ({"source": response("3").replace("<CON", LOOK + "<CON"), "text": ""}, False, "source"),
        ({"source": response("3")[:-1], "text": ""}, False, "source"),
        ({"answer": "4"}, False, "source"),
        # The last answer that the reflection states counts, in any usual writing of the right one.
        ({"look": "At first I thought the answer is 4. But no, the answer is **3**."}, True, "ok"),
        ({"look": "The answer is 4, not 3."}, False, "answer_changed"),
        ({"answer": "A", "options": ["3", "4"], "look": "So the answer is (B)."}, False, "answer_changed"),
        ({"answer": "A", "options": ["3", "4"], "look": "So the answer is A."}, True, "ok"),
        # Free text is not compared: other words may say the same.
        ({"answer": "a red cup", "source": response("a red cup"), "look": "The answer is 1 cup, red."}, True, "ok"),
    ],
)
def test_reflection(row, passed, code):
    row = {"source": response("3"), "answer": "3", "error": "", "tokens": 64, "reflection_tokens": 10} | row
    look = f"<REFLECTION>{row.pop('look', 'I look again.')}</REFLECTION>"
    row = {"text": row["source"].replace("<CON", look + "<CON")} | row
    verdict = reflection_verdict(row, DistillOptions(make="cold_start"))
    assert (verdict.passed, verdict.code) == (passed, code), verdict


def test_format_alone_does_not_look_at_the_answer():
    assert format_verdict(response("anything")).passed
    assert format_verdict("<CONCLUSION>3</CONCLUSION>").code == "format_missing"
    assert format_verdict(response("3", "<|im_start|>")).code == "control_token"


def test_agreement_counts_each_conclusion_with_itself():
    texts = [response("3"), response("2"), response("three"), "no conclusion"]
    two = agreement_verdicts(texts, 2)
    assert [v.passed for v in two] == [True, False, True, False]
    assert [v.code for v in two] == ["ok", "disagreement", "ok", "no_conclusion"]
    assert two[0].reason == "2 of 4 samples conclude the same, 2 needed"
    assert [v.passed for v in agreement_verdicts(texts, 1)] == [True, True, True, False]
    assert not any(v.passed for v in agreement_verdicts(texts, 3))
    # The answer that is matched may be either: "B" is what "(B) red" says, not the other way round.
    assert [v.passed for v in agreement_verdicts([response("B"), response("(B) red")], 2)] == [True, True]
    # With the options known, the letter and the text of one are the same conclusion.
    texts = [response("B"), response("red"), response("blue")]
    assert [v.passed for v in agreement_verdicts(texts, 2, ("blue", "red"))] == [True, True, False]
    assert not any(v.passed for v in agreement_verdicts(texts, 2))


def test_an_options_text_is_its_letter():
    assert rule_verdict(response("red"), "B", ("blue", "red")).passed
    assert not rule_verdict(response("blue"), "B", ("blue", "red")).passed
    assert not rule_verdict(response("red"), "B").passed


C, N, A, P = Vote.CORRECT, Vote.INCORRECT, Vote.ABSTAIN, Vote.PENDING


@pytest.mark.parametrize(
    "votes, passed, code",
    [
        ((C, C, C, C), True, "ok"),
        ((C, N, C, C), True, "ok"),  # paper: 2 of 4 reject, 1 does not
        ((C, N, C, N), False, "judged_incorrect"),
        ((N, N, N, N), False, "judged_incorrect"),
        ((C, A, C, C), True, "ok"),
        ((C, A, A, C), False, "too_few_votes"),
        ((A, A, A, A), False, "too_few_votes"),
        ((N, A, N, A), False, "judged_incorrect"),
        ((C, C, C, P), None, "pending"),
        ((N, N, P, P), False, "judged_incorrect"),  # whatever the others will say
        ((A, A, P, P), None, "pending"),
    ],
)
def test_votes_of_four_judges_of_whom_two_reject_and_three_must_speak(votes, passed, code):
    verdict = judges_verdict(votes, reject_votes=2, min_votes=3)
    assert (verdict.passed, verdict.code) == (passed, code)


def options(keep="first", verifiers=("rule",), **judges):
    return dataclasses.replace(
        DistillOptions(),
        verify=VerifyOptions(verifiers=verifiers, keep=keep),
        judges=JudgeOptions(models=("a", "b"), **judges),
    )


RIGHT, LONG, WRONG = response("3"), response("3", "a longer way"), response("4")


def states(texts, tokens, settings, votes=None):
    asked = []

    def ask(number):
        asked.append(number)
        return votes[number]

    return [one.status.value for one in assess(texts, tokens, "3", settings, ask)], asked


def test_which_of_the_accepted_is_kept():
    texts, tokens = [WRONG, LONG, RIGHT, RIGHT], [5, 9, 6, 6]
    assert states(texts, tokens, options("first"))[0] == ["rejected", "accepted", "spare", "spare"]
    assert states(texts, tokens, options("shortest"))[0] == ["rejected", "spare", "accepted", "spare"]
    assert states(texts, tokens, options("all"))[0] == ["rejected", "accepted", "accepted", "spare"]


def test_judges_are_asked_last_in_order_and_no_further_than_needed():
    texts, tokens, names = [WRONG, LONG, RIGHT, RIGHT], [5, 9, 6, 6], ("rule", "judges")
    yes, no, later = (C, C), (N, N), (P, P)
    votes = {1: no, 2: yes, 3: yes}
    assert states(texts, tokens, options("first", names), votes) == (
        ["rejected", "rejected", "accepted", "spare"], [1, 2],
    )  # fmt: skip
    assert states(texts, tokens, options("shortest", names), votes) == (
        ["rejected", "spare", "accepted", "spare"], [2],
    )  # fmt: skip
    assert states(texts, tokens, options("all", names), votes | {2: no})[1] == [1, 2, 3]
    # What waits for judges holds back those behind it, of which one would be kept too early.
    assert states(texts, tokens, options("first", names), votes | {1: later}) == (
        ["rejected", "pending", "pending", "pending"], [1],
    )  # fmt: skip
    assert states(texts, tokens, options("all", names), votes | {1: later})[0] == [
        "rejected", "pending", "accepted", "spare",
    ]  # fmt: skip


def test_all_verifiers_have_to_pass_and_every_failure_is_named():
    settings = options(verifiers=("rule", "agreement"))
    assessed = assess([RIGHT, WRONG, "?"], [1, 1, 1], "3", settings, lambda number: ())
    assert [[v.code for v in one.failed] for one in assessed] == [
        ["disagreement"],
        ["wrong_answer", "disagreement"],
        ["format_no_tags", "no_conclusion"],
    ]
    assert {one.status for one in assessed} == {Status.REJECTED}
    assert best([RIGHT, WRONG, "?"], "3", assessed) == 0
    assert best(["?", WRONG], "3", assessed[1:]) == 1
    assert best(["<CONCLUSION>3</CONCLUSION>", WRONG], "3", assessed[1:]) == 0
