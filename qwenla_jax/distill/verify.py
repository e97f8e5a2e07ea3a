"""Whether an answer may be learned from: pure functions over texts and votes.

Paper, the pipeline: an answer is judged correct or incorrect by 4 models, and one that 2 or more call incorrect does
not stay. Paper silent, ours: checks that cost nothing come first (the answer format, the right answer, agreement among
the samples of a question), and judges are asked only about what passes them.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from enum import StrEnum

from qwenla_jax.distill.distill_options import DistillOptions
from qwenla_jax.rewards.accuracy import accuracy_reward
from qwenla_jax.rewards.format import format_reward
from qwenla_jax.text.answers.match import extract_conclusion, matches
from qwenla_jax.text.answers.normalize import plain
from qwenla_jax.text.response_format import parse
from qwenla_jax.text.special_tokens import QWEN_CONTROL_TOKENS, REFLECTION_NAME, REFLECTION_OPEN, SECTION_NAMES
from qwenla_jax.utils.jsonl_store import Row

# Answers that a sentence can state without doubt: an option's letter, a number, yes or no.
_SHORT = r"[A-Z]|[+-]?\d+(?:\.\d+)?|[Yy]es|[Nn]o"
_STATED = re.compile(rf"\b[Aa]nswer (?:is|must be|should be)\W{{1,3}}({_SHORT})\b")


class Vote(StrEnum):
    """What one judge says of one answer."""

    CORRECT = "correct"
    INCORRECT = "incorrect"
    ABSTAIN = "abstain"  # it failed, or gave no verdict
    PENDING = "pending"  # not asked yet


class Status(StrEnum):
    """What becomes of one answer."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    SPARE = "spare"  # nothing against it, but another one of the same question is kept
    PENDING = "pending"  # judges have yet to be asked, about it or about one that goes before it


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one verifier says of one answer.

    Attributes:
      verifier: its name.
      passed: None where it cannot say yet.
      code: a short name of the reason, to count by.
      reason: the reason in words.
    """

    verifier: str
    passed: bool | None
    code: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Assessed:
    """One answer's fate and the verdicts that led to it, in the order in which they were reached."""

    status: Status
    verdicts: tuple[Verdict, ...]

    @property
    def failed(self) -> tuple[Verdict, ...]:
        """The verdicts against it."""
        return tuple(verdict for verdict in self.verdicts if verdict.passed is False)


def format_problem(text: str) -> tuple[str, str] | None:
    """(code, reason) why a text cannot be trained on as a response, None where it can.

    The format reward leaves what stands inside a section alone; a control token there would end or confuse a prompt.
    """
    parsed = parse(text)
    if not parsed.ok:
        return f"format_{parsed.fault}", f"the format breaks at character {parsed.fault_at}: {parsed.fault}"
    control = [token for token in QWEN_CONTROL_TOKENS if token in text]
    return ("control_token", f"holds {', '.join(control)}") if control else None


def answer_problem(text: str, answer: str, choices: Sequence[str] = ()) -> tuple[str, str] | None:
    """(code, reason) why the conclusion is not the right answer, None where it is."""
    conclusion = extract_conclusion(text)
    if conclusion is None:
        return "no_conclusion", "there is no complete conclusion"
    if not matches(conclusion, answer, choices):
        return "wrong_answer", f"concludes {conclusion[:80]!r}, the right answer is {answer[:80]!r}"
    return None


def format_verdict(text: str) -> Verdict:
    """Format reward 1 and no control token."""
    code, reason = format_problem(text) or ("ok", "in the format")
    return Verdict("format", code == "ok", code, reason)


def rule_verdict(text: str, answer: str, choices: Sequence[str] = ()) -> Verdict:
    """Format reward 1, no control token, and the conclusion matches the answer."""
    problem = format_problem(text) or answer_problem(text, answer, choices)
    code, reason = problem or ("ok", "in the format, right answer")
    return Verdict("rule", code == "ok", code, reason)


def agreement_verdicts(texts: Sequence[str], minimum: int, choices: Sequence[str] = ()) -> list[Verdict]:
    """For each of a question's k samples: whether `minimum` of them, itself included, give its conclusion.

    Two conclusions are the same where either matches the other as the right answer would be matched.
    """
    conclusions = [extract_conclusion(text) for text in texts]
    out = []
    for own in conclusions:
        if own is None:
            out.append(Verdict("agreement", False, "no_conclusion", "there is no complete conclusion"))
            continue
        same = sum(other is not None and _same(own, other, choices) for other in conclusions)
        passed = same >= minimum
        reason = f"{same} of {len(texts)} samples conclude the same, {minimum} needed"
        out.append(Verdict("agreement", passed, "ok" if passed else "disagreement", reason))
    return out


def _same(own: str, other: str, choices: Sequence[str]) -> bool:
    return matches(own, other, choices) or matches(other, own, choices)


def source_problem(row: Row, options: DistillOptions) -> tuple[str, str] | None:
    """(code, reason) why no reflection can make a record's response (`source`) acceptable, None where one can."""
    source, problem = row["source"], format_problem(row["source"])
    if problem is None and "rule" in options.verify.verifiers:
        problem = answer_problem(source, row["answer"], row.get("options", ()))
    if problem is None and REFLECTION_OPEN in source:
        problem = "", "there is a reflection already"
    return None if problem is None else ("source", f"the record's own response: {problem[1]}")


def reflection_problem(text: str, source: str, answer: str, choices: Sequence[str] = ()) -> tuple[str, str] | None:
    """(code, reason) why a text is not its source with one reflection before the conclusion, None where it is.

    Args:
      text: the response with the reflection.
      source: the record's response, see `source_problem`.
      answer: the right answer.
      choices: the texts of options A, B, C, ... where the question has them.
    """
    if REFLECTION_OPEN not in text:
        return "no_reflection", "there is no reflection"
    if (problem := format_problem(text)) is not None:
        return problem
    parsed = parse(text)
    if len(parsed.reflections) > 1:
        return "several_reflections", f"there are {len(parsed.reflections)} reflections, expected 1"
    if parsed.sections[-2].name != REFLECTION_NAME:
        return "reflection_place", "the reflection is not between reasoning and conclusion"
    before, after = ({part.name: part.text.strip() for part in parse(one).sections} for one in (source, text))
    if after["CONCLUSION"] != before["CONCLUSION"]:
        return "answer_changed", f"concludes {after['CONCLUSION'][:80]!r}, the source {before['CONCLUSION'][:80]!r}"
    gold, stated = plain(answer), _STATED.findall(after[REFLECTION_NAME])
    if stated and re.fullmatch(_SHORT, gold) and not matches(stated[-1], answer, choices):
        return "answer_changed", f"the reflection says that the answer is {stated[-1]!r}, the right answer is {gold!r}"
    names_answer = re.compile(rf"(?<!\w){re.escape(gold)}(?!\w)", re.IGNORECASE)
    for name in SECTION_NAMES:
        if after[name] != before[name]:
            if names_answer.search(after[name]) and not names_answer.search(before[name]):
                return "answer_leak", f"{name} names the right answer, the source's does not"
            return "section_changed", f"{name} is not the source's"
    return None


def reflection_verdict(row: Row, options: DistillOptions) -> Verdict:
    """What `reflection_problem` and the bounds of length say of a row of the log of samples (make=cold_start)."""
    verdict = functools.partial(Verdict, "reflection")
    problem = source_problem(row, options)
    if problem is None and not row["text"]:
        if not row["error"]:
            return verdict(None, "pending", "the teacher has yet to be asked")
        problem = "no_reply", row["error"]
    low, high = options.verify.min_reflection_tokens, options.verify.max_reflection_tokens
    tokens, most = row["reflection_tokens"], options.data.max_response_tokens
    problem = problem or reflection_problem(row["text"], row["source"], row["answer"], row.get("options", ()))
    if problem is None and not low <= tokens <= high:
        problem = "reflection_length", f"the reflection has {tokens} tokens, expected {low} to {high}"
    if problem is None and row["tokens"] > most:
        problem = "too_long", f"the response has {row['tokens']} tokens, expected at most {most}"
    code, reason = problem or ("ok", "one reflection, the rest unchanged")
    return verdict(code == "ok", code, reason)


def judges_verdict(votes: Sequence[Vote], reject_votes: int, min_votes: int) -> Verdict:
    """n-of-m voting: rejected by `reject_votes` times incorrect, or by fewer than `min_votes` that say anything.

    Paper: 4 judges, 2 votes reject. Paper silent on judges that fail: they abstain, and `min_votes` says how many may.
    """
    verdict = functools.partial(Verdict, "judges")
    counts = {vote: votes.count(vote) for vote in Vote}
    against, given = counts[Vote.INCORRECT], counts[Vote.INCORRECT] + counts[Vote.CORRECT]
    shown = ", ".join(f"{number} {vote}" for vote, number in counts.items() if number)
    if against >= reject_votes:
        return verdict(False, "judged_incorrect", f"{shown}; {reject_votes} incorrect reject")
    if counts[Vote.PENDING]:
        return verdict(None, "pending", shown)
    if given < min_votes:
        return verdict(False, "too_few_votes", f"{shown}; {min_votes} votes needed")
    return verdict(True, "ok", shown)


def assess(
    texts: Sequence[str],
    tokens: Sequence[int],
    answer: str,
    options: DistillOptions,
    votes: Callable[[int], Sequence[Vote]],
    choices: Sequence[str] = (),
    first: Sequence[Verdict] = (),
) -> list[Assessed]:
    """All samples of a question through the verifiers that the options name.

    Judges are asked in the order in which answers would be kept, and no further than the first that is accepted unless
    all are kept: what would not be kept is not paid for.

    Args:
      texts: the k samples.
      tokens: their lengths.
      answer: the right answer.
      options: the run's settings.
      votes: the judges' votes on the sample of a given number; called only where judges have a say.
      choices: the texts of options A, B, C, ... where the question has them.
      first: a verdict on each sample without which no verifier is asked; empty: none.

    Returns:
      one result a sample, in their order.
    """
    names, keep = options.verify.verifiers, options.verify.keep
    agreement = agreement_verdicts(texts, options.verify.agreement_min, choices) if "agreement" in names else []
    verdicts: list[list[Verdict]] = []
    status: list[Status] = []
    for number, text in enumerate(texts):
        own = list(first[number : number + 1])
        if not own or own[0].passed:
            own += [format_verdict(text)] if "format" in names else []
            own += [rule_verdict(text, answer, choices)] if "rule" in names else []
            own += agreement[number : number + 1]
        verdicts.append(own)
        passed = [verdict.passed for verdict in own]
        status.append(Status.REJECTED if False in passed else Status.PENDING if None in passed else Status.SPARE)
    order = [number for number in range(len(texts)) if status[number] == Status.SPARE and keep != "none"]
    if keep == "shortest":
        order.sort(key=lambda number: (tokens[number], number))
    kept: list[int] = []
    pending = False
    for number in order:
        if keep == "all":
            if any(texts[number] == texts[other] for other in kept):
                continue  # the same text again teaches nothing
        elif kept:
            continue
        elif pending:
            status[number] = Status.PENDING
            continue
        if "judges" in names:
            verdict = judges_verdict(votes(number), options.judges.reject_votes, options.judges.min_votes)
            verdicts[number].append(verdict)
            if not verdict.passed:
                status[number] = Status.PENDING if verdict.passed is None else Status.REJECTED
                pending = pending or verdict.passed is None
                continue
        status[number] = Status.ACCEPTED
        kept.append(number)
    return [Assessed(s, tuple(own)) for s, own in zip(status, verdicts, strict=True)]


def best(texts: Sequence[str], answer: str, assessed: Sequence[Assessed], choices: Sequence[str] = ()) -> int:
    """The sample that a person would have the least to mend on: right answer, format, verdicts passed, first."""

    def merit(number: int) -> tuple[float, float, int, int]:
        passed = sum(verdict.passed is True for verdict in assessed[number].verdicts)
        return accuracy_reward(texts[number], answer, choices), format_reward(texts[number]), passed, -number

    return max(range(len(texts)), key=merit)
