"""Whether an answer may be learned from: pure functions over texts and votes.

Paper, the pipeline: an answer is judged correct or incorrect by 4 models, and one that 2 or more call incorrect does
not stay. Paper silent, ours: checks that cost nothing come first (the answer format, the right answer, agreement among
the samples of a question), and judges are asked only about what passes them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from enum import StrEnum

from qwenla_jax.distill.distill_options import DistillOptions
from qwenla_jax.rewards.accuracy import accuracy_reward
from qwenla_jax.rewards.format import format_reward
from qwenla_jax.text.answers.match import extract_conclusion, matches
from qwenla_jax.text.response_format import parse
from qwenla_jax.text.special_tokens import QWEN_CONTROL_TOKENS


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

    Returns:
      one result a sample, in their order.
    """
    names, keep = options.verify.verifiers, options.verify.keep
    agreement = agreement_verdicts(texts, options.verify.agreement_min, choices) if "agreement" in names else []
    verdicts: list[list[Verdict]] = []
    for number, text in enumerate(texts):
        own = [format_verdict(text)] if "format" in names else []
        own += [rule_verdict(text, answer, choices)] if "rule" in names else []
        verdicts.append(own + agreement[number : number + 1])
    status = [Status.SPARE if all(v.passed for v in own) else Status.REJECTED for own in verdicts]
    order = [number for number in range(len(texts)) if status[number] == Status.SPARE]
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
