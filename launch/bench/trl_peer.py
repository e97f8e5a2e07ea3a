"""One GRPO step of TRL on Hugging Face's Qwen2.5-VL, timed: the peer that `launch/bench/main.py` stands beside.

Runs as a process of its own, in an environment that has torch, transformers, trl 1.16, accelerate, datasets and
pillow (qwenla_jax itself needs none of torch, trl, accelerate or datasets). Prints one line of JSON on stdout;
everything that the libraries print goes to stderr.

    python launch/bench/trl_peer.py --checkpoint=qwenla_jax/assets/tiny --examples=FILE.jsonl

TRL's own code samples (transformers' `generate`), scores with the reference model, computes the loss, the gradient
and the optimizer step. What stands in for a library's part, and why:

* The processor: transformers' `Qwen2_5_VLProcessor` wants a video processor, which wants torchvision. The subclass
  here leaves the video processor out; images and text still go through the library's methods.
* The chat template: Qwen's prompt layout without a system message, in case the checkpoint's tokenizer has none.
* The reward: seeded random numbers, so that its cost is nothing and every group has an advantage.
* The trainer: a subclass whose methods read the clock and call TRL's.

Settings that favour TRL: no gradient checkpointing (TRL's default is on), one micro-batch for the whole batch, no
logging, no saving, no data-loader processes. Paper silent: the paper reports no such measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

REQUIRED = ("torch", "transformers", "trl", "accelerate", "datasets", "pillow")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line (`None`: that of the process). Bad values end the process with a message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="Hugging Face folder of a Qwen2.5-VL model")
    parser.add_argument("--examples", type=Path, required=True, help="JSONL of {image, question}")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps that are timed (default: 10)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those, not counted (default: 2)")
    parser.add_argument("--prompts", type=int, default=8, help="different prompts in a step (default: 8)")
    parser.add_argument("--responses", type=int, default=8, help="responses to each prompt (default: 8)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of every response (default: 64)")
    parser.add_argument("--beta", type=float, default=0.1, help="weight of the KL term; 0 drops the reference model")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name, least in dict(steps=1, warmup=1, prompts=1, responses=2, tokens=1, threads=1, beta=0).items():
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if not (args.checkpoint / "config.json").is_file():
        parser.error(f"--checkpoint: no config.json in {args.checkpoint}, expected a Hugging Face model folder")
    if not args.examples.is_file():
        parser.error(f"--examples: no such file: {args.examples}")
    return args


def require_packages() -> dict[str, str]:
    """Returns the versions of the packages this script runs on; exits with the missing ones by name."""
    versions, missing = {"python": sys.version.split()[0]}, []
    for name in REQUIRED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise SystemExit(
            f"trl_peer: not installed in {sys.executable}: {', '.join(missing)}; "
            "wanted: pip install torch==2.13.0 trl==1.16.0 transformers==5.23.0 accelerate datasets pillow"
        )
    return versions


def read_examples(path: Path, count: int) -> Iterator[tuple[Any, str]]:
    """Yields `count` pairs of image and question from a JSONL file, from its top again when it ends.

    A line is `{"image": path relative to the file, "question": text}`. Raises ValueError that names file and line.
    """
    from PIL import Image

    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.append((path.parent / row["image"], str(row["question"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: expected an object with image and question: {error}") from error
    if not rows:
        raise ValueError(f"{path}: no examples in it")
    for index in range(count):
        image_path, question = rows[index % len(rows)]
        with Image.open(image_path) as image:
            yield image.convert("RGB"), question


def make_dataset(args: argparse.Namespace) -> Any:
    """Returns a `datasets.Dataset` with columns prompt (a conversation) and image, a row for every prompt of the run.

    There are as many rows as the run needs, so that no epoch ends (and no data loader starts again) on the clock.
    """
    import datasets

    pairs = read_examples(args.examples, args.prompts * (args.warmup + args.steps))
    images, questions = zip(*pairs, strict=True)
    prompts = [[{"role": "user", "content": question}] for question in questions]
    dataset = datasets.Dataset.from_dict({"prompt": prompts, "image": list(images)})
    return dataset.cast_column("image", datasets.Image())


def make_processor(checkpoint: Path) -> Any:
    """Returns transformers' Qwen2.5-VL processor for the checkpoint, without its video part (that needs torchvision).

    The image settings come from preprocessor_config.json where the checkpoint has one, else from config.json.
    """
    from transformers import AutoTokenizer
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class ImageProcessor(Qwen2_5_VLProcessor):
        # transformers reads a processor's parts from this signature
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None):
            super().__init__(image_processor, tokenizer, chat_template=chat_template)

    if (checkpoint / "preprocessor_config.json").is_file():
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)
    else:
        vision = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["vision_config"]
        image_processor = Qwen2VLImageProcessorPil(
            patch_size=vision["patch_size"],
            temporal_patch_size=vision["temporal_patch_size"],
            merge_size=vision["spatial_merge_size"],
        )
    # TRL loads processors with left padding and relies on it when it puts prompts and responses together
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left", truncation_side="left")
    return ImageProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template or CHAT_TEMPLATE)


class StepClock:
    """Seconds a step and of its parts, and what the steps worked on; the first `warmup` steps are left out."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.rows: list[dict[str, float]] = []
        self.facts: dict[str, Any] = {}
        self._parts: dict[str, float] = defaultdict(float)
        self._last = time.perf_counter()
        self._last_cpu = time.process_time()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the time of the block to the part `name` of the running step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._parts[name] += time.perf_counter() - start

    def add(self, name: str, amount: float) -> None:
        """Adds an amount (tokens, say) to the part `name` of the running step."""
        self._parts[name] += amount

    def end_step(self) -> None:
        """Closes the running step; its time is that since the end of the one before, so nothing in between is lost."""
        now, cpu = time.perf_counter(), time.process_time()
        self.rows.append({**self._parts, "step": now - self._last, "cpu": cpu - self._last_cpu})
        self._parts.clear()
        self._last, self._last_cpu = now, cpu

    def measured(self, name: str) -> list[float]:
        """Returns the values of one part in the steps after the warm-up."""
        return [row.get(name, 0.0) for row in self.rows[self.warmup :]]


def make_trainer(args: argparse.Namespace, processor: Any, clock: StepClock, output_dir: str) -> Any:
    """Returns TRL's GRPOTrainer for the run, with a clock around its parts."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class ClockedTrainer(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids: Any, images: Any, multimodal_fields: Any, *rest: Any, **more: Any):
            lengths = [len(row) for row in prompt_ids]
            clock.facts["prompt_tokens"] = [min(lengths), max(lengths)]
            clock.facts["patches"] = int(multimodal_fields["pixel_values"].shape[0])
            pads = [sum(token == self._image_pad_token_id for token in row) for row in prompt_ids]
            clock.facts["visual_tokens_a_prompt"] = [min(pads), max(pads)]
            with clock.part("generation"):
                return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *rest, **more)

        def _get_per_token_logps_and_entropies(self, model: Any, *rest: Any, **more: Any):
            name = "reference_logprobs" if model is self.ref_model else "policy_forward"
            with clock.part(name):
                return super()._get_per_token_logps_and_entropies(model, *rest, **more)

        def _generate_and_score_completions(self, inputs: Any):
            with clock.part("rollout"):
                return super()._generate_and_score_completions(inputs)

        def training_step(self, *rest: Any, **more: Any):
            with clock.part("training_step"):
                return super().training_step(*rest, **more)

    class StepEnd(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end_step()

    rng = random.Random(args.seed)

    def random_reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        clock.add("tokens", sum(len(row) for row in completion_ids))
        return [rng.random() for _ in completion_ids]

    batch = args.prompts * args.responses
    config = GRPOConfig(
        output_dir=output_dir,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        num_generations=args.responses,
        num_iterations=1,
        max_completion_length=args.tokens,
        generation_kwargs={"min_new_tokens": args.tokens},
        temperature=1.0,
        beta=args.beta,
        learning_rate=1e-5,
        max_steps=args.warmup + args.steps,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=args.seed,
    )
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        args.checkpoint, dtype=torch.float32, attn_implementation="sdpa"
    )
    trainer = ClockedTrainer(
        model=model,
        reward_funcs=random_reward,
        args=config,
        train_dataset=make_dataset(args),
        processing_class=processor,
        callbacks=[StepEnd()],
    )
    check_models(trainer, args)
    return trainer


def check_models(trainer: Any, args: argparse.Namespace) -> None:
    """Raises ValueError unless policy and reference model are there and in float32, as the report says."""
    models = {"policy": trainer.model}
    if args.beta > 0:
        models["reference"] = trainer.ref_model
    for name, model in models.items():
        if model is None:
            raise ValueError(f"the {name} model is missing although --beta is {args.beta}")
        dtypes = {str(parameter.dtype) for parameter in model.parameters()}
        if dtypes != {"torch.float32"}:
            raise ValueError(f"the {name} model has parameters of {sorted(dtypes)}, expected torch.float32 only")


def summary(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Returns median, min and max of a list of seconds."""
    named = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in named.items()}


def report(args: argparse.Namespace, clock: StepClock, trainer: Any, versions: dict[str, str]) -> dict[str, Any]:
    """Returns what is printed: seconds a step and where they go (medians of the parts need not add up exactly)."""
    steps = clock.measured("step")
    parts = {name: clock.measured(name) for name in ("generation", "reference_logprobs", "rollout", "training_step")}
    # Tokenizing, image processing (TRL does it twice), decoding, rewards and advantages
    rows = zip(parts["rollout"], parts["generation"], parts["reference_logprobs"], strict=True)
    parts["prepare_and_reward"] = [whole - generation - reference for whole, generation, reference in rows]
    less = lambda whole, part: [a - b for a, b in zip(whole, part, strict=True)]  # noqa: E731
    # Policy forward, loss and backward
    parts["forward_backward"] = less(parts["training_step"], parts["rollout"])
    # Data loading with its decoding of images, gradient clipping, optimizer step
    parts["optimizer_and_loader"] = less(steps, parts["training_step"])
    shown = ("generation", "reference_logprobs", "forward_backward", "prepare_and_reward", "optimizer_and_loader")
    tokens = clock.measured("tokens")
    return {
        "name": "trl_grpo",
        "seconds_per_step": summary(steps),
        "seconds_of_each_step": [round(seconds, 3) for seconds in steps],
        # All threads together: far below threads x seconds where something else held the processor
        "cpu_seconds_per_step": summary(clock.measured("cpu")),
        "steps": len(steps),
        "parts": {name: round(statistics.median(parts[name]), 4) for name in shown},
        "tokens_per_step": round(statistics.mean(tokens), 1),
        **{name: getattr(args, name) for name in ("warmup", "prompts", "responses", "tokens", "beta", "threads")},
        **clock.facts,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "reference_model": trainer.ref_model is not None,
        "versions": versions,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the measurement and prints its line of JSON."""
    args = parse_arguments(argv)
    versions = require_packages()
    # The libraries read these while they are imported
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as output_dir:
        import torch

        torch.set_num_threads(args.threads)
        clock = StepClock(args.warmup)
        # TRL loads the reference model itself, from the folder that the policy came from
        trainer = make_trainer(args, make_processor(args.checkpoint), clock, output_dir)
        trainer.train()
        line = report(args, clock, trainer, versions)
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
