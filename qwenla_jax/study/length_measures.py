"""One arm's answers to questions with reasoning of a chosen length, by scene: generated, and teacher-forced.

Everything is about what is told after the look: the caption with marks, or in the paper's order the reflection.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.data.batching.example import Example
from qwenla_jax.data.record import Record
from qwenla_jax.data.synthetic.marked_scenes import MARKS
from qwenla_jax.data.synthetic.scenes import COLORS
from qwenla_jax.data.synthetic.source import SceneSource
from qwenla_jax.evals.benchmarks.rendered_scenes import judge_answer, said_details
from qwenla_jax.inference.attention_mass import PARTS, attention_mass, parts_of
from qwenla_jax.inference.runtime import Runtime
from qwenla_jax.inference.sample_batches import sample_batches
from qwenla_jax.inference.sampler import Sampler
from qwenla_jax.model.qwen_vl import Params, QwenVL, head_matrix, logits_of
from qwenla_jax.reattention.options import allowed_insertions, find_insertions
from qwenla_jax.rewards.accuracy import accuracy_reward
from qwenla_jax.sampling.prefill import encode_prompts
from qwenla_jax.study.response_prefix import control_frame, responded
from qwenla_jax.text.response_format import parse
from qwenla_jax.text.tokenizer import Tokenizer
from qwenla_jax.train.logprobs import response_selection, response_states
from qwenla_jax.train.token_logprobs import token_logprobs
from qwenla_jax.types import PromptBatch, VisionBatch

SQUEEZED_STEP = 0.1  # positions that a token of the reasoning takes where they are squeezed
END_OF_REASONING = "</REASONING>"
Numbers = dict[str, np.ndarray]  # name of a measure -> float [scenes]


@dataclasses.dataclass(frozen=True)
class Measured:
    """By scene, in the source's order; sums where a scene has several of what is counted.

    Attributes:
      numbers: float [scenes] by name.
      answers: the first answers, to read.
      seconds: wall time of all, compilation included.
    """

    numbers: Numbers
    answers: tuple[str, ...]
    seconds: float


def generated(
    runtime: Runtime,
    params: Params,
    source: SceneSource,
    sampler: Sampler,
    given: bool,
    score: Any | None = None,
    shown: int = 4,
) -> Measured:
    """Greedy answers.

    Args:
      runtime, params: the arm's.
      source: the questions, with their written responses.
      sampler: a greedy one with one response a question, of `answer_sampler`.
      given: whether the written response is given up to where it tells what is seen (`continued`), and only the rest is
        generated.
      score: where it is given and the arm selects tokens, the first of `forced_programs`, by which it does.
      shown: answers that are kept as text.

    Returns:
      `right`, whether the conclusion is; `worked`, whether the reasoning is the written one; `reflections`; `named`,
      `invented` and `missed` objects of what is told after the look (as `judge_answer` counts them), `details` and
      `wrong_details` (marks); `tokens` generated and `inserted_tokens`.
    """
    begin, rows, texts = time.perf_counter(), [], []
    for record, prefix, text, length, inserted in _answers(runtime, params, source, sampler, given, score):
        index, whole = len(rows), prefix + text
        told = told_after(whole)
        one = judge_answer(f"<CAPTION>{told}</CAPTION>", "", record.kind, source.caption(index))
        details, wrong = said_details(told, source.details(index))
        worked = _section(whole, "REASONING") == _section(record.response or "", "REASONING")
        reflections = sum(section.name == "REFLECTION" for section in parse(whole).sections)
        rows.append(
            {"right": accuracy_reward(whole, record.answer) == 1.0, "worked": worked, "reflections": reflections}
            | {"named": one.named, "invented": one.invented, "missed": one.missed}
            | {"details": details, "wrong_details": wrong, "tokens": length, "inserted_tokens": inserted}
        )
        texts += [f"{record.question} -> {record.answer} | {whole}"] if index < shown else []
    numbers = {name: np.array([row[name] for row in rows], float) for name in rows[0]}
    return Measured(numbers, tuple(texts), time.perf_counter() - begin)


def answer_sampler(runtime: Runtime, most_tokens: int, given: bool) -> Sampler:
    """A greedy sampler of one response a question, of at most so many tokens; for `given` see `generated`."""
    runtime = _asked_with(runtime, given)
    options = runtime.sample_options(group_size=1, temperature=0.0)
    return Sampler(runtime, dataclasses.replace(options, max_new_tokens=most_tokens))


def _asked_with(runtime: Runtime, given: bool) -> Runtime:
    """The given part counts as the question, with what is inserted there, and nothing is inserted behind it."""
    if not given:
        return runtime
    config = runtime.config
    longest = config.max_prompt_tokens + config.max_response_tokens
    images = 2 if config.reattention.content in ("blank", "other") else 1
    config = dataclasses.replace(config, max_prompt_tokens=longest, max_images=images, reattention=ReattentionOptions())
    return dataclasses.replace(runtime, config=config)


class Question(NamedTuple):
    """What is asked: the example, the given text of its response, and the tokens that were inserted into it."""

    example: Example
    prefix: str = ""
    inserted: int = 0


def _answers(
    runtime: Runtime, params: Params, source: SceneSource, sampler: Sampler, given: bool, score: Any | None
) -> Iterator[tuple[Record, str, str, int, int]]:
    """For each question its record, what was given of its response, what was generated, and tokens of it and put in.

    The one place where answers are generated.
    """
    rows, make = runtime.config.batch_size, runtime.example(with_response=given)
    examples = (make(source[index]) for index in range(len(source)))
    batches = iter(lambda: list(itertools.islice(examples, rows)), [])
    questions: collections.deque[Question] = collections.deque()

    def asked() -> Iterator[tuple[list[Example], np.ndarray]]:
        for batch in batches:
            new = given_questions(runtime, params, batch, score) if given else [Question(e) for e in batch]
            questions.extend(new)
            yield [one.example for one in new], np.arange(rows, dtype=np.uint32)

    for batch in sample_batches(_asked_with(runtime, given), params, asked(), sampler):
        r = batch.rollout
        inserted_B = np.asarray(r.selected_BxExX).sum((1, 2))
        for row, record in enumerate(batch.records):
            _, prefix, inserted = questions.popleft()
            yield record, prefix, batch.texts[row], int(r.length_B[row]), inserted + int(inserted_B[row])


def given_questions(runtime: Runtime, params: Params, batch: list[Example], score: Any | None) -> list[Question]:
    """Examples with their responses, as questions that are to be continued."""
    selected: list[np.ndarray | None] = [None] * len(batch)
    if runtime.reattention().selects:
        assert score is not None
        rows, first = runtime.config.batch_size, int(runtime.reattention().delimiters)
        vision, prompts, responses = runtime.collate_responses(batch, runtime.buckets(rows), rows)
        with runtime.context():
            selected_BxExX = jax.device_get(score(params, vision, prompts, responses.ids_BxR, responses.length_B)[2])
        M = batch[0].frames[0].num_visual_tokens
        selected = list(selected_BxExX[: len(batch), 0, first : first + M])
    return [continued(example, runtime, batch[(i + 1) % len(batch)], selected[i]) for i, example in enumerate(batch)]


def continued(example: Example, runtime: Runtime, other: Example, selected_M: np.ndarray | None) -> Question:
    """An example with its response, as a question that is to be continued where the response tells what is seen.

    Given are the tags up to there and what the arm inserts, at its place: no arm is charged for arithmetic before the
    look, nor for a section that it leaves out.

    Args:
      example: one image, and a response with a reasoning and a reflection behind it.
      runtime: the arm's.
      other: the example whose image "other" shows.
      selected_M: bool, the visual tokens that ROUTE shows; None: all.
    """
    tok, options = runtime.tokenizer, runtime.reattention()
    ids_R = example.ids_T[example.prompt_length :]
    told, ids = told_tokens(ids_R, tok), ids_R.tolist()
    end = told.start + (told.start == told.stop)  # a section without words is given to its end
    look = int(np.flatnonzero(ids_R[:end] == options.open_id)[-1])  # an insertion stands before the tag
    control = other.frames[0]
    if options.content != "other":
        control = control_frame(options.content, example.frames[0], None, runtime)
    cut = responded(example, ids[:look], tok, runtime, options, control, selected_M, ids[look:end])
    return Question(cut, tok.decode(ids[:end]), len(cut.ids_T) - example.prompt_length - end)


def told_after(response: str) -> str:
    """What a response tells of the image after its reasoning: its caption, or in the paper's order the reflection."""
    _, _, after = response.partition(END_OF_REASONING)
    caption = _section(after, "CAPTION")
    return caption if "<CAPTION>" in after else _section(after, "REFLECTION")


def _section(response: str, name: str) -> str:
    texts = [section.text for section in parse(response).sections if section.name == name]
    return texts[-1] if texts else ""


def teacher_forced(
    runtime: Runtime, params: Params, source: SceneSource, programs: tuple[Any, Any | None], profiled: int = 0
) -> Measured:
    """The written responses, scored after the look.

    Args:
      runtime, params: the arm's.
      source: the questions, with their written responses.
      programs: of `forced_programs`.
      profiled: on how many of the first scenes attention is measured, in whole batches.

    Returns:
      `logp_answer`, the log-probability of the answer inside its box, in nats; `logp_told`, that of what is told after
      the look; `told_tokens`, `colours` and `marks`, their numbers there, and `right_colours` and `right_marks`, those
      of them that are the likeliest token; `inserted_tokens`; and for each of PARTS `mass/PART`, `even/PART` and
      `tokens/PART`, sums over tokens of attention on visual tokens and of its even share (0 where not profiled).
    """
    begin, rows = time.perf_counter(), runtime.config.batch_size
    (score, mass), tok = programs, runtime.tokenizer
    make = runtime.example(with_response=True)
    buckets, found = runtime.buckets(rows), []
    for first in range(0, len(source), rows):
        examples = [make(source[index]) for index in range(first, min(first + rows, len(source)))]
        vision, prompts, responses = runtime.collate_responses(examples, buckets, rows)
        with runtime.context():
            out = score(params, vision, prompts, responses.ids_BxR, responses.length_B)
        logp_BxR, best_BxR, selected_BxExX = jax.device_get(out)
        numbers = _by_row(responses.ids_BxR, responses.length_B, logp_BxR, best_BxR, tok)
        numbers["inserted_tokens"] = selected_BxExX.sum((1, 2)).astype(float)
        attention = {f"{what}/{part}": np.zeros(rows) for part in PARTS for what in ("mass", "even", "tokens")}
        if first < profiled and mass is not None:
            ids_BxR, length_B = responses.ids_BxR, responses.length_B
            with runtime.context():
                masses = jax.device_get(mass(params, vision, prompts, ids_BxR, length_B, selected_BxExX))
            parts = parts_of(ids_BxR, length_B, tok.ids.reflection_open, tok.ids.reflection_close)
            attention = _attention(masses, parts)
        found.append({name: x[: len(examples)] for name, x in (numbers | attention).items()})
    whole = {name: np.concatenate([one[name] for one in found]) for name in found[0]}
    return Measured(whole, (), time.perf_counter() - begin)


def forced_programs(runtime: Runtime, squeezed: bool) -> tuple[Any, Any | None]:
    """The compiled programs of `teacher_forced`; attention is not measured where positions are squeezed.

    Args:
      runtime: the arm's.
      squeezed: whether every token of the reasoning advances the position by SQUEEZED_STEP instead of 1.

    Raises:
      ValueError: squeezed positions of an arm that inserts.
    """
    if squeezed and runtime.reattention().inserts:
        raise ValueError("positions are squeezed for text-only answers alone; expected reattention.mode none")
    return _scores(runtime, squeezed), None if squeezed else _masses(runtime)


def _scores(runtime: Runtime, squeezed: bool) -> Any:
    """Compiled: (params, vision, prompts, ids, lengths) -> log-probabilities [B, R], likeliest tokens [B, R], and what
    the insertions of each row show, bool [B, E, X].
    """
    model, reattention, tok = runtime.model, runtime.reattention(), runtime.tokenizer

    @jax.jit
    def run(params: Params, vision: VisionBatch, prompts: PromptBatch, ids_BxR: jax.Array, length_B: jax.Array) -> Any:
        scored = model, params, vision, prompts, ids_BxR
        selected_BxExX = jnp.zeros((len(ids_BxR), 0, 0), bool)
        if squeezed:
            states_BxRxD = _squeezed_states(*scored, tok)
        elif reattention.inserts:
            selected_BxExX = response_selection(*scored, length_B, reattention, reattention.max_insertions)
            states_BxRxD = response_states(*scored, reattention, length_B, selected_BxExX)
            allowed_B = allowed_insertions(reattention, prompts)
            _, turn_BxR = find_insertions(ids_BxR, length_B, allowed_B, reattention.open_id)
            there_BxE = jnp.arange(reattention.max_insertions) < turn_BxR.max(1)[:, None]
            selected_BxExX = selected_BxExX & there_BxE[..., None]
        else:
            states_BxRxD = response_states(*scored)
        bias_V = runtime.logit_bias_V
        logp_BxR, _ = token_logprobs(states_BxRxD, head_matrix(params), ids_BxR, bias_V)
        return logp_BxR, jnp.argmax(logits_of(params, states_BxRxD) + bias_V, axis=-1), selected_BxExX

    return run


def _squeezed_states(
    model: QwenVL, params: Params, vision: VisionBatch, prompts: PromptBatch, ids_BxR: jax.Array, tok: Tokenizer
) -> jax.Array:
    """As `response_states` without insertions, but a token of the reasoning advances the position by SQUEEZED_STEP."""
    opened, closed = (jnp.cumsum(ids_BxR == tok.ids.tags[tag], axis=1) for tag in ("<REASONING>", END_OF_REASONING))
    # The opening tag advances by 1: it is inside only from the token behind it on.
    inside_BxR = (opened > closed) & (ids_BxR != tok.ids.tags["<REASONING>"])
    step_BxR = jnp.where(inside_BxR, SQUEEZED_STEP, 1.0)
    pos_BxR = prompts.next_pos_Q[:, None] + jnp.cumsum(step_BxR, axis=1) - step_BxR
    last_QxD, prefix, _ = encode_prompts(model, params, vision, prompts)
    x_BxTxD = model.apply({"params": params}, ids_BxR[:, :-1], None, None, method="embed")
    pos_BxTx3 = jnp.broadcast_to(pos_BxR[:, :-1, None], (*x_BxTxD.shape[:2], 3))
    hidden_BxTxD = model.apply({"params": params}, x_BxTxD, pos_BxTx3, prefix, method="decode").hidden_BxTxD
    return jnp.concatenate([last_QxD[:, None], hidden_BxTxD], axis=1)


def _masses(runtime: Runtime) -> Any:
    """Compiled: (params, vision, prompts, ids, lengths, selected) -> attention on visual tokens [B, R], and its even
    share."""
    reattention = runtime.reattention()

    @jax.jit
    def run(params: Params, vision: Any, prompts: Any, ids: Any, length: Any, selected: Any) -> Any:
        selected = selected if reattention.inserts else None
        seen = attention_mass(runtime.model, params, vision, prompts, ids, length, reattention, selected)
        visual_BxR = seen.original_BxR + seen.inserted_BxExR.sum(1)
        return visual_BxR, seen.even_original_BxR + seen.even_inserted_BxExR.sum(1)

    return run


def _attention(masses: tuple[np.ndarray, np.ndarray], parts: dict[str, np.ndarray]) -> Numbers:
    """Sums of attention over the tokens of each part, by row."""
    result: Numbers = {}
    for part in PARTS:
        where = parts[part]
        for name, values in zip(("mass", "even"), masses, strict=True):
            result[f"{name}/{part}"] = np.where(where, values, 0).sum(1)
        result[f"tokens/{part}"] = where.sum(1).astype(float)
    return result


def _by_row(
    ids_BxR: np.ndarray, length_B: np.ndarray, logp_BxR: np.ndarray, best_BxR: np.ndarray, tok: Tokenizer
) -> Numbers:
    """Scores of what is told after the look, and of the answer."""
    kinds = {"colours": COLORS, "marks": MARKS}
    words = {name: {i for word in known for i in tok.encode(f" {word}")} for name, known in kinds.items()}
    names = ("logp_answer", "logp_told", "told_tokens", *kinds, *(f"right_{name}" for name in kinds))
    numbers = {name: np.zeros(len(ids_BxR)) for name in names}
    for row, length in enumerate(length_B):
        if not length:
            continue  # only fills the batch
        ids, logp, best = (x[row, :length] for x in (ids_BxR, logp_BxR, best_BxR))
        told, answer = told_tokens(ids, tok), answer_tokens(ids, tok)
        numbers["logp_told"][row] = logp[told].sum()
        numbers["told_tokens"][row] = told.stop - told.start
        numbers["logp_answer"][row] = logp[answer].sum()
        for name, known in words.items():
            at = [i for i in range(told.start, told.stop) if int(ids[i]) in known]
            numbers[name][row], numbers[f"right_{name}"][row] = len(at), (best[at] == ids[at]).sum()
    return numbers


def told_tokens(ids: np.ndarray, tok: Tokenizer) -> slice:
    """Where a written response tells of the image after the look, its tags excluded; see `told_after`."""
    tags = tok.ids.tags
    after = int(np.flatnonzero(ids == tags[END_OF_REASONING])[-1])
    name = "CAPTION" if (ids[after:] == tags["<CAPTION>"]).any() else "REFLECTION"
    first, end = (after + int(np.flatnonzero(ids[after:] == tags[tag])[0]) for tag in (f"<{name}>", f"</{name}>"))
    return slice(first + 1, end)


def answer_tokens(ids: np.ndarray, tok: Tokenizer) -> slice:
    """Where the answer of a written response stands, inside its box."""
    first, end = (int(np.flatnonzero(ids == tok.encode(brace)[0])[-1]) for brace in "{}")
    return slice(first + 1, end)
