"""The engine's answers to requests, without the server: one question at a time, in buckets and slots of its own.

Nothing of `qwenla_jax.serve` takes part, but for the default of its longest context.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

import qwenla_jax
from qwenla_jax.data.batching.collate import collate_prompts, make_buckets
from qwenla_jax.data.batching.example import Example, to_chat_example
from qwenla_jax.data.images.preprocess import FramePatches, image_to_patches, to_rgb
from qwenla_jax.inference.ask import check_checkpoint
from qwenla_jax.inference.runtime import layout_of
from qwenla_jax.reattention.options import ReattentionConfig
from qwenla_jax.sampling.engine import Engine
from qwenla_jax.sampling.request import Request
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.token import suppression_bias
from qwenla_jax.serve.serve_options import ServeOptions
from qwenla_jax.text.answers.match import extract_conclusion
from qwenla_jax.weights.hub import EMBEDDED

DEFAULTS = ServeOptions()


class EngineAnswers:
    """Answers requests as `qwenla serve` without further flags should.

    Args:
      bodies: all requests that will be asked, for the sizes.
    """

    def __init__(self, bodies: Sequence[dict[str, Any]]) -> None:
        checkpoint = qwenla_jax.load(EMBEDDED)
        self._tok, self._processor = check_checkpoint(checkpoint)
        self._layout = layout_of(checkpoint.config)
        self._examples = {_key(body): self._example(body) for body in bodies}
        self._known: dict[str, list[dict[str, Any]]] = {}
        ids = self._tok.ids
        self._reattention = ReattentionConfig(
            mode=DEFAULTS.reattention,
            keep_ratio=DEFAULTS.keep_ratio,
            max_insertions=DEFAULTS.max_insertions,
            rows_at_once=1,
            open_id=ids.reflection_open,
            close_id=ids.reflection_close,
        )
        lengths = [len(example.ids_T) for example in self._examples.values()]
        images = max(len(example.frames) for example in self._examples.values())
        limits = [self._limit(body, len(self._examples[_key(body)].ids_T)) for body in bodies]
        bounds = (self._processor.min_pixels, self._processor.max_pixels, max(lengths), max(lengths), max(images, 1))
        sizes = make_buckets(self._layout, 1, *bounds)
        # One size of prompts and images, so that there is little to compile.
        self._buckets = dataclasses.replace(
            sizes, prompts=sizes.prompts[-1:], slots=sizes.slots[-1:], visual=sizes.visual[-1:]
        )
        options = SampleOptions(1, max(limits), 0.0, 1.0, ids.stop(), self._reattention, penalties=True)
        model, params = checkpoint
        bias_V = suppression_bias(checkpoint.config.text.vocab_size, self._tok.vocab_size, ids.suppressed())
        self._engine = Engine(model, params, options, self._buckets, 1, bias_V, 16)

    def answers(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """content, reasoning ("" for none) and finish_reason of each of the answers."""
        key = _key(body)
        if key not in self._known:
            self._known[key] = [self._answer(body, number) for number in range(body.get("n") or 1)]
        return self._known[key]

    def _limit(self, body: dict[str, Any], prompt: int) -> int:
        room = DEFAULTS.max_model_len - prompt
        return min(body.get("max_completion_tokens") or body.get("max_tokens") or room, room)

    def _example(self, body: dict[str, Any]) -> Example:
        turns: list[tuple[str, list[str | FramePatches]]] = []
        for message in body["messages"]:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            turns.append((message["role"], [self._part(part) for part in parts]))
        return to_chat_example(turns, self._tok, self._layout, "request")

    def _part(self, part: dict[str, Any]) -> str | FramePatches:
        if part["type"] == "text":
            return part["text"]
        data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
        return image_to_patches(to_rgb(Image.open(io.BytesIO(data))), self._processor, self._layout)

    def _answer(self, body: dict[str, Any], number: int) -> dict[str, Any]:
        example = self._examples[_key(body)]
        vision, prompts = collate_prompts([example], self._buckets, 1, self._reattention)
        request = Request(
            vision,
            prompts,
            samples=(number,),
            seed=(body.get("seed") or 0) % 2**32,
            temperature=float(body.get("temperature", 1.0)),
            top_p=float(body.get("top_p", 1.0)),
            top_k=max(body.get("top_k") or 0, 0),
            max_new_tokens=self._limit(body, len(example.ids_T)),
            presence_penalty=float(body.get("presence_penalty") or 0),
            frequency_penalty=float(body.get("frequency_penalty") or 0),
            repetition_penalty=float(body.get("repetition_penalty") or 1),
        )
        ((_, _, rollout),) = self._engine.run([request])
        ids = rollout.ids_BxR[0, : rollout.length_B[0]].tolist()
        text = self._tok.decode([i for i in ids if i not in self._tok.ids.stop()])
        ended = bool(rollout.stopped_B[0])
        stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
        cuts = [text.find(stop) for stop in stops if stop in text]  # here it ends the text, not the sampling
        if cuts:
            text, ended = text[: min(cuts)], True
        before, _, rest = text.partition("<CONCLUSION>")
        if not body.get("stream"):
            said = extract_conclusion(text)
            reasoning = before.strip() if said else ""
        elif re.match(r"\s*<(SUMMARY|CAPTION|REASONING|REFLECTION|CONCLUSION)>", text):  # what was sent stays sent
            said, reasoning = rest.partition("</CONCLUSION>")[0].strip(), before.strip()
        else:
            said, reasoning = text, ""
        content = said or text or self._tok.decode(ids)
        return {"content": content, "reasoning": reasoning, "finish_reason": "stop" if ended else "length"}


def _key(body: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in body.items() if name != "stream_options"}, sort_keys=True)
