"""The command line: what it prints for programs, and what it refuses. Its answers are checked in ask_test.py."""

import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

import qwenla_jax
from qwenla_jax.cli.generate import main, make_parser
from qwenla_jax.data.synthetic.scenes import make_scene
from qwenla_jax.text.special_tokens import TAGS

TINY = Path(qwenla_jax.__file__).parent / "assets" / "tiny"
ATTENTION = {
    "original",
    "inserted",
    "even_original",
    "even_inserted",
    "total",
    "ratio",
    "ratio_original",
    "ratio_inserted",
}


def flags(reflecting, images, *more):
    common = [f"--model={reflecting}", f"--image={images[0]}", "--question=How many?", "--max_new_tokens=40"]
    return [*common, "--reattention=route", "--keep_ratio=0.3", *more]


def test_json(reflecting, images, capsys):
    main(flags(reflecting, images, "--json"))
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    result = json.loads(out)
    assert set(result) == {"text", "token_ids", "sections", "reattention", "skipped", "stopped", "seconds"}
    kinds = {name: type(value) for name, value in result.items()}
    assert kinds == {
        "text": str,
        "token_ids": list,
        "sections": list,
        "reattention": list,
        "skipped": int,
        "stopped": bool,
        "seconds": float,
    }
    assert all(type(token) is int for token in result["token_ids"])
    assert [section["name"] for section in result["sections"]][:2] == ["SUMMARY", "CAPTION"]
    for section in result["sections"]:
        whole = f"<{section['name']}>{section['text']}</{section['name']}>"
        assert result["text"][section["start"] : section["end"]] == whole
    spec = json.loads((reflecting / "tokenizer.json").read_text())
    tag = next(token["id"] for token in spec["added_tokens"] if token["content"] == "<REFLECTION>")
    assert len(result["reattention"]) == 2
    for reattention in result["reattention"]:
        assert result["token_ids"][reattention["position"]] == tag
        (image,) = reattention["images"]
        assert (image["image"], image["rows"], image["cols"]) == (0, 4, 4)
        assert len(image["selected"]) == reattention["selected_tokens"] == 5  # of 16 at 0.3: 4.8, rounded up
        assert reattention["visual_tokens"] == 16
        for row, col in image["selected"]:
            assert 0 <= row < 4 and 0 <= col < 4
        assert set(reattention["before"]) == set(reattention["after"]) == ATTENTION


def test_text(reflecting, images, capsys):
    main(flags(reflecting, images))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert re.search(r"inserted before token \d+: 5 of 16 visual tokens", out)
    assert re.search(r"attention on visual tokens: [\d.]+% -> [\d.]+%", out)
    grid = re.findall(r"^    ([#.](?: [#.]){3})$", out, re.MULTILINE)
    assert len(grid) == 8 and "".join(grid).count("#") == 10
    assert "SUMMARY\n" in out and "REFLECTION\n" in out


def test_the_embedded_checkpoint_answers(images, capsys):
    common = [f"--image={images[0]}", "--question=How many?", "--reattention=none", "--max_new_tokens=64"]
    main(["--model=tiny", *common])
    assert "CONCLUSION" in capsys.readouterr().out


def test_a_rendered_scene_needs_no_file(tmp_path, monkeypatch, capsys):
    """The held-out scene of that number; an answer without a reflection says that nothing was inserted."""
    monkeypatch.chdir(tmp_path)
    argv = ["--model=tiny", "--image=scene:7", "--question=How many?", "--max_new_tokens=64"]
    main(argv)
    out = capsys.readouterr().out
    things = ", ".join(map(str, make_scene(0, 1, 7).in_order()))
    assert out.startswith(f"(scene:7 shows: {things})\n") and "CONCLUSION" in out
    assert "REFLECTION" not in out and "; no reflection, so nothing was inserted" in out
    make_scene(0, 1, 7).image.save("scene.png")
    for image in ("scene:7", "scene.png"):
        main(["--model=tiny", f"--image={image}", *argv[2:], "--reattention=none", "--json"])
    one, two = map(json.loads, capsys.readouterr().out.splitlines())
    assert one["token_ids"] == two["token_ids"]


def test_interactive_streams_the_texts_that_json_holds(capsys, monkeypatch):
    argv = ["--model=tiny", "--image=scene:7", "--max_new_tokens=64"]
    questions = ["How many?", "What color is the big square?"]
    for question in questions:
        main([*argv, f"--question={question}", "--json"])
    texts = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert texts[0] != texts[1]
    monkeypatch.setattr("sys.stdin", io.StringIO(f" {questions[1]}\n\nNot this one.\n"))
    main([*argv, f"--question={questions[0]}", "--interactive"])
    captured = capsys.readouterr()
    notes = r"\n\(\d+ tokens in [\d.]+ s; no reflection, so nothing was inserted\)\n"
    expected = r"\(scene:7 shows: .*\)\n" + "".join(re.escape(text) + notes for text in texts)
    assert re.fullmatch(expected, captured.out) and captured.err == ""


def test_every_flag_is_explained(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for action in make_parser()._actions:
        assert action.help and action.option_strings[-1] in text


def without_tokens(folder, texts):
    """Takes added tokens out of a checkpoint's tokenizer."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in texts]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    spec = json.loads((folder / "tokenizer_config.json").read_text())  # where transformers takes them from, too
    tokens = spec["added_tokens_decoder"].items()
    spec["added_tokens_decoder"] = {i: token for i, token in tokens if token["content"] not in texts}
    (folder / "tokenizer_config.json").write_text(json.dumps(spec))


def test_a_tokenizer_as_released_gets_the_tags(tmp_path, images, capsys):
    """The embedded checkpoint's come last, so that they get their own ids again."""
    shutil.copytree(TINY, tmp_path / "released")
    without_tokens(tmp_path / "released", TAGS)
    answers = []
    for model in ("tiny", tmp_path / "released"):
        main([f"--model={model}", f"--image={images[0]}", "--question=How many?", "--json"])
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["token_ids"] == answers[1]["token_ids"] and "<CONCLUSION>" in answers[1]["text"]


@pytest.mark.parametrize(
    ("changed", "messages"),
    [
        ("--image=none.png", ["--image: none.png: cannot be read: No such file", "PNG"]),
        ("--image={broken}", ["--image: {broken}: is no image that can be read", "PNG"]),
        ("--image={cut}", ["--image: {cut}: the PNG of 112x112", "truncated"]),
        ("--image=/dev/zero", ["--image: /dev/zero: is no file"]),
        ("--image={pipe}", ["--image: {pipe}: is no file"]),
        ("--image={sparse}", ["--image: {sparse}: has 42949672960 bytes; at most"]),
        ("--image={strip}", ["--image: {strip}: ", "factor of 200"]),
        (
            "--image=scene:-1",
            ["--image: scene:-1: expected scene:N with a whole number N of at least 0 and at most 999999"],
        ),
        ("--image=scene:1000000", ["--image: scene:1000000: expected scene:N"]),
        ("--model=none", ["--model: none: no such folder", "Hugging Face", "tiny"]),
        ("--model={empty}", ["--model: {empty}", "config.json"]),
        ("--model={corrupt}", ["--model: {corrupt}", "model.safetensors", "not a readable safetensors file"]),
        ("--model={foreign}", ["--model: {foreign}", "image_token_id is 429, but 428 in tokenizer.json"]),
        ("--reattention=twice", ["--reattention", "'twice'", "none", "copy", "route", "vision_only"]),
        ("--keep_ratio=1.5", ["--keep_ratio", "'1.5'", "a number of at least 0 and at most 1"]),
        ("--keep_ratio=half", ["--keep_ratio", "'half'", "a number of at least 0 and at most 1"]),
        ("--keep_ratio=nan", ["--keep_ratio", "'nan'"]),
        ("--question=", ["--question", "empty", "expected a text"]),
        ("--question=x\udcff?", ["--question: it holds half of a character ('\\udcff' at 1); expected UTF-8 text"]),
        ("--system=\udc80", ["--system: it holds half of a character ('\\udc80' at 0); expected UTF-8 text"]),
        ("--temperature=-1", ["--temperature", "'-1'", "of at least 0"]),
        ("--top_p=0", ["--top_p", "'0'", "above 0 and at most 1"]),
        ("--frequency_penalty=3", ["--frequency_penalty", "'3'", "of at least -2 and at most 2"]),
        ("--repetition_penalty=0", ["--repetition_penalty", "'0'", "above 0"]),
        ("--seed=1.5", ["--seed", "'1.5'", "a whole number"]),
        ("--max_new_tokens=0", ["--max_new_tokens", "'0'", "of at least 1"]),
        ("--max_new_tokens=100000000000", ["--max_new_tokens", "'100000000000'", "at most 262144"]),
        ("--max_insertions=100000000000000000000", ["--max_insertions", "at most 256"]),
        ("--max_pixels=1000000000", ["--max_pixels", "at most 67108864"]),
        ("--temperature=1e300", ["--temperature", "at most 1000000.0"]),
        ("--top_p=1e-300", ["--top_p", "'1e-300'"]),
        ("--seed=" + "9" * 400, ["--seed", "999...999", "at most 4294967295"]),
        ("--seed=" + "9" * 5000, ["--seed", "999...999", "at most 4294967295"]),
        ("--keep_ratio=\x1b[2J", ["--keep_ratio", "\\x1b[2J"]),
        ("--max_insertions=-1", ["--max_insertions", "'-1'", "of at least 0"]),
        ("--max_pixels=0", ["--max_pixels", "'0'", "of at least 1"]),
        ("--modle=tiny", ["--modle"]),
    ],
)
def test_refuses_in_one_line(changed, messages, tmp_path, images, capsys):
    paths = {name: tmp_path / name for name in "broken cut strip empty corrupt foreign pipe sparse".split()}
    paths["broken"].write_text("no image")
    paths["cut"].write_bytes(images[0].read_bytes()[:500])
    Image.new("RGB", (900, 3)).save(paths["strip"], "PNG")
    paths["empty"].mkdir()
    os.mkfifo(paths["pipe"])
    with open(paths["sparse"], "wb") as file:
        file.truncate(40 << 30)
    for name in ("corrupt", "foreign"):
        if name in changed:
            shutil.copytree(TINY, paths[name])
    if "corrupt" in changed:
        weights = paths["corrupt"] / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
    if "foreign" in changed:
        without_tokens(paths["foreign"], ["<|vision_end|>"])
    argv = {"--model": "--model=tiny", "--image": f"--image={images[0]}", "--question": "--question=How many?"}
    argv[changed.partition("=")[0]] = changed.format(**paths)
    with pytest.raises(SystemExit) as stopped:
        main(list(argv.values()))
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("qwenla generate: ")
    for message in messages:
        assert message.format(**paths) in captured.err


def test_stream_and_json_are_not_for_one_answer(images, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--model=tiny", f"--image={images[0]}", "--question=How many?", "--json", "--stream"])
    assert stopped.value.code == 2 and "--stream: it prints text as it comes" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--model", "--image", "--question"])
def test_names_the_flag_that_is_missing(flag, images, capsys):
    argv = [f"--image={images[0]}", "--model=tiny", "--question=How many?"]
    with pytest.raises(SystemExit) as stopped:
        main([arg for arg in argv if not arg.startswith(flag)])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert flag in err and err.count("\n") == 1
