"""Transformers beside this package, on one image and one question: python convert/compare.py --hf DIR --flax DIR

--flax takes a Hugging Face folder or one of convert/from_hf.py. A table tells, for a prefix of the decoder of growing
depth, how far the hidden states lie apart (after the final norm), and how far the logits do. Models are loaded one
after the other; --layers=N compares a model of the first N layers only, for machines that cannot hold it in float32.
This is the only program here that needs torch.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags, logging

from qwenla_jax.cli.command_line import read_flags
from qwenla_jax.utils.libtpu import skip_without_tpu


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    flags.DEFINE_string("hf", None, "Hugging Face folder, read by transformers", required=True, flag_values=values)
    flags.DEFINE_string("flax", None, "folder, read by this package", required=True, flag_values=values)
    flags.DEFINE_string("image", None, "an image; default: coloured noise", flag_values=values)
    flags.DEFINE_string("question", "What does the image show?", "asked of it", flag_values=values)
    flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "that is computed in", flag_values=values)
    flags.DEFINE_integer("layers", None, "only the first so many decoder layers", lower_bound=1, flag_values=values)
    flags.DEFINE_float(
        "bound", None, "exit with 1 where logits differ by more; default: 1e-3, none in bfloat16", flag_values=values
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs both and prints the table."""
    args = read_flags(argv, __doc__, define_flags)
    skip_without_tpu()
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it touches
    from qwenla_jax.weights.hub import local_folder

    try:
        hf, flax = local_folder(args.hf), local_folder(args.flax)
        difference = compare(hf, flax, args.image, args.question, args.dtype, args.layers)
    except (OSError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    bound = args.bound if args.bound is not None else {"float32": 1e-3}.get(args.dtype, float("inf"))
    sys.exit(0 if difference <= bound else f"the logits differ by more than {bound:g}")


def compare(hf: Path, flax: Path, image: str | None, question: str, dtype: str, layers: int | None) -> float:
    """Prints the table; returns the largest difference of logits.

    Raises:
      OSError, ValueError: what cannot be read.
    """
    from PIL import Image

    from qwenla_jax.data.images.decode import open_image
    from qwenla_jax.data.record import Record
    from qwenla_jax.model.config import ModelConfig

    if image is None:
        noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
        img = Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC)
    else:
        img = open_image(image)
    config = ModelConfig.from_hf(flax)
    depth = min(layers or config.text.num_layers, config.text.num_layers)
    depths = sorted({1, *(max(1, depth * part // 4) for part in (1, 2, 3)), depth})
    record = Record("compared", (img,), question, "", None, "question")
    # Theirs first: what it needs is gone before ours is loaded.
    states, logits, visual, pixels = _theirs(hf, record, dtype, depth, depths)
    own_states, own_logits, own_visual = _ours(flax, record, dtype, depth, depths)
    rows = [("visual tokens", visual, own_visual)]
    rows += [(f"hidden state, {n} layers", states[n], own_states[n]) for n in depths]
    rows.append((f"logits, {depth} layers", logits, own_logits))
    print(f"{'':<26}{'largest':>12}{'mean':>12}{'of size':>12}{'same argmax':>13}")
    for name, theirs, ours in rows:
        gap = np.abs(theirs - ours)
        same = f"{np.mean(theirs.argmax(-1) == ours.argmax(-1)):.1%}" if name.startswith("logits") else ""
        print(f"{name:<26}{gap.max():>12.3g}{gap.mean():>12.3g}{np.abs(theirs).mean():>12.3g}{same:>13}")
    print(f"{pixels} patches, {len(logits)} tokens, {dtype}")
    return float(np.abs(logits - own_logits).max())


def _example(folder: Path, record: Any) -> tuple[Any, Any, Any]:
    """Ids, positions and patches of the record, with the folder's own tokenizer and image processor."""
    from qwenla_jax.data.batching.example import to_prompt_example
    from qwenla_jax.data.images.preprocess import ImageLayout, ProcessorSettings
    from qwenla_jax.model.config import ModelConfig
    from qwenla_jax.text.tokenizer import Tokenizer

    config = ModelConfig.from_hf(folder)
    settings = ProcessorSettings.from_json(folder / "preprocessor_config.json")
    v = config.vision
    sizes = (v.patch_size, v.spatial_merge_size, v.temporal_patch_size, v.window_size, v.tokens_per_second)
    layout = ImageLayout(*sizes)
    tokenizer = Tokenizer.from_folder(folder).with_tags()
    return to_prompt_example(record, tokenizer, settings, layout), settings, layout


def _theirs(folder: Path, record: Any, dtype: str, depth: int, depths: list[int]) -> tuple[Any, Any, Any, int]:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2VLImageProcessorPil

    example, _, _ = _example(folder, record)
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    images = processor(images=list(record.images), return_tensors="pt")
    config = AutoConfig.from_pretrained(folder)
    config.text_config.num_hidden_layers = depth
    config.text_config.layer_types = (config.text_config.layer_types or [])[:depth]
    kind = getattr(torch, dtype)
    model = AutoModelForImageTextToText.from_pretrained(folder, config=config, dtype=kind).eval()
    ids = torch.tensor(example.ids_T[None].astype(np.int64))
    kinds = (ids == config.image_token_id).int()
    with torch.no_grad():
        out = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=images["pixel_values"].to(model.dtype),
            image_grid_thw=images["image_grid_thw"],
            mm_token_type_ids=kinds,
            output_hidden_states=True,
        )
        visual = model.model.get_image_features(
            images["pixel_values"].to(model.dtype), images["image_grid_thw"]
        ).pooler_output
        norm = model.model.language_model.norm
        # The last of them has been through the norm already.
        states = {n: out.hidden_states[n] if n == depth else norm(out.hidden_states[n]) for n in depths}
    number = lambda x: x.float().numpy()  # noqa: E731
    states = {n: number(x[0]) for n, x in states.items()}
    return states, number(out.logits[0]), number(torch.cat(list(visual))), len(images["pixel_values"])


def _ours(folder: Path, record: Any, dtype: str, depth: int, depths: list[int]) -> tuple[Any, Any, Any]:
    import jax

    from qwenla_jax.data.batching.collate import collate_prompts, make_buckets
    from qwenla_jax.model.qwen_vl import QwenVL, logits_of
    from qwenla_jax.utils.compiler_options import accepted
    from qwenla_jax.weights.hf import load_params

    example, settings, layout = _example(folder, record)
    tokens = len(example.ids_T)
    buckets = make_buckets(layout, 1, settings.min_pixels, settings.max_pixels, tokens, tokens)
    vision, prompts = collate_prompts([example], buckets, 1)
    config, params = load_params(folder)
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    layers = params["decoder"].pop("layers")
    cast = lambda x: x.astype(dtype)  # noqa: E731
    params = jax.tree.map(cast, params)
    layers = jax.tree.map(lambda x: cast(x if len(x) == depth else x[:depth]), layers)
    states: dict[int, np.ndarray] = {}
    # A CPU computes bfloat16 in float32; left to itself XLA converts all layers at once, before the loop over them.
    passes = ("while-loop-invariant-code-motion", "while-loop-expensive-invariant-code-motion")
    on_cpu = jax.default_backend() == "cpu"
    unhurried = accepted({"xla_disable_hlo_passes": ",".join(passes)}) if on_cpu else {}
    for n in depths:
        model = QwenVL(dataclasses.replace(config, text=dataclasses.replace(config.text, num_layers=n)))
        own = jax.tree.map(lambda x, n=n: x if len(x) == n else x[:n], layers)
        tree = params | {"decoder": params["decoder"] | {"layers": own}}

        @functools.partial(jax.jit, compiler_options=unhurried)
        def run(params: Any, model: Any = model) -> tuple[Any, Any, Any]:
            visual = model.apply({"params": params}, vision, method="encode")
            x = model.apply({"params": params}, prompts.ids_QxP, prompts.visual_QxP, visual, method="embed")
            hidden = model.apply({"params": params}, x, prompts.pos_QxPx3, method="decode").hidden_BxTxD
            return visual, hidden, logits_of(params, hidden)

        visual, hidden, logits = (np.asarray(x, np.float32) for x in run(tree))
        states[n] = hidden[0, :tokens]
    visual = visual[: example.frames[0].num_visual_tokens, : config.text.hidden_size]  # without DeepStack's features
    return states, logits[0, :tokens], visual


if __name__ == "__main__":
    main()
