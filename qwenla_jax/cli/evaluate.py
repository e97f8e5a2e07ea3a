"""Answers a benchmark's questions and scores the answers, or scores saved predictions.

qwenla evaluate --task=mathvision --gold=QUESTIONS --model=DIR --workdir=OUT
qwenla evaluate --task=pope --gold=QUESTIONS --score=PREDICTIONS

With --model, answers go to OUT, and the same command continues after an interruption; then OUT/predictions.jsonl is
scored, into OUT/score.json and OUT/score.txt. Images are inside the files of --gold (parquet, base64), beside them,
or below --images.

--score and --gold take JSON, JSON lines, TSV, xlsx and parquet, and may stand several times (POPE's three splits).
--gold is left out where the predictions' file holds the questions too, as VLMEvalKit's does. Where a prediction has a
<CONCLUSION>, only conclusions are scored, and how many lack one is reported. --json prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwenla_jax.evals.registry import read_answers, score_answers, tasks
from qwenla_jax.evals.task import CONCLUSION, FALLBACK, MISSING, UNKNOWN, Answer, Settings
from qwenla_jax.utils.compile_cache import keep_compiled_programs
from qwenla_jax.utils.libtpu import skip_without_tpu


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line (`None`: that of the process). Bad values end the process with a message."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("qwenla evaluate", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--task", required=True, choices=tuple(tasks()), help="the benchmark")
    add("--score", default=[], action="append", type=Path, metavar="FILE", help="predictions")
    add("--gold", default=[], action="append", type=Path, metavar="FILE", help="questions and right answers")
    add("--field", help="the predictions' column (default: prediction, response, output, text, caption, ...)")
    add("--conclusion", default="auto", choices=CONCLUSION, help="score the last <CONCLUSION> alone (default: auto)")
    add("--missing", default="refuse", choices=MISSING, help="questions without a prediction (default: refuse)")
    add("--unknown", default="refuse", choices=UNKNOWN, help="predictions without a question (default: refuse)")
    add("--fallback", default="random", choices=FALLBACK, help="mmmu, mmmu_pro: answers that name no option")
    add("--seed", type=int, default=42, help="of random fallbacks (default: 42, as officially)")
    add("--synonyms", type=Path, help="chair: the official synonyms (default: our own table, other figures)")
    add("--noalgebra", action="store_true", help="mathvision: compare texts and plain numbers alone")
    add("--submission", type=Path, metavar="FILE", help="mmbench: write the sheet for its server, .tsv or .xlsx")
    add("--replies", type=Path, metavar="FILE", help="mmhal: saved replies of the judge")
    add("--judge_url", help="mmhal: OpenAI-compatible endpoint, such as https://host/v1")
    add("--judge_model", help="mmhal: the judge's model")
    add("--judge_key_env", help="mmhal: environment variable with the API key")
    add("--judge_log", type=Path, default=Path("mmhal_judge.jsonl"), help="mmhal: what was asked is not asked again")
    add("--judge_instruction", type=Path, help="mmhal: text with {question}, {answer}, {text} (default: our own)")
    add("--details", type=Path, metavar="FILE", help="write what became of each answer as JSON lines")
    add("--json", action="store_true", help="print one JSON object")
    _add_generation(parser.add_argument_group("answering", "with --model; what is not given has the default"))
    return parser.parse_args(argv)


def _add_generation(group: Any) -> None:
    """Flags of `evals.generate_options.GenerateOptions`; without a default, so that those given are known."""
    from qwenla_jax.config.schema import leaves
    from qwenla_jax.evals.generate_options import FLAGS, GenerateOptions

    group.add_argument("--workdir", type=Path, metavar="DIR", help="folder of the answers")
    for leaf in leaves(GenerateOptions):
        if leaf.key in FLAGS:
            default = "" if leaf.key == "model" else f" (default: {leaf.field.default})"
            text = (leaf.field.metadata["help"] + default).replace("%", "%%")
            group.add_argument(f"--{leaf.key}", type=leaf.type, default=argparse.SUPPRESS, help=text)


def main(argv: Sequence[str] | None = None) -> int:
    """Scores and prints; 2 where something cannot be scored."""
    args = parse_arguments(argv)
    skip_without_tpu()
    keep_compiled_programs()
    try:
        return _run(args)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    from qwenla_jax.evals.generate_options import FLAGS
    from qwenla_jax.evals.table_writer import write_rows

    same = ("conclusion", "missing", "unknown", "field", "fallback", "seed", "synonyms")
    settings = Settings(**{name: getattr(args, name) for name in same}, algebra=not args.noalgebra)
    for flag, task in (("submission", "mmbench"), ("replies", "mmhal"), ("judge_url", "mmhal")):
        if getattr(args, flag) is not None and args.task != task:
            raise ValueError(f"--{flag} is for --task={task}; got --task={args.task}")
    given = {name: value for name, value in vars(args).items() if name in FLAGS}
    if bool(args.score) == ("model" in given):
        raise ValueError("expected either --score=FILE, or --model=DIR with --workdir=DIR")
    generation, size = None, None
    if args.score and (given or args.workdir):
        raise ValueError(f"{', '.join(f'--{name}' for name in [*given, 'workdir'])}: only with --model")
    if not args.score:
        generation, size = _generated(args, given, settings)
        args.score = [args.workdir / "predictions.jsonl"]
    answers, counts, notes = read_answers(args.task, args.score, args.gold, settings, size)
    if args.submission is not None:
        from qwenla_jax.evals.benchmarks.mmbench_mmstar import submission

        write_rows(args.submission, submission(answers))
        print(f"{args.submission}: {len(answers)} rows; nothing is scored", file=sys.stderr)
        return 0
    if args.task == "mmhal":
        settings = _judged(args, settings, answers)
    result = score_answers(args.task, answers, counts, notes, settings)
    if args.details is not None:
        write_rows(args.details, result.rows)
    output, table = result.to_json(), result.table()
    if generation is not None:
        from qwenla_jax.utils.jsonl_store import rewriting, write_json

        output |= {"generation": generation}
        wide = max(map(len, generation)) + 2
        table += "\n".join(["\nanswers", *(f"  {name:<{wide}}{number}" for name, number in generation.items())])
        write_json(args.workdir / "score.json", output)
        with rewriting(args.workdir / "score.txt") as (file,):
            file.write(table + "\n")
    print(json.dumps(output) if args.json else table)
    return 0


def _generated(
    args: argparse.Namespace, given: dict[str, Any], settings: Settings
) -> tuple[dict[str, Any], int | None]:
    """Answers what is not answered yet: what was counted, and how many questions count."""
    from qwenla_jax.evals.generate_options import make_options

    if args.workdir is None:
        raise ValueError("--workdir is missing: answers are kept there")
    options = make_options({**given, "task": args.task, "missing": settings.missing}, args.gold)
    from qwenla_jax.evals.generate_answers import generate

    note = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    return generate(options, args.gold, args.workdir, settings, note), options.size


def _judged(args: argparse.Namespace, settings: Settings, answers: Sequence[Answer]) -> Settings:
    """Settings with the judge's replies, saved ones or new ones."""
    import dataclasses

    from qwenla_jax.distill.distill_options import JudgeOptions
    from qwenla_jax.distill.endpoint import address_problem, read_key
    from qwenla_jax.distill.judges import JudgeLog, Judges
    from qwenla_jax.evals.benchmarks import mmhal
    from qwenla_jax.evals.table_files import read_rows

    if args.replies is not None:
        return dataclasses.replace(settings, replies=mmhal.replies_of(read_rows(args.replies)))
    if not args.judge_url or not args.judge_model:
        raise ValueError("mmhal: needs --judge_url and --judge_model, or --replies=FILE")
    try:
        key = read_key(args.judge_key_env)
    except ValueError as error:
        raise ValueError(f"--judge_key_env: {error}") from error
    if (problem := address_problem(args.judge_url)) is not None:
        raise ValueError(f"--judge_url: {problem}")
    instruction = mmhal.INSTRUCTION if args.judge_instruction is None else _instruction(args.judge_instruction)
    options = JudgeOptions(models=(args.judge_model,), base_url=args.judge_url, max_reply_tokens=1024)
    log = JudgeLog(args.judge_log)
    with Judges(options, log, args.judge_log.parent, key, instruction=instruction) as judges:
        return dataclasses.replace(settings, replies=mmhal.ask(answers, judges, log, options, instruction))


def _instruction(path: Path) -> str:
    """A judge's instruction, refused before anything is asked where its places cannot be filled."""
    from qwenla_jax.utils.json_files import read_bytes

    try:
        text = read_bytes(path).decode("utf-8")
        text.format(question="", answer="", text="")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error
    except (LookupError, AttributeError, ValueError) as error:
        message = "expected {question}, {answer} and {text}, and any other brace doubled"
        raise ValueError(f"{path}: {error}; {message}") from error
    return text
