"""Requests in the shapes in which benchmark harnesses send them, over HTTP to a server with an engine that echoes.

Oracle: the sampling that each body names, written by hand; transformers' rendering of its messages; the text that is
echoed. The shapes are those that `harnesses/run.sh` records of VLMEvalKit, lmms-eval, inspect-ai and lm-eval.
"""

import json

import openai
import pytest
from serve.app_test import (  # noqa: F401
    ENGINE,
    OPTIONS,
    checkpoint,
    data_url,
    echo,
    gate_is_open,
    post,
    start,
    streamed,
)
from transformers import AutoTokenizer

from qwenla_jax.weights.hub import EMBEDDED

QUESTION = "Is there a red circle? Please answer yes or no."


def image(kind, **more):
    return {"type": "image_url", "image_url": {"url": data_url((60, 60), kind), **more}}


def text(said):
    return {"type": "text", "text": said}


def user(*content):
    return {"role": "user", "content": list(content)}


SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
PARTS_OF_SYSTEM = {"role": "system", "content": [text("You are a helpful assistant.")]}
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "stop": ()}
SHAPES = {
    "VLMEvalKit": (
        {"messages": [user(image("JPEG"), text(QUESTION))], "n": 1, "max_tokens": 32768, "temperature": 0.0},
        GREEDY,
    ),
    "VLMEvalKit, interleaved": (
        {"messages": [user(text(""), image("JPEG"), text(" and "), image("JPEG"), text(": which?"))], "n": 1}
        | {"max_tokens": 32768, "temperature": 0},
        GREEDY,
    ),
    "VLMEvalKit, GPT4V": (
        {"messages": [SYSTEM, user(image("JPEG", detail="high"), text(QUESTION))], "n": 1, "max_tokens": 64}
        | {"temperature": 0},
        GREEDY | {"max_new_tokens": 64},
    ),
    "VLMEvalKit, system in parts": (
        {"messages": [PARTS_OF_SYSTEM, user(text(QUESTION))], "n": 1, "max_tokens": 64, "temperature": 0},
        GREEDY | {"max_new_tokens": 64},
    ),
    "VLMEvalKit, sampled": (
        {"messages": [user(image("JPEG"), text(QUESTION))], "n": 1, "max_tokens": 64, "temperature": 0.7, "top_k": 20}
        | {"top_p": 0.9, "repetition_penalty": 1.05, "chat_template_kwargs": {"enable_thinking": True}, "seed": 7}
        | {"stream": True},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05, "seed": 7, "max_new_tokens": 64},
    ),
    "lmms-eval": (
        {"messages": [user(image("PNG"), text(f"{QUESTION}\nAnswer with one word."))], "max_tokens": 128}
        | {"temperature": 0},
        GREEDY | {"max_new_tokens": 128},
    ),
    "inspect-ai": (
        {"messages": [user(image("JPEG", detail="auto"), text(QUESTION))], "max_tokens": 128, "seed": 3}
        | {"temperature": 0.7, "top_p": 0.9, "stop": ["\n\n\n"]},
        {"temperature": 0.7, "top_p": 0.9, "seed": 3, "stop": ("\n\n\n",), "max_new_tokens": 128},
    ),
    "lm-eval": (
        {"messages": [user(image("PNG", detail="auto"), text(f"<image>{QUESTION}"))], "max_tokens": 64}
        | {"temperature": 0.0, "stop": ["\n\n"], "seed": 1234},
        GREEDY | {"max_new_tokens": 64, "stop": ("\n\n",), "seed": 1234},
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_requests_of_harnesses(echo, shape):  # noqa: F811
    """They are answered, with text and counts, and the engine gets the settings and the prompt that they name."""
    url, engine = echo
    body, wanted = SHAPES[shape]
    got = post(url, json.dumps({"model": "echo", **body}))
    assert got.status_code == 200, got.text
    asked = engine.requests[max(engine.requests)]
    assert {name: getattr(asked, name) for name in wanted} == wanted
    theirs = AutoTokenizer.from_pretrained(EMBEDDED)
    prompt = theirs.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
    prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * 16)  # an image has 16 tokens
    ids = theirs(prompt)["input_ids"]
    assert asked.prompts.ids_QxP[0, : asked.prompts.length_Q[0]].tolist() == ids
    if "max_new_tokens" not in wanted:
        assert asked.max_new_tokens == OPTIONS.max_model_len - len(ids)  # the room that is left
    said = body["messages"][-1]["content"][-1]["text"]
    if body.get("stream"):
        events = [line.removeprefix("data: ") for line in got.text.splitlines() if line]
        assert events.pop() == "[DONE]"
        chunks = [openai.types.chat.ChatCompletionChunk.model_validate(json.loads(event)) for event in events]
        assert streamed(chunks)[1:3] == (said, ["stop"])
        return
    answer = openai.types.chat.ChatCompletion.model_validate(got.json())
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (said, "stop")
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == len(ENGINE["tok"].encode(said)) + 1
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0
