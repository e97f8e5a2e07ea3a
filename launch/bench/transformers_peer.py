"""transformers' side of `launch/bench/model.py`: a process that holds one model and does what it is told, step by step.

    python launch/bench/transformers_peer.py --config=FOLDER --inputs=FILE.npz --threads=2 --device=cpu --dtype=float32

It reads a line from standard input and answers with a line of JSON: `peak SIDE`, `train ROWS`, `lora ROWS RANK`,
`prefill ROWS` or `generate ROWS TOKENS`. Each is done once uncounted and then `--in_a_row` times. Between two lines it
waits and takes no processor, so that ours can be timed in turn with it. Where the folder has weights they are read;
else they are drawn on the device. Sdpa attention, no checkpointing.

Paper silent: the paper reports no such measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Peer:
    """The model and its inputs, on the device."""

    def __init__(self, args: argparse.Namespace) -> None:
        import numpy as np
        import torch
        import transformers

        self.torch, self.device, self.in_a_row = torch, args.device, args.in_a_row
        dtype = getattr(torch, args.dtype)
        kind, folder = transformers.Qwen2_5_VLForConditionalGeneration, Path(args.config)
        if list(folder.glob("*.safetensors")):
            self.model = kind.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(self.device)
        else:
            config = transformers.Qwen2_5_VLConfig(**json.loads((folder / "config.json").read_text()))
            config._attn_implementation = "sdpa"
            before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            with torch.device(self.device):
                self.model = kind(config)
            torch.set_default_dtype(before)
        content = np.load(args.inputs)
        self.never = content["never"].tolist()
        self.inputs = {name: torch.from_numpy(content[name]).to(self.device) for name in content.files}
        self.inputs["pixel_values"] = self.inputs["pixel_values"].to(dtype)

    def batch(self, kind: str, rows: int) -> dict[str, Any]:
        """What the model takes: `rows` times the prompt or the whole sequence, with an image each."""
        of = lambda name: self.inputs[name]  # noqa: E731
        ids = of(f"{kind}_ids")[None].repeat(rows, 1)
        return {
            "input_ids": ids,
            "attention_mask": self.torch.ones_like(ids),
            "mm_token_type_ids": of(f"{kind}_types")[None].repeat(rows, 1),
            "pixel_values": of("pixel_values").repeat(rows, 1),
            "image_grid_thw": of("image_grid_thw").repeat(rows, 1),
        }

    def timed(self, work: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
        """Seconds and seconds of all processors of each counted time, and what came of the last."""
        rows, result = [], None
        for _ in range(self.in_a_row + 1):
            self.wait()
            start, cpu = time.perf_counter(), time.process_time()
            result = work()
            self.wait()
            rows.append((time.perf_counter() - start, time.process_time() - cpu))
        return {"seconds": [row[0] for row in rows[1:]], "cpu_seconds": [row[1] for row in rows[1:]]}, result

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.device != "cpu":
            self.torch.cuda.synchronize()

    def peak(self, side: int) -> dict[str, Any]:
        """1e9 operations a second in a product of square matrices in the model's type, the best of several tries."""
        x = self.torch.randn(side, side, device=self.device, dtype=self.model.dtype)
        times = [second for _ in range(4) for second in self.timed(lambda: x @ x)[0]["seconds"]]
        return {"matrix_gflops": 2 * side**3 / min(times) / 1e9}

    def train(self, rows: int) -> dict[str, Any]:
        """Forward and backward of the mean loss over the response."""
        batch = self.batch("whole", rows)
        labels = self.inputs["labels"][None].repeat(rows, 1)
        self.model.train()

        def work() -> Any:
            self.model.zero_grad(set_to_none=True)
            loss = self.model(**batch, labels=labels, use_cache=False).loss
            loss.backward()
            return loss.detach()

        times, loss = self.timed(work)
        self.model.zero_grad(set_to_none=True)
        return times | {"loss": float(loss)}

    def lora(self, rows: int, rank: int) -> dict[str, Any]:
        """The same with adapters (PEFT) on the decoder's products, and the rest frozen."""
        import peft

        names = "self_attn.[qkvo]_proj|mlp.(gate|up|down)_proj"
        config = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=rf".*language_model.*({names})")
        inner = self.model
        grads = [(p, p.requires_grad) for p in inner.parameters()]
        try:
            self.model = peft.get_peft_model(inner, config)
            return self.train(rows)
        finally:
            self.model = self.model.unload() if self.model is not inner else inner
            for parameter, moves in grads:
                parameter.requires_grad_(moves)

    def prefill(self, rows: int) -> dict[str, Any]:
        """The prompt alone, to the logits behind it."""
        batch = self.batch("prompt", rows)
        self.model.eval()
        with self.torch.inference_mode():
            times, _ = self.timed(lambda: self.model(**batch, use_cache=True, logits_to_keep=1).logits)
        return times

    def generate(self, rows: int, tokens: int) -> dict[str, Any]:
        """Greedy tokens, exactly so many."""
        batch = self.batch("prompt", rows)
        self.model.eval()
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        with self.torch.inference_mode():
            times, out = self.timed(lambda: self.model.generate(**batch, **options, suppress_tokens=self.never))
        return times | {"ids": out[:, batch["input_ids"].shape[1] :].tolist()}


def main() -> None:
    """Answers until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("config", "inputs", "device", "dtype"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("threads", "in_a_row"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS=str(args.threads))
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        import torch
        import transformers

        torch.set_num_threads(args.threads)
        peer = Peer(args)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        print(json.dumps({"versions": versions}), file=answers, flush=True)
        for line in sys.stdin:
            word, *numbers = line.split()
            try:
                result = getattr(peer, word)(*map(int, numbers))
            except (torch.OutOfMemoryError, ImportError) as error:
                result = {"none": type(error).__name__}
            if args.device != "cpu":
                torch.cuda.empty_cache()  # ours needs the room while this waits
            print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
