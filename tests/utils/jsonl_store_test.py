"""Logs cut at every byte, files that a person broke, names of images."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from qwenla_jax.utils import jsonl_store

ROWS = [{"a": 1}, {"text": "sch\u00f6n \u2028\n"}, {"lone": "\ud800"}]


def test_a_log_cut_anywhere_keeps_its_whole_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    jsonl_store.append(path, ROWS)
    raw = path.read_bytes()
    assert "sch\u00f6n".encode() in raw and [row for _, row in jsonl_store.read_rows(path)] == ROWS
    for size in range(len(raw) + 1):
        path.write_bytes(raw[:size])
        jsonl_store.mend(path)
        assert path.read_bytes() == b"".join(raw[:size].splitlines(keepends=True)[: raw[:size].count(b"\n")])
    jsonl_store.mend(tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


def test_mending_looks_back_over_long_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"x" * 200_000)
    jsonl_store.mend(path)
    assert path.read_bytes() == b'{"a": 1}\n'
    path.write_bytes(b"x" * 200_000)
    jsonl_store.mend(path)
    assert path.read_bytes() == b""


def test_a_broken_line_within_a_log_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(jsonl_store.StoreError, match=r"log\.jsonl:2: not JSON"):
        list(jsonl_store.read_rows(path))
    path.write_bytes(b"[1]\n")
    with pytest.raises(jsonl_store.StoreError, match=r"log\.jsonl:1: holds a list"):
        list(jsonl_store.read_rows(path))


def test_groups_come_whole_and_in_order(tmp_path):
    path = tmp_path / "log.jsonl"
    texts = dict.fromkeys(("id", "question", "answer", "image", "kind", "text"), "x")
    rows = [{"index": i, "sample": g, "tokens": 3, **texts} for i in range(3) for g in range(2)]
    jsonl_store.append(path, rows[:5])
    assert list(jsonl_store.groups(path, 2)) == [rows[:2], rows[2:4]]
    jsonl_store.keep_rows(path, 2)
    assert list(jsonl_store.groups(path, 2)) == [rows[:2]] and len(path.read_bytes().splitlines()) == 2
    jsonl_store.append(path, [rows[3]])
    with pytest.raises(jsonl_store.StoreError, match="log.jsonl:3: holds sample 1 of question 1, expected sample 0"):
        list(jsonl_store.groups(path, 2))
    for name, value in (("text", None), ("tokens", "3"), ("options", "A"), ("options", [1])):
        path.write_text(jsonl_store.line_of(rows[0] | {name: value}))
        with pytest.raises(jsonl_store.StoreError, match=f"log.jsonl:1: {name}: missing, or of another type"):
            list(jsonl_store.groups(path, 1))


def test_what_a_terminal_obeys_is_escaped_and_comes_back(tmp_path):
    text = "\x1b]0;x\x07 \x9b2J \u202e \u2028 sch\u00f6n \u4f60 \ud800 \\ \\u0041"
    line = jsonl_store.line_of({"a": text})
    assert line.isprintable() is False and line[:-1].isprintable() and "sch\u00f6n \u4f60" in line
    assert json.loads(line) == {"a": text}
    jsonl_store.write_json(tmp_path / "a.json", {"a": text})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"a": text} and b"\x9b" not in line.encode()


def test_a_folder_that_was_deleted_or_emptied_is_not_made_again(tmp_path):
    from PIL import Image

    folder = tmp_path / "run"
    with jsonl_store.locked(folder):
        jsonl_store.write_json(folder / jsonl_store.SETTINGS, {})
        jsonl_store.check_there(folder)
        (folder / jsonl_store.SETTINGS).unlink()
        with pytest.raises(jsonl_store.StoreError, match="settings.json is gone: the folder was deleted or emptied"):
            jsonl_store.check_there(folder)
        shutil.rmtree(folder)
        for write in (
            lambda: jsonl_store.write_image(folder / "images" / "a.png", Image.new("RGB", (2, 2))),
            lambda: jsonl_store.append(folder / jsonl_store.SAMPLES, [{}]),
        ):
            with pytest.raises(FileNotFoundError):
                write()
    assert not folder.exists()


def test_results_replace_the_old_ones_only_when_all_are_written(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("old")
    with pytest.raises(KeyError), jsonl_store.rewriting(a, b) as (one, _):
        one.write("new")
        raise KeyError
    assert a.read_text() == "old" and not b.exists()
    with jsonl_store.rewriting(a, b) as (one, _):
        one.write("new")
    assert a.read_text() == "new" and b.read_text() == ""


def test_lines_of_a_person(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_bytes('\ufeff{"id": "a\u2028"}\r\n\r\n nonsense\n3\n\n'.encode() + b'{"id": "\xff"}')
    result = list(jsonl_store.typed_lines(path))
    assert [(number, text) for number, text, _ in result][:3] == [(1, '{"id": "a\u2028"}'), (3, "nonsense"), (4, "3")]
    assert result[0][2] == {"id": "a\u2028"} and result[2][2] == "holds a int, expected an object"
    assert result[1][2].startswith("not JSON") and result[3][0] == 6 and result[3][2] == {"id": "\ufffd"}


def test_image_names_are_safe_and_differ():
    ids = [
        "scene-0-train-1",
        "a/b",
        "a b",
        "../x",
        "A?",
        "a" * 300,
        "a" * 301,
        "\u00e9",
        "\ud800",
        "",
        "Scene",
        "scene",
    ]
    names = [jsonl_store.image_name(i) for i in ids]
    assert names[0] == "images/scene-0-train-1.png" and len({name.lower() for name in names}) == len(ids)
    assert all(re.fullmatch(r"images/[A-Za-z0-9_-]{1,100}\.png", name) for name in names)


def test_a_second_process_is_refused(tmp_path):
    code = (
        "import sys; from pathlib import Path; from qwenla_jax.utils import jsonl_store\n"
        "try:\n    with jsonl_store.locked(Path(sys.argv[1])): print('in')\n"
        "except jsonl_store.StoreError as error: print(error)"
    )
    call = [sys.executable, "-c", code, str(tmp_path)]
    with jsonl_store.locked(tmp_path):
        assert "another process" in subprocess.run(call, capture_output=True, text=True).stdout
    assert subprocess.run(call, capture_output=True, text=True).stdout == "in\n"


def test_json_is_written_whole(tmp_path):
    jsonl_store.write_json(tmp_path / "s.json", {"a": "\u00f6"})
    assert json.loads((tmp_path / "s.json").read_text(encoding="utf-8")) == {"a": "\u00f6"}
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]
