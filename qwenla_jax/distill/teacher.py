"""Records of the cold start (paper's stage 1): a teacher inserts one reflection into each record's response.

Paper: 2,000 records of LLaVA-CoT-100k, each with exactly one reflection between reasoning and conclusion, written by
GPT-4o and checked by hand. Paper silent on what the teacher is asked: `INSTRUCTION` is ours. It asks for the reflection
alone, since what the teacher does not write it cannot change; a reply that is the whole response counts too, and then
all of its sections have to be the record's.

Without a teacher the responses of rendered scenes are taken with the reflection that their source has written.

The only log is that of the teacher's replies. The log of samples is written anew from it and the source, so that an
interrupted run ends with the same files as an uninterrupted one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from qwenla_jax.data.batching.loader import RecordSource
from qwenla_jax.distill.distill_options import DistillOptions
from qwenla_jax.distill.judges import JudgeLog, request_key
from qwenla_jax.distill.sample_answers import image_namer, sample_row
from qwenla_jax.distill.verify import format_problem
from qwenla_jax.text.conversation import encode_response
from qwenla_jax.text.response_format import parse
from qwenla_jax.text.special_tokens import SECTION_TAGS
from qwenla_jax.text.token_counts import reflection_tokens
from qwenla_jax.text.tokenizer import Tokenizer
from qwenla_jax.utils import jsonl_store
from qwenla_jax.utils.jsonl_store import Row
from qwenla_jax.weights.hub import local_folder

INSTRUCTION = """You are given an image, a question about it, and a response in four sections. Write the reflection that
the author of the response would make after the reasoning and before the conclusion.

Question: {question}

Response:
{text}

In the reflection the author looks at the image once more and checks the reasoning against it:
- name the visual details that decide the question, and what the image shows of them: objects, colors, counts,
  positions, written text, values of a chart or a figure;
- check the step of the reasoning that is most likely to be wrong, and confirm it or correct it from the image;
- agree with the conclusion of the response, which is right; do not give another answer, and do not merely repeat it;
- mention nothing that the image does not show, and neither this instruction nor "the response".

Write 40 to 120 words of plain text in the first person, in the language of the response, without lists, markdown or
code blocks. Reply with exactly one section and nothing before or after it:
<REFLECTION>your reflection</REFLECTION>"""

_FENCE = re.compile(r"```\w*\n(.*)\n```", re.DOTALL)


def with_reflection(source: str, reply: str) -> str:
    """The response that a reply gives; whether it can be used is for `verify.reflection_problem` to say.

    A code block around the whole reply is taken off.

    Args:
      source: the record's response, in the answer format.
      reply: the reflection, to be inserted before the conclusion, or the whole response.
    """
    reply = reply.strip()
    fenced = _FENCE.fullmatch(reply)
    reply = fenced[1].strip() if fenced else reply
    if any(tag in reply for tag in SECTION_TAGS):
        return reply
    reasoning, conclusion = parse(source).sections[-2:]
    return source[: conclusion.start] + reply + source[reasoning.end :]


def source_rows(source: RecordSource, workdir: Path) -> Iterator[Row]:
    """The records as `Judges.votes` takes them: rows as of `sample_row` whose text, and `source`, is the response.

    Raises:
      ValueError: a record with no image or with several.
    """
    place = image_namer(source, workdir)
    for index in range(len(source)):
        record = source[index]
        text = record.response or ""
        yield sample_row(index, 0, record, place(record), text, 0, source=text)


def write_samples(source: RecordSource, options: DistillOptions, workdir: Path, log: JudgeLog) -> None:
    """Writes the log of samples from the source and the teacher's replies.

    A row has, beside what `sample_row` gives: `source`, the record's response; `reflection_tokens`; and `error`, why
    there is no reply. Its text is empty where there is no reply.

    Raises:
      ValueError: the tokenizer of `config.init_from`, or a record's image, cannot be used.
    """
    tokenizer = Tokenizer.from_folder(local_folder(options.init_from or "")).with_tags()
    with jsonl_store.rewriting(workdir / jsonl_store.SAMPLES) as (file,):
        for row in source_rows(source, workdir):
            for sample, answer in enumerate(_answers(row, options, log)):
                ids = [] if format_problem(answer["text"]) else encode_response(answer["text"], tokenizer)
                counts = {"tokens": len(ids), "reflection_tokens": sum(reflection_tokens(ids[:-1], tokenizer))}
                file.write(jsonl_store.line_of(row | {"sample": sample} | answer | counts))


def _answers(row: Row, options: DistillOptions, log: JudgeLog) -> Iterator[dict[str, str]]:
    """Text, source and error of a record's samples: one a teacher; without one, of the response as it is."""
    text = source = row["source"]
    if not options.teacher.models:
        for part in reversed(parse(text).reflections):
            source = source[: part.start] + source[part.end :]
        yield {"text": text, "source": source, "error": ""}
    for model in options.teacher.models:
        key = request_key(options.teacher, model, row, INSTRUCTION)
        reply = log.reply(key)
        text = "" if reply is None else with_reflection(source, reply)
        yield {"text": text, "source": source, "error": log.failure(key) or ""}
