"""The settings of the server. Nothing here imports jax."""

from __future__ import annotations

import dataclasses

ANSWERS = ("conclusion", "sections", "think")


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """What `qwenla serve` is started with.

    Attributes:
      model: as in `weights.hub.local_folder`.
      names: what requests call the model; the first is in the answers.
      api_keys: any of these opens /v1; none: it is open.
      max_model_len: most tokens of a prompt and its answer together; inserted tokens do not count.
      max_images: most images of a request.
      max_pixels: larger images are shrunk; None: the checkpoint's bound, and at most half of the context an image.
      max_num_seqs: answers that are decoded at once.
      max_queued: answers that may wait for that; further ones get 429.
      max_body_bytes: of a request; a larger one gets 413.
      seed: of the seeds that requests without one get; None: by chance.
      answer: what `content` is: "conclusion", "sections" (the whole text) or "think" (the conclusion behind the rest
        in <think> tags).
      reattention, keep_ratio, max_insertions: of requests that do not set them; max_insertions is their maximum too.
      allowed_origins: origins of web pages, other than the server's own, that may call it; "*": all.
      grace_seconds: how long, at least, /health says 503 between SIGTERM and the end.
      version: of the package.
    """

    model: str = "tiny"
    names: tuple[str, ...] = ("tiny",)
    api_keys: tuple[str, ...] = ()
    max_model_len: int = 2048
    max_images: int = 8
    max_pixels: int | None = None
    max_num_seqs: int = 8
    max_queued: int = 256
    max_body_bytes: int = 128 << 20
    seed: int | None = None
    answer: str = "conclusion"
    reattention: str = "copy"
    keep_ratio: float = 0.5
    max_insertions: int = 2
    allowed_origins: tuple[str, ...] = ()
    grace_seconds: float = 5.0
    version: str = ""
