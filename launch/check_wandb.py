"""Writes metrics and completions to wandb offline, over a restart, and reads them back: python launch/check_wandb.py

Needs the extra `wandb` and no network. Exits with 1 where something is missing, there twice, or other than written.
"""

from __future__ import annotations

import collections
import json
import os
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7


def records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file: LevelDB's log format behind a header of its own, with wandb's messages in it."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, message = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        room = BLOCK - at % BLOCK
        if room < HEADER:  # the rest of a block that holds no header is padding
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        message += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # the whole message, or its last part
            yield Record.FromString(message)
            message = b""


def main() -> int:
    """Writes, reads and compares."""
    os.environ["WANDB_MODE"] = "offline"
    import wandb
    from PIL import Image

    from qwenla_jax.run.completions import Completion
    from qwenla_jax.run.metrics import MetricWriter
    from qwenla_jax.utils.progress import Progress

    row = Completion((Image.new("RGB", (9, 5)),), "how many?", "2", "<REFLECTION>|", {"format": 1.0}, 1.5, -0.5)
    found: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
    tables, configs, ids = 0, [], set()
    with tempfile.TemporaryDirectory() as folder:
        # Killed after step 4, resumed from the checkpoint of step 2.
        for resume, steps in ((None, (1, 2, 3, 4)), (2, (3, 4, 5))):
            with MetricWriter(
                folder, resume_step=resume, progress=Progress(5), sinks=["wandb"], settings={"seed": 3}
            ) as writer:
                for step in steps:
                    writer.write(step, {"train/reward": step / 4})
                    writer.show(step, [row])
        wandb.teardown()  # its own process writes the files, and has not always done so when a run is finished
        for path in sorted(Path(folder).glob("wandb/offline-run-*/*.wandb")):
            for record in records(path):
                ids |= {record.run.run_id} - {""}
                configs += [json.loads(item.value_json) for item in record.run.config.update if item.key == "seed"]
                values = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                step = int(values.get("_step", record.history.step.num))
                if "train/reward" in values:
                    found["train/reward"].append((step, float(values["train/reward"])))
                tables += any(name.startswith("completions") for name in values)
        files = list(Path(folder).glob("wandb/offline-run-*/files/media/table/*.json"))
        text = [json.loads(file.read_text())["data"][0] for file in files]
    print(dict(found), f"{tables} tables, {len(ids)} run, config {configs}", text[:1])
    good = found["train/reward"] == [(step, step / 4) for step in range(1, 6)]
    good &= tables == 5 and len(files) == 5 and len(ids) == 1 and set(configs) == {3}
    good &= all("<REFLECTION>|" in cells and -0.5 in cells for cells in text)
    print("as written" if good else "not as written")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
