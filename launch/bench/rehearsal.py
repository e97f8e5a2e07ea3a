"""A rehearsal of a released checkpoint with random weights: load, a step of BRPO with adapters, export, transformers.

    python launch/bench/rehearsal.py --config=CONFIG.json --processor=PREPROCESSOR.json --tokenizer=DIR --dir=DIR
        [--layers=2 --vision_layers=8]

transformers saves a random bfloat16 model of the published sizes to DIR/hf (whole width; --layers and --vision_layers
keep the first layers only), in shards and under the released names; config.json, generation_config.json,
chat_template.json, image processor and tokenizer are put beside it as they are released. Then the package does what a
user does first, and transformers loads the export: names, shapes and the tensors that must not have changed are
compared. One line of JSON tells seconds, those of all cores, and the most memory so far in GB. Needs torch.

Paper silent: the paper reports no such measurement.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwenla_jax.utils.libtpu import skip_without_tpu

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the rewards' processes find this file there

GENERATION = {
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.05,
    "temperature": 0.000001,
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def letters(record: Any) -> float:
    """A reward that differs between random responses: different letters of the response."""
    return float(len(set(record.response)))


def write_released(folder: Path, config: dict[str, Any], processor: Path, tokenizer: Path, shard: str) -> None:
    """A random checkpoint as a released one lies on the disk; the model itself is transformers'."""
    import torch
    import transformers

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(transformers.AutoConfig.from_pretrained(folder))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, config["initializer_range"])
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size=shard)
    # transformers 5 has written its own, nested form of these.
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}) + "\n")
    shutil.copy(processor, folder / "preprocessor_config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)


def rehearse(folder: Path, workdir: Path, dtype: str = "bfloat16", rank: int = 8) -> dict[str, Any]:
    """Loads the checkpoint, takes a step, and has transformers load the export.

    Returns:
      seconds and peak memory by part, and how many tensors the step changed.

    Raises:
      RuntimeError: transformers reports a missing or unexpected tensor, or another tensor than those with an adapter
        changed.
    """
    import jax
    import transformers

    import qwenla_jax
    from qwenla_jax.config.run_options import (
        BrpoOptions,
        DataOptions,
        EvalOptions,
        LoraOptions,
        OptimOptions,
        PoolOptions,
        RewardOptions,
        RunOptions,
    )
    from qwenla_jax.train.loop import run

    result: dict[str, Any] = {}

    def timed(name: str, work: Any) -> Any:
        begin, busy = time.perf_counter(), time.process_time()
        value = work()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        seconds = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - busy, "peak_gb": peak}
        result[name] = {key: round(number, 2) for key, number in seconds.items()}
        return value

    loaded = timed("load", lambda: qwenla_jax.load(folder))
    result["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(loaded.params))
    result["tokens"], result["rows"] = loaded.tokenizer.vocab_size, loaded.config.text.vocab_size
    del loaded
    options = RunOptions(
        stage="brpo",
        steps=1,
        init_from=str(folder),
        dtype=dtype,
        remat="full",
        data=DataOptions(batch_size=2, max_prompt_tokens=96, max_response_tokens=16, max_pixels=112 * 112),
        optim=OptimOptions(learning_rate=1e-3, warmup_ratio=0.0),
        brpo=BrpoOptions(group_size=2),
        rewards=RewardOptions(extra=("launch.bench.rehearsal:letters",), pool=PoolOptions(workers=1)),
        eval=EvalOptions(every=0, final_size=0),
        lora=LoraOptions(rank=rank),
    )
    timed("step_and_export", lambda: run(options, workdir))
    kind = transformers.Qwen2_5_VLForConditionalGeneration
    exported, info = timed(
        "read_by_transformers", lambda: kind.from_pretrained(workdir / "hf", output_loading_info=True)
    )
    if any(info.values()):
        raise RuntimeError(f"transformers reports of {workdir / 'hf'}: {info}")
    base = kind.from_pretrained(folder).state_dict()
    changed = [name for name, value in exported.state_dict().items() if not value.equal(base[name])]
    others = [name for name in changed if "language_model.layers" not in name or "proj.weight" not in name]
    if others or not changed:
        raise RuntimeError(f"changed without an adapter: {others}; changed at all: {len(changed)}")
    return result | {"changed": len(changed), "jax": jax.__version__, "transformers": transformers.__version__}


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the checkpoint if it is not there, and rehearses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("config", "processor", "tokenizer", "dir"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--layers", type=int, help="decoder layers; default: all")
    parser.add_argument("--vision_layers", type=int, help="blocks of the vision tower; default: all")
    parser.add_argument("--shard", default="1GB", help="size of a weight file (default: 1GB)")
    args = parser.parse_args(argv)
    skip_without_tpu()
    config = json.loads(args.config.read_text())
    vision = config["vision_config"]
    config["num_hidden_layers"] = args.layers or config["num_hidden_layers"]
    vision["depth"] = args.vision_layers or vision["depth"]
    vision["fullatt_block_indexes"] = [n for n in vision["fullatt_block_indexes"] if n < vision["depth"]]
    if not (args.dir / "hf").is_dir():
        write_released(args.dir / "hf", config, args.processor, args.tokenizer, args.shard)
    print(json.dumps(rehearse(args.dir / "hf", args.dir / "run")))


if __name__ == "__main__":
    main()
