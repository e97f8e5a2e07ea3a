"""Oracle: the paper's printed settings, config_flags itself, and refusals spelled out by hand."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import config_dict

from qwenla_jax.config.checks import from_config_dict
from qwenla_jax.config.run_options import OptimOptions, RunOptions
from qwenla_jax.config.schema import ConfigError, check_command_line, describe, leaves, to_config_dict, to_dict

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ("brpo", "cold_start")
STAGE_4 = ("sft_copy", "sft_route")


def get_config(name, *preset):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*preset)


@pytest.fixture
def checkpoint(tmp_path):
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).touch()
    return tmp_path


def refusal(**changes):
    config = to_config_dict(RunOptions()).to_dict()
    for dotted, value in changes.items():
        *groups, last = dotted.split("__")
        node = config
        for group in groups:
            node = node[group]
        node[last] = value
    with pytest.raises(ConfigError) as error:
        from_config_dict(config)
    return str(error.value)


def test_round_trip_with_every_optional_set_and_unset():
    options = RunOptions()
    assert from_config_dict(to_config_dict(options)) == options
    optim = OptimOptions(clip_norm=None, trainable=(("visual/.*", "freeze"), (".*", "train")))
    changed = dataclasses.replace(options, optim=optim, steps=3)
    assert from_config_dict(to_config_dict(changed)) == changed
    assert from_config_dict(json.loads(json.dumps(to_dict(changed)))) == changed


def test_config_dict_is_locked_and_typed_and_optionals_can_be_set():
    config = to_config_dict(RunOptions())
    with pytest.raises(AttributeError):
        config.optim.lr = 1.0
    with pytest.raises(TypeError):
        config.steps = "many"
    config.data.max_pixels = 400
    config.rewards.balance_floor = 0.0
    assert isinstance(config, config_dict.ConfigDict)
    options = from_config_dict(config)
    assert options.data.max_pixels == 400 and options.rewards.balance_floor == 0.0


@pytest.mark.parametrize(
    "key, nearest",
    [("optim__learnig_rate", "optim.learning_rate"), ("optim__lr", "optim.learning_rate"), ("step", "steps"),
     ("group_size", "brpo.group_size"), ("data__max_pixel", "data.max_pixels")],
)  # fmt: skip
def test_unknown_key_names_the_nearest(key, nearest):
    dotted = key.replace("__", ".")
    assert refusal(**{key: 1}) == f"config.{dotted}: there is no such key; did you mean config.{nearest}?"


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("steps", "5", "config.steps: got '5' (str), expected int"),
        ("steps", 5.0, "config.steps: got 5.0 (float), expected int"),
        ("steps", True, "config.steps: got True (bool), expected int"),
        ("steps", None, "config.steps: got None (NoneType), expected int"),
        ("steps", 0, "config.steps: got 0, expected at least 1"),
        ("data__max_pixels", "big", "config.data.max_pixels: got 'big' (str), expected int or none"),
        ("optim__b1", True, "config.optim.b1: got True (bool), expected float"),
        ("optim__eps", float("nan"), "config.optim.eps: got nan, expected a finite number"),
        ("optim__learning_rate", 0.0, "config.optim.learning_rate: got 0.0, expected more than 0"),
        ("brpo__top_p", 1.5, "config.brpo.top_p: got 1.5, expected at most 1"),
        ("brpo__group_size", 1, "config.brpo.group_size: got 1, expected at least 2"),
        ("rewards__balance_only_if_correct", 1,
         "config.rewards.balance_only_if_correct: got 1 (int), expected true or false"),
        ("stage", "rl", "config.stage: got 'rl', expected one of sft, brpo"),
        ("optim", 3, "config.optim: got 3, expected a group of settings"),
        ("optim__trainable", ((".*", "tune"),),
         "config.optim.trainable: got 'tune' for '.*', expected 'train', 'freeze' or 'tags'"),
        ("optim__accumulation", 3,
         "config.optim.accumulation: got 3, expected a divisor of config.data.batch_size (8)"),
        ("brpo", {"group_parts": 3},
         "config.brpo.group_parts: got 3, expected a divisor of config.brpo.group_size (8)"),
        ("brpo", {"importance_min": 3.0},
         "config.brpo.importance_min: got 3, expected less than importance_max (3)"),
        ("brpo", {"importance_sampling": "token_mask", "inner_updates": 2},
         "config.brpo.inner_updates: got 2, expected 1 with importance_sampling: the ratio is taken in the update that "
         "follows the sampling"),
        ("data__source", "nowhere.jsonl",
         "config.data.source: there is no file 'nowhere.jsonl'; expected scenes, easy_vqa, an existing .jsonl file or "
         "NAME:PATH"),
        ("rewards", {"match": "exact", "math": True},
         "config.rewards.math: exact compares letter by letter; expected match=normalized, or no math"),
        ("rewards", {"overlong": 1.0, "overlong_buffer": 65},
         "config.rewards.overlong_buffer: got 65, expected 1 to config.data.max_response_tokens (64)"),
        ("rewards", {"format": 0.0, "accuracy": 0.0, "balance": 0.0},
         "config.rewards: all weights are 0, expected at least one above 0"),
        ("rewards", {"extra": ("mine:short=many",)},
         "config.rewards.extra: got 'mine:short=many', expected module:function or module:function=WEIGHT"),
        ("init_from", "/no/such/folder",
         "config.init_from: there is no folder '/no/such/folder'; expected tiny, random:CONFIG, such a folder, or a "
         "model of the Hugging Face Hub such as Qwen/Qwen2.5-VL-3B-Instruct"),
        ("init_from", "random:/no/config.json",
         "config.init_from: got 'random:/no/config.json', but /no/config.json is neither a config.json nor a folder "
         "that holds one"),
    ],
)  # fmt: skip
def test_refusals_name_key_value_and_what_is_right(key, value, message):
    assert refusal(**{key: value}) == message


@pytest.mark.parametrize("value", ["x", (("(", "train"),), ((".*",),), ()])
def test_bad_trainable(value):
    assert "config.optim.trainable: " in refusal(optim__trainable=value)


def test_all_problems_at_once():
    assert refusal(steps=0, seed=-1, mesh__datas=2).count("config.") == 4  # one names a second key


@pytest.mark.parametrize("mesh", [{"data": 0}, {"data": -1, "fsdp": -1}, {"tensor": -2}])
def test_bad_mesh(mesh):
    assert "config.mesh" in refusal(**{f"mesh__{k}": v for k, v in mesh.items()})


def test_a_whole_number_and_no_limit_are_good_floats():
    options = from_config_dict({"optim": {"learning_rate": 1, "clip_norm": float("inf")}, "data": {"system": ""}})
    assert type(options.optim.learning_rate) is float
    assert options.optim.clip_norm is None and options.data.system is None


@pytest.mark.parametrize("name", CONFIGS + STAGE_4)
def test_large_presets_need_a_checkpoint_and_questions(name, checkpoint):
    config = get_config(name, "7b")
    with pytest.raises(ConfigError) as error:
        from_config_dict(config)
    assert str(error.value).splitlines() == [
        "config.init_from: the 7b preset needs --config.init_from=MODEL, a Hugging Face folder or name",
        "config.data.source: the 7b preset needs --config.data.source=FILE.jsonl or NAME:PATH",
    ]
    config.init_from, config.data.source = str(checkpoint), "scenes"
    assert from_config_dict(config).init_from == str(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="safetensors missing"):
        from_config_dict(config)


def test_brpo_7b_carries_the_papers_settings():
    o = get_config("brpo", "7b")
    assert (o.optim.learning_rate, o.optim.b1, o.optim.b2, o.optim.eps, o.optim.warmup_ratio) == (
        1e-6,
        0.9,
        0.95,
        1e-8,
        0.01,
    )
    assert (o.data.batch_size, o.optim.accumulation, o.brpo.group_size, o.brpo.temperature) == (16, 2, 8, 1.0)
    assert (o.brpo.beta, o.rewards.target_length, o.data.max_response_tokens, o.data.max_pixels) == (
        0.1,
        100,
        1024,
        307200,
    )
    assert (o.rewards.format, o.rewards.accuracy, o.rewards.balance, o.rewards.balance_floor) == (1, 1, 1, None)
    assert (o.dtype, o.param_dtype, o.optim.trainable) == ("bfloat16", "float32", ((".*", "train"),))
    assert o.data.max_prompt_tokens + o.data.max_response_tokens == 8192


@pytest.mark.parametrize("name", STAGE_4)
def test_stage_4_carries_the_papers_settings(name):
    o = get_config(name, "7b")
    assert (o.optim.learning_rate, o.optim.b1, o.optim.b2, o.optim.eps, o.optim.warmup_ratio) == (
        1e-5,
        0.9,
        0.999,
        1e-8,
        0.01,
    )
    assert (o.data.batch_size, o.optim.accumulation, o.data.max_pixels) == (64, 8, 262_144)
    assert o.steps == 13 * 40_000 // o.data.batch_size
    assert o.optim.trainable == get_config(name).optim.trainable
    assert [mode for _, mode in o.optim.trainable] == ["freeze", "tags", "train"]
    assert (o.reattention.mode, o.reattention.keep_ratio) == (name.removeprefix("sft_"), 0.5)


@pytest.mark.parametrize("name", CONFIGS + STAGE_4)
def test_presets(name, checkpoint):
    config = get_config(name)
    if name in STAGE_4:
        with pytest.raises(ConfigError, match="tiny preset needs --config.init_from"):
            from_config_dict(config)
        config.init_from, config.data.source = str(checkpoint), "scenes"
    assert from_config_dict(config).preset == "tiny"
    assert {get_config(name, preset).preset for preset in ("3b", "32b", "72b")} == {"3b", "32b", "72b"}
    with pytest.raises(ValueError, match="'9b'; valid: tiny, 3b, 7b, 32b, 72b"):
        get_config(name, "9b")


SCRIPT = """
import sys
from absl import app
from ml_collections import config_flags
from qwenla_jax.config import checks, run_options, schema
config = config_flags.DEFINE_config_file("config")
def main(argv):
    import json
    print(json.dumps(schema.to_dict(checks.from_config_dict(config.value))))
    assert not {"jax", "flax", "numpy"} & set(sys.modules)
schema.check_command_line(sys.argv[1:], run_options.RunOptions)
app.run(main)
"""


def test_through_config_flags_from_the_repository_root():
    flags = [
        "--config=configs/brpo.py:tiny", "--config.steps=7", "--config.optim.learning_rate=1",
        "--config.data.max_pixels=500", "--config.rewards.balance_floor=-1", "--config.data.system=Look twice.",
        "--config.rewards.balance_only_if_correct", "--config.optim.clip_norm=inf",
        """--config.optim.trainable=(("visual/.*", "freeze"), (".*", "train"))""",
    ]  # fmt: skip
    run = subprocess.run([sys.executable, "-c", SCRIPT, *flags], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    options = from_config_dict(json.loads(run.stdout))
    assert (options.steps, options.optim.learning_rate, options.data.max_pixels) == (7, 1.0, 500)
    assert (options.rewards.balance_floor, options.rewards.balance_only_if_correct) == (-1.0, True)
    assert (options.data.system, options.optim.clip_norm) == ("Look twice.", None)
    assert options.optim.trainable == (("visual/.*", "freeze"), (".*", "train"))


def test_command_line_is_refused_before_the_flags_are_parsed():
    right = ["--config=x.py", "--config.seed=3", "--config.seed", "3", "--other.key=1", "--workdir=/x"]
    check_command_line(right, RunOptions)
    check_command_line(["--", "--config.nothing=1"], RunOptions)
    with pytest.raises(ConfigError) as error:
        wrong = ["--config.optim.lr=1", "-config.steps=1e3", "--noconfig.zzz", "--config.seed=5"]
        check_command_line(wrong, RunOptions)
    assert str(error.value).splitlines() == [
        "config.optim.lr: there is no such key; did you mean config.optim.learning_rate?",
        "config.steps: got '1e3', expected int",
        "config.zzz: there is no such key; --help lists the keys",
    ]


def test_help_names_every_key_with_its_default():
    text = describe(RunOptions())
    for leaf in leaves(RunOptions):
        assert f"--config.{leaf.key}  (" in text
        assert leaf.field.metadata["help"] in text
    assert "--config.optim.learning_rate  (float, 0.0002)" in text
    assert "--config.data.max_pixels  (int or none, none)" in text
