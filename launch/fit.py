"""What a run needs of chips that are not there: python launch/fit.py --config=configs/brpo.py:7b --topology=v5p:2x2x4

Compiles the programs of a step for the TPU slice (needs the extra `fit`), and prints memory by component, operations,
traffic by kind of collective, the roofline's step time, and the smallest slice that fits. For GPUs (--topology=h200:8)
and with --arithmetic nothing is compiled. --scale=docs/SCALE.md makes that page; results in --results are used again.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from qwenla_jax.train.option_checks import relations
from qwenla_jax.train.options import RunOptions
from qwenla_jax.train.schema import ConfigError, build, check_command_line, config_file

BRPO = Path(__file__).resolve().parents[1] / "configs" / "brpo.py"
_CONFIG = config_flags.DEFINE_config_file("config", None, "configs/STAGE.py or configs/STAGE.py:PRESET")
_TOPOLOGY = flags.DEFINE_string("topology", None, "CHIP:SHAPE: v5e:4x4, v5p:2x2x4, v6e:8x8, h100:8, h200:8")
_PROMPT = flags.DEFINE_integer("prompt_tokens", 512, "tokens of a prompt, its picture's included", lower_bound=1)
_PICTURE = flags.DEFINE_string("picture", "640x480", "pixels of a prompt's picture, width x height")
_ARITHMETIC = flags.DEFINE_bool("arithmetic", False, "compile nothing")
_JSON = flags.DEFINE_bool("json", False, "print one JSON object and nothing else")
_SCALE = flags.DEFINE_string("scale", None, "write this page, from --results and from what is compiled now")
_QUICK = flags.DEFINE_bool(
    "quick", False, "compile with little effort: in a quarter of the time, for somewhat other programs"
)
_RESULTS = flags.DEFINE_string("results", "docs/scale.jsonl", "with --scale: compiled results, one a line")


def options_of(config: Any) -> RunOptions:
    """Checked settings. A plan needs no checkpoint and no data, so their absence is fine.

    Raises:
      ConfigError: wrong keys or values.
    """
    options = build(RunOptions, config.to_dict())
    problems = list(relations(options))
    if problems:
        raise ConfigError("\n".join(problems))
    return options


def preset(name: str) -> RunOptions:
    """A preset of configs/brpo.py."""
    spec = importlib.util.spec_from_file_location("brpo", BRPO)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return options_of(module.get_config(name))


def scale(path: Path, results: Path) -> None:
    """Compiles the cases that have no result yet, and writes the page."""
    from qwenla_jax.train.fit.report import FULL, QUICK
    from qwenla_jax.train.fit.scale import Case, compile_case, fit_cases, page, read_results, scaling_cases, write_page

    known, source = read_results(results), QUICK if _QUICK.value else FULL

    def compiled(case: Case) -> bool:
        """Whether it had to be."""
        if (case.key, FULL) in known or (case.key, source) in known:
            return False
        print(f"compiling: {case.key}", flush=True)
        known[case.key, source] = compile_case(case, results, _QUICK.value)
        return True

    if not _ARITHMETIC.value:
        for case in scaling_cases(preset):
            compiled(case)
        # A slice that turns out too small gives way to another, which is to be compiled in turn.
        while any([compiled(case) for *_, case in fit_cases(preset, known) if case]):
            pass
    machine = f"{os.cpu_count()} cores ({platform.machine()})"
    write_page(path, page(preset, known, machine))
    print(f"wrote {path}")


def main(argv: list[str]) -> None:
    """Plans one run, or writes the page."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the plan's own arithmetic needs no more
    from qwenla_jax.train.fit.chips import parse_topology
    from qwenla_jax.train.fit.programs import Load
    from qwenla_jax.train.fit.report import compile_fit, describe, estimate, smallest

    try:
        if _SCALE.value:
            scale(Path(_SCALE.value), Path(_RESULTS.value))
            return
        if _CONFIG.value is None or _TOPOLOGY.value is None:
            sys.exit("--config=configs/STAGE.py:PRESET and --topology=CHIP:SHAPE are both needed (or --scale=PATH)")
        options = options_of(_CONFIG.value)
        topology = parse_topology(_TOPOLOGY.value)
        width, by, height = _PICTURE.value.partition("x")
        if not (by and width.isdigit() and height.isdigit()):
            sys.exit(f"--picture: got {_PICTURE.value!r}, expected WIDTHxHEIGHT such as 640x480")
        load = Load(_PROMPT.value, int(width), int(height))
        compiled = topology.chip.is_tpu and not _ARITHMETIC.value
        found = compile_fit(options, topology, load, _QUICK.value) if compiled else estimate(options, topology, load)
        least = smallest(options, topology.chip, load)
    except (ConfigError, ValueError, ModuleNotFoundError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if _JSON.value:
        print(json.dumps(dataclasses.asdict(found) | {"smallest": least[0].name if least else None}))
        return
    print("\n".join(describe(found, least[0] if least else None)))


if __name__ == "__main__":
    path = config_file(sys.argv[1:])
    if path is not None and not Path(path).is_file():
        sys.exit(f"--config: there is no file {path!r}; expected configs/STAGE.py or configs/STAGE.py:PRESET")
    try:
        check_command_line(sys.argv[1:], RunOptions)
    except ConfigError as error:
        sys.exit(f"ConfigError: {error}")
    app.run(main)
