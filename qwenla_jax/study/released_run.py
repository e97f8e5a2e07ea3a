"""The length study at full size, without training: a released model reasons at length, with and without insertions.

Every question's reasoning is generated once; shorter ones are its beginning. Every (working, N, arm) is a file; what is
there and was made with the same settings is not measured again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwenla_jax.config.inference_config import InferenceConfig
from qwenla_jax.config.schema import to_dict
from qwenla_jax.config.shared_options import MeshOptions
from qwenla_jax.data.batching.example import Example
from qwenla_jax.data.batching.loader import RecordSource
from qwenla_jax.data.record import Record
from qwenla_jax.data.sources.factory import make_source
from qwenla_jax.inference.runtime import Runtime, build
from qwenla_jax.inference.sample_batches import sample_batches
from qwenla_jax.inference.sampler import Sampler
from qwenla_jax.model.qwen_vl import Params
from qwenla_jax.study.collect import StudyError
from qwenla_jax.study.length_arms import ARMS, BLANK, COPY, OTHER, ROUTE_50, TEXT
from qwenla_jax.study.released_prefix import (
    ANSWER,
    CHUNK,
    LEAD,
    OPENER,
    WAIT,
    asked,
    filler,
    reasoned,
    without_tags,
)
from qwenla_jax.study.released_results import ReleasedResult, read_released, write_released
from qwenla_jax.study.response_prefix import control_frame, responded, shown
from qwenla_jax.text.answers.match import matches
from qwenla_jax.train.logprobs import response_logprobs, response_selection
from qwenla_jax.types import PromptBatch, VisionBatch
from qwenla_jax.utils.jsonl_store import append, mend, read_rows
from qwenla_jax.weights.hub import local_folder

LENGTHS = (0, 256, 1024, 4096)
RELEASED_ARMS = (TEXT, BLANK, COPY, OTHER, ROUTE_50)
ANSWER_TOKENS = 24  # of an answer; one that is not closed by then is wrong
_MARGIN = 256  # room for LEAD, OPENER and ANSWER in any tokenizer, which is checked


@dataclasses.dataclass(frozen=True)
class Released:
    """What is run.

    Attributes:
      model: a folder in Hugging Face format, or another name that `hub.local_folder` takes.
      source: the questions, see `data.sources.spec`; each with one image.
      size: most questions.
      lengths: N, tokens of reasoning before the insertion.
      seed: of the sampled reasoning, and of sources that draw.
      temperature: of the reasoning; answers are greedy.
      batch_size: questions at once.
      max_prompt_tokens: of a question with its image; a longer one is an error.
      max_pixels: larger images are shrunk.
      dtype: of parameters and computation.
      tensor: devices that split heads; the others split the batch.
    """

    model: str
    source: str
    size: int = 1000
    lengths: tuple[int, ...] = LENGTHS
    seed: int = 0
    temperature: float = 0.7
    batch_size: int = 8
    max_prompt_tokens: int = 2048
    max_pixels: int = 512 * 512
    dtype: str = "bfloat16"
    tensor: int = 1

    @property
    def name(self) -> str:
        """The model's, as files and tables have it."""
        return Path(self.model).name

    def cells(self) -> list[tuple[str, int]]:
        """(working, N) of what is measured; without reasoning there is no filler either."""
        return [("chain", n) for n in self.lengths] + [("filler", n) for n in self.lengths if n]

    def inference(self) -> InferenceConfig:
        """The model's settings. A prompt is a question, its response up to the answer, and another image."""
        longest = max(self.lengths)
        return InferenceConfig(
            init_from=self.model,
            seed=self.seed,
            dtype=self.dtype,
            param_dtype=self.dtype,
            batch_size=self.batch_size,
            max_prompt_tokens=2 * self.max_prompt_tokens + longest + _MARGIN,
            max_response_tokens=max(ANSWER_TOKENS, longest + _MARGIN),
            max_images=2,
            max_pixels=self.max_pixels,
            mesh=MeshOptions(tensor=self.tensor),
        )


def run_released(settings: Released, results: Path, note: Callable[[str], None]) -> list[Path]:
    """Runs whatever is not there yet.

    Args:
      settings: what is run.
      results: folder of the results; also gets the reasoning.
      note: gets a line of progress.

    Returns:
      the results' files.

    Raises:
      StudyError: settings or questions cannot be used, or the folder holds results of others.
    """
    if not settings.lengths or min(settings.lengths) < 0 or len(set(settings.lengths)) < len(settings.lengths):
        raise StudyError(f"lengths: got {settings.lengths}, expected different numbers of tokens, 0 or more")
    try:
        source = make_source(settings.source, "held_out", seed=settings.seed, size=settings.size, whole=True)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise StudyError(f"source: {error}") from error
    of = _stamp(settings, source)
    files = {(*cell, arm): results / _file(settings, *cell, arm) for cell in settings.cells() for arm in RELEASED_ARMS}
    missing = {key: path for key, path in files.items() if not (path.is_file() and _same(path, of))}
    for (working, tokens, arm), path in files.items():
        if (working, tokens, arm) not in missing:
            note(f"{path.name}: measured already")
    if missing:
        results.mkdir(parents=True, exist_ok=True)
        runtime, params = build(settings.inference())
        study = _Study(settings, without_tags(runtime), params, source, of)
        prefixes = study.reasoning(results / f"{settings.name}_reasoning.jsonl", note)
        for (working, tokens, arm), path in missing.items():
            begin = time.perf_counter()
            result = study.measure(prefixes, working, tokens, arm)
            write_released(path, dataclasses.replace(result, seconds=time.perf_counter() - begin))
            right = float(result.right.mean())
            note(f"{path.name}: {100 * right:.1f}% of {len(source)} right, {time.perf_counter() - begin:.0f} s")
    return list(files.values())


def _file(settings: Released, working: str, tokens: int, arm: str) -> str:
    return f"{settings.name}_{working}_{tokens}_{arm.lower().replace(' ', '-')}.json"


def _same(path: Path, of: dict[str, Any]) -> bool:
    """Whether a result was made with these settings.

    Raises:
      StudyError: with others.
    """
    saved = read_released(path).of
    if saved != of:
        wrong = [key for key in of if saved.get(key) != of[key]]
        raise StudyError(f"{path}: made with another {', '.join(wrong)}; expected the same, or another --results")
    return True


def _stamp(settings: Released, source: RecordSource) -> dict[str, Any]:
    """What a result depends on; batches and devices are not among it."""
    try:
        folder = local_folder(settings.model)
    except OSError as error:
        raise StudyError(f"model: {error}") from error
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    model = hashlib.blake2b(digest_size=8)
    for path in files:
        model.update(f"{path.name} {path.stat().st_size}".encode())
        model.update(path.read_bytes() if path.name == "config.json" else b"")
    asked_for = hashlib.blake2b(digest_size=8)
    for record in (source[i] for i in range(len(source))):
        asked_for.update("\0".join((record.id, record.question, record.answer, *record.options)).encode())
    names = ("source", "seed", "temperature", "max_pixels", "dtype")
    values = {name: getattr(settings, name) for name in names}
    texts = hashlib.blake2b("\0".join((LEAD, WAIT, OPENER, ANSWER)).encode(), digest_size=8).hexdigest()
    return values | {
        "longest": max(settings.lengths),
        "model": model.hexdigest(),
        "questions": asked_for.hexdigest(),
        "texts": texts,
    }


def boxed(text: str) -> str | None:
    """The text up to the brace that closes the box which ANSWER opens; None where none does."""
    depth = 1
    for at, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return text[:at]
    return None


class _Study:
    """A model, its questions, and the programs that measure them."""

    def __init__(
        self, settings: Released, runtime: Runtime, params: Params, source: RecordSource, of: dict[str, Any]
    ) -> None:
        self.settings, self.runtime, self.params, self.source, self.of = settings, runtime, params, source, of
        tok, rows = runtime.tokenizer, settings.batch_size
        self.make = runtime.example(with_response=False)
        self.lead, self.after = tok.encode_plain(LEAD), [*tok.encode_plain(OPENER), *tok.encode_plain(ANSWER)]
        if len(self.lead) + len(self.after) + 4 > _MARGIN:
            raise StudyError(f"tokenizer.json: the study's own texts take {len(self.lead) + len(self.after)} tokens")
        greedy = runtime.sample_options(group_size=1, temperature=0.0)
        self.answers = Sampler(runtime, dataclasses.replace(greedy, max_new_tokens=ANSWER_TOKENS), rows)
        self.buckets = self.answers.buckets
        self.score = _scores(runtime)
        config = dataclasses.replace(runtime.config, reattention=ARMS[ROUTE_50].reattention)
        self.routed = dataclasses.replace(runtime, config=config)
        self.select = _selections(self.routed)

    def batches(self, first: int = 0) -> Iterator[tuple[range, list[Example]]]:
        """Numbers and prompts of the questions from the `first` on."""
        rows = self.settings.batch_size
        for begin in range(first, len(self.source), rows):
            numbers = range(begin, min(begin + rows, len(self.source)))
            examples = [self.make(asked(self.source[i])) for i in numbers]
            for example in examples:
                if len(example.ids_T) > self.settings.max_prompt_tokens:
                    raise StudyError(
                        f"record {example.record.id!r}: a prompt of {len(example.ids_T)} tokens, expected at most "
                        f"max_prompt_tokens={self.settings.max_prompt_tokens}"
                    )
            yield numbers, examples

    def reasoning(self, log: Path, note: Callable[[str], None]) -> list[list[int]]:
        """Every question's reasoning of the largest N, from the log as far as it is there."""
        longest, reasoning = max(self.settings.lengths), list[list[int]]()
        if not longest:
            return [[] for _ in range(len(self.source))]
        mend(log)
        for number, row in read_rows(log):
            if number == 1 and row.get("of") != self.of:
                raise StudyError(f"{log}: made with other settings; expected the same, or another --results")
            reasoning += [row["ids"]] if number > 1 else []
        if not log.is_file() or not log.stat().st_size:
            append(log, [{"of": self.of}])
        options = self.runtime.sample_options(group_size=1, temperature=self.settings.temperature)
        sampler = Sampler(self.runtime, dataclasses.replace(options, max_new_tokens=min(longest, CHUNK)))
        begin = time.perf_counter()
        for numbers, examples in self.batches(len(reasoning)):
            new = reasoned(self.runtime, self.params, examples, numbers, longest, sampler)
            append(log, [{"id": e.record.id, "ids": ids} for e, ids in zip(examples, new, strict=True)])
            reasoning += new
            note(f"reasoning of {len(reasoning)} of {len(self.source)} questions, {time.perf_counter() - begin:.0f} s")
        return reasoning

    def other(self, number: int) -> Record:
        """The next question whose image is another one."""
        image = self.source[number].images[0]
        for step in range(1, len(self.source)):
            record = self.source[(number + step) % len(self.source)]
            if record.images and record.images[0].tobytes() != image.tobytes():
                return record
        raise StudyError("source: all questions have the same image; expected another one to show in its place")

    def measure(self, prefixes: Sequence[Sequence[int]], working: str, tokens: int, arm: str) -> ReleasedResult:
        """One arm at one N: greedy answers, and the right answer's log-probability."""
        tok, options = self.runtime.tokenizer, ARMS[arm].reattention
        fill, prefix = filler(tok, tokens), hashlib.blake2b(digest_size=8)
        right, logp, inserted, visual, shows, texts = [], [], [], [], [], []
        rows = self.settings.batch_size
        for numbers, prompts in self.batches():
            said = [[*self.lead, *(prefixes[i][:tokens] if working == "chain" else fill)] for i in numbers]
            prefix.update(json.dumps(said).encode())
            selected = self._selected(prompts, said) if options.mode == "route" else [None] * len(said)
            examples = []
            for i, prompt, response, selected_M in zip(numbers, prompts, said, selected, strict=True):
                other = self.other(i).images[0] if options.content == "other" and options.mode != "none" else None
                control = control_frame(options.content, prompt.frames[0], other, self.runtime)
                example = responded(prompt, response, tok, self.runtime, options, control, selected_M, self.after)
                examples.append(example)
                count, what = shown(example, len(prompt.ids_T))
                inserted.append(count)
                shows.append(what)
                visual.append(prompt.frames[0].num_visual_tokens)
            batch = [(examples, np.arange(rows, dtype=np.uint32))]
            (answered,) = sample_batches(self.runtime, self.params, batch, self.answers)
            logp += self._logp(answered.vision, answered.prompts, [example.record for example in examples])
            for example, text in zip(examples, answered.texts, strict=False):
                got, record = boxed(text), example.record
                right.append(got is not None and matches(got, record.answer, record.options))
                texts.append(f"{record.id}: {record.answer} | {text}")
        return ReleasedResult(
            of=self.of,
            model=self.settings.name,
            working=working,
            tokens=tokens,
            arm=arm,
            reattention=to_dict(options),
            prefix=prefix.hexdigest(),
            right=np.array(right, float),
            logp_answer=np.array(logp),
            inserted=np.array(inserted),
            visual=np.array(visual),
            shown=tuple(shows),
            answers=tuple(texts[:4]),
        )

    def _logp(self, vision: VisionBatch, prompts: PromptBatch, records: Sequence[Record]) -> list[float]:
        """Log-probabilities of the right answers, in nats."""
        answers = [self.runtime.tokenizer.encode_plain(record.answer) for record in records]
        width = -(-max(map(len, answers)) // 8) * 8
        ids_BxR = np.zeros((self.settings.batch_size, width), np.int32)
        for row, ids in enumerate(answers):
            ids_BxR[row, : len(ids)] = ids
        with self.runtime.context():
            logp_BxR = np.asarray(self.score(self.params, vision, prompts, ids_BxR))
        return [float(logp_BxR[row, : len(ids)].sum()) for row, ids in enumerate(answers)]

    def _selected(self, prompts: Sequence[Example], said: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """ROUTE's visual tokens of each question: those that LEAD and reasoning attended to most."""
        ids = self.runtime.tokenizer.ids
        given = []
        for prompt, response in zip(prompts, said, strict=True):
            whole = responded(
                prompt, [*response, ids.reflection_open, ids.im_end], self.runtime.tokenizer, self.runtime
            )
            given.append(dataclasses.replace(whole, prompt_length=prompt.prompt_length))
        batch = self.routed.collate_responses(given, self.buckets, self.settings.batch_size)
        with self.runtime.context():
            selected_BxX = np.asarray(self.select(self.params, *batch[:2], batch[2].ids_BxR, batch[2].length_B))[:, 0]
        counts = [prompt.frames[0].num_visual_tokens for prompt in prompts]
        return [selected_X[1 : 1 + count] for selected_X, count in zip(selected_BxX, counts, strict=False)]


def _scores(runtime: Runtime) -> Any:
    """Compiled: (params, vision, prompts, ids) -> log-probabilities of answers, float32 [B, R]."""

    @jax.jit
    def run(params: Params, vision: VisionBatch, prompts: PromptBatch, ids_BxR: jax.Array) -> jax.Array:
        return response_logprobs(runtime.model, params, vision, prompts, ids_BxR, runtime.logit_bias_V, 1.0)[0]

    return run


def _selections(runtime: Runtime) -> Any:
    """Compiled: (params, vision, prompts, ids, lengths) -> what the insertion shows, bool [B, 1, X]."""

    @jax.jit
    def run(params: Params, vision: Any, prompts: Any, ids_BxR: jax.Array, length_B: jax.Array) -> jax.Array:
        reattention = runtime.reattention()
        return response_selection(runtime.model, params, vision, prompts, ids_BxR, length_B, reattention, 1)

    return run
