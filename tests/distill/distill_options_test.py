"""Oracle: refusals spelled out by hand, the paper's printed settings, config_flags itself."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwenla_jax.config.schema import (
    ConfigError,
    check_command_line,
    describe,
    differences,
    leaves,
    to_config_dict,
    to_dict,
)
from qwenla_jax.distill.distill_options import DistillOptions, from_config_dict, read_options

ROOT = Path(__file__).resolve().parents[2]


def get_config(*preset):
    spec = importlib.util.spec_from_file_location("distill_config", ROOT / "configs" / "distill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*preset)


def refusal(raw):
    with pytest.raises(ConfigError) as error:
        from_config_dict(raw)
    return str(error.value).splitlines()


def test_round_trips():
    options = read_options({"verify": {"verifiers": ["judges"]}, "judges": {"models": ("a", "b/c"), "max_cost": 1}})
    assert options.judges.models == ("a", "b/c") and options.judges.max_cost == 1.0
    assert read_options(to_config_dict(options).to_dict()) == options
    assert read_options(json.loads(json.dumps(to_dict(options)))) == options


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"sampling": {"sample": 2}}, "config.sampling.sample: there is no such key; did you mean config.sampling.s"),
        ({"temperature": 2.0}, "config.temperature: there is no such key; did you mean config.sampling.temperature"),
        ({"sampling": {"samples": 0}}, "config.sampling.samples: got 0, expected at least 1"),
        ({"sampling": {"samples": 257}}, "config.sampling.samples: got 257, expected at most 256"),
        ({"sampling": {"top_p": 0.0}}, "config.sampling.top_p: got 0.0, expected more than 0"),
        ({"seed": True}, "config.seed: got True (bool), expected int"),
        ({"judges": {"timeout_s": float("nan")}}, "config.judges.timeout_s: got nan, expected a finite number"),
        ({"judges": 3}, "config.judges: got 3, expected a group of settings"),
        ({"verify": {"keep": "best"}}, "config.verify.keep: got 'best', expected one of first, shortest, all, none"),
        ({"verify": {"verifiers": ("rule", "jury")}},
         "config.verify.verifiers: got 'jury', expected some of format, rule, agreement, judges"),
        ({"verify": {"verifiers": "rule"}}, "config.verify.verifiers: got 'rule' (str), expected texts"),
        ({"verify": {"verifiers": ("rule", "rule")}}, "config.verify.verifiers: 'rule' stands twice"),
        ({"verify": {"verifiers": ()}}, "config.verify.verifiers: got none, expected some of"),
        ({"verify": {"agreement_min": 5}},
         "config.verify.agreement_min: got 5, expected at most config.sampling.samples (4)"),
        ({"data": {"size": 2**24 + 1}}, "config.data.size: got 16777217, expected at most 16777216"),
        ({"data": {"source": "nowhere.jsonl"}}, "config.data.source: there is no file 'nowhere.jsonl'; expected"),
        ({"init_from": "/no/folder"}, "config.init_from: there is no folder '/no/folder'"),
        ({"mesh": {"data": 0}}, "config.mesh: got data, fsdp, tensor = (0, 1, 1)"),
    ],
)  # fmt: skip
def test_refusals_name_key_value_and_what_is_right(raw, message):
    (line,) = refusal(raw)
    assert line.startswith(message)


def test_judges_need_an_endpoint_names_a_key_and_prices(monkeypatch):
    verify = {"verifiers": ["judges"]}
    assert [line.split(":")[0] for line in refusal({"verify": verify})] == [
        "config.judges.models",
        "config.judges.base_url",
    ]
    monkeypatch.delenv("SOME_KEY", raising=False)
    judges = {"models": ["a"], "base_url": "host/v1", "api_key_env": "SOME_KEY", "max_cost": 5.0}
    assert [line.split(":")[0] for line in refusal({"verify": verify, "judges": judges})] == [
        "config.judges.reject_votes",  # 2 of the 1 judge
        "config.judges.base_url",
        "config.judges.api_key_env",
        "config.judges.max_cost",
    ]
    monkeypatch.setenv("SOME_KEY", "x")
    judges |= {"base_url": "https://host/v1", "price_prompt": 1.0, "reject_votes": 1}
    assert from_config_dict({"verify": verify, "judges": judges}).judges.models == ("a",)


def test_presets():
    tiny = from_config_dict(get_config())
    assert (tiny.init_from, tiny.data.source, tiny.data.size) == ("tiny", "scenes", 4000)
    assert (tiny.sampling.samples, tiny.sampling.temperature) == (4, 1.0)
    assert tiny.verify.verifiers == ("rule", "agreement")
    for name in ("3b", "7b", "32b", "72b"):
        paper = get_config(name)
        assert (paper.data.size, paper.judges.reject_votes) == (40_000, 2)
        assert refusal(paper) == [
            f"config.init_from: the {name} preset needs --config.init_from=MODEL, a Hugging Face folder or name",
            f"config.data.source: the {name} preset needs --config.data.source=FILE.jsonl or NAME:PATH",
            f"config.judges.models: the {name} preset needs --config.judges.models=NAME, once a judge",
            f"config.judges.base_url: the {name} preset needs --config.judges.base_url=https://HOST/v1",
        ]
    with pytest.raises(ValueError, match="'9b'; valid: tiny, 3b, 7b, 32b, 72b"):
        get_config("9b")


def test_what_samples_has_the_same_settings():
    options = read_options({"seed": 7, "dtype": "bfloat16", "data": {"source": "easy_vqa", "batch_size": 6}})
    config = options.inference
    assert (config.seed, config.dtype, config.init_from, config.batch_size) == (7, "bfloat16", "tiny", 6)
    assert (options.data.source, options.data.size) == ("easy_vqa", 2000)


def test_differences_name_what_is_not_free():
    old = to_dict(DistillOptions())
    new = read_options({"seed": 1, "judges": {"retries": 9, "models": ["a"]}, "data": {"batch_size": 1}})
    assert differences(old, new, ("judges.retries", "data.batch_size")) == [
        "config.judges.models: [] in the folder, ['a'] now",
        "config.seed: 0 in the folder, 1 now",
    ]
    del old["seed"]  # a folder of a version that did not have the setting yet
    assert differences(old, DistillOptions(), ()) == []


SCRIPT = """
import sys, json
from absl import app
from ml_collections import config_flags
from qwenla_jax.config import schema
from qwenla_jax.config.schema import to_dict
from qwenla_jax.distill import distill_options
config = config_flags.DEFINE_config_file("config")
def main(argv):
    print(json.dumps(to_dict(distill_options.from_config_dict(config.value))))
    assert not {"jax", "flax", "numpy"} & set(sys.modules)
schema.check_command_line(sys.argv[1:], distill_options.DistillOptions)
app.run(main)
"""


def test_through_config_flags_without_jax():
    flags = [
        "--config=configs/distill.py", "--config.verify.verifiers=rule,judges", "--config.judges.models=big-4o",
        "--config.judges.models=Org/model-2.5", "--config.judges.base_url=http://h/v1", "--config.judges.max_cost=inf",
        "--config.data.size=12",
    ]  # fmt: skip
    run = subprocess.run([sys.executable, "-c", SCRIPT, *flags], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    options = read_options(json.loads(run.stdout))
    assert options.verify.verifiers == ("rule", "judges") and options.judges.models == ("big-4o", "Org/model-2.5")
    assert options.judges.max_cost is None and options.data.size == 12


def test_command_line_is_refused_before_the_flags_are_parsed():
    check_command_line(["--config=x", "--config.seed=3", "--workdir=/x", "--config.mesh.fsdp=2"], DistillOptions)
    with pytest.raises(ConfigError) as error:
        check_command_line(["--config.seeds=1", "--config.sampling.top_p=high"], DistillOptions)
    assert str(error.value).splitlines() == [
        "config.seeds: there is no such key; did you mean config.seed?",
        "config.sampling.top_p: got 'high', expected float",
    ]


def test_help_names_every_key():
    text = describe(DistillOptions())
    for leaf in leaves(DistillOptions):
        assert f"--config.{leaf.key}  (" in text and leaf.field.metadata["help"] in text
    assert "--config.judges.models  (texts, [])" in text
