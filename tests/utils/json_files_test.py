"""Oracle: the standard library's parser where it copes; what it cannot cope with is written out by hand."""

import json
import os

import pytest

from qwenla_jax.utils import json_files


def test_what_the_standard_library_reads():
    value = {"a": [1, 2.5, None, True, "\u00e9\U0001f600"], "b": {"c": []}}
    for text in (json.dumps(value), json.dumps(value, indent=1).encode(), "\ufeff" + json.dumps(value)):
        assert json_files.loads(text, "x") == value


@pytest.mark.parametrize("depth", [100, 101, 900, 200_000])
@pytest.mark.parametrize("pair", ["[]", ('{"a":', "}")])
def test_depth(depth, pair):
    text = pair[0] * depth + ("1" if pair[0] != "[" else "") + pair[1] * depth
    if depth <= json_files.MAX_DEPTH:
        json_files.loads(text, "f")
    else:
        with pytest.raises(ValueError, match="f:3: nested more than 100 deep"):
            json_files.loads(text, "f:3")


@pytest.mark.parametrize("text", ["", "[" * 200_000, "{", b"\xff", "1" * 5000, "nul", '{"a": 1} {"a": 2}'])
def test_refused_by_name(text):
    with pytest.raises(ValueError, match="^f:1: "):
        json_files.loads(text, "f:1")


def test_one_value_after_the_other():
    values = [{"a": [1, {"b": None}]}, {"c": "\u2028 }{"}, 3]
    for join, lines in (("\n", [1, 2, 3]), (" ", [1, 1, 1]), ("\r\n\n", [1, 3, 5])):
        text = "\ufeff" + join.join(map(json.dumps, values)) + "\n "
        assert json_files.loads_all(text, "f") == list(zip(lines, values, strict=True))
    pretty = "\n".join(json.dumps(value, indent=2) for value in values)
    assert [line for line, _ in json_files.loads_all(pretty.encode(), "f")] == [1, 9, 12]
    assert json_files.loads_all(" \n", "f") == []
    wrong = {"1\n{": "^f:2: not JSON", "1\n\n" + "[" * 200_000: "^f:3: nested", b"1\n\xff": "^f: not JSON"}
    for text, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            json_files.loads_all(text, "f")
    with pytest.raises(ValueError, match="^f:2: nested more than 100 deep"):
        json_files.loads_all("{}\n" + "[" * 101 + "]" * 101, "f")


def test_files(tmp_path):
    (tmp_path / "a.json").write_text('{"x": 1}')
    (tmp_path / "list.json").write_text("[]")
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(40 << 30)
    assert json_files.read_object(tmp_path / "a.json") == {"x": 1}
    with pytest.raises(FileNotFoundError, match="none.json: no such file"):
        json_files.read_json(tmp_path / "none.json")
    refused = {"list.json": "holds a list", "pipe": "not a regular file", "large": "at most", ".": "not a regular file"}
    for name, what in refused.items():
        with pytest.raises(ValueError, match=what):
            json_files.read_object(tmp_path / name)
    with pytest.raises(ValueError, match="/dev/zero: not a regular file"):
        json_files.read_json("/dev/zero")
