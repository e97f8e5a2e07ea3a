"""Whether a run fits a topology, and how fast it could be there: from compiled programs, or from arithmetic alone."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
from jax.sharding import AbstractMesh

from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.model.kernels import planned_for
from qwenla_jax.parallel.mesh import AXES, make_mesh, mesh_sizes
from qwenla_jax.planner import arithmetic
from qwenla_jax.planner.chips import Chip, Topology, slices, tpu_devices
from qwenla_jax.planner.compiled import Load, abstract_runtime, plan_programs, planned_config
from qwenla_jax.planner.flops import Work
from qwenla_jax.planner.hbm_traffic import memory_traffic, token_bytes
from qwenla_jax.planner.hlo import KINDS, Collective, collectives
from qwenla_jax.planner.hlo_products import product_flops
from qwenla_jax.train.train_runtime import TrainRuntime

HEADROOM = 0.1  # share of the memory that a run should leave free
# Sources of compiled figures, by the compiler's effort.
FULL, QUICK = "compiled", "compiled quickly"


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of a step on one chip.

    Attributes:
      flops, hbm_bytes: by arithmetic, see `arithmetic.work`.
      sent: bytes sent to other chips, by kind of collective.
      count: collectives run, by kind.
      peak_bytes: most memory in use while the phase runs, everything resident included.
      seconds: the roofline's: no program with these figures is faster.
      bound: what those seconds are due to: "compute", "memory" or "links".
      moved_bytes: to and from memory by the compiled program; of a rollout for one token of the chip's rows, on average
        over a response. None for arithmetic.
      least_bytes: what it has to move at least, by arithmetic.
      exposed: of `sent`, bytes in collectives that no other work overlaps; None for arithmetic.
      compile_s: seconds that compiling took; None for arithmetic.
      compile_cpu_s: processor seconds of that, over all cores.
      product_flops: operations of the compiled products, those of attention kernels aside; None for arithmetic, and of
        a rollout, whose loop over tokens counts to no constant.
    """

    flops: float
    hbm_bytes: float
    sent: dict[str, float]
    count: dict[str, int]
    peak_bytes: float
    seconds: float
    bound: str
    moved_bytes: float | None = None
    least_bytes: float | None = None
    exposed: float | None = None
    compile_s: float | None = None
    compile_cpu_s: float | None = None
    product_flops: float | None = None


@dataclasses.dataclass(frozen=True)
class Fit:
    """A run on a topology.

    Attributes:
      topology: its name.
      chips: how many.
      mesh: sizes of data, fsdp, tensor.
      source: "compiled", "compiled quickly" or "arithmetic": where peak and traffic are from.
      hbm_bytes: memory of a chip.
      components: bytes of one chip by component, at the peak.
      peak_bytes: the most of all phases.
      headroom: share of the memory that is left at the peak; negative where it does not fit.
      fits: whether `HEADROOM` is left.
      phases: by name.
      step_s: seconds of a step by the roofline.
      problem: why the compiler gave no program; None where it did.
      versions: of what the figures depend on.
    """

    topology: str
    chips: int
    mesh: tuple[int, int, int]
    source: str
    hbm_bytes: float
    components: dict[str, float]
    peak_bytes: float
    headroom: float
    fits: bool
    phases: dict[str, Phase]
    step_s: float
    problem: str | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


def roofline(chip: Chip, work: Work, sent: float) -> tuple[float, str]:
    """Seconds of a phase whose parts overlap fully, and what they are bound by."""
    times = {
        "compute": work.flops / chip.flops,
        "memory": work.bytes / chip.hbm_bandwidth,
        "links": sent / chip.link_bandwidth,
    }
    bound = max(times, key=lambda name: times[name])
    return times[bound], bound


def _phase(chip: Chip, work: Work, result: Sequence[Collective], peak: float, times: int = 1, **more: Any) -> Phase:
    ran = [one for one in result if one.group > 1 and one.times]
    kinds = dict.fromkeys(one.kind for one in ran)
    sent = {kind: sum(one.sent * times for one in ran if one.kind == kind) for kind in kinds}
    count = {kind: sum(one.times * times for one in ran if one.kind == kind) for kind in kinds}
    seconds, bound = roofline(chip, work, sum(sent.values()))
    order = [kind for kind in KINDS if kind in sent]
    sent, count = {kind: sent[kind] for kind in order}, {kind: count[kind] for kind in order}
    return Phase(work.flops, work.bytes, sent, count, peak, seconds, bound, **more)


def _meshed(options: RunOptions, topology: Topology) -> RunOptions:
    """The settings with a mesh for the topology. Raises ValueError where there is none."""
    mesh = arithmetic.choose_mesh(options, planned_config(options), topology.chips)
    return dataclasses.replace(options, mesh=mesh)


def estimate(options: RunOptions, topology: Topology, load: Load) -> Fit:
    """By arithmetic. Raises ValueError where the settings do not fit the topology."""
    options = _meshed(options, topology)
    mesh: Any = AbstractMesh(mesh_sizes(options.mesh, topology.chips), AXES)
    runtime = abstract_runtime(options, mesh)
    sizes = arithmetic.sizes_of(runtime, load)
    kept = arithmetic.resident(runtime)
    work, traffic = arithmetic.work(runtime, sizes, kept), arithmetic.traffic(runtime, sizes, kept)
    extra = arithmetic.transient(runtime, sizes, kept, topology.chip.is_tpu)
    phases, peaks = {}, {}
    for name, more in extra.items():
        peaks[name] = sum(kept.components.values()) + sum(more.values())
        phases[name] = _phase(topology.chip, work[name], traffic[name], peaks[name])
    worst = max(peaks, key=lambda name: peaks[name])
    return _fit(runtime, topology, "arithmetic", kept.components | extra[worst], phases)


@contextlib.contextmanager
def _effort(level: str | None) -> Iterator[None]:
    """Compiles at JAX's optimisation level of this name; None leaves it."""
    before = cast(Any, jax.config).jax_optimization_level  # made at run time
    jax.config.update("jax_optimization_level", level or before)
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", before)


def compile_fit(options: RunOptions, topology: Topology, load: Load, quick: bool = False) -> Fit:
    """From the compiled programs of a step.

    With `quick` the compiler spends little effort on fast programs: a quarter of the time, somewhat other peaks and
    traffic than those of the programs that a run compiles.

    Raises:
      ModuleNotFoundError: the TPU compiler is not installed.
      ValueError: settings that do not fit the topology.
    """
    options = _meshed(options, topology)
    runtime = abstract_runtime(options, make_mesh(options.mesh, devices=tpu_devices(topology)))
    sizes = arithmetic.sizes_of(runtime, load)
    kept = arithmetic.resident(runtime)
    work = arithmetic.work(runtime, sizes, kept)
    with planned_for("tpu"):
        planned = plan_programs(runtime, load)
    phases, used, problem = {}, {}, None
    for name, program in planned.programs.items():
        begin, busy = time.perf_counter(), time.process_time()
        try:
            with _effort("O1" if quick else None):
                compiled = program.compile()
        except jax.errors.JaxRuntimeError as error:
            problem = f"{name}: {str(error).strip()}"
            break
        spent = {"compile_s": time.perf_counter() - begin, "compile_cpu_s": time.process_time() - busy}
        memory: Any = compiled.memory_analysis()
        # What the run holds beside the program's own arguments.
        beside = {"rollout": ("optimiser", "reference"), "reference": ("optimiser",)}.get(name, ())
        used[name] = float(memory.peak_memory_in_bytes)
        peak = used[name] + sum(kept.components.get(part, 0) for part in beside)
        times = sizes.rounds if name == "rollout" else 1
        text = compiled.as_text()
        assert text is not None
        result = collectives(text, topology.chips, _dynamic_trips(runtime, name))
        moved = memory_traffic(text)
        if name == "rollout":
            bytes_, least = token_bytes(moved, *planned.pages), arithmetic.least_token_bytes(runtime, sizes)
        else:
            bytes_, least = float(sum(one.bytes for one in moved)), work[name].bytes if name in work else None
        read = {
            "moved_bytes": bytes_,
            "least_bytes": least,
            "product_flops": None if name == "rollout" else product_flops(text),
            "exposed": sum(one.sent * times for one in result if one.group > 1 and not one.overlapped),
        }
        phases[name] = _phase(topology.chip, work.get(name, Work()), result, peak, times, **read, **spent)
    components: dict[str, float] = dict(kept.components)
    if phases:
        worst = max(phases, key=lambda name: phases[name].peak_bytes)
        guess = arithmetic.transient(runtime, sizes, kept, True).get(worst, {})
        rest = phases[worst].peak_bytes - sum(kept.components.values())
        known = {part: size for part, size in guess.items() if part in ("cache", "activations", "gradient")}
        components |= known | {"temporaries": rest - sum(known.values())}
    return _fit(runtime, topology, QUICK if quick else FULL, components, phases, problem)


def _dynamic_trips(runtime: TrainRuntime, name: str) -> list[int]:
    """Rounds of the loop over tokens when every response is as long as may be."""
    return [runtime.options.data.max_response_tokens] if name == "rollout" else []


def _fit(
    runtime: TrainRuntime,
    topology: Topology,
    source: str,
    components: dict[str, float],
    phases: dict[str, Phase],
    problem: str | None = None,
) -> Fit:
    peak = max((phase.peak_bytes for phase in phases.values()), default=0.0)
    hbm = topology.chip.hbm_bytes
    shape = runtime.mesh.shape
    return Fit(
        topology=topology.name,
        chips=topology.chips,
        mesh=(shape["data"], shape["fsdp"], shape["tensor"]),
        source=source,
        hbm_bytes=hbm,
        components={name: float(size) for name, size in components.items()},
        peak_bytes=peak,
        headroom=1 - peak / hbm,
        fits=problem is None and peak <= (1 - HEADROOM) * hbm,
        phases=phases,
        step_s=sum(phase.seconds for phase in phases.values()),
        problem=problem,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    result = {}
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            continue
    return result


def smallest(options: RunOptions, chip: Chip, load: Load) -> tuple[Topology, Fit] | None:
    """The smallest slice of a chip on which the arithmetic leaves `HEADROOM`; None where there is none."""
    return next(fitting(options, chip, load), None)


def fitting(options: RunOptions, chip: Chip, load: Load) -> Iterator[tuple[Topology, Fit]]:
    """The slices of a chip on which the arithmetic leaves `HEADROOM`, the smallest first."""
    least = arithmetic.least_bytes(options, planned_config(options))
    for topology in slices(chip):
        if least / topology.chips > (1 - HEADROOM) * chip.hbm_bytes:
            continue
        try:
            result = estimate(options, topology, load)
        except ValueError:
            continue
        if result.fits:
            yield topology, result


def describe(fit: Fit, least: Topology | None) -> list[str]:
    """Lines for a person; `least` is the smallest slice of the same chip that fits by arithmetic."""
    gb = 1e9
    how = "by arithmetic, nothing compiled" if fit.source == "arithmetic" else fit.source
    lines = [f"{fit.topology}: {fit.chips} chips, mesh data, fsdp, tensor = {fit.mesh} ({how})"]
    if fit.problem:
        lines.append(f"the compiler gave no program of {fit.problem}")
    lines.append(f"memory of a chip at the peak, of {fit.hbm_bytes / gb:.1f} GB:")
    lines += [f"  {name:24} {size / gb:8.2f} GB" for name, size in fit.components.items()]
    verdict = "fits" if fit.fits else f"does not leave {HEADROOM:.0%}"
    lines.append(f"  {'all':24} {fit.peak_bytes / gb:8.2f} GB, {fit.headroom:.0%} free: {verdict}")
    for name, phase in fit.phases.items():
        took = f", compiled in {phase.compile_s:.0f} s" if phase.compile_s is not None else ""
        lines.append(
            f"{name}: {phase.flops / 1e12:.2f} TFLOP, {phase.hbm_bytes / gb:.1f} GB read and written, peak "
            f"{phase.peak_bytes / gb:.2f} GB, at least {phase.seconds:.3f} s (bound by {phase.bound}){took}"
        )
        if phase.moved_bytes is not None and phase.least_bytes:
            what = "a token, on average over a response" if name == "rollout" else "a step"
            ratio = phase.moved_bytes / phase.least_bytes
            lines.append(f"  {phase.moved_bytes / gb:.2f} GB moved {what}: {ratio:.2f} of what it has to be")
        if phase.product_flops and phase.flops:
            ratio = phase.product_flops / phase.flops
            flops = f"{phase.product_flops / 1e12:.2f} TFLOP of products, attention kernels aside"
            lines.append(f"  {flops}: {ratio:.2f} of all that it has to compute")
        if phase.exposed and (sent := sum(phase.sent.values())):
            lines.append(f"  {phase.exposed / gb:.2f} of {sent / gb:.2f} GB are sent while nothing else is computed")
        lines += [f"  {kind:24} {size / gb:8.2f} GB sent in {phase.count[kind]:,}" for kind, size in phase.sent.items()]
    lines.append(f"a step takes at least {fit.step_s:.2f} s by the roofline")
    lines.append(f"smallest slice that fits, by arithmetic: {least.name if least else 'none'}")
    return lines
