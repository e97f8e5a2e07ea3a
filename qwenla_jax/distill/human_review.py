"""Taking back what a person corrected: lines of the queue whose `response` is filled in."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from qwenla_jax.distill.distill_options import DistillOptions, read_options
from qwenla_jax.distill.judges import JudgeLog
from qwenla_jax.distill.results import assess_group, choices_of, read_corrections, summary_text, write_results
from qwenla_jax.distill.verify import Status, answer_problem, format_problem, reflection_problem
from qwenla_jax.utils import jsonl_store
from qwenla_jax.utils.jsonl_store import Row

_FIXED = ("image", "question", "answer")


@dataclasses.dataclass
class TakenBack:
    """What became of the lines.

    Attributes:
      added, replaced, known: lines with a new response, another one than was taken back before, and the same one.
      open: lines with no response yet.
      refused: one text a line that cannot be used, with file and line number.
    """

    added: int = 0
    replaced: int = 0
    known: int = 0
    open: int = 0
    refused: list[str] = dataclasses.field(default_factory=list)


def correct(workdir: Path, name: str) -> int:
    """Takes a corrected queue back and tells the console.

    Args:
      workdir: the run's folder.
      name: the file, in that folder or from the current one.

    Returns:
      the number of lines refused.

    Raises:
      StoreError: there is no run in the folder, another process is in it, or a file cannot be used.
    """
    saved = jsonl_store.read_settings(workdir)
    if saved is None:
        raise jsonl_store.StoreError(f"{workdir}: holds no distillation run ({jsonl_store.SETTINGS} is missing)")
    with jsonl_store.locked(workdir):
        taken, summary = take_back(workdir, read_options(saved), find_file(workdir, name))
    for line in taken.refused:
        print(f"refused: {line}")
    print(
        f"taken back: {taken.added} new, {taken.replaced} replaced, {taken.known} known before; {taken.open} still "
        f"open, {len(taken.refused)} refused"
    )
    print(summary_text(summary))
    return len(taken.refused)


def find_file(workdir: Path, name: str) -> Path:
    """A file named on the command line: in the run's folder, or else from where the command was given.

    Raises:
      StoreError: there is no such file.
    """
    for path in (workdir / name, Path(name)):
        if path.is_file():
            return path
    raise jsonl_store.StoreError(f"--take_back: there is no file {name!r}, neither in {workdir} nor here")


def take_back(workdir: Path, options: DistillOptions, path: Path) -> tuple[TakenBack, dict[str, Any]]:
    """Checks the corrected lines, adds the good ones to the accepted answers, and leaves the others in the queue.

    A response has to be in the answer format and, where the run's verifiers include `rule`, conclude with the right
    answer. For the cold start it has to be the record's response with one reflection, of any length. Doing it twice
    changes nothing; an id whose response was changed since is replaced.

    Args:
      workdir: the run's folder.
      options: its settings.
      path: the corrected queue.

    Returns:
      what became of the lines, and the run's new summary.

    Raises:
      StoreError: the run's files, or those of the results that are to be written anew, cannot be read.
    """
    log = JudgeLog(workdir / jsonl_store.JUDGEMENTS)
    jsonl_store.mend(workdir / jsonl_store.SAMPLES)
    jsonl_store.mend(workdir / jsonl_store.CORRECTIONS)
    known = read_corrections(workdir)
    questions: dict[str, tuple[Row, bool]] = {}
    for rows in jsonl_store.groups(workdir / jsonl_store.SAMPLES, options.answers_each):
        accepted = any(one.status == Status.ACCEPTED for one in assess_group(rows, options, log, None))
        fixed = {name: rows[0][name] for name in (*_FIXED, "options", "source") if name in rows[0]}
        questions[rows[0]["id"]] = (fixed, accepted)
    out, new, seen = TakenBack(), [], set()
    for number, _, row in jsonl_store.typed_lines(path):
        if isinstance(row, str):
            out.refused.append(f"{path}:{number}: {row}")
            continue
        problem = _problem(row, questions, seen, "rule" in options.verify.verifiers)
        if problem is not None:
            out.refused.append(f"{path}:{number}: {problem}")
            continue
        seen.add(row["id"])
        response = row["response"].strip()
        if not response:
            out.open += 1
        elif known.get(row["id"]) == response:
            out.known += 1
        else:
            out.replaced += row["id"] in known
            out.added += row["id"] not in known
            new.append({"id": row["id"], "response": response})
    if new:
        jsonl_store.append(workdir / jsonl_store.CORRECTIONS, new)
    return out, write_results(workdir, options, log)


def _problem(row: Row, questions: dict[str, tuple[Row, bool]], seen: set[str], check_answer: bool) -> str | None:
    """Why a line cannot be used, None where it can."""
    name, response = row.get("id"), row.get("response")
    if not isinstance(name, str) or name not in questions:
        return f"id {name!r} is no question of this run"
    if name in seen:
        return f"id {name!r} stands in an earlier line already"
    if not isinstance(response, str):
        return f"id {name!r}: response is {response!r}, expected text (empty: not corrected yet)"
    fixed, accepted = questions[name]
    for key, value in fixed.items():
        if row.get(key, value) != value:
            return f"id {name!r}: {key} is {row[key]!r}, but the run asked with {value!r}"
    if not response.strip():
        return None
    if accepted:
        return f"id {name!r} has an accepted answer already, it is not in the queue"
    known = fixed["answer"], choices_of(fixed)
    problem = format_problem(response) or (answer_problem(response, *known) if check_answer else None)
    if problem is None and "source" in fixed:
        problem = reflection_problem(response, fixed["source"], *known)
    return None if problem is None else f"id {name!r}: {problem[1]}"
