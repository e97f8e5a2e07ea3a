"""What a run needs of chips that are not there: qwenla fit --config=brpo:7b --topology=v5p:2x2x4

Compiles the programs of a step for the TPU slice (needs the extra `fit`), and prints memory by component, operations,
traffic by kind of collective, the roofline's step time, and the smallest slice that fits. For GPUs (--topology=h200:8)
and with --arithmetic nothing is compiled. --scale=docs/SCALE.md makes that page; results in --results are used again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from qwenla_jax.cli.command_line import read_flags
from qwenla_jax.config.checks import relations
from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.config.schema import ConfigError, build


def options_of(config: Any) -> RunOptions:
    """Checked settings. A plan needs no checkpoint and no data, so their absence is fine.

    Raises:
      ConfigError: wrong keys or values.
    """
    options = build(RunOptions, config.to_dict())
    if problems := list(relations(options)):
        raise ConfigError("\n".join(problems))
    return options


def preset(name: str) -> RunOptions:
    """A preset of the recipe brpo."""
    from qwenla_jax.recipes.by_name import get_config

    return options_of(get_config("brpo", name))


def scale(args: flags.FlagValues) -> None:
    """Compiles the cases that have no result yet, and writes the page."""
    from qwenla_jax.planner.fit_report import FULL, QUICK
    from qwenla_jax.planner.scale import Case, compile_case, fit_cases, page, read_results, scaling_cases
    from qwenla_jax.utils.atomic_files import write_text

    path, results = Path(args.scale), Path(args.results)
    known, source = read_results(results), QUICK if args.quick else FULL

    def compiled(case: Case) -> bool:
        """Whether it had to be."""
        if (case.key, FULL) in known or (case.key, source) in known:
            return False
        print(f"compiling: {case.key}", flush=True)
        known[case.key, source] = compile_case(case, results, args.quick)
        return True

    if not args.arithmetic:
        for case in scaling_cases(preset):
            compiled(case)
        # A slice that turns out too small gives way to another, which is to be compiled in turn.
        while any([compiled(case) for *_, case in fit_cases(preset, known) if case]):
            pass
    machine = f"{os.cpu_count()} cores ({platform.machine()})"
    write_text(path, page(preset, known, machine))
    print(f"wrote {path}")


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    config_flags.DEFINE_config_file("config", None, "configs/STAGE.py or configs/STAGE.py:PRESET", flag_values=values)
    there: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string("topology", None, "CHIP:SHAPE: v5e:4x4, v5p:2x2x4, v6e:8x8, h100:8, h200:8", **there)
    flags.DEFINE_integer("prompt_tokens", 512, "tokens of a prompt, its images' included", 1, **there)
    flags.DEFINE_string("image", "640x480", "pixels of each of a prompt's images, width x height", **there)
    flags.DEFINE_bool("arithmetic", False, "compile nothing", **there)
    flags.DEFINE_bool("json", False, "print one JSON object and nothing else", **there)
    flags.DEFINE_string("scale", None, "write this page, from --results and from what is compiled now", **there)
    quick = "compile with little effort: in a quarter of the time, for somewhat other programs"
    flags.DEFINE_bool("quick", False, quick, **there)
    flags.DEFINE_string("results", "docs/scale.jsonl", "with --scale: compiled results, one a line", **there)


def main(argv: Sequence[str] | None = None) -> None:
    """Plans one run, or writes the page."""
    args = read_flags(argv, __doc__, define_flags, RunOptions())
    logging.set_verbosity(logging.WARNING)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the plan's own arithmetic needs no more
    from qwenla_jax.planner.chips import parse_topology
    from qwenla_jax.planner.compiled import Load
    from qwenla_jax.planner.fit_report import compile_fit, describe, estimate, smallest

    try:
        if args.scale:
            scale(args)
            return
        if args.config is None or args.topology is None:
            sys.exit("--config=configs/STAGE.py:PRESET and --topology=CHIP:SHAPE are both needed (or --scale=PATH)")
        options = options_of(args.config)
        topology = parse_topology(args.topology)
        width, by, height = args.image.partition("x")
        if not (by and width.isdigit() and height.isdigit()):
            sys.exit(f"--image: got {args.image!r}, expected WIDTHxHEIGHT such as 640x480")
        load = Load(args.prompt_tokens, int(width), int(height))
        compiled = topology.chip.is_tpu and not args.arithmetic
        result = compile_fit(options, topology, load, args.quick) if compiled else estimate(options, topology, load)
        least = smallest(options, topology.chip, load)
    except (ConfigError, ValueError, ModuleNotFoundError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if args.json:
        print(json.dumps(dataclasses.asdict(result) | {"smallest": least[0].name if least else None}))
        return
    print("\n".join(describe(result, least[0] if least else None)))
