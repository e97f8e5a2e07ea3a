"""No compilation after warm-up. Oracle: JAX's own monitoring events, which a fresh program must set off."""

import dataclasses
import functools
import io
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from models import sampler_of, small_model
from PIL import Image

from qwenla_jax.data.batching.collate import collate_prompts, make_buckets
from qwenla_jax.data.batching.example import to_prompt_example
from qwenla_jax.data.images.preprocess import ImageLayout, ProcessorSettings
from qwenla_jax.data.record import Record
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.token import suppression_bias
from qwenla_jax.text.tokenizer import train_tiny_tokenizer
from qwenla_jax.train.logprobs import response_logprobs
from qwenla_jax.utils.compile_counter import CompileCounter, CompileNotes
from qwenla_jax.utils.progress import Progress

VOCAB = 320
LAYOUT = ImageLayout(patch_size=4, merge_size=2, temporal_patch_size=2, window_size=16)
SETTINGS = ProcessorSettings(16 * 16, 32 * 32, (0.5,) * 3, (0.5,) * 3, patch_size=4)


def test_counts_fresh_programs_only_inside_the_block():
    x = np.ones(3)
    with CompileCounter() as counter:
        jax.jit(lambda x: jnp.sin(x) * 3)(x)
        first = counter.count
        again = jax.jit(lambda x: jnp.cos(x) * 5)
        again(x)
        again(x)
    jax.jit(lambda x: jnp.tan(x) * 7)(x)
    assert first == 1 and counter.count == 2 and counter.seconds > 0


def test_counts_one_program_for_every_shape():
    function = jax.jit(lambda x: x * 3 + 1)
    with CompileCounter() as counter:
        for size in (2, 3, 2, 3, 4):
            function(np.ones(size))
    assert counter.count == 3


def test_notes_name_each_phase_once_with_what_it_compiled():
    stream = io.StringIO()
    with CompileCounter() as counter:
        notes = CompileNotes(["rollout", "update"], counter, Progress(9, stream=stream, terminal=False), every=0.05)
        for _ in range(2):
            notes.begin("data")
            notes.begin("rollout")
            jax.jit(lambda x: x * 11)(np.ones(3))
            time.sleep(0.2)
            notes.begin("reward")
            notes.begin("update")
            jax.jit(lambda x: x * 12)(np.ones(3)), jax.jit(lambda x: x * 13)(np.ones(3))
            notes.end()
    lines = re.sub(r"\d+ of them", "N of them", stream.getvalue()).splitlines()
    assert "compiling rollout (1/2) ... 0s" in lines
    assert [line for line in lines if not line.endswith("... 0s")] == [
        "compiling rollout (1/2) ...",
        "compiled rollout (1/2): 1 programs, N of them from the cache, in 0s",
        "compiling update (2/2) ...",
        "compiled update (2/2): 2 programs, N of them from the cache, in 0s",
    ]


def programs():
    """Sampler and trainer's log-probabilities of a small model with a real tokenizer, and images to batches."""
    tok = train_tiny_tokenizer(["how many circles are there?"], VOCAB)
    ids = {f"{name}_token_id": getattr(tok.ids, short) for name, short in NAMES.items()}
    text = dataclasses.replace(small_model()[0].config.text, vocab_size=VOCAB)
    model, params = small_model(text=text, **ids)
    logit_bias_V = suppression_bias(VOCAB, tok.vocab_size, tok.ids.suppressed())
    options = SampleOptions(2, 4, 1.0, 1.0, tok.ids.stop())
    sampler = sampler_of(model, options)
    score = jax.jit(functools.partial(response_logprobs, model, temperature=1.0))
    buckets = make_buckets(LAYOUT, 2, SETTINGS.min_pixels, SETTINGS.max_pixels, 64, 64)

    def collate(sizes):
        records = [
            Record(str(size), (Image.new("RGB", size, (90, 30, 200)),), "how many?", "1", None, "count")
            for size in sizes
        ]
        return collate_prompts([to_prompt_example(record, tok, SETTINGS, LAYOUT) for record in records], buckets)

    def run(batch):
        rollout = sampler(params, *batch, logit_bias_V, np.uint32(0), np.uint32(0), np.arange(4, dtype=np.uint32))
        return jax.device_get(score(params, *batch, rollout.ids_BxR, logit_bias_V))

    return collate, run


NAMES = {
    "image": "image_pad",
    "video": "video_pad",
    "vision_start": "vision_start",
    "vision_end": "vision_end",
}


def test_images_of_any_size_compile_once_a_bucket():
    collate, run = programs()
    rng = np.random.default_rng(0)
    seen, grids, warm, late = set(), set(), 0, 0
    # Every batch has a large square, so that a few buckets hold them all; beside it comes any size and shape.
    drawn = [[(31, 33), tuple(rng.integers(14, 90, 2).tolist())] for _ in range(30)]
    for sizes in drawn:
        batch = collate(sizes)
        shape = tuple(x.shape for x in jax.tree.leaves(batch))
        grids |= {tuple(hw.max(0)) for hw in batch[0].hw_IxSx2}
        with CompileCounter() as counter:
            run(batch)
        if shape in seen:
            late += counter.count
        else:
            warm += counter.count
            assert counter.count >= 2  # the negative control: a new bucket does compile both programs
        seen.add(shape)
    assert late == 0
    assert len(grids) >= 10 and 2 <= len(seen) <= 4 and warm >= 2 * len(seen)
