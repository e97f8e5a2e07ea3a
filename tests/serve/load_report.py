"""What `load_run.py` counts, what must hold of it, and the report."""

from __future__ import annotations

import collections
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from load_server import FLAGS, Sample

LEAST_SHARE = 0.5  # of the mean number of requests, that every client must have had
SHOWN = 12  # failures that the report names


class Facts:
    """Everything that is counted; `fail` notes what must not be."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.failures: list[str] = []
        self.equal: collections.Counter[str] = collections.Counter()
        self.different: collections.Counter[str] = collections.Counter()
        self.kinds: collections.Counter[str] = collections.Counter()
        self.statuses: collections.Counter[tuple[str, int]] = collections.Counter()
        self.refused: collections.Counter[tuple[str, int, int]] = collections.Counter()
        self.half_open: collections.Counter[str] = collections.Counter()
        self.done: collections.Counter[int] = collections.Counter()
        self.latency: dict[int, list[float]] = collections.defaultdict(list)
        self.first: dict[int, list[float]] = collections.defaultdict(list)
        self.health: list[float] = []
        self.samples: list[Sample] = []
        self.tokens = 0  # of equal answers
        self.seconds = self.cpu_seconds = self.start_seconds = self.restart_seconds = 0.0
        self.running = self.waiting = self.insertions = -1.0
        self.ended: dict[str, float] = {}
        self.last = Sample(0, 0, 0, 0, 0)
        self.retried = self.files_before = self.killed = self.errors_logged = 0
        self.kill_code: int | None = None
        self.term_code: int | None = None
        self.pool = ""

    def fail(self, message: str) -> None:
        """Notes a failure."""
        self.failures.append(message)

    def compare(self, name: str, answer: Mapping[str, Any], want: Mapping[str, Any], when: str = "load") -> None:
        """Whether an answer equals that to the request alone, in every field."""
        if answer == want:
            self.equal[when] += 1
            self.tokens += answer["usage"]["completion_tokens"] if when == "load" else 0
            return
        self.different[when] += 1
        pairs = zip(answer["choices"], want["choices"], strict=False)
        fields = sorted({key for one, other in pairs for key in one if one[key] != other.get(key)})
        self.fail(f"{name}: another answer, in {', '.join(fields) or 'usage or number'}")

    def note_pool(self, pool: Sequence[Mapping[str, Any]], answers: Mapping[tuple[int, bool], Any]) -> None:
        """What the requests and their answers alone are like."""
        choices = [choice for (_, stream), answer in answers.items() if not stream for choice in answer["choices"]]
        tokens = statistics.mean(len(choice["token_ids"]) for choice in choices)
        inserted = sum(bool(choice["insertions"]) for choice in choices)
        prompts = [answer["usage"]["prompt_tokens"] for answer in answers.values()]
        images = [sum(part["type"] == "image_url" for part in one["messages"][-1]["content"]) for one in pool]
        self.pool = (
            f"{len(pool)} distinct requests ({images.count(0)} of text only, {sum(n > 1 for n in images)} with several "
            f"images), prompts of {min(prompts)} to {max(prompts)} tokens, {len(choices)} answers of {tokens:.1f} "
            f"tokens in the mean, {inserted} of them with insertions"
        )


def growth(samples: Sequence[Sample], requests: int) -> tuple[float, float, float]:
    """Memory in MB: the most up to a tenth of the requests, the most after, and the growth after it.

    Growth is the median in the last tenth less that in the second: peaks are those of large images.
    """
    part = lambda low, high: [s.memory for s in samples if low * requests <= s.requests <= high * requests]  # noqa: E731
    early, late = part(0, 0.1), part(0.1, 1)
    begun, ended = part(0.1, 0.2), part(0.9, 1)
    if not (early and late and begun and ended):
        return 0.0, 0.0, float("nan")
    return max(early), max(late), statistics.median(ended) - statistics.median(begun)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def report(facts: Facts) -> tuple[str, bool]:
    """The text, and whether anything has failed."""
    done = sum(facts.done.values())
    settings = facts.settings
    peak_early, peak_late, _ = growth(facts.samples, done)
    counts = [facts.done[number] for number in range(settings["clients"])]
    checks = _checks(facts)
    failed = [name for name, _, holds in checks if not holds]
    lines = [
        f"# Load run: {'failed' if failed else 'passed'}",
        "",
        f"{done} requests of {settings['clients']} clients (asked for: {settings['requests']}), seed "
        f"{settings['seed']}; {facts.pool}.",
        "",
        f"Server: `qwenla serve {' '.join(flag for flag in FLAGS if 'key' not in flag)}`. Machine: {_machine()}.",
        "",
        "| check | seen | |",
        "|---|---|---|",
        *[f"| {name} | {seen} | {'holds' if holds else '**fails**'} |" for name, seen, holds in checks],
        "",
        f"{facts.seconds:.0f} s, {done / max(facts.seconds, 1e-9):.2f} requests and "
        f"{facts.tokens / max(facts.seconds, 1e-9):.1f} tokens of equal answers a second; the server took "
        f"{facts.cpu_seconds:.0f} s of processor time. Start {facts.start_seconds:.0f} s, restart "
        f"{facts.restart_seconds:.0f} s. {facts.retried} responses of 429 were retried after `Retry-After`. Answers by "
        f"how they ended: {_counts({name: int(count) for name, count in facts.ended.items()})}. Images were inserted "
        f"{facts.insertions:.0f} times. Half-open connections: {_counts(facts.half_open)}.",
        "",
        f"Memory: at most {peak_early:.0f} MB in the first tenth, {peak_late:.0f} MB after it; "
        f"open files at most {max((s.files for s in facts.samples), default=0)}, threads at most "
        f"{max((s.threads for s in facts.samples), default=0)}.",
        "",
        "| requests | memory, MB | open files | threads |",
        "|---|---|---|---|",
        *[f"| {s.requests} | {s.memory:.0f} | {s.files} | {s.threads} |" for s in _every(facts.samples, 11)],
        "",
        "| seconds | fastest client | median client | slowest client |",
        "|---|---|---|---|",
        *_by_client("to the first token, p50", facts.first, 0.5),
        *_by_client("to the first token, p99", facts.first, 0.99),
        *_by_client("to the answer, p50", facts.latency, 0.5),
        *_by_client("to the answer, p99", facts.latency, 0.99),
        f"| of /health, p50 and most | {quantile(facts.health, 0.5):.3f} | | {max(facts.health, default=0):.2f} |",
        "",
        f"Requests of a client: {min(counts)} to {max(counts)}.",
        "",
        "| kind | requests | status: number |",
        "|---|---|---|",
        *[f"| {kind} | {number} | {_counts(_statuses(facts, kind))} |" for kind, number in facts.kinds.items()],
        "",
        "| refused | expected | status: number |",
        "|---|---|---|",
        *[f"| {name} | {want} | {_counts(got)} |" for (name, want), got in sorted(_refused(facts).items())],
    ]
    if facts.failures:
        lines += ["", "Failures:", "", *[f"- {message}" for message in facts.failures[:SHOWN]]]
    return "\n".join(lines) + "\n", bool(failed)


def _checks(facts: Facts) -> list[tuple[str, str, bool]]:
    """What must hold: its name, what was seen, and whether it holds."""
    result: list[tuple[str, str, bool]] = []

    def check(name: str, seen: str, holds: bool) -> None:
        result.append((name, seen, holds))

    done, most = sum(facts.done.values()), facts.settings["most_growth_mb"]
    answered = facts.equal["load"] + facts.different["load"]
    check(
        "answers under load equal those alone",
        f"{facts.equal['load']} of {answered}",
        facts.equal["load"] == answered > 0,
    )
    refused = sum(facts.refused.values())
    wrong = sum(count for (_, want, got), count in facts.refused.items() if got != want)
    check("requests that must be refused got their status", f"{refused - wrong} of {refused}", not wrong)
    counts = [facts.done[number] for number in range(facts.settings["clients"])]
    share = min(counts) / max(statistics.mean(counts), 1e-9)
    check("requests of the slowest client, of the mean", f"{share:.2f}, at least {LEAST_SHARE}", share >= LEAST_SHARE)
    _, _, grown = growth(facts.samples, done)
    check("growth of memory after a tenth of the requests", f"{grown:+.1f} MB, below {most:g} MB", grown < most)
    files, before = facts.last.files, facts.files_before
    check("open files at the end, and before", f"{files}, {before}", files <= before)
    left = facts.running, facts.waiting
    check("answers running and waiting at the end", f"{left[0]:.0f}, {left[1]:.0f}", left == (0, 0))
    ended = facts.ended.get("stop", 0) + facts.ended.get("length", 0)
    check("answers that ended, by /metrics", f"{ended:.0f}, at least {answered}", ended >= answered)
    check("tracebacks in the server's log", f"{facts.errors_logged}", not facts.errors_logged)
    if not facts.settings["load_only"]:
        _check_signals(facts, check)
    check("other failures", f"{len(facts.failures)}", not facts.failures)
    return result


def _check_signals(facts: Facts, check: Callable[[str, str, bool], None]) -> None:
    code = facts.kill_code
    check(
        "kill -9 amid 16 streams: those cut off, exit code", f"{facts.killed}, {code}", facts.killed > 0 and code == -9
    )
    again = facts.equal["restart"] + facts.different["restart"]
    check(
        "answers after the restart equal", f"{facts.equal['restart']} of {again}", facts.equal["restart"] == again > 0
    )
    drained, code = facts.equal["drain"], facts.term_code
    check("SIGTERM amid 16 streams: equal answers, exit code", f"{drained}, {code}", drained == 16 and code == 0)


def _machine() -> str:
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "uvicorn", "starlette"))
    cores = f"{os.cpu_count()} x {names[0] if names else platform.machine()}"
    return f"{cores}, Python {platform.python_version()}, {packages}"


def _counts(counter: Mapping[Any, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(counter.items())) or "none"


def _statuses(facts: Facts, wanted: str) -> dict[int, int]:
    return {status: count for (kind, status), count in facts.statuses.items() if kind == wanted}


def _refused(facts: Facts) -> dict[tuple[str, int], dict[int, int]]:
    result: dict[tuple[str, int], dict[int, int]] = {}
    for (name, want, got), count in facts.refused.items():
        result.setdefault((name, want), {})[got] = count
    return result


def _every(samples: Sequence[Sample], count: int) -> list[Sample]:
    if len(samples) <= count:
        return list(samples)
    return [samples[round(n * (len(samples) - 1) / (count - 1))] for n in range(count)]


def _by_client(name: str, of: Mapping[int, Sequence[float]], share: float) -> list[str]:
    each = sorted(quantile(values, share) for values in of.values() if values)
    return [f"| {name} | {each[0]:.2f} | {statistics.median(each):.2f} | {each[-1]:.2f} |"] if each else []
