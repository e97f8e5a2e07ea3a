"""Asks a checkpoint a question about images."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence

from PIL import Image

from qwenla_jax.data.batching.collate import Buckets, collate_prompts, make_buckets
from qwenla_jax.data.batching.example import Example, to_prompt_example
from qwenla_jax.data.images.decode import open_image
from qwenla_jax.data.images.preprocess import ImageLayout, ProcessorSettings, smart_resize, to_rgb
from qwenla_jax.data.record import Clip, Record
from qwenla_jax.inference.answer import Answer
from qwenla_jax.inference.response_attention import attention_of, insertions_of, power_of_two
from qwenla_jax.inference.responses import texts_of
from qwenla_jax.inference.runtime import layout_of
from qwenla_jax.reattention.options import ReattentionConfig
from qwenla_jax.sampling.engine import Engine
from qwenla_jax.sampling.penalties import NEUTRAL
from qwenla_jax.sampling.request import Request
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.token import suppression_bias
from qwenla_jax.text.response_format import parse
from qwenla_jax.text.special_tokens import TAGS
from qwenla_jax.text.token_text import TokenText
from qwenla_jax.text.tokenizer import Tokenizer
from qwenla_jax.types import PromptBatch, Rollout, VisionBatch
from qwenla_jax.utils.unicode import half_character
from qwenla_jax.weights.hf import Checkpoint

STEPS = 8  # tokens between two parts of a streamed text

RawImage = str | os.PathLike[str] | Image.Image


def ask(
    checkpoint: Checkpoint,
    images: RawImage | Sequence[RawImage],
    question: str,
    *,
    videos: Sequence[Clip] = (),
    reattention: str = "copy",
    keep_ratio: float = 0.5,
    max_insertions: int = 2,
    temperature: float = 0.0,
    top_p: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    max_new_tokens: int = 1024,
    max_pixels: int | None = None,
    system: str | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Asks one question and takes the answer apart.

    Compiled programs are cached for the process: a later call with the same model configuration, re-attention, longest
    response and buckets of prompt and images compiles nothing, whatever its temperature; only the first with a penalty
    compiles programs that count tokens. An answer with insertions needs one more program, for its attention, by its
    padded length. `Asker` asks several questions on the same images.

    Args:
      checkpoint: from `qwenla_jax.load`.
      images: one image or several, as files or Pillow images; an empty list for none.
      question: the user's text.
      videos: from `data.images.video_file.read_video`; they are after the images. Only images are inserted again, so
        `reattention` has to be "none" then.
      reattention: what stands before a reflection, one of `shared_options.MODES`.
      keep_ratio: route: the share of the visual tokens that is kept, 0 to 1.
      max_insertions: most insertions of a response; later reflections are text alone (paper silent).
      temperature: 0 is greedy.
      top_p: nucleus, above 0 and at most 1; 1 is the whole distribution.
      presence_penalty, frequency_penalty: -2 to 2, against tokens that the response has, as OpenAI's; 0 is none.
      repetition_penalty: above 0, against tokens that prompt or response has, as transformers'; 1 is none.
      seed: 0 to 2**32 - 1; the answer is a function of it (and of nothing at temperature 0).
      max_new_tokens: longest response in tokens (paper: 1024 in its reinforcement learning).
      max_pixels: larger images are shrunk to so many pixels; None takes the checkpoint's own bound (paper: 262,144
        in its second supervised stage).
      system: text of a system turn; None leaves the turn out.
      on_text: called with each further part of the response's text, as it comes.

    Raises:
      ValueError: an image, a text, an option or the checkpoint cannot be used; named.
    """
    asker = Asker(
        checkpoint,
        reattention=reattention,
        keep_ratio=keep_ratio,
        max_insertions=max_insertions,
        temperature=temperature,
        top_p=top_p,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_new_tokens=max_new_tokens,
        max_pixels=max_pixels,
        system=system,
    )
    return asker.ask(images, question, videos=videos, on_text=on_text)


class Asker:
    """Asks a checkpoint questions with the same options; the visual tokens of the last images are kept.

    Args: as in `ask`.

    Raises:
      ValueError: an option or the checkpoint cannot be used; named.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        reattention: str = "copy",
        keep_ratio: float = 0.5,
        max_insertions: int = 2,
        temperature: float = 0.0,
        top_p: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        max_new_tokens: int = 1024,
        max_pixels: int | None = None,
        system: str | None = None,
    ) -> None:
        if (message := half_character(system or "")) is not None:
            raise ValueError(f"system: it {message}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed: got {seed}, expected a whole number from 0 to 4294967295")
        self._checkpoint, self._seed, self._system = checkpoint, seed, system
        self._tok, processor = check_checkpoint(checkpoint)
        self._processor = processor if max_pixels is None else with_max_pixels(processor, max_pixels)
        ids = self._tok.ids
        self._reattention = ReattentionConfig(
            mode=reattention,
            keep_ratio=keep_ratio,
            max_insertions=max_insertions,
            rows_at_once=1,
            open_id=ids.reflection_open,
            close_id=ids.reflection_close,
        )
        self._penalties = {
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "repetition_penalty": repetition_penalty,
        }
        penalized = tuple(self._penalties.values()) != NEUTRAL
        self._options = SampleOptions(
            1, max_new_tokens, temperature, top_p, ids.stop(), self._reattention, penalties=penalized
        )
        self._engine: Engine | None = None

    def ask(
        self,
        images: RawImage | Sequence[RawImage],
        question: str,
        *,
        videos: Sequence[Clip] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Asks one question; see `ask`."""
        started = time.perf_counter()
        if not question.strip():
            raise ValueError("question: it is empty; expected a text")
        if (message := half_character(question)) is not None:
            raise ValueError(f"question: it {message}")
        tok, reattention = self._tok, self._reattention
        if videos and reattention.mode != "none":
            raise ValueError(
                f"videos: re-attention inserts images only; expected reattention='none', got {reattention.mode!r}"
            )
        layout = layout_of(self._checkpoint.config)
        opened = _images(images, self._processor, layout)
        record = Record("question", opened, question, "", None, "", videos=tuple(videos))
        example = to_prompt_example(record, tok, self._processor, layout, self._system)
        buckets = _buckets(example, self._processor, layout)
        batch = collate_prompts([example], buckets, 1, reattention if reattention.inserts else None)
        rollout = self._respond(*batch, buckets, on_text)
        ids = rollout.ids_BxR[0, : rollout.length_B[0]].tolist()
        text = texts_of(rollout, tok)[0]
        insertions = []
        if rollout.inserted_B[0]:
            attention = attention_of(self._checkpoint, reattention, *batch, rollout)
            insertions = insertions_of(attention, tok, *batch, rollout, example)
        return Answer(
            text=text,
            token_ids=ids,
            sections=list(parse(text).sections),
            reattention=insertions,
            skipped=int(rollout.skipped_B[0]),
            stopped=bool(rollout.stopped_B[0]),
            seconds=time.perf_counter() - started,
            question=question,
            images=opened,
            inserts=reattention.inserts,
        )

    def _respond(
        self, vision: VisionBatch, prompts: PromptBatch, buckets: Buckets, on_text: Callable[[str], None] | None
    ) -> Rollout:
        """Samples the response, part by part."""
        tok, options = self._tok, self._options
        (frames, slots, _), visual = vision.patches_IxSxC.shape, vision.gather_IxM.shape[1]
        prompt = (prompts.ids_QxP.shape[1],)
        own = dataclasses.replace(
            buckets, frames=(frames,), slots=(slots,), visual=(visual,), prompts=prompt, tokens=prompt
        )
        if self._engine is None or self._engine.buckets != own:
            config = self._checkpoint.config
            logit_bias_V = suppression_bias(config.text.vocab_size, tok.vocab_size, tok.ids.suppressed())
            model, params = self._checkpoint
            self._engine = Engine(model, params, options, own, 1, logit_bias_V, STEPS)
        request = Request(vision, prompts, seed=self._seed, temperature=options.temperature, top_p=options.top_p)
        ticket = self._engine.submit(dataclasses.replace(request, **self._penalties))
        text = TokenText(tok.token_bytes, options.stop_ids)
        try:
            while True:
                (update,) = self._engine.step()
                if on_text is not None:
                    on_text(text.add(update.ids[0], ended=update.rollout is not None))
                if update.rollout is not None:
                    return update.rollout
        finally:  # interrupted, it must not be what the next question waits for
            self._engine.cancel(ticket)


def check_checkpoint(checkpoint: Checkpoint) -> tuple[Tokenizer, ProcessorSettings]:
    """What a question needs of a checkpoint beside the model.

    A released model's tokenizer gets the ten tags: its answers have none, so that nothing is ever inserted.

    Raises:
      ValueError: a part is missing or the parts do not fit together; the message names the file.
    """
    tok, processor = checkpoint.tokenizer, checkpoint.processor
    if tok is None or processor is None:
        missing = "tokenizer.json" if tok is None else "preprocessor_config.json"
        raise ValueError(f"{missing}: the checkpoint has none; expected a folder with model, tokenizer and processor")
    try:
        if any(tok.token_to_id(tag) is None for tag in TAGS):  # the copy takes over a second at the released size
            tok = tok.with_tags()
        ids = tok.ids
    except ValueError as error:
        raise ValueError(f"tokenizer.json: {error}; expected that of a Qwen2.5-VL or Qwen3-VL") from error
    rows = checkpoint.config.text.vocab_size
    if tok.vocab_size > rows:
        raise ValueError(f"tokenizer.json: has {tok.vocab_size} tokens, but the embedding has only {rows} rows")
    if checkpoint.config.image_token_id != ids.image_pad:
        raise ValueError(
            f"config.json: image_token_id is {checkpoint.config.image_token_id}, but {ids.image_pad} in tokenizer.json"
        )
    return tok, processor


def _images(
    images: RawImage | Sequence[RawImage], processor: ProcessorSettings, layout: ImageLayout
) -> tuple[Image.Image, ...]:
    """The images as RGB, each of a shape that the model takes."""
    several = [images] if isinstance(images, str | os.PathLike | Image.Image) else list(images)
    converted = []
    for number, one in enumerate(several):
        if not isinstance(one, str | os.PathLike | Image.Image):
            raise ValueError(f"images[{number}]: got {type(one).__name__}, expected a file's name or a Pillow image")
        name = f"images[{number}]" if isinstance(one, Image.Image) else os.fspath(one)
        try:
            image = to_rgb(one) if isinstance(one, Image.Image) else open_image(one)
            smart_resize(image.height, image.width, layout.token_pixels, processor.min_pixels, processor.max_pixels)
        except ValueError as error:
            raise ValueError(str(error) if str(error).startswith(name) else f"{name}: {error}") from error
        converted.append(image)
    return tuple(converted)


def with_max_pixels(processor: ProcessorSettings, max_pixels: int) -> ProcessorSettings:
    """The processor with a lower bound on an image's pixels. Raises ValueError where it is below 1."""
    if max_pixels < 1:
        raise ValueError(f"max_pixels: got {max_pixels}, expected at least 1")
    most = min(max_pixels, processor.max_pixels)
    return dataclasses.replace(processor, min_pixels=min(processor.min_pixels, most), max_pixels=most)


def _buckets(example: Example, processor: ProcessorSettings, layout: ImageLayout) -> Buckets:
    """Buckets of few sizes, so that similar examples share a program."""
    prompt, images = power_of_two(len(example.ids_T), 64), power_of_two(len(example.frames))
    return make_buckets(layout, 1, processor.min_pixels, processor.max_pixels, prompt, prompt, images)
