"""Requests to an engine, and the updates that it returns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from qwenla_jax.data.batching.collate import Buckets
from qwenla_jax.reattention.options import ReattentionConfig, row_reattention
from qwenla_jax.sampling.penalties import NEUTRAL, RowPenalties
from qwenla_jax.sampling.recent_logprobs import TokenLogprob
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.sample_state import RowSettings
from qwenla_jax.sampling.slot_sizes import sizes_for
from qwenla_jax.types import PromptBatch, Rollout, VisionBatch, VisualTokens


@dataclasses.dataclass(frozen=True)
class Request:
    """Questions that are prefilled together, and how their responses are sampled.

    Attributes:
      vision, prompts: as many questions as the engine's `questions`, as `collate_prompts` makes them with its buckets;
        with their `block` where anything is inserted.
      samples: the sample number of each row, G rows a question; a request of a single question may have fewer rows.
      count: how many of the questions are sampled; the others are padding. None: all.
      seed, step: a row's randomness is a function of (seed, step, its number, its token) alone.
      temperature: 0 is greedy.
      top_p: nucleus; 1 is the whole distribution.
      top_k: sample from this many of the most likely tokens; 0: from all.
      max_new_tokens: longest response; one number, or one a row; None: the engine's.
      reattention: of these questions; None: the engine's. Only an engine whose options are `by_row` takes another.
      stop: strings; a response ends as soon as its text contains one of them.
      presence_penalty, frequency_penalty: -2 to 2, 0 for none; subtracted from the logit of every token that is in the
        response, once and for each occurrence respectively. Applied before temperature, top_k and top_p.
      repetition_penalty: above 0, 1 for none; of every token that is in the prompt or the response, a positive logit is
        divided by it and a negative one multiplied. Applied before the other two.
      top_logprobs: updates report the log-probability of each token and of this many of the most likely tokens at its
        position; None: no log-probabilities.
    """

    vision: VisionBatch | VisualTokens
    prompts: PromptBatch
    samples: Sequence[int] | np.ndarray = (0,)
    count: int | None = None
    seed: int = 0
    step: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int | np.ndarray | None = None
    reattention: ReattentionConfig | None = None
    stop: Sequence[str] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    top_logprobs: int | None = None


@dataclasses.dataclass(frozen=True)
class Update:
    """The new tokens of a question's rows after one decode loop.

    Attributes:
      ticket: from `Engine.submit`.
      question: its number within the request.
      ids: new tokens of each row.
      rollout: the complete responses, on the host, once every row has ended; else None. A row that a stop string ended
        has `stopped_B` False, and its last token completes the string.
      logprobs: an entry for each of `ids`, if the request asks for them; else None.
    """

    ticket: int
    question: int
    ids: list[list[int]]
    rollout: Rollout | None
    logprobs: list[list[TokenLogprob]] | None = None


def check_request(request: Request, options: SampleOptions, b: Buckets, Q: int, decodes: bool) -> None:
    """Checks a request for an engine.

    Args:
      request: see there.
      options, b, Q: the engine's options, buckets and questions of a request.
      decodes: whether the engine can turn ids into text.

    Raises:
      ValueError: a setting is out of range or not supported by the engine, or the questions fit no bucket; the message
        names it.
    """
    own, prompts, vision = options.reattention, request.prompts, request.vision
    most, given = Q * options.group_size, len(request.samples)
    if not (given == most or (Q == 1 and 1 <= given < most)):
        raise ValueError(f"samples: got {given}, expected {'1 to ' if Q == 1 else ''}{most}, the request's rows")
    if request.count is not None and not 1 <= request.count <= Q:
        raise ValueError(f"count: got {request.count}, expected 1 to {Q}, the engine's questions of a request")
    if request.temperature < 0 or not 0 < request.top_p <= 1 or request.top_k < 0:
        raise ValueError("temperature and top_k must be at least 0, and top_p above 0 and at most 1")
    if not options.cuts and (request.top_p < 1 or request.top_k):
        raise ValueError("top_p and top_k: expected an engine that `cuts`")
    _check_extras(request, options)
    limit_B = np.asarray(options.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens)
    if limit_B.min() < 1 or limit_B.max() > options.max_new_tokens or limit_B.shape not in ((), (given,)):
        raise ValueError(
            f"max_new_tokens: got {request.max_new_tokens}, expected 1 to {options.max_new_tokens}, for all or each row"
        )
    if request.stop and (not decodes or not all(request.stop)):
        raise ValueError("stop: expected texts of at least one character, and an engine that can decode")
    fixed = ("form", "content", "delimiters", "positions", "open_id", "close_id")
    asked = request.reattention
    if asked is not None and not (own.by_row and all(getattr(asked, f) == getattr(own, f) for f in fixed)):
        raise ValueError(f"reattention: expected an engine by_row with the same {', '.join(fixed)}")
    if asked is not None and (asked.by_row or asked.max_insertions > own.max_insertions):
        raise ValueError(f"reattention: max_insertions: expected at most {own.max_insertions}, and not by_row")
    if own.inserts and prompts.block is None:
        raise ValueError("prompts: expected them with their `block`; collate them with re-attention options")
    slots = sizes_for(own, b, 1).block[0]
    if own.inserts and prompts.block is not None and (longest := int(np.max(prompts.block.length_Q))) > slots:
        raise ValueError(f"prompts: an insertion of {longest} slots, expected at most {slots}, what the buckets hold")
    known, sizes = (b.prompts,), (prompts.ids_QxP.shape[1],)
    if isinstance(vision, VisionBatch):
        known = (b.frames, b.slots, b.visual, *known)
        sizes = (*vision.patches_IxSxC.shape[:2], vision.gather_IxM.shape[1], *sizes)
    if len(prompts.length_Q) != Q or any(size not in bucket for size, bucket in zip(sizes, known, strict=True)):
        raise ValueError(
            f"{len(prompts.length_Q)} questions of {sizes} images, patch slots, visual and prompt tokens: expected"
            f" {Q} of {known}"
        )


def _check_extras(request: Request, options: SampleOptions) -> None:
    """Penalties and log-probabilities, which only some engines have."""
    for name in ("presence_penalty", "frequency_penalty"):
        if not -2 <= (value := getattr(request, name)) <= 2:
            raise ValueError(f"{name}: got {value}, expected -2 to 2")
    if not 0 < request.repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty: got {request.repetition_penalty}, expected a number above 0")
    neutral = (request.presence_penalty, request.frequency_penalty, request.repetition_penalty) == NEUTRAL
    if not options.penalties and not neutral:
        raise ValueError("presence_penalty, frequency_penalty, repetition_penalty: expected an engine with `penalties`")
    asked, most = request.top_logprobs, options.top_logprobs
    if asked is not None and (most is None or not 0 <= asked <= most):
        expected = "None from this engine" if most is None else f"0 to {most}, or None"
        raise ValueError(f"top_logprobs: got {asked}, expected {expected}")


def row_settings(request: Request, options: SampleOptions, questions: int) -> RowSettings:
    """The settings of each row of a request that `check_request` has checked; on the host."""
    G, samples, top = options.group_size, np.asarray(request.samples, np.uint32), request.top_logprobs
    reattention = request.reattention or dataclasses.replace(options.reattention, by_row=False)
    each = lambda value, dtype: np.full(questions * G, value, dtype)  # noqa: E731
    sample_B, limit_B = each(0, np.uint32), each(1, np.int32)
    sample_B[: len(samples)] = samples
    limit_B[: len(samples)] = options.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
    penalties = (
        each(request.presence_penalty, np.float32),
        each(request.frequency_penalty, np.float32),
        each(min(request.repetition_penalty, 1e30), np.float32),  # finite in float32
    )
    return RowSettings(
        each(request.seed, np.uint32),
        each(request.step, np.uint32),
        sample_B,
        each(request.temperature, np.float32),
        each(request.top_p, np.float32),
        each(min(request.top_k, 2**31 - 1), np.int32),
        limit_B,
        row_reattention(reattention, request.prompts, G),
        RowPenalties(*penalties) if options.penalties else None,
        None if options.top_logprobs is None else each(-1 if top is None else top, np.int32),
    )
