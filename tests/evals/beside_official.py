"""Compares the scorers with the official ones, run on real outputs: both from checkouts that are given here.

python tests/evals/beside_official.py --mmmu=DIR --vlmevalkit=DIR --mmstar=DIR --mme=DIR

--mmmu is a checkout of MMMU-Benchmark/MMMU (its outputs of GPT-4o on MMMU-Pro and of Qwen-VL on MMMU), --mmstar one of
MMStar-Benchmark/MMStar (its submission of LLaVA-Next), --vlmevalkit one of open-compass/VLMEvalKit (reads the answers
of the other two and fuzzed ones), --mme the unpacked eval_tool of MME with its results of LaVIN. Needs pandas, numpy,
openpyxl and, for MME, scikit-learn. Prints one line a comparison; exit status 1 where something differs.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import random
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwenla_jax.evals.benchmarks.mmbench_mmstar import mmstar_item, read_letter
from qwenla_jax.evals.benchmarks.mmmu import choice
from qwenla_jax.evals.benchmarks.pope_mme import COGNITION, PERCEPTION
from qwenla_jax.evals.registry import score_files
from qwenla_jax.evals.table_files import read_rows
from qwenla_jax.evals.task import Settings

SUBMISSION = "eval/submits/llava_next_yi_34b_MMStar.xlsx"
FUZZED = 300_000
PIECES = (
    "A;B;C;D;E;Z;a;b;(B);**C**;answer is;The correct answer is;Answer: ;is;the; ;\n;.;,;red;green;light green;4;*;{A};"
    "#;Cannot determine the answer;Failed to obtain answer via API;option ;is **;is  **d;\u0130"
).split(";")
OPTIONS = (
    {"A": "red", "B": "green", "C": "light green", "D": "4"},
    {"A": "Red", "B": "Blue"},
    {"A": "x x x ", "B": "GREEN", "C": "is"},
)


def load(path: Path, **modules: Any) -> Any:
    """A file as a module, with stand-ins for what it imports of its own package."""
    sys.modules.update(modules)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stand_in(name: str, **members: Any) -> Any:
    """A module of the given members."""
    module = types.ModuleType(name)
    module.__dict__.update(members)
    return module


def pro_responses(root: Path) -> Iterator[tuple[Path, dict[str, Any], dict[str, str]]]:
    """File, row and options of every saved answer to MMMU-Pro."""
    for path in sorted((root / "mmmu-pro" / "output").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            options = ast.literal_eval(str(row["options"]))
            yield path, row, {chr(ord("A") + n): option for n, option in enumerate(options)}


def compare_mmmu(root: Path) -> bool:
    """MMMU-Pro answer by answer with those that name an option, and MMMU with the official draw of the others."""
    official = load(root / "mmmu-pro" / "evaluate.py")
    same, files = True, {}
    for path, row, options in pro_responses(root):
        counts = files.setdefault(path, {"answers": 0, "right": 0, "random": 0, "differ": 0})
        text = row["response"] if isinstance(row["response"], str) else ""
        theirs = set()
        for seed in range(40):  # what it draws at random differs
            random.seed(seed)
            theirs.add(official.parse_multi_choice_response(text, list(options), options) if len(options) > 1 else "A")
        ours = choice(text, {letter: str(option) for letter, option in options.items()}, pro=True)
        drawn = len(theirs) > 1
        counts["answers"] += 1
        counts["random"] += drawn
        counts["right"] += theirs == {row["answer"]}
        counts["differ"] += len(options) > 1 and (ours is not None if drawn else ours not in theirs)
    for path, counts in files.items():
        right = score_files("mmmu_pro", [path], settings=Settings(fallback="wrong")).counts["right"]
        print(f"MMMU-Pro {path.stem}: official {counts}, here {right} right")
        same &= right == counts["right"] and not counts["differ"]
    sys.path.insert(0, str(root / "mmmu"))
    from utils.eval_utils import evaluate, parse_multi_choice_response, parse_open_response  # of the checkout

    paths = sorted((root / "mmmu" / "example_outputs" / "qwen_vl").glob("*/output.json"))
    rows = [row for path in paths for row in json.loads(path.read_text(encoding="utf-8"))]
    random.seed(42)
    for row in rows:
        closed = row["question_type"] == "multiple-choice"
        asked = (row["response"], row["all_choices"], row["index2ans"]) if closed else (row["response"],)
        row["parsed_pred"] = (parse_multi_choice_response if closed else parse_open_response)(*asked)
    judged, _ = evaluate(rows)
    theirs, ours = sum(verdict == "Correct" for verdict in judged.values()), score_files("mmmu", paths)
    right = {row["id"]: row["right"] for row in ours.rows}
    differ = sum(right[name] != (verdict == "Correct") for name, verdict in judged.items())
    print(f"MMMU Qwen-VL: official {theirs} of {len(rows)}, here {ours.counts['right']}; {differ} verdicts differ")
    return same and not differ


def compare_mmstar(root: Path) -> bool:
    """Micro accuracy of the submission by MMStar's own scorer."""
    import logging

    import pandas

    saved: dict[str, Any] = {}
    helpers = {"load": pandas.read_excel, "dump": lambda result, _: saved.update(result)}
    smp = stand_in("vlmeval.smp", tqdm=lambda lines: lines, get_logger=logging.getLogger, **helpers)
    official = load(root / "eval/vlmeval/evaluate/mmstar.py", **{"vlmeval": stand_in("vlmeval"), "vlmeval.smp": smp})
    official.MMStar_eval(str(root / SUBMISSION))
    theirs = 100 * saved["final score"]
    figures = score_files("mmstar", [root / SUBMISSION]).figures
    ours, kit = figures["accuracy by first letter"].value, figures["accuracy"].value
    print(f"MMStar LLaVA-Next-34B: official {theirs:.4f}, here {ours:.4f} by first letter, {kit:.4f} as VLMEvalKit")
    return abs(theirs - ours) < 1e-9


def compare_vlmevalkit(root: Path, mmmu: Path | None, mmstar: Path | None) -> bool:
    """How answers to questions with options are read, real ones and fuzzed ones."""
    import logging

    log = stand_in("vlmeval.smp.log", get_logger=logging.getLogger)
    official = load(root / "vlmeval/utils/matching_util.py", **{"vlmeval.smp.log": log})

    def answers() -> Iterator[tuple[str, str, dict[str, str]]]:
        for _, row, options in pro_responses(mmmu) if mmmu else ():
            if isinstance(row["response"], str):
                yield "MMMU-Pro", row["response"], {letter: str(option) for letter, option in options.items()}
        for row in read_rows(mmstar / SUBMISSION) if mmstar else ():
            options = mmstar_item(row, row.need("index")).options
            yield "MMStar", row.text("prediction") or "", dict(options)
        draw = random.Random(0)
        for _ in range(FUZZED):
            pieces = (draw.choice(PIECES) + draw.choice(("", " ", " ")) for _ in range(draw.randint(0, 12)))
            yield "fuzzed", "".join(pieces), draw.choice(OPTIONS)

    message: dict[str, list[int]] = {}
    for kind, text, options in answers():
        theirs = official.can_infer(text, dict(options))
        read = theirs if theirs and theirs != "Z" else None  # Z: none of the options
        counts = message.setdefault(kind, [0, 0, 0])
        for place, more in enumerate((1, read is not None, read != read_letter(text, options))):
            counts[place] += more
    for kind, (number, named, differ) in message.items():
        print(f"VLMEvalKit, answers of {kind}: {number}, {named} of which name an option; {differ} read otherwise here")
    return not any(differ for *_, differ in message.values())


def compare_mme(root: Path) -> bool:
    """Every task's score of LaVIN by MME's own tool."""
    command = [sys.executable, "calculation.py", "--results_dir", "./LaVIN"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    theirs = {task: float(score) for task, score in re.findall(r"(\w+) +score: ([\d.]+)", done.stdout)}
    figures = score_files("mme", sorted((root / "LaVIN").glob("*.txt"))).figures
    tasks = PERCEPTION + COGNITION
    differ = [task for task in tasks if abs(theirs[task] - figures[task].value) > 1e-9]
    total = sum(theirs[task] for task in tasks)
    print(f"MME LaVIN: official {total:.4f}, here {figures['total'].value:.4f}; {len(differ)} of 14 tasks differ")
    return not differ


def main() -> int:
    """Compares what is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("mmmu", "vlmevalkit", "mmstar", "mme"):
        parser.add_argument(f"--{name}", type=Path, metavar="DIR")
    args = parser.parse_args()
    if args.mme is None and args.mmmu is None and args.mmstar is None and args.vlmevalkit is None:
        parser.error("expected at least one checkout")
    same = [compare_mmmu(args.mmmu)] if args.mmmu else []
    same += [compare_mmstar(args.mmstar)] if args.mmstar else []
    same += [compare_vlmevalkit(args.vlmevalkit, args.mmmu, args.mmstar)] if args.vlmevalkit else []
    same += [compare_mme(args.mme)] if args.mme else []
    print("all the same" if all(same) else "something differs")
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
