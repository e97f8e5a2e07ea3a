"""Converts a model of full size with random weights, there and back, and measures it.

    python tests/convert/full_size.py --config=CONFIG.json --tokenizer=TOKENIZER.json --processor=PREPROCESSOR.json
        --image=FILE --dir=DIR

Writes random bfloat16 weights in shards of 5 GB to DIR/hf, converts them to DIR/orbax and back to DIR/back, compares
the files byte for byte, copies DIR/hf with cp for its time, and compares the logits with transformers': in bfloat16,
and of the first layers in float32.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARD = 5_000_000_000


def write_random(folder: Path) -> None:
    """Weights of the released scale: 0.02, around 1 for the norms."""
    import torch
    from safetensors.torch import save_file

    from qwenla_jax.model.config import ModelConfig
    from qwenla_jax.model.hf_names import table

    config = ModelConfig.from_hf(folder)
    generator = torch.Generator().manual_seed(0)
    sizes, shards = {}, [{}]
    for entry in table(config):
        for name in entry.names:
            size = 2 * int(torch.Size(entry.shape).numel())
            if sum(sizes[n] for n in shards[-1]) + size > SHARD:
                shards.append({})
            sizes[name] = size
            shards[-1][name] = entry
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    where = {}
    for file, shard in zip(names, shards, strict=True):
        tensors = {}
        for name, entry in shard.items():
            value = torch.empty(entry.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            tensors[name] = value + 1 if entry.paths[0].endswith("scale") else value
            where[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def command(*args: str) -> tuple[float, float]:
    """Seconds, and the most memory of the process in GB."""
    begin = time.perf_counter()
    process = subprocess.Popen(args, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if status:
        sys.exit(f"{' '.join(args)} ended with {status}")
    os.sync()
    return seconds, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("config", "tokenizer", "processor", "image", "dir"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--make", type=Path, help="only write random weights into this folder")
    parser.add_argument("--rounds", type=int, default=3, help="of cp and the conversions, in turn")
    parser.add_argument("--float32_layers", type=int, default=4)
    args = parser.parse_args()
    if args.make:
        write_random(args.make)
        return
    hf, orbax, back, copy = (args.dir / name for name in ("hf", "orbax", "back", "copy"))
    if not (hf / "model.safetensors.index.json").is_file():
        hf.mkdir(parents=True, exist_ok=True)
        shutil.copy(args.config, hf / "config.json")
        shutil.copy(args.tokenizer, hf / "tokenizer.json")
        shutil.copy(args.processor, hf / "preprocessor_config.json")
        # In a process of its own: what this one holds would count as its children's memory.
        subprocess.run([sys.executable, __file__, "--make", str(hf)], check=True)
    size = sum(path.stat().st_size for path in hf.iterdir()) / 1e9
    python = (sys.executable,)
    for _ in range(args.rounds):
        for folder in (orbax, back):
            shutil.rmtree(folder, ignore_errors=True)
        for name, source, target in (("from_hf", hf, orbax), ("to_hf", orbax, back)):
            # cp of the same files just before, and its copy gone again: both find the page cache in the same state.
            copied, _ = command("cp", "-r", str(source), str(copy))
            shutil.rmtree(copy)
            seconds, memory = command(*python, f"convert/{name}.py", "--src", str(source), "--dst", str(target))
            print(
                f"\n{name}: {seconds:.1f} s, {copied / seconds:.2f} of the speed of cp ({copied:.1f} s), "
                f"peak memory {memory:.2f} GB",
                flush=True,
            )
    command("diff", "-r", str(hf), str(back))
    print(f"{hf} and {back} are the same to the byte ({size:.2f} GB)", flush=True)
    shutil.rmtree(back)
    compare = (*python, "convert/compare.py", "--hf", str(hf), "--flax", str(orbax), "--image", str(args.image))
    command(*compare, "--dtype=float32", f"--layers={args.float32_layers}")
    command(*compare, "--dtype=bfloat16")
    print(f"peak memory of all: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
