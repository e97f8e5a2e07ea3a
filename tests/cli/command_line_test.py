"""Hostile values on the command line: settings come of them, or one clear line for each problem.

Oracle: the clock, the memory, and what a refusal must look like. 2,000 random settings; `QWENLA_FUZZ=100000 pytest
tests/train/command_line_test.py` is the long form, and `QWENLA_FUZZ_SEED` repeats a seed.
"""

import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from absl import flags
from measure import peak_growth, slower_than
from ml_collections import config_flags

from qwenla_jax.cli import train
from qwenla_jax.cli.command_line import parse_flags
from qwenla_jax.config import checks
from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.config.schema import ConfigError, leaves
from qwenla_jax.distill import distill_options
from qwenla_jax.distill.distill_options import DistillOptions

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
CASES = int(os.environ.get("QWENLA_FUZZ", "2000"))
SEED = int(os.environ.get("QWENLA_FUZZ_SEED", time.time_ns() % 10**9))
SETTINGS = {
    "brpo": (RunOptions, checks.from_config_dict),
    "sft_route": (RunOptions, checks.from_config_dict),
    "distill": (DistillOptions, distill_options.from_config_dict),
}


def settings(name, *arguments, preset=""):
    """The settings that a command line comes to, as `launch/train.py` reads it."""
    cls, build = SETTINGS[name]
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values)
    argv = ["x.py", f"--config={ROOT / 'configs' / name}.py{preset}", *arguments]
    with mock.patch.object(sys, "argv", argv):  # where config_flags looks for overrides
        parse_flags(argv, cls, values)
    return build(config.value)


def refusal(name, *arguments, preset=""):
    with pytest.raises(ConfigError) as refused:
        settings(name, *arguments, preset=preset)
    assert_clear(str(refused.value))
    return str(refused.value)


def assert_clear(text):
    """Lines that name a key or a flag, without what a terminal would obey, and not long."""
    for line in text.split("\n"):
        assert line.isprintable() and line.isascii() and 10 < len(line) < 600, line
        assert "config" in line, line


@pytest.mark.parametrize("cls", [RunOptions, DistillOptions])
def test_no_number_is_without_bounds(cls):
    """One above what is allowed, and below, is refused by its key; so is what no number of 32 bits can hold."""
    name = "brpo" if cls is RunOptions else "distill"
    for leaf in leaves(cls):
        if leaf.type in (int, float):
            for text in ("10" + "0" * 20, "-1" + "0" * 20) if leaf.type is int else ("1e40", "-1e40", "1e-40", "nan"):
                if leaf.type is int and text.startswith("10"):
                    assert f"config.{leaf.key}: got 1" in refusal(name, f"--config.{leaf.key}={text}")
                else:
                    assert f"config.{leaf.key}: got" in refusal(name, f"--config.{leaf.key}={text}"), (leaf.key, text)


def test_steps_and_inner_updates_together():
    assert settings("brpo", "--config.steps=1000000000").steps == 10**9
    message = refusal("brpo", "--config.steps=1000000000", "--config.brpo.inner_updates=3")
    assert message == ("config.steps: got 1000000000 with 3 inner updates each, expected at most 2147483647 updates")


NUMBERS = ["-1", "0", "1", "2", "1e999", "-1e999", "1e-320", "nan", "inf", "0x10", "1_000", "١٢", "9" * 400, "1" * 5000]
NUMBERS += ["0x" + "f" * 5000, "10" * 12, "2147483648", "4294967296", "-0.0", "1e5", "0.5", "1.0", "True", "1e", "٣.٥"]
TEXTS = ["", " ", "x", "x" * 100_000, "\x1b[2J\x07", "a\nb", "\x00", "\udcff", "\u202ex", "None", "{}", "()", "'", '"']
TEXTS += [
    "[" * 50_000,
    "(" * 90 + ")" * 90,
    "(" * 50_000,
    "-" * 50_000 + "1",
    "a," * 5000,
    "a,a",
    "(1, 2)",
    "('a', 'b')",
]
TEXTS += ["((('(' , 'train'),),)", "(('(a+)+$', 'train'),)", "('a' * 10**9,)", "9**9**9", "__import__('os')", "1+1j"]
TEXTS += [
    "/",
    "/dev/zero",
    "/dev/stdin",
    "/proc/self/mem",
    "random:/dev/zero",
    "random:",
    "~",
    "..",
    "nowhere.jsonl",
    "x" * 300 + ".jsonl",
    "parquet:" + "x" * 5000,
]
TEXTS += ["scenes*1e999", "scenes*0", "scenes*nan", "scenes,scenes", "parquet:/dev/zero", "parquet:", "we_math:/", ":"]
TEXTS += ["scenes#max_options=" + "9" * 5000, "scenes#", "#", "*", "a.jsonl*" * 1000, "http://x@y", "http://[", "//:"]
TEXTS += ["my:reward=1e999", "a:b=" + "9" * 5000, "a:b=1", "math:sqrt", ("é" * 300), "judges", "rule,judges", "format"]


def argument(rng, keys):
    key = rng.choice(keys)
    if rng.random() < 0.05:  # a key that is none
        cut = rng.randrange(len(key) + 1)
        key = key[:cut] + rng.choice(["", ".", "x", "\x1b[2J", "[0]", "é", "k" * 3000]) + key[cut + 1 :]
    value = rng.choice(rng.choice([NUMBERS, TEXTS]))
    if rng.random() < 0.1:
        value += rng.choice(NUMBERS)
    return rng.choice(["--config.{}={}", "--config.{}={}", "-config.{}={}", "--noconfig.{}", "--config.{}"]).format(
        key, value
    )


def test_random_settings(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(SEED)
    print(f"QWENLA_FUZZ_SEED={SEED}")
    settings("brpo"), settings("distill")  # what is loaded at the first call is no value's doing
    growth, refused = peak_growth(), 0
    keys = {name: [leaf.key for leaf in leaves(SETTINGS[name][0])] for name in SETTINGS}
    for _ in range(CASES):
        name = rng.choice(list(SETTINGS))
        given = [argument(rng, keys[name]) for _ in range(rng.choice([1, 1, 1, 2, 4]))]
        start = time.thread_time()
        try:
            result = settings(name, *given)
        except ConfigError as error:
            refused += 1
            shown = [arg[:200] for arg in given]
            assert "\x1b" not in str(error) and all(len(line) < 700 for line in str(error).split("\n")), shown
        else:
            numbers = [value for value in leaf_values(result) if isinstance(value, float)]
            assert all(math.isfinite(value) for value in numbers), given
        assert not slower_than(1, start, settings, name, *given), [arg[:200] for arg in given]
    assert CASES / 3 < refused < CASES
    assert growth() < 300  # MB


def leaf_values(options):
    for leaf in leaves(type(options)):
        value = options
        for part in leaf.key.split("."):
            value = getattr(value, part)
        yield value


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train.py"], "--config is missing; expected --config=RECIPE or --config=RECIPE:PRESET; --list names them"),
        (["distill.py"], "--config is missing; expected --config=configs/distill.py"),
        (["distill.py", "--make", "cold_start", "--config=distill"], "--make=cold_start: the settings of"),
        (["train.py", "--config="], "--config: there is no file ''"),
        (["train.py", "--config=nowhere.py"], "--config: there is no file 'nowhere.py'"),
        (["train.py", "--config=configs"], "--config: there is no file 'configs'"),
        (["train.py", "--config", "nowhere.py"], "nowhere.py"),
        (["train.py", "--config=configs/brpo.py:8b"], "recipe brpo: there is no preset '8b'; valid: tiny, 3b, 7b"),
        (["distill.py", "--config=configs/distill.py:\x1b[2J"], "recipe distill: there is no preset"),
        (["train.py", "--config=configs/brpo.py", "--nosuch=1"], "Unknown command line flag 'nosuch'"),
        (["train.py", "--config=configs/brpo.py", "--num_processes=x"], "num_processes"),
        (
            ["train.py", "--config=configs/brpo.py", f"--config.steps={10**20}"],
            "config.steps: got 100000000000000000000",
        ),
    ],
)
def test_one_clean_line(command, message):
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / command[0], *command[1:]],
        capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and not done.stdout, done
    (line,) = done.stderr.splitlines()
    assert message in line and line.isprintable() and len(line) < 600


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"steps": 1', "settings.json: not JSON"),
        ("[1]", "settings.json: holds a list; expected an object"),
        ('{"stepz": 1}', "config.stepz: there is no such key; did you mean config.steps?"),
        ('{"sampling": {"samples": 0}}', "config.sampling.samples: got 0, expected at least 1"),
    ],
)
def test_a_file_of_settings_that_is_none(content, message, tmp_path):
    (tmp_path / "settings.json").write_text(content)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    with pytest.raises(ConfigError) as refused:
        parse_flags(["x.py", f"--config={tmp_path / 'settings.json'}"], RunOptions, values)
    assert message in str(refused.value)


def shown(monkeypatch, capsys, *argv):
    """What `qwenla train` prints."""
    monkeypatch.setattr(sys, "argv", ["qwenla", *argv])  # where config_flags looks for overrides
    try:
        train.main(argv)
    except SystemExit as ended:
        assert not ended.code, ended.code
    return capsys.readouterr().out


def test_printed_settings_are_taken_back_and_show_in_the_help(monkeypatch, capsys, tmp_path):
    given = ["--config.optim.clip_norm=inf", "--config.rewards.extra=('a:b', 'c:d')", "--config.seed=7"]
    given.append("--config.optim.trainable=(('visual/.*', 'freeze'), ('.*', 'train'))")
    printed = shown(monkeypatch, capsys, "--config=brpo:7b", *given, "--print_config")
    values = json.loads(printed)
    assert values["optim"]["clip_norm"] is None and values["rewards"]["extra"] == ["a:b", "c:d"]
    assert values["optim"]["learning_rate"] == 1e-6 and values["seed"] == 7  # the paper's, and the flag's
    file = tmp_path / "saved.json"
    file.write_text(printed)
    assert shown(monkeypatch, capsys, f"--config={file}", "--print_config") == printed
    again = shown(monkeypatch, capsys, f"--config={file}", "--config.seed=8", "--print_config")
    assert json.loads(again) == values | {"seed": 8}
    help = shown(monkeypatch, capsys, f"--config={file}", "--config.seed=8", "--help")
    assert "--config.optim.learning_rate  (float, 1e-06)" in help and "--config.seed  (int, 8)" in help
    assert "--config.optim.learning_rate  (float, 0.0002)" in shown(monkeypatch, capsys, "--help")


def test_the_list_has_every_recipe_with_its_presets(monkeypatch, capsys):
    words = [line.replace(",", "").split() for line in shown(monkeypatch, capsys, "--list").splitlines()]
    recipes = {path.stem for path in (ROOT / "configs").glob("*.py")}
    sizes = ["3b", "7b", "32b", "72b", *(f"qwen3vl-{size}" for size in ("2b", "4b", "8b", "32b"))]
    wanted = dict.fromkeys(recipes, ["tiny", *sizes]) | {"base": ["tiny"]}
    wanted["distill"] = [*wanted["brpo"], "cold_start"]
    wanted["cold_start"] = [*wanted["brpo"], "brief", "working", "long"]
    wanted["brpo"] = [*wanted["brpo"], "3b_80gb", "3b_v5e8", "7b_8x80gb", "7b_v5p8", "7b_geometry3k"]
    assert {line[0]: line[1:] for line in words if line[0] in recipes} == wanted


def test_a_mistake_in_a_config_file_is_shown_where_it_is(tmp_path):
    for code, error in (("return nonsense", NameError), ("return (", SyntaxError), ("return 1 + 'a'", TypeError)):
        (tmp_path / "own.py").write_text(f"def get_config():\n    {code}\n")
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values)
        with pytest.raises(error):
            parse_flags(["x.py", f"--config={tmp_path / 'own.py'}"], RunOptions, values)


@pytest.mark.parametrize("key", ["data.system", "data.source"])
def test_bytes_that_are_no_text(key):
    assert f"config.{key}: holds half of a character" in refusal("brpo", f"--config.{key}=a\udcff")
