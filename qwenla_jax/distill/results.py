"""What comes out of the logs: answers with verdicts, accepted, rejected, the queue for a person, and a summary.

All of it is a function of the settings and the three logs (samples, judgements, corrections), written anew each time;
of the results themselves only what a person typed into the queue is carried over.
"""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import Any

from qwenla_jax.distill.distill_options import DistillOptions, EndpointOptions
from qwenla_jax.distill.judges import JudgeLog, Judges, request_key
from qwenla_jax.distill.verify import Assessed, Status, Vote, assess, best, reflection_verdict
from qwenla_jax.utils import jsonl_store
from qwenla_jax.utils.jsonl_store import Row

_QUESTION = ("id", "image", "question", "answer", "kind")


def choices_of(row: Row) -> tuple[str, ...]:
    """The texts of options A, B, C, ... of a line's question; empty where it has none."""
    return tuple(row.get("options", ()))


def _question(row: Row) -> Row:
    return row.get("columns", {}) | {name: row[name] for name in (*_QUESTION, "options", "system") if name in row}


def assess_group(rows: list[Row], options: DistillOptions, log: JudgeLog, judges: Judges | None) -> list[Assessed]:
    """The samples of a question through the verifiers.

    Args:
      rows: its lines of the log of samples.
      options: the run's settings.
      log: what judges said.
      judges: whom to ask what is not in the log; None: nobody.
    """

    def votes(number: int) -> tuple[Vote, ...]:
        if judges is not None:
            return judges.votes(rows[number])
        models = options.judges.models
        return tuple(log.said(request_key(options.judges, model, rows[number])) for model in models)

    texts, tokens = [row["text"] for row in rows], [row["tokens"] for row in rows]
    first = [reflection_verdict(row, options) for row in rows] if options.make == "cold_start" else []
    return assess(texts, tokens, rows[0]["answer"], options, votes, choices_of(rows[0]), first)


def read_corrections(workdir: Path) -> dict[str, str]:
    """Responses that a person wrote, by the question's id; of several the last, at the place of the first.

    Raises:
      StoreError: a line is none that `take_back` wrote.
    """
    result, path = {}, workdir / jsonl_store.CORRECTIONS
    for number, row in jsonl_store.read_rows(path):
        if not (isinstance(row.get("id"), str) and isinstance(row.get("response"), str)):
            raise jsonl_store.StoreError(f"{path}:{number}: expected an id and a response, each a text")
        result[row["id"]] = row["response"]
    return result


def queue_row(rows: list[Row], assessed: list[Assessed]) -> Row:
    """A question for a person: the best sample as the proposal, why it does not pass, and a response to fill in."""
    number = best([row["text"] for row in rows], rows[0]["answer"], assessed, choices_of(rows[0]))
    reason = "; ".join(f"{verdict.verifier}: {verdict.reason}" for verdict in assessed[number].failed)
    head = _question(rows[0])
    return head | {"proposal": rows[number]["text"] or rows[number].get("source", ""), "reason": reason, "response": ""}


def write_results(workdir: Path, options: DistillOptions, log: JudgeLog) -> dict[str, Any]:
    """Writes answers, accepted, rejected, queue and summary from the logs.

    Returns:
      the summary.

    Raises:
      StoreError: a log cannot be read, or the folder was deleted meanwhile; nothing is written then.
    """
    jsonl_store.check_there(workdir)
    old_queue = list(jsonl_store.typed_lines(workdir / jsonl_store.QUEUE))
    typed = {str(row.get("id")): row for _, _, row in old_queue if isinstance(row, dict)}
    ids: set[str] = set()
    corrections, corrected = read_corrections(workdir), {}
    count: collections.Counter[str] = collections.Counter()
    reasons: collections.Counter[str] = collections.Counter()
    votes = {model: collections.Counter() for model in options.judges.models}
    names = (jsonl_store.ANSWERS, jsonl_store.ACCEPTED, jsonl_store.REJECTED, jsonl_store.QUEUE)
    with jsonl_store.rewriting(*(workdir / name for name in names)) as (answers, accepted, rejected, queue):
        for rows in jsonl_store.groups(workdir / jsonl_store.SAMPLES, options.answers_each):
            assessed = assess_group(rows, options, log, None)
            states = [one.status for one in assessed]
            count["questions"] += 1
            ids.add(rows[0]["id"])
            for row, one in zip(rows, assessed, strict=True):
                count[one.status] += 1
                answers.write(jsonl_store.line_of(_answer_row(row, one)))
                if one.status == Status.ACCEPTED:
                    accepted.write(jsonl_store.line_of(_accepted_row(row, options)))
                elif one.status == Status.REJECTED:
                    reasons[one.failed[0].code] += 1
                    rejected.write(jsonl_store.line_of(_rejected_row(row, one)))
                if any(verdict.verifier == "judges" for verdict in one.verdicts):
                    for model, counter in votes.items():
                        key = request_key(options.judges, model, row)
                        counter[log.said(key)] += 1
                        counter["failed"] += log.failure(key) is not None
            if Status.ACCEPTED in states:
                count["questions_accepted"] += 1
            elif (name := rows[0]["id"]) in corrections:
                corrected[name] = _question(rows[0]) | {"response": corrections[name], "corrected": True}
            elif Status.PENDING in states:
                count["questions_pending"] += 1
            else:
                count["queue"] += 1
                row = queue_row(rows, assessed)
                mine = typed.get(row["id"], {})
                # The response, and notes under names of a person's own.
                queue.write(jsonl_store.line_of(mine | row | {"response": mine.get("response") or ""}))
        for name in corrections:  # in the order in which they came, behind what the model said
            if name in corrected:
                accepted.write(jsonl_store.line_of(corrected[name]))
        for _, line, row in old_queue:  # what cannot be understood is left for its writer to mend
            if not isinstance(row, dict) or row.get("id") not in ids:
                queue.write(line + "\n")
    summary = {
        "questions": count["questions"],
        "samples": count["questions"] * options.answers_each,
        "accepted": count[Status.ACCEPTED],
        "questions_accepted": count["questions_accepted"],
        "corrected": len(corrected),
        "rejected": count[Status.REJECTED],
        "rejected_by_reason": dict(sorted(reasons.items())),
        "spare": count[Status.SPARE],
        "pending": count[Status.PENDING],
        "questions_pending": count["questions_pending"],
        "queue": count["queue"],
    }
    if "judges" in options.verify.verifiers:
        message = (*(vote.value for vote in Vote), "failed")
        summary["judges"] = {
            "votes": {model: {name: counter[name] for name in message} for model, counter in votes.items()},
            **_spent(log, options.judges),
        }
    if options.teacher.models and options.make == "cold_start":
        summary["teacher"] = _spent(JudgeLog(workdir / jsonl_store.REPLIES), options.teacher)
    jsonl_store.write_json(workdir / jsonl_store.SUMMARY, summary)
    return summary


def _spent(log: JudgeLog, options: EndpointOptions) -> dict[str, Any]:
    return {
        "requests": log.requests,
        "prompt_tokens": log.prompt_tokens,
        "completion_tokens": log.completion_tokens,
        "replies_without_usage": log.without_usage,
        "cost": log.cost(options),
    }


def summary_text(summary: dict[str, Any]) -> str:
    """The summary for the console."""
    lines = [
        f"{summary['questions']} questions, {summary['samples']} samples: {summary['accepted']} accepted "
        f"(for {summary['questions_accepted']} questions), {summary['rejected']} rejected, {summary['spare']} spare"
    ]
    lines += [f"  rejected, {code}: {number}" for code, number in summary["rejected_by_reason"].items()]
    lines.append(f"{summary['corrected']} corrected by a person, {summary['queue']} in the queue for one")
    if summary["questions_pending"]:
        lines.append(f"{summary['questions_pending']} questions wait for a teacher or judges")
    for name in ("teacher", "judges"):
        if name not in summary:
            continue
        asked = summary[name]
        lines.append(
            f"{name}: {asked['requests']} requests, {asked['prompt_tokens']} + {asked['completion_tokens']} tokens, "
            f"cost {asked['cost']:.4g}"
        )
        if asked["replies_without_usage"]:
            lines.append(f"  {asked['replies_without_usage']} replies did not say what they cost: the cost is higher")
        for model, votes in asked.get("votes", {}).items():
            lines.append(f"  {model}: " + ", ".join(f"{number} {name}" for name, number in votes.items() if number))
    return "\n".join(lines)


def _answer_row(row: Row, one: Assessed) -> Row:
    return row | {"status": one.status, "verdicts": [dataclasses.asdict(verdict) for verdict in one.verdicts]}


def _accepted_row(row: Row, options: DistillOptions) -> Row:
    out = _question(row) | {"response": row["text"], "sample": row["sample"]}
    if options.verify.keep == "all":  # ids of a training file differ
        out["id"] = f"{row['id']}.{row['sample']}"
    return out


def _rejected_row(row: Row, one: Assessed) -> Row:
    head = _question(row) | {name: row[name] for name in ("sample", "text", "tokens")}
    return head | {"reasons": [dataclasses.asdict(verdict) for verdict in one.failed]}
