"""Metrics under vLLM's names, so that its dashboards work, and those of insertions under our own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)


class ServerMetrics:
    """What /metrics has. Labels: `model_name`, and of ended requests `finished_reason` (stop, length, abort).

    Args:
      model_name: the label.
      running, waiting: how many answers are.
    """

    def __init__(self, model_name: str, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        label, value = ["model_name"], {"model_name": model_name}

        def gauge(name: str, text: str, count: Callable[[], int]) -> None:
            Gauge(name, text, label, registry=registry).labels(**value).set_function(count)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, label, registry=registry).labels(**value)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(name, text, label, registry=registry, buckets=_SECONDS).labels(**value)

        gauge("vllm:num_requests_running", "Answers that are being decoded", running)
        gauge("vllm:num_requests_waiting", "Answers that wait for a slot", waiting)
        self.prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts, images included")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens of answers, without inserted ones")
        self.first_token = histogram("vllm:time_to_first_token_seconds", "From a request's arrival to its first token")
        self.latency = histogram("vllm:e2e_request_latency_seconds", "From a request's arrival to its last token")
        self.insertions = counter("qwenla:insertions", "Times that images were inserted before a reflection")
        self.skipped = counter("qwenla:skipped_insertions", "Reflections of text alone although the mode inserts")
        ended = Counter(
            "vllm:request_success", "Answers that have ended", [*label, "finished_reason"], registry=registry
        )
        self.ended = {reason: ended.labels(model_name, reason) for reason in ("stop", "length", "abort")}

    def render(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
