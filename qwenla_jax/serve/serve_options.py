"""The settings of the server, each a flag of `qwenla serve`. Nothing here imports jax."""

from __future__ import annotations

import dataclasses

from qwenla_jax.config.schema import option
from qwenla_jax.config.shared_options import MODES, MODES_HELP, MOST_IMAGES, MOST_INSERTIONS, MOST_PIXELS, MOST_TOKENS

ANSWERS = ("conclusion", "sections", "think")


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """What `qwenla serve` is started with. Names are vLLM's where it has the same."""

    model: str = option("tiny", "a Hugging Face folder, a model of the Hub, or tiny, the embedded one")
    host: str = option("127.0.0.1", "address to listen at")
    port: int = option(8000, "0: any free one", low=0, high=65535)
    api_key: tuple[str, ...] = option((), "keys, any of which opens /v1; default: $QWENLA_API_KEY, or none")
    served_model_name: tuple[str, ...] = option(
        (), "what requests call the model; default: ORG/NAME of the Hub, or a folder's name"
    )
    max_model_len: int = option(
        2048, "most tokens of a prompt and its answer; inserted tokens do not count", low=64, high=MOST_TOKENS
    )
    limit_mm_per_prompt: int = option(8, "most images of a request, as '{\"image\": N}'", low=1, high=MOST_IMAGES)
    mm_processor_kwargs: int | None = option(
        None,
        "larger images are shrunk, as '{\"max_pixels\": N}'; default: the checkpoint's bound, and half of the context "
        "an image",
        low=1,
        high=MOST_PIXELS,
    )
    max_num_seqs: int = option(8, "answers that are decoded at once", low=1, high=1024)
    max_queued_requests: int = option(256, "answers that may wait; more get 429", low=0, high=2**20)
    max_body_mb: int = option(128, "largest request, in MiB; larger ones get 413", low=1, high=4096)
    allowed_origins: tuple[str, ...] = option((), "other web pages that may call the server, as '[\"*\"]'")
    seed: int | None = option(None, "of the seeds of requests without one; default: by chance", low=0, high=2**32 - 1)
    answer: str = option(
        "conclusion",
        "what content is: the conclusion, all sections, or think (the conclusion behind the rest in <think> tags)",
        choices=ANSWERS,
    )
    reattention: str = option("copy", MODES_HELP, choices=MODES)
    keep_ratio: float = option(0.5, "route: share of the visual tokens that is kept", low=0, high=1)
    max_insertions: int = option(
        2, "most insertions of an answer, whatever a request asks for", low=0, high=MOST_INSERTIONS
    )
    grace_period: float = option(5.0, "seconds, at least, that /health says 503 after SIGTERM", low=0, high=3600)
