"""The check of a run's data: every invalid record by name, constructed leaks, exit codes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwenla_jax.config.run_options import DataOptions, EvalOptions, RunOptions
from qwenla_jax.tools.data_check import check_data

ROOT = Path(__file__).resolve().parents[2]


def make_image(number):
    rng = np.random.default_rng(number)
    image = Image.new("RGB", (80, 60), tuple(int(x) for x in rng.integers(0, 255, 3)))
    for _ in range(5):
        x, y = (int(v) for v in rng.integers(0, 40, 2))
        image.paste(tuple(int(v) for v in rng.integers(0, 255, 3)), (x, y, x + 25, y + 15))
    return image


def write(folder, name, numbers, **changes):
    """A dataset in MathVision's layout with one image a question; `changes` by id."""
    rows = []
    (folder / name).mkdir()
    for number in numbers:
        make_image(number).save(folder / name / f"{number}.png")
        row = {"id": f"{name}{number}", "question": "q", "options": [], "answer": "1", "subject": "s"}
        rows.append(row | {"image": f"{number}.png"} | changes.get(f"id{number}", {}))
    (folder / name / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return f"mathvision:{folder / name}"


def options(source, eval_source=None, **more):
    return RunOptions(data=DataOptions(source=source, eval_source=eval_source, **more))


def test_every_broken_record_is_named_and_counted_once(tmp_path):
    name = write(tmp_path, "a", range(30), id3={"answer": ""}, id5={"image": "no.png"}, id8={"question": "q " * 300},
                 id9={"subject": "t"}, id11={"options": ["x", "y"], "answer": "C"})  # fmt: skip
    (tmp_path / "a" / "7.png").write_bytes(b"")
    result = check_data(options(f"{name}#kinds=s"))
    text = result.text()
    for message in (
        "test.jsonl:4: the answer is empty",
        "no.png: cannot be read",
        "7.png: ",
        "record 'a8': its prompt has",
        "test.jsonl:12: the answer 'C' is none of the options A, B",
        "  invalid, empty_answer: 1 (config.data.max_invalid)\n    ",
        "  invalid, too_long: 1 (config.data.max_prompt_tokens, config.data.max_response_tokens, config.data.max_p",
        "  left out by filter, other_kind: 1 (#kinds of the source)",
    ):
        assert message in text, message
    assert (result.invalid, result.leaked, result.ok) == (5, 0, False)
    assert text.endswith("5 invalid records, 0 leaked images")
    whole = check_data(options(write(tmp_path, "b", range(30))))
    assert whole.ok and whole.text().endswith("nothing is wrong")
    # At least 112x112 pixels, in steps of 28, make 140x112 of 80x60: 5x4 visual tokens.
    prompt = (
        "<|im_start|>user\n    <|vision_start|><|image_pad|> x 20<|vision_end|>q<|im_end|>\n    <|im_start|>assistant"
    )
    assert whole.text().count(prompt) == 5 and "options: none; right answer: 1" in whole.text()
    assert "0 over config.data.max_prompt_tokens=128" in whole.text() and "; 1 over config.data.max_prompt" in text
    lines = [line for line in whole.lines if "30 records, of them" in line]
    assert sum(int(line.split("of them ")[1].split()[0]) for line in lines) == 30 and len(lines) == 2


def test_leaks_are_found_across_sources_and_further_evaluations(tmp_path):
    train = write(tmp_path, "train", range(20))
    judged = write(tmp_path, "judged", range(20, 30))
    other = write(tmp_path, "other", [40, 41])
    assert check_data(options(train, judged), [other]).ok
    make_image(4).resize((160, 120)).save(tmp_path / "judged" / "21.png")  # another size
    result = check_data(options(train, judged), [other])
    assert (result.leaked, result.invalid) == (1, 0) and "by look, 1 pairs: train4 = judged21" in result.text()
    (tmp_path / "other" / "40.png").write_bytes((tmp_path / "train" / "6.png").read_bytes())
    result = check_data(options(f"{train}*2,scenes*1", judged), [other])
    assert result.leaked == 2 and "by file, 1 pairs: train6 = other40" in result.text()
    assert "training scenes: made by the program" in result.text()
    # Without an evaluation only what was asked for is compared.
    alone = replace(options(train, judged), eval=EvalOptions(every=0, final_size=0))
    assert check_data(alone).ok and check_data(alone, [other]).leaked == 1


def test_answers_that_no_response_can_match_and_records_without_an_image_are_reported(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    golds = ["<answer> 3 </answer>", "<foo> 3 </foo>", "Because " * 40, "4"]
    columns = {"question": ["q", "q", "q", "<image>q"], "solution": golds, "image": ["lost.png", None, None, None]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    result = check_data(options(f"parquet:{tmp_path / 'x.parquet'}", f"parquet:{tmp_path / 'x.parquet'}"))
    text = result.text()
    assert result.invalid == 3 and not result.ok
    for message in (
        "row 1: the answer '<foo> 3 </foo>' is wrapped in <foo>",
        "row 3: the question has places for 1 image(s) (<image>), the record has 0",
        "lost.png: cannot be read",
        "without an image: 1",
        "with an answer of over 200 characters, matched word for word only: 1",
        "row 2: 'Because ",
    ):
        assert message in text, message


def launch(*args):
    line = [sys.executable, "launch/train.py", "--config=configs/brpo.py", *args]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_exit_codes(tmp_path):
    train = write(tmp_path, "train", range(12))
    judged = write(tmp_path, "judged", range(20, 24))
    asked = [f"--config.data.source={train}", f"--config.data.eval_source={judged}", f"--workdir={tmp_path / 'run'}"]
    good = launch(*asked, "--check_data")
    assert good.returncode == 0 and "nothing is wrong" in good.stdout, good.stderr
    bad = launch(*asked, "--check_data", f"--against={train}")
    assert bad.returncode == 1 and "0 invalid records, 12 leaked images" in bad.stdout
    wrong = launch(*asked, "--check_data", "--against=nothing")
    assert wrong.returncode == 1 and "'nothing': expected scenes" in wrong.stderr
    idle = launch(*asked, f"--against={train}")
    assert idle.returncode == 1 and "nothing is compared without --check_data" in idle.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("source", ["scenes", "scenes*2,easy_vqa*1"])
def test_what_the_program_makes_needs_no_check(source):
    assert check_data(options(source)).ok


def test_reasons_of_rows_name_the_setting_of_their_columns(tmp_path):
    make_image(0).save(tmp_path / "a.png")
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    rows = [{"image": "a.png", "label": "1", "question": "q"}, {"image": "a.png", "messages": turns * 2}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = check_data(options(f"{tmp_path}/x.jsonl", "scenes")).text()
    assert "  invalid, field: 1 (#columns=FIELD:COLUMN of the source)\n" in text
    assert "  invalid, several_turns: 1 (#turns=first of the source)\n" in text
    fixed = f"{tmp_path}/x.jsonl#columns=answer:label&turns=first"
    assert "invalid, several_turns" not in check_data(options(fixed, "scenes")).text()
