"""The length study of a released model: its reasoning, made long, and what stands behind it in each arm.

A response is LEAD, N tokens of reasoning, what the arm inserts, OPENER and ANSWER; then the answer is generated. All of
it is one prompt, so every arm runs the same programs and differs in nothing but the inserted tokens. A released model
knows no `<REFLECTION>`: its reflection is opened in words.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from qwenla_jax.data.batching.example import Example
from qwenla_jax.data.record import Record
from qwenla_jax.inference.runtime import Runtime
from qwenla_jax.inference.sampler import Asked, Sampler
from qwenla_jax.model.qwen_vl import Params
from qwenla_jax.sampling.token import suppression_bias
from qwenla_jax.study.collect import StudyError
from qwenla_jax.study.response_prefix import responded
from qwenla_jax.text.tokenizer import Tokenizer

LEAD = "Let me think step by step.\n\n"  # of every response, so that ROUTE has attention to go by where N is 0
WAIT = "\n\nWait"  # in the place of an end that comes too early
OPENER = "\n\nWait, let me look at the image again.\n\n"
ANSWER = "So the final answer is \\boxed{"
CHUNK = 512  # tokens of reasoning between two checks for an early end
_FORM = "\nThink step by step, then put the final answer into \\boxed{}."
_LETTER = "\nThink step by step, then put the letter of the right option into \\boxed{}."


def asked(record: Record) -> Record:
    """The question with a line on the form of its answer.

    Raises:
      StudyError: it has not exactly one image, or has a video.
    """
    if len(record.images) != 1 or record.videos:
        got = f"{len(record.images)} image(s) and {len(record.videos)} video(s)"
        raise StudyError(f"record {record.id!r}: {got}; expected one image (in --source: #images=1)")
    return dataclasses.replace(record, question=record.question + (_LETTER if record.options else _FORM))


def without_tags(runtime: Runtime) -> Runtime:
    """The runtime, which samples none of the ten tags either: in a released model their rows are not trained."""
    ids, tok = runtime.tokenizer.ids, runtime.tokenizer
    never = (*ids.suppressed(), *ids.tags.values())
    bias_V = suppression_bias(runtime.model.config.text.vocab_size, tok.vocab_size, never)
    return dataclasses.replace(runtime, logit_bias_V=bias_V)


def reasoned(
    runtime: Runtime, params: Params, examples: Sequence[Example], numbers: Sequence[int], tokens: int, sampler: Sampler
) -> list[list[int]]:
    """The model's own reasoning, of exactly so many tokens a question.

    Where it ends too early, WAIT stands in the place of the end and it goes on (budget forcing as in s1, arXiv
    2501.19393). To forbid the end alone would have it continue with tokens that it holds for unlikely.

    Args:
      runtime, params: the model, see `without_tags`.
      examples: at most a batch of prompts.
      numbers: of the questions: randomness is a function of them.
      tokens: N.
      sampler: with one response a question; of so many tokens at once.
    """
    rows, tok = runtime.config.batch_size, runtime.tokenizer
    lead, wait, responses = tok.encode_plain(LEAD), tok.encode_plain(WAIT), [list[int]() for _ in examples]
    for turn in itertools.count():
        short = [i for i, ids in enumerate(responses) if len(ids) < tokens]
        if not short:
            return [ids[:tokens] for ids in responses]
        batch = [responded(examples[i], [*lead, *responses[i]], tok, runtime) for i in short]
        vision, prompts = runtime.collate_prompts(batch, sampler.buckets, rows)
        sample_B = np.zeros(rows, np.uint32)
        sample_B[: len(short)] = [numbers[i] for i in short]
        rollout = next(sampler.run(params, [Asked(vision, prompts, turn, sample_B, len(short))]))
        for row, i in enumerate(short):
            ids = rollout.ids_BxR[row, : rollout.length_B[row]].tolist()
            responses[i] += [*ids[:-1], *wait] if rollout.stopped_B[row] else ids
    raise AssertionError  # the loop has no end


def filler(tok: Tokenizer, tokens: int) -> list[int]:
    """So many tokens of text that tells nothing of any question: the control of the reasoning."""
    text, line = "", 0
    while len(ids := tok.encode_plain(text)) < tokens:
        for _ in range(64):
            line += 1
            text += f"Line {line} of this text says nothing about the image or the question.\n"
    return ids[:tokens]
