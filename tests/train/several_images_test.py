"""Training on questions with none to three images, from the record to rollout and gradient.

Oracle: transformers and its autograd, to which all images of a question are given once more at every reflection.
"""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from official import CAP, Ids, Official, torch

import qwenla_jax
from qwenla_jax.config.run_options import BrpoOptions, DataOptions, EvalOptions, OptimOptions, RunOptions
from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.data.record import Record
from qwenla_jax.data.synthetic.scenes import make_scene
from qwenla_jax.inference.read_examples import fitting
from qwenla_jax.inference.sampler import Asked, Sampler
from qwenla_jax.train.brpo.update import RolloutBatch
from qwenla_jax.train.programs import gradient_of
from qwenla_jax.train.train_runtime import build, for_training
from qwenla_jax.utils.compile_counter import CompileCounter

SHARE, G, R = 0.4, 2, 40
# Of every parameter's gradient: the norm of the difference over the norm.
TOLERANCE = 1e-4
RESPONSE = (
    "<SUMMARY>look at the circles</SUMMARY><REFLECTION>one red circle</REFLECTION>"
    "<REASONING>two</REASONING><REFLECTION>two blue</REFLECTION><CONCLUSION>2</CONCLUSION>"
)


def record(images, seed=0):
    """A question about so many images of different shapes."""
    scenes = [make_scene(7, 5, 10 * seed + n).image.crop((0, 0, 112, 112 - 30 * n)) for n in range(images)]
    return Record(f"{images} of {seed}", tuple(scenes), "How many circles are there?", "2", RESPONSE, "count")


@pytest.fixture(scope="module")
def runtimes(reflecting):
    """Runtimes by mode, and the parameters."""
    made = {}
    for mode in ("copy", "route"):
        options = RunOptions(
            stage="sft",
            init_from=str(reflecting),
            data=DataOptions(batch_size=4, max_images=3, max_prompt_tokens=96, max_response_tokens=R),
            optim=OptimOptions(accumulation=2),
            brpo=BrpoOptions(group_size=G),
            reattention=ReattentionOptions(mode=mode, keep_ratio=SHARE, max_insertions=CAP, rows_at_once=2),
            eval=EvalOptions(batch_size=4),
        )
        runtime, params = build(options)
        bias_V = runtime.logit_bias_V.copy()
        bias_V[runtime.tokenizer.ids.reflection_open] = 3  # responses are to reflect early
        made[mode] = dataclasses.replace(runtime, logit_bias_V=bias_V)
    return made, params


@pytest.fixture(scope="module")
def samplers(runtimes):
    """By mode: records -> the batch, and its rollout at temperature 1."""
    made, params = runtimes

    def sampler(runtime):
        call = Sampler(runtime, runtime.sample_options(G, 1.0), 4)

        def run(records):
            batch = runtime.collate_prompts([runtime.example(False)(one) for one in records], runtime.buckets(4))
            return batch, jax.device_get(call(params, *batch, 0, np.arange(4 * G, dtype=np.uint32)))

        run.sampler = call
        return run

    return {mode: sampler(runtime) for mode, runtime in made.items()}


RECORDS = [record(3), record(1), record(0), record(2)]


@pytest.fixture(scope="module")
def official(reflecting, runtimes):
    """`RECORDS` through transformers and its image processor."""
    transformers = pytest.importorskip("transformers")
    pil = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(reflecting, dtype=torch.float32).eval()
    runtime = runtimes[0]["copy"]
    pixels = [image for one in RECORDS for image in one.images]
    hf = pil.Qwen2VLImageProcessorPil.from_pretrained(reflecting)(images=pixels, return_tensors="pt")
    examples = [runtime.example(False)(one) for one in RECORDS]
    _, prompts = runtime.collate_prompts(examples, runtime.buckets(4))
    grids = [[(frame.rows, frame.cols) for frame in example.frames] for example in examples]
    config = model.config
    ids = Ids(
        config.image_token_id,
        config.vision_start_token_id,
        config.vision_end_token_id,
        runtime.tokenizer.ids.reflection_open,
    )
    return Official(model, ids, SimpleNamespace(hf=hf, length_Q=prompts.length_Q, prompts=prompts), grids)


def log_probabilities(official, runtime, q, ids):
    """Log-probabilities [R] of a response to record `q`, and the visual tokens that ROUTE selects."""
    selected = None
    if runtime.config.reattention.mode == "route":
        logits, selected, _ = official.routed(q, ids, SHARE)
    else:
        logits = official.logits(q, ids)
    logits = logits[:-1] + torch.from_numpy(runtime.logit_bias_V)
    return logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)], selected


@pytest.mark.parametrize("mode", ["copy", "route"])
@torch.no_grad()
def test_rollouts(runtimes, samplers, official, mode):
    """Every token's log-probability, insertions counted, and what ROUTE selects of all images together."""
    (vision, prompts), rollout = samplers[mode](RECORDS)
    block = prompts.block
    for b, length in enumerate(rollout.length_B.tolist()):
        q = b // G
        ids = rollout.ids_BxR[b, :length].tolist()
        want, selected = log_probabilities(official, runtimes[0][mode], q, ids)
        np.testing.assert_allclose(rollout.logp_BxR[b, :length], want, atol=1e-4, rtol=0)
        tags = ids[:-1].count(official.ids.tag)
        assert rollout.inserted_B[b] == (min(tags, CAP) if q != 2 else 0)
        assert rollout.skipped_B[b] == tags - rollout.inserted_B[b]
        own = np.flatnonzero(prompts.visual_QxP[q] >= 0).tolist()
        for e, cells in enumerate(selected or []):
            if ids[:-1].count(official.ids.tag) > e:
                source = block.source_QxX[q, np.flatnonzero(rollout.selected_BxExX[b, e])]
                assert {own.index(s) for s in source if s in own} == cells
    assert rollout.inserted_B.sum() > 2 * G and all(rollout.inserted_B[G * q] for q in (0, 1, 3))
    assert block.tokens_QxN.shape == (4, 3) and vision.patches_IxSxC.shape[0] == 8


@pytest.mark.parametrize("mode", ["copy", "route"])
def test_supervised_gradient(runtimes, official, tmp_path, mode):
    """In microbatches with three images and one, and with two and none; of every parameter."""
    made, params = runtimes
    runtime = made[mode]
    batch = runtime.stack(RECORDS, runtime.collate_responses, True)
    with runtime.context():
        grads, metrics = jax.jit(gradient_of(runtime))(params, *batch, runtime.logit_bias_V)
    official.model.zero_grad()
    loss = number = 0
    for q, one in enumerate(RECORDS):
        example = runtime.example(True)(one)
        logp_R, _ = log_probabilities(official, runtime, q, example.ids_T[example.prompt_length :].tolist())
        loss, number = loss - logp_R.sum(), number + len(logp_R)
    (loss / number).backward()
    assert metrics["num_tokens"] == number
    np.testing.assert_allclose(metrics["loss"], (loss / number).item(), rtol=1e-5)
    # Written as a checkpoint, so that transformers says which of its parameters each is.
    qwenla_jax.save(tmp_path / "gradient", runtime.model, jax.device_get(grads))
    named = type(official.model).from_pretrained(tmp_path / "gradient", dtype=torch.float32)
    for (name, value), (_, ours) in zip(official.model.named_parameters(), named.named_parameters(), strict=True):
        error = float((ours.detach() - value.grad).norm() / value.grad.norm())
        assert error < TOLERANCE, f"{name}: {error}"


def test_brpo_is_on_policy(runtimes, samplers):
    made, params = runtimes
    runtime = for_training(made["route"], dataclasses.replace(made["route"].options, stage="brpo"))
    batch, rollout = samplers["route"](RECORDS)
    ones = np.ones(4 * G, np.float32)
    advantage_B = np.tile([1.0, -1.0], 4).astype(np.float32)
    given = RolloutBatch(
        rollout.ids_BxR, rollout.logp_BxR, rollout.length_B, advantage_B, ones, ones, rollout.selected_BxExX
    )
    batch = jax.tree.map(lambda x: np.asarray(x)[None], (*batch, given))
    with runtime.context():
        metrics = jax.jit(lambda *args: gradient_of(runtime)(*args)[1])(params, params, *batch, runtime.logit_bias_V)
    assert metrics["sampling_logp_difference"] < 1e-4
    np.testing.assert_allclose(metrics["ratio_mean"], 1, atol=1e-5)


def test_a_row_depends_on_no_other_and_its_number_of_images_compiles_nothing(samplers):
    """The first record beside others with 0 to 3 images: the same tokens, and log-probabilities but for rounding."""
    run, first = samplers["copy"], record(1, seed=3)
    results, compiled = [], []
    for number, others in enumerate([(2, 0, 3), (3, 3, 1), (1, 1, 3), (1, 1, 1), (0, 1, 0), (3, 3, 3), (3, 2, 3)]):
        with CompileCounter() as counter:
            rollout = run([first, *(record(images, seed=4 + number) for images in others)])[1]
        results.append(jax.tree.map(lambda x: x[:G], rollout))
        compiled.append(counter.count)
    # Room for 8 images in a batch, then 4, then 12: a program each.
    assert compiled[1] == compiled[2] == compiled[4] == compiled[6] == 0 and min(compiled[3], compiled[5]) > 0
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].ids_BxR, other.ids_BxR)
        np.testing.assert_array_equal(results[0].inserted_B, other.inserted_B)
        np.testing.assert_allclose(results[0].logp_BxR, other.logp_BxR, atol=2e-5)
    assert results[0].inserted_B.min() > 0


def test_limits_count_all_images(runtimes):
    runtime = runtimes[0]["copy"]
    example = runtime.example(True)(record(3))
    limited = lambda **changes: fitting(example, dataclasses.replace(runtime.config, **changes))  # noqa: E731
    assert limited() is example
    with pytest.raises(ValueError, match=r"record '3 of 0' has 3 images; config.data.max_images is 2"):
        limited(max_images=2)
    visual = sum(frame.num_visual_tokens for frame in example.frames)
    n = example.prompt_length
    message = rf"record '3 of 0': its prompt has {n} tokens, {visual} of them visual \(3 images\); config.data.max_prom"
    with pytest.raises(ValueError, match=message):
        limited(max_prompt_tokens=n - 1)


def test_a_run_takes_larger_images_after_smaller_ones(runtimes, samplers):
    """Each batch gets what it gets alone, though an engine for small images leaves no room for the larger ones."""
    made, params = runtimes
    runtime = made["copy"]
    sampler = samplers["copy"].sampler
    small = [
        Record(str(n), (record(1, n).images[0].crop((0, 0, 56, 56)),), "How many?", "2", None, "") for n in range(4)
    ]
    numbers = np.arange(4 * G, dtype=np.uint32)
    batches = [
        runtime.collate_prompts([runtime.example(False)(one) for one in records], runtime.buckets(4))
        for records in (small, RECORDS, small[::-1])
    ]
    together = list(sampler.run(params, [Asked(*batch, step, numbers) for step, batch in enumerate(batches)]))
    assert len(sampler._engines) == 2
    for step, (batch, rollout) in enumerate(zip(batches, together, strict=True)):
        alone = sampler(params, *batch, step, numbers)
        np.testing.assert_array_equal(rollout.ids_BxR, alone.ids_BxR)
        np.testing.assert_array_equal(rollout.selected_BxExX, alone.selected_BxExX)
        np.testing.assert_allclose(rollout.logp_BxR, alone.logp_BxR, atol=1e-5)
        assert rollout.inserted_B.max() == CAP
