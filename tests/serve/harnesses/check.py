"""What the harnesses got and what they scored, against this project's engine and scorers.

    python tests/serve/harnesses/check.py WORK

WORK is that of run.sh. Of each run: every recorded answer against that of an engine of its own, asked the same without
the server; the answers that the harness stored against the recorded ones; and its score of each answer against ours.
Exits with 1 where an answer differs. Answers that the two score differently are listed, since harnesses' rules differ.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stored import Stored, stored_answers

from qwenla_jax.evals.registry import score_answers, task_of
from qwenla_jax.evals.table_files import read_rows
from qwenla_jax.evals.task import Answer, Settings
from qwenla_jax.utils.compile_cache import keep_compiled_programs

if TYPE_CHECKING:
    from engine_answers import EngineAnswers

CHAT = "/v1/chat/completions"
SHOWN = 3  # differences of a run


def recorded(path: Path) -> list[dict[str, Any]]:
    """The chat completions of a run."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["path"] == CHAT]


def answers_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """content, reasoning and finish_reason of each choice; parts of a stream joined."""
    chunks = record["answer"] if isinstance(record["answer"], list) else [record["answer"]]
    joined: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        part = choice.get("message") or choice.get("delta")
        whole = joined.setdefault(choice["index"], {"content": "", "reasoning": "", "finish_reason": None})
        for name in ("content", "reasoning"):
            whole[name] += part.get(name) or ""
        whole["finish_reason"] = choice["finish_reason"] or whole["finish_reason"]
    return [joined[index] for index in sorted(joined)]


def check_answers(run: str, records: list[dict[str, Any]], engine: EngineAnswers) -> int:
    """Prints how many answers of a run equal the engine's; returns how many do not."""
    refused = collections.Counter(record["status"] for record in records if record["status"] != 200)
    served = [record for record in records if record["status"] == 200]
    open_seed = [r for r in served if r["body"].get("temperature", 1) and r["body"].get("seed") is None]
    different = equal = 0
    for record in served:
        if record in open_seed:
            continue
        for got, want in zip(answers_of(record), engine.answers(record["body"]), strict=True):
            equal += got == want
            if got != want:
                different += 1
                if different <= SHOWN:
                    print(f"  {run}: got {got}\n  {run}: not {want}")
    notes = "".join(f", {count} with status {status}" for status, count in sorted(refused.items()))
    notes += f", {len(open_seed)} sampled without a seed" if open_seed else ""
    print(f"{run}: {len(records)} requests{notes}; {equal} answers equal the engine's, {different} do not")
    return different


def check_scores(gold: Path, stored: Stored, records: list[dict[str, Any]]) -> int:
    """Prints both scores of a run's answers; returns how many stored answers the server did not give."""
    run, task = stored.run, stored.task
    items = task_of(task).items(read_rows(gold))
    given = collections.Counter(
        one["content"].strip() for record in records if record["status"] == 200 for one in answers_of(record)
    )
    strange = collections.Counter(text.strip() for _, text, _ in stored.answers) - given
    answers = [Answer(items[number], text) for number, text, _ in stored.answers]
    result = score_answers(task, answers, {}, {}, Settings(conclusion="never", fallback="wrong"))
    ours = [bool(row["right"]) for row in result.rows]
    same = "it does not say which are right"
    if stored.each:
        scores = [right for _, _, right in stored.answers]
        unlike = [n for n, (a, b) in enumerate(zip(scores, ours, strict=True)) if a != b]
        same = f"{len(ours) - len(unlike)} of {len(ours)} answers are scored the same"
        for n in unlike:
            about = f"{answers[n].text[:60]!r}, right is {answers[n].item.answer!r}, read as {result.rows[n]['read']!r}"
            print(f"  {run}: {stored.gold}: {about}: theirs {scores[n]}, ours {ours[n]}")
    theirs, name = stored.figure
    mine = result.figures[name].value
    print(f"{run}: {stored.gold}, {len(answers)} answers: {name} theirs {theirs:.2f}, ours {mine:.2f}; {same}")
    if strange:
        print(f"  {run}: stored, but never given: {list(strange)[:SHOWN]}")
    return strange.total()


def main() -> int:
    """Checks all runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    keep_compiled_programs()  # before jax is imported
    from engine_answers import EngineAnswers

    requests = {path.stem: recorded(path) for path in sorted((work / "requests").glob("*.jsonl"))}
    engine = EngineAnswers([r["body"] for records in requests.values() for r in records if r["status"] == 200])
    wrong = sum(check_answers(run, records, engine) for run, records in requests.items())
    for stored in stored_answers(work / "out"):
        gold = work / "data/gold" / f"{stored.gold}.jsonl"
        wrong += check_scores(gold, stored, requests[stored.run])
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
