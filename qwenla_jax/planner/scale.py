"""The cases of docs/SCALE.md: which are worth compiling, their results on disk, and the page made of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.planner.chips import Topology, chip, parse_topology
from qwenla_jax.planner.compiled import Load
from qwenla_jax.planner.fit_report import FULL, QUICK, Fit, Phase, compile_fit, estimate, fitting
from qwenla_jax.planner.published import published_sizes
from qwenla_jax.utils.json_files import loads

CHIPS = ("v5e", "v5p", "v6e")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the page: what its runs have to do in a step.

    Attributes:
      load: of a question.
      response_tokens: new tokens of each response.
      group_parts: of an update; see `BrpoOptions`.
      sizes: its presets; none: all.
    """

    load: Load
    response_tokens: int = 1024
    group_parts: int = 1
    sizes: tuple[str, ...] = ()

    def of(self, options: RunOptions) -> RunOptions:
        """A preset's settings with these."""
        return dataclasses.replace(
            options,
            data=dataclasses.replace(options.data, max_response_tokens=self.response_tokens),
            brpo=dataclasses.replace(options.brpo, group_parts=self.group_parts),
        )


LOADS = {
    "1,024 new tokens": Table(Load(512)),
    "8,192 in all": Table(Load(7168)),
    "16,384 new tokens": Table(Load(512), 16_384, 8, ("7b",)),
    "32,768 new tokens": Table(Load(512), 32_768, 8, ("7b",)),
}
SCALING = ("v5p:2x2x4", "v5p:4x8x8", "v5p:8x8x16")


@dataclasses.dataclass(frozen=True)
class Case:
    """One run on one topology.

    Attributes:
      table: "fit" or "scaling".
      size: the preset.
      load: a key of `LOADS`.
      options: the run's settings.
      topology: where; for "fit" the smallest slice by arithmetic.
      planned: by arithmetic.
    """

    table: str
    size: str
    load: str
    options: RunOptions
    topology: Topology
    planned: Fit

    @property
    def key(self) -> str:
        """Names the case among the results."""
        parts, once = self.options.optim.accumulation, self.options.mesh.gather_to_sample
        return f"{self.table} {self.size}, {self.load}, {self.topology.name}, {parts} parts, gathered {once}"


Preset = Callable[[str], RunOptions]
Results = Mapping[tuple[str, str], Fit]


def fit_cases(preset: Preset, results: Results) -> Iterator[tuple[str, str, str, Case | None]]:
    """(size, chip, load, case) of every size on every chip; None where no slice is large enough by arithmetic.

    Where the preset itself fits nowhere, one part a batch (the same gradient, and rows for twice the chips) and weights
    that stay split while they sample are tried in turn. What was compiled and found too small gives way to the next
    that fits by arithmetic; where all were, the case is the one that leaves most.

    Args:
      preset: a size's settings.
      results: looked at anew for every case, so that what is compiled meanwhile counts.
    """
    for load, table in LOADS.items():
        for size in table.sizes or published_sizes():
            for name in CHIPS:
                tried = []
                for case in _candidates(table.of(preset(size)), size, name, load):
                    if best(case, results).fits:
                        yield size, name, load, case
                        break
                    tried.append(case)
                else:
                    most = max(tried, key=lambda case: best(case, results).headroom, default=None)
                    yield size, name, load, most


def _candidates(preset: RunOptions, size: str, name: str, load: str) -> Iterator[Case]:
    """What fits by arithmetic, the first choice first."""
    for options in _variants(preset):
        for topology, planned in fitting(options, chip(name), LOADS[load].load):
            yield Case("fit", size, load, options, topology, planned)


def _variants(options: RunOptions) -> Iterator[RunOptions]:
    for once in (options.mesh.gather_to_sample, False):
        for parts in (options.optim.accumulation, 1):
            yield dataclasses.replace(
                options,
                optim=dataclasses.replace(options.optim, accumulation=parts),
                mesh=dataclasses.replace(options.mesh, gather_to_sample=once),
            )


def scaling_cases(preset: Preset) -> Iterator[Case]:
    """The 7B with a question a chip, parameters split over 16 chips, on more and more chips."""
    first = next(iter(LOADS))
    for name in SCALING:
        topology = parse_topology(name)
        options = preset("7b")
        chips = topology.chips
        options = dataclasses.replace(
            options,
            data=dataclasses.replace(options.data, batch_size=chips),
            eval=dataclasses.replace(options.eval, batch_size=chips),
            optim=dataclasses.replace(options.optim, accumulation=1),
            mesh=dataclasses.replace(options.mesh, data=chips // 16, fsdp=16, tensor=1),
        )
        yield Case("scaling", "7b", first, options, topology, estimate(options, topology, LOADS[first].load))


def read_results(path: Path) -> dict[tuple[str, str], Fit]:
    """Compiled results by `Case.key` and source; of two with both the same the later counts.

    Raises:
      ValueError: a line that is no result, by file and number.
    """
    result: dict[tuple[str, str], Fit] = {}
    if not path.is_file():
        return result
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            content = loads(line, str(path))
            fit = content["fit"]
            phases = {name: Phase(**phase) for name, phase in fit["phases"].items()}
            one = Fit(**fit | {"phases": phases, "mesh": tuple(fit["mesh"])})
            result[content["case"], one.source] = one
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: is no result of launch/fit.py: {error!r}") from error
    return result


def best(case: Case, results: Results) -> Fit:
    """Of a case's results the most exact."""
    return results.get((case.key, FULL)) or results.get((case.key, QUICK)) or case.planned


def compile_case(case: Case, path: Path, quick: bool = False) -> Fit:
    """Compiles a case and appends its result to the file."""
    result = compile_fit(case.options, case.topology, LOADS[case.load].load, quick)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"case": case.key, "fit": dataclasses.asdict(result)}) + "\n")
    return result


def page(preset: Preset, results: Results, machine: str) -> str:
    """docs/SCALE.md: compiled figures where there are results, arithmetic elsewhere, each marked."""
    cases, scaling = list(fit_cases(preset, results)), list(scaling_cases(preset))
    compared = _comparison([*scaling, *(case for *_, case in cases if case)], results)
    shown = " (last table)" if compared else ""
    lines = [_HEAD.format(machine=machine, versions=_versions(list(results.values())), shown=shown)]
    for load in LOADS:
        lines += [f"## The smallest slice that fits: {load}", "", _FIT_HEADER]
        lines += [_fit_row(size, name, case, results) for size, name, own, case in cases if own == load]
        lines.append("")
    lines.append(_SCALING_HEAD)
    # Of one effort where there is one: what a compiler sends depends on it more than on the number of chips.
    common = next((kind for kind in (FULL, QUICK) if all((case.key, kind) in results for case in scaling)), None)
    shown_of = lambda case: best(case, results) if common is None else results[case.key, common]  # noqa: E731
    lines += [_scaling_row(case, shown_of(case)) for case in scaling]
    return "\n".join(lines + compared) + "\n"


_HEAD = """# Scale: what fits where

Made by `python launch/fit.py --scale=docs/SCALE.md --quick` on {machine}; {versions}.
No accelerator was there. Rows marked *compiled* were compiled by the TPU compiler for the topology they name; their
peak, traffic and compile time are the compiler's; *quickly*: with the compiler's least effort on fast programs, which
moves peak and traffic somewhat{shown}. Rows marked *arithmetic* were not compiled. Operations are arithmetic
in both. The step's time is the roofline's with every response as long as may be: no run is faster, real ones slower.

The load is the paper's: 16 questions a step in 2 parts, 8 responses each, one image of 640 x 480 pixels (391 visual
tokens, 300 of Qwen3-VL); prompts of 512 tokens with responses of 1,024, prompts of 7,168 with the same responses,
8,192 in all, or, of the 7B, prompts of 512 tokens with responses of 16,384 and 32,768. With these an update works
through the responses to a question one by one (`config.brpo.group_parts=8`), and rows and heads do: no axis for the
sequence is needed.
bfloat16 with float32 parameters and moments, rematerialised layers, a frozen reference. "Gathered once": the weights
are gathered over fsdp before they sample, not in every layer of every token. Attention is splash attention, as a run
on a TPU has it; rows marked * were compiled earlier, with attention in plain XLA in blocks of queries. A slice fits
where 10% of a chip's memory stays free; listed is the smallest of those that rows (16, or 8 in 2 parts) and heads
divide over, by arithmetic and where it was compiled by that too. "No slice": the largest that rows and heads divide
over is too small.
"""
_FIT_HEADER = """\
| model | slice | chips | data, fsdp, tensor | parts | gathered | peak GB a chip | free | step s | \
bound (rollout / update) | compile s (CPU s) | source |
|---|---|---|---|---|---|---|---|---|---|---|---|"""
_SCALING_HEAD = """## More chips, more questions

The 7B on v5p, a question a chip, parameters split over 16 chips and repeated over `data`; figures of one chip and step.

| chips | questions | TFLOP | GB sent, rollout | GB sent, update | of it by kind | peak GB | step s | source |
|---|---|---|---|---|---|---|---|---|"""

_COMPARISON_HEAD = """## One case, three ways

| model | slice | source | peak GB, rollout / update | GB sent, rollout / update | compile s (CPU s) |
|---|---|---|---|---|---|"""


def _versions(results: Sequence[Fit]) -> str:
    if not results:
        return "nothing compiled"
    return ", ".join(f"{name} {version}" for name, version in results[-1].versions.items())


def _fit_row(size: str, name: str, case: Case | None, results: Results) -> str:
    if case is None:
        return f"| {size} | {name}: no slice | | | | | | | | | | arithmetic |"
    fit = best(case, results)
    mesh, parts = ", ".join(map(str, fit.mesh)), case.options.optim.accumulation
    gathered = "once" if case.options.mesh.gather_to_sample else "every token"
    head = f"| {size} | {fit.topology} | {fit.chips} | {mesh} | {parts} | {gathered} |"
    if fit.problem:
        return f"{head} | does not compile | | | | compiled |"
    earlier = fit.source in (FULL, QUICK) and fit.phases["rollout"].moved_bytes is None
    source = f"{fit.source}{'*' if earlier else ''}"
    bounds = " / ".join(phase.bound for name, phase in fit.phases.items() if name != "reference")
    return (
        f"{head} {fit.peak_bytes / 1e9:.1f} | {fit.headroom:.0%}"
        f"{'' if fit.fits else ' (too little)'} | {fit.step_s:.1f} | {bounds} | {_compile_time(fit)} | {source} |"
    )


def _compile_time(fit: Fit) -> str:
    if fit.source not in (FULL, QUICK):
        return "-"
    wall = sum(phase.compile_s or 0 for phase in fit.phases.values())
    busy = sum(phase.compile_cpu_s or 0 for phase in fit.phases.values())
    return f"{wall:.0f} ({busy:.0f})"


def _comparison(cases: Sequence[Case], results: Results) -> list[str]:
    """Cases that were compiled both ways, beside their arithmetic."""
    both = [case for case in cases if all((case.key, source) in results for source in (FULL, QUICK))]
    if not both:
        return []
    lines = ["", _COMPARISON_HEAD]
    for case in both:
        for fit in (results[case.key, FULL], results[case.key, QUICK], case.planned):
            peaks = " / ".join(f"{fit.phases[name].peak_bytes / 1e9:.1f}" for name in ("rollout", "update"))
            sent = " / ".join(f"{sum(fit.phases[name].sent.values()) / 1e9:.1f}" for name in ("rollout", "update"))
            cells = (f"{case.size}, {case.load}", fit.topology, fit.source, peaks, sent, _compile_time(fit))
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _scaling_row(case: Case, fit: Fit) -> str:
    flops = sum(phase.flops for phase in fit.phases.values())
    sent = {name: phase.sent for name, phase in fit.phases.items()}
    kinds = ", ".join(f"{kind} {size / 1e9:.0f}" for kind, size in sent["update"].items())
    rollout, update = (sum(sent[name].values()) / 1e9 for name in ("rollout", "update"))
    questions = case.options.data.batch_size
    return (
        f"| {fit.chips} | {questions} | {flops / 1e12:.1f} | {rollout:.1f} | {update:.1f} | {kinds} | "
        f"{fit.peak_bytes / 1e9:.1f} | {fit.step_s:.2f} | {fit.source} |"
    )
