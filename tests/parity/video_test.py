"""Prompts with videos against transformers: positions, visual tokens, logits; frames never see each other."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from models import sampler_of
from PIL import Image

import qwenla_jax
from qwenla_jax.cli.generate import main as generate
from qwenla_jax.data.batching.collate import collate_prompts, make_buckets
from qwenla_jax.data.batching.example import to_prompt_example, to_sft_example
from qwenla_jax.data.batching.mrope_positions import VideoGrid, visual_positions
from qwenla_jax.data.images.preprocess import ImageLayout, image_to_patches
from qwenla_jax.data.images.video import video_to_patches
from qwenla_jax.data.record import Clip, Record
from qwenla_jax.data.synthetic.scenes import make_scene
from qwenla_jax.inference.runtime import layout_of
from qwenla_jax.model.qwen_vl import logits_of
from qwenla_jax.sampling.sample_options import SampleOptions
from qwenla_jax.sampling.token import suppression_bias
from qwenla_jax.types import VisionBatch

NEW_TOKENS = 12
TOLERANCE = 1e-4  # of visual tokens and logits in float32, absolute; both are of order 1
# seed of the architecture -> what stands in the prompt: (rows, columns) of an image, or (frames, fps, rows, columns).
CASES = {
    2: [(6, 2.0, 3, 5)],
    5: [(4, 1.0, 5, 6)],
    7: [(3, 4.0, 2, 3), (2, 2)],  # an odd number of frames: the last one twice
    10: [(2, 3), (8, 24.0, 1, 4), (5, 0.5, 4, 4)],
}


@functools.partial(jax.jit, static_argnums=0)
def _forward(model, params, vision, ids_BxT, pos_BxTx3, visual_BxT):
    visual_ZxD = model.apply({"params": params}, vision, method="encode")
    x = model.apply({"params": params}, ids_BxT, visual_BxT, visual_ZxD, method="embed")
    return visual_ZxD, logits_of(params, model.apply({"params": params}, x, pos_BxTx3, method="decode").hidden_BxTxD)


def _architecture(oracle, seed):
    # Videos take two frames a patch; a layer of each kind of attention.
    return dataclasses.replace(oracle.architecture(seed), temporal=2, vision_depth=3, full=(1,), window=2)


def _official_patches(frames, config):
    """float32 [steps * patches, values] in transformers' order.

    The values are those of transformers' image processor on every frame; that its video processor, which needs
    torchvision, pairs frames in this way is shown in tests/data/video_test.py.
    """
    pil = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    processor = pil.Qwen2VLImageProcessorPil(
        size={"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
        patch_size=config.patch_size,
        temporal_patch_size=1,
    )
    frames = [*frames, *[frames[-1]] * (len(frames) % 2)]
    rows = [processor(images=[Image.fromarray(f)], return_tensors="np")["pixel_values"] for f in frames]
    pairs = [
        np.stack([a.reshape(len(a), 3, -1), b.reshape(len(b), 3, -1)], axis=2).reshape(len(a), -1)
        for a, b in zip(rows[::2], rows[1::2], strict=True)
    ]
    return np.concatenate(pairs)


def _prompt(oracle, arch, wanted):
    """One prompt for both sides."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng([5, arch.seed])
    config = oracle.settings(arch)
    layout = ImageLayout(arch.patch, 2, arch.temporal, arch.window * arch.patch * 2)
    side, image, video = arch.patch * 2, arch.vocab - 1, arch.vocab - 2
    ids, grids, steps = rng.integers(0, arch.vocab - 4, 3).tolist(), [], []
    hf = {name: [] for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")}
    hf["second_per_grid_ts"] = []
    for entry in wanted:
        count, fps, rows, cols = entry if len(entry) == 4 else (1, None, *entry)
        coarse = rng.integers(0, 256, (count, rows * 2, cols * 2, 3), dtype=np.uint8)
        frames = coarse.repeat(arch.patch, axis=1).repeat(arch.patch, axis=2)
        frames = (frames + rng.integers(0, 30, frames.shape)).clip(0, 255).astype(np.uint8)
        assert frames.shape[1:3] == (rows * side, cols * side)
        if fps is None:
            steps.append(image_to_patches(Image.fromarray(frames[0]), config, layout))
            grids.append((rows, cols))
            hf["pixel_values"].append(_official_patches(frames, config))
            hf["image_grid_thw"].append([1, rows * 2, cols * 2])
            pad, tokens = image, rows * cols
        else:
            clip = video_to_patches(frames, fps, config, layout)
            steps += clip.steps
            grids.append(clip.grid)
            hf["pixel_values_videos"].append(_official_patches(frames, config))
            hf["video_grid_thw"].append([-(-count // 2), rows * 2, cols * 2])
            hf["second_per_grid_ts"].append(2 / fps)
            pad, tokens = video, clip.num_visual_tokens
        ids += [arch.vocab - 3, *[pad] * tokens, arch.vocab - 4, *rng.integers(0, arch.vocab - 4, 5).tolist()]
    for name in ("pixel_values", "pixel_values_videos"):
        hf[name] = torch.from_numpy(np.concatenate(hf[name])) if hf[name] else None
    for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts"):
        hf[name] = torch.tensor(hf[name]) if hf[name] else None
    hf = {name: value for name, value in hf.items() if value is not None}
    ids_T = np.array(ids)
    hf["input_ids"] = torch.from_numpy(ids_T[None])
    hf["attention_mask"] = torch.ones_like(hf["input_ids"])
    hf["mm_token_type_ids"] = torch.from_numpy(((ids_T == image) + 2 * (ids_T == video)).astype(np.int32)[None])
    return ids_T, grids, steps, hf


def _batch(steps):
    """The rows of the tower, padded to the largest, and for each row its visual tokens."""
    S, M = max(len(s.valid_S) for s in steps), max(s.num_visual_tokens for s in steps)
    I, C = len(steps), steps[0].patches_SxC.shape[1]
    vision = VisionBatch(
        np.zeros((I, S, C), np.float32),
        np.zeros((I, S, 2), np.int32),
        np.zeros((I, S), bool),
        np.zeros((I, M), np.int32),
    )
    for i, step in enumerate(steps):
        n = len(step.valid_S)
        vision.patches_IxSxC[i, :n], vision.hw_IxSx2[i, :n] = step.patches_SxC, step.hw_Sx2
        vision.valid_IxS[i, :n] = step.valid_S
        vision.gather_IxM[i, : step.num_visual_tokens] = step.gather_M
    index = np.concatenate([i * M + np.arange(step.num_visual_tokens) for i, step in enumerate(steps)])
    return vision, index


@pytest.mark.parametrize("seed", [2, 10, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (5, 7))])
def test_a_prompt_with_videos(oracle, saved, seed):
    import torch

    arch = _architecture(oracle, seed)
    official, folder = saved(arch)
    ids_T, grids, steps, hf = _prompt(oracle, arch, CASES[seed])

    pos_Tx3, next_pos = visual_positions(ids_T, arch.vocab - 1, arch.vocab - 2, grids, 2)
    known = {k: v for k, v in hf.items() if k.endswith(("_thw", "_ts")) or k == "attention_mask"}
    pos_3x1xT, _ = official.model.get_rope_index(hf["input_ids"], hf["mm_token_type_ids"], **known)
    np.testing.assert_array_equal(pos_Tx3, pos_3x1xT[:, 0].numpy().T)
    assert next_pos == pos_Tx3[-1, 0] + 1  # text is last

    model, params = qwenla_jax.load(folder)
    vision, index = _batch(steps)
    visual_T = np.full(len(ids_T), -1, np.int32)
    visual_T[ids_T >= arch.vocab - 2] = index
    visual_ZxD, logits = _forward(model, params, vision, ids_T[None].astype(np.int32), pos_Tx3[None], visual_T[None])
    with torch.no_grad():
        expected = official(**hf).logits[0].numpy()
        clips = official.model.get_video_features(hf["pixel_values_videos"], hf["video_grid_thw"]).pooler_output
    clips = torch.cat(list(clips)).numpy()
    ours = np.asarray(visual_ZxD)[visual_T[ids_T == arch.vocab - 2]]
    np.testing.assert_allclose(ours, clips, atol=TOLERANCE, rtol=0)
    assert 0.3 < expected.std() < 5  # otherwise the tolerance would mean little
    np.testing.assert_allclose(np.asarray(logits)[0], expected, atol=TOLERANCE, rtol=0)

    # Without the times the logits are others: the tolerance sees them.
    still = [dataclasses.replace(g, second_per_grid=1e-6) if isinstance(g, VideoGrid) else g for g in grids]
    wrong, _ = visual_positions(ids_T, arch.vocab - 1, arch.vocab - 2, still, 2)
    if arch.mrope[0]:
        _, other = _forward(model, params, vision, ids_T[None].astype(np.int32), wrong[None], visual_T[None])
        assert np.abs(np.asarray(other)[0] - expected).max() > 100 * TOLERANCE


def test_steps_do_not_see_each_other(oracle, saved):
    """Another last step leaves the visual tokens of all steps before it as they are, here and in transformers."""
    import torch

    arch = _architecture(oracle, 5)
    official, folder = saved(arch)
    _, _, steps, hf = _prompt(oracle, arch, CASES[5])
    other = [*steps[:-1], dataclasses.replace(steps[-1], patches_SxC=steps[-1].patches_SxC[::-1].copy())]
    model, params = qwenla_jax.load(folder)
    encode = jax.jit(lambda vision: model.apply({"params": params}, vision, method="encode"))
    ours = [np.asarray(encode(_batch(rows)[0])) for rows in (steps, other)]
    before = len(ours[0]) // len(steps) * (len(steps) - 1)
    np.testing.assert_array_equal(ours[0][:before], ours[1][:before])
    assert np.abs(ours[0][before:] - ours[1][before:]).max() > 0.1
    pixels = hf["pixel_values_videos"].clone()
    pixels[-len(pixels) // len(steps) :] = pixels[-len(pixels) // len(steps) :].flip(0)
    with torch.no_grad():
        theirs = [
            torch.cat(list(official.model.get_video_features(values, hf["video_grid_thw"]).pooler_output)).numpy()
            for values in (hf["pixel_values_videos"], pixels)
        ]
    np.testing.assert_array_equal(theirs[0][:before], theirs[1][:before])
    assert np.abs(theirs[0][before:] - theirs[1][before:]).max() > 0.1


def _official_inputs(example, tok, image, frames, processor):
    """Of an image and a clip at two frames a second; and a function: token ids -> what else is by token."""
    torch = pytest.importorskip("torch")
    n = len(example.ids_T)
    kinds = (example.ids_T == tok.ids.image_pad) + 2 * (example.ids_T == tok.ids.video_pad)
    inputs = {
        "pixel_values": torch.from_numpy(_official_patches(np.asarray(image)[None], processor)),
        "pixel_values_videos": torch.from_numpy(_official_patches(frames, processor)),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "video_grid_thw": torch.tensor([[-(-len(frames) // 2), 8, 8]]),
        "second_per_grid_ts": torch.tensor([1.0]),
    }

    def typed(ids):
        types = np.pad(kinds, (0, ids.shape[1] - n)).astype(np.int32)[None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": torch.from_numpy(types)}

    return inputs, typed


def test_a_question_about_a_folder_of_frames(tmp_path, capsys):
    """By the command, beside an image; what transformers generates for the frames."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = Path(qwenla_jax.__file__).parent / "assets" / "tiny"
    official = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    loaded = qwenla_jax.load(folder, dtype="float32")
    model, tok, processor = loaded.model, loaded.tokenizer, loaded.processor
    image, question = make_scene(0, 1, 99).image, "How many objects are there?"
    frames = np.stack([np.asarray(make_scene(3, 5, index).image) for index in range(11)])
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"frame{number}.png")  # frame10 is the last
    record = Record("clip", (image,), question, "", None, "", videos=(Clip(frames, 2.0),))
    example = to_prompt_example(record, tok, processor, layout_of(model.config))
    inputs, typed = _official_inputs(example, tok, image, frames, processor)
    unsampled = [*tok.ids.suppressed(), *range(tok.vocab_size, model.config.text.vocab_size)]
    with torch.no_grad():
        ids = torch.from_numpy(example.ids_T[None].astype(np.int64))
        out = official.generate(**typed(ids), **inputs, max_new_tokens=40, do_sample=False, suppress_tokens=unsampled)
    flags = ["--model=tiny", "--image=scene:99", f"--video={tmp_path}", f"--question={question}", "--max_new_tokens=40"]
    generate([*flags, "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["token_ids"] == out[0, len(example.ids_T) :].tolist()
    for changed, message in (
        ([flags[0], *flags[2:], "--reattention=copy"], "--video: re-attention inserts images only"),
        ([*flags, "--video=none.mp4"], "--video: none.mp4: no such file or folder"),
        ([*flags, "--fps=0"], "argument --fps"),
        ([flags[0], *flags[3:]], "--image or --video: expected at least one"),
    ):
        with pytest.raises(SystemExit) as stopped:
            generate(changed)
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_long_clip_from_the_record_to_the_last_token():
    """20 seconds at 2 frames a second beside an image, by the path of the data; the shipped checkpoint, greedily.

    `generate` continues behind the last token of the prompt, where a response is trained on, too; not at its rope
    delta.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = Path(qwenla_jax.__file__).parent / "assets" / "tiny"
    official = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    loaded = qwenla_jax.load(folder, dtype="float32")
    model, params, tok, processor = loaded.model, loaded.params, loaded.tokenizer, loaded.processor
    v = model.config.vision
    sizes = (v.patch_size, v.spatial_merge_size, v.temporal_patch_size, v.window_size, v.tokens_per_second)
    layout = ImageLayout(*sizes)
    frames = np.stack([np.asarray(make_scene(3, 5, index).image) for index in range(40)])
    image = make_scene(3, 5, 99).image
    ours = Record("clip", (image,), "How many objects are there?", "", None, "", videos=(Clip(frames, 2.0),))
    example = to_prompt_example(ours, tok, processor, layout)
    n = len(example.ids_T)
    inputs, typed = _official_inputs(example, tok, image, frames, processor)
    ids = torch.from_numpy(example.ids_T[None].astype(np.int64))
    places = {key: value for key, value in inputs.items() if not key.startswith("pixel")}
    pos, delta = official.model.get_rope_index(**typed(ids), **places)
    np.testing.assert_array_equal(example.pos_Tx3, pos[:, 0].numpy().T)
    beyond = n + int(delta[0]) - example.next_pos
    assert beyond > 10 and example.next_pos == example.pos_Tx3[-1, 0] + 1

    unsampled = [*tok.ids.suppressed(), *tok.ids.stop(), *range(tok.vocab_size, model.config.text.vocab_size)]
    with torch.no_grad():
        out = official.generate(
            **typed(ids), **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, suppress_tokens=unsampled
        )
        theirs = official(**typed(out), **inputs).logits[0].numpy()
    logit_bias_V = suppression_bias(model.config.text.vocab_size, tok.vocab_size, unsampled)
    buckets = make_buckets(layout, 21, 112 * 112, 112 * 112, n, n, 21)
    vision, prompts = collate_prompts([example], buckets)
    run = sampler_of(model, SampleOptions(1, NEW_TOKENS, 0.0, 1.0, tok.ids.stop()))
    rollout = run(params, vision, prompts, logit_bias_V, np.uint32(0), np.uint32(0), np.zeros(1, np.uint32))
    assert rollout.ids_BxR[0].tolist() == out[0, n:].tolist()
    want = jax.nn.log_softmax(theirs[n - 1 : -1] + logit_bias_V)[np.arange(NEW_TOKENS), out[0, n:].numpy()]
    np.testing.assert_allclose(rollout.logp_BxR[0], want, atol=TOLERANCE, rtol=0)

    # The response as it is trained on, and the prompt's logits; from the delta's position on they would be others.
    asked = dataclasses.replace(ours, response=tok.decode(out[0, n:].tolist()))
    trained = to_sft_example(asked, tok, processor, layout)
    assert trained.pos_Tx3[n].tolist() == [example.next_pos] * 3
    _, logits = _forward(model, params, vision, prompts.ids_QxP, prompts.pos_QxPx3, prompts.visual_QxP)
    np.testing.assert_allclose(np.asarray(logits)[0, :n], theirs[:n], atol=TOLERANCE * theirs.std(), rtol=0)
    moved = prompts.replace(next_pos_Q=prompts.next_pos_Q + beyond)
    other = run(params, vision, moved, logit_bias_V, np.uint32(0), np.uint32(0), np.zeros(1, np.uint32))
    assert np.abs(other.logp_BxR[0, 1] - want[1]) > 10 * TOLERANCE
