"""Requests of OpenAI's chat completions, checked field by field, and errors in its form."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from qwenla_jax.config.shared_options import MODES
from qwenla_jax.sampling.recent_logprobs import MOST_TOP_LOGPROBS
from qwenla_jax.serve.serve_options import ServeOptions
from qwenla_jax.utils.unicode import half_character

MOST_CHOICES = 128
MOST_STOPS = 16
_GREEDY = 1e-5  # temperatures below it are greedy, as in vLLM
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
# Refused where they ask for anything; the values that ask for nothing.
_REFUSED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "tools": (None, []),
        "functions": (None, []),
        "logit_bias": (None, {}),
        "response_format": (None, {"type": "text"}),
    }
)


class ApiError(Exception):
    """An answer other than 200.

    Args:
      status: of HTTP.
      message: what is wrong and what would be right.
      param: the field of the request.
      code: a word for programs.
      retry_after: seconds.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A 400 that names a field."""
    return ApiError(400, f"{param}: {message}", param, code)


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """The body of a request, checked.

    Attributes:
      model: the name that it asked for.
      messages: not checked yet, see `chat_prompt`.
      n: answers.
      max_tokens: longest answer; None: as long as the context allows.
      temperature, top_p: as in `sampling.engine.Request`.
      top_k: 0 for all tokens.
      presence_penalty, frequency_penalty, repetition_penalty: 0, 0 and 1 change nothing.
      seed: 0 to 2**32 - 1, or None.
      stop: texts.
      logprobs: whether log-probabilities are asked for, and `top_logprobs` of how many of the most likely tokens.
      stream, include_usage: whether the answer is streamed, and the usage with it.
      mode, keep_ratio, max_insertions: of re-attention.
      return_reattention: whether the answer has its insertions in full.
      return_selection: whether `insertions` says which visual tokens each shows.
      return_token_ids: whether the answer has its tokens.
      separate_reasoning: False: content is all of the text, whatever the server's `answer`.
    """

    model: str
    messages: list[Any]
    n: int
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int | None
    stop: tuple[str, ...]
    logprobs: bool
    top_logprobs: int
    stream: bool
    include_usage: bool
    mode: str
    keep_ratio: float
    max_insertions: int
    return_reattention: bool
    return_selection: bool
    return_token_ids: bool
    separate_reasoning: bool


def parse_body(data: bytes, options: ServeOptions) -> tuple[dict[str, Any], str, list[Any]]:
    """What all requests have: the body, the model that it asks for, and the messages, which are not checked yet.

    Raises:
      ApiError: 404 for an unknown model, else 400; it names the field.
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {type(error).__name__}; expected an object") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a {type(body).__name__}; expected an object")
    model = body.get("model") or options.served_model_name[0]
    if model not in options.served_model_name:
        raise unknown_model(model)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", "expected a list of at least one message")
    return body, model, messages


def parse_request(data: bytes, options: ServeOptions) -> ChatRequest:
    """Checks a body; fields that are not known are ignored.

    Raises:
      ApiError: 404 for an unknown model, else 400; it names the field.
    """
    body, model, messages = parse_body(data, options)
    for name, neutral in _REFUSED.items():
        if body.get(name) not in neutral:
            raise invalid(name, "it is not supported; leave it out", "unsupported_parameter")
    look = _section(body, "reattention", ("mode", "keep_ratio", "max_insertions"))
    mode = look.get("mode") or options.reattention
    if mode not in MODES:
        raise invalid("reattention.mode", f"expected one of {', '.join(MODES)}")
    stream = _flag(body, "stream")
    limits = [_number(body, name, None, 1, whole=True) for name in ("max_completion_tokens", "max_tokens")]
    top_k = _number(body, "top_k", 0, -1, whole=True)
    seed = _number(body, "seed", None, whole=True)
    logprobs = _flag(body, "logprobs")
    top_logprobs = _number(body, "top_logprobs", 0, 0, MOST_TOP_LOGPROBS, whole=True)
    if top_logprobs and not logprobs:
        raise invalid("top_logprobs", "expected logprobs: true with it")
    temperature = _number(body, "temperature", 1.0, 0, 1e6)
    repetition_penalty = _number(body, "repetition_penalty", 1.0, 0)
    if repetition_penalty == 0:
        raise invalid("repetition_penalty", "expected a number above 0")
    return ChatRequest(
        model=model,
        messages=messages,
        n=_number(body, "n", 1, 1, MOST_CHOICES, whole=True),
        max_tokens=next((limit for limit in limits if limit is not None), None),
        temperature=0.0 if temperature < _GREEDY else temperature,
        top_p=_number(body, "top_p", 1.0, 1e-9, 1),
        top_k=max(top_k, 0),
        presence_penalty=_number(body, "presence_penalty", 0.0, -2, 2),
        frequency_penalty=_number(body, "frequency_penalty", 0.0, -2, 2),
        repetition_penalty=repetition_penalty,
        seed=None if seed is None else seed % 2**32,
        stop=_stops(body.get("stop")),
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        stream=stream,
        include_usage=_flag(_section(body, "stream_options"), "include_usage"),
        mode=mode,
        keep_ratio=_number(look, "keep_ratio", options.keep_ratio, 0, 1, "reattention."),
        max_insertions=_number(
            look, "max_insertions", options.max_insertions, 0, options.max_insertions, "reattention.", whole=True
        ),
        return_reattention=_flag(body, "return_reattention"),
        return_selection=_flag(body, "return_selection"),
        return_token_ids=_flag(body, "return_token_ids"),
        separate_reasoning=_flag(body, "separate_reasoning", True),
    )


def unknown_model(name: Any) -> ApiError:
    """A 404."""
    return ApiError(404, f"The model {str(name)[:100]!a} does not exist.", "model", "model_not_found")


def _section(body: Mapping[str, Any], name: str, known: tuple[str, ...] | None = None) -> Mapping[str, Any]:
    """An object within the body; with `known`, other keys are an error, since nobody else has such a field."""
    value = {} if body.get(name) is None else body[name]
    if not isinstance(value, dict):
        raise invalid(name, "expected an object")
    if known is not None and (other := [key for key in value if key not in known]):
        raise invalid(f"{name}.{str(other[0])[:40]}", f"there is no such setting; expected one of {', '.join(known)}")
    return value


def _flag(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise invalid(name, "expected true or false")
    return default if value is None else value


def _number(
    body: Mapping[str, Any],
    name: str,
    default: Any,
    low: float = -math.inf,
    high: float = math.inf,
    before: str = "",
    whole: bool = False,
) -> Any:
    """A number in a range, or the default where there is none."""
    value = body.get(name)
    if value is None:
        return default
    inside = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if whole and inside and isinstance(value, float):
        inside, value = value.is_integer(), int(value) if math.isfinite(value) else value
    if not inside or (not whole and abs(value) > sys.float_info.max):  # a whole number may be, and infinity is
        bounds = (
            f"{'' if low == -math.inf else f' of at least {low:g}'}{'' if high == math.inf else f', at most {high:g}'}"
        )
        raise invalid(before + name, f"expected a {'whole ' if whole else ''}number{bounds}")
    return value if whole else float(value)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    whole = isinstance(stops, list) and len(stops) <= MOST_STOPS
    if not whole or not all(isinstance(s, str) and s and half_character(s) is None for s in stops):
        raise invalid("stop", f"expected a text, or at most {MOST_STOPS} of them, none empty")
    return tuple(stops)
