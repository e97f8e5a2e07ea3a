"""The model card of an export: what the run was, as the Hugging Face Hub and a person read it."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.config.schema import leaves
from qwenla_jax.data.sources.spec import parse
from qwenla_jax.model.families import QWEN2_5_VL, Family
from qwenla_jax.run.metrics import METRICS_FILE, whole_lines
from qwenla_jax.weights.custom_generate import CODE_FOLDER
from qwenla_jax.weights.hub import hub_name

# No times: the card of a resumed run is that of an uninterrupted one.
_METRICS = (
    *("eval/accuracy", "eval/accuracy_low", "eval/accuracy_high", "eval/format", "eval/completions/mean_length"),
    *("train/loss", "train/reward", "train/rewards/format/mean", "train/rewards/accuracy/mean"),
    *("train/rewards/balance/mean", "train/kl", "train/completions/mean_length", "train/reflection/count_mean"),
)
_ELSEWHERE = ("stage", "preset", "init_from", "data.source", "data.eval_source")  # and folders are nobody's business


def model_card(
    options: RunOptions, workdir: Path, step: int, adapter: bool = False, family: Family = QWEN2_5_VL
) -> str:
    """The text of README.md: metadata, base model, data, commands, metrics and settings.

    Args:
      options: of the run.
      workdir: its folder, with its metrics.
      step: of the checkpoint that is exported.
      adapter: the export holds adapters alone.
      family: of the model.
    """
    # Imported here: only an export needs it.
    from huggingface_hub import ModelCard, ModelCardData

    repo, revision = hub_name(options.init_from or "") or (None, None)
    start = Path(options.init_from or "").name
    data = ModelCardData(
        base_model=repo,
        base_model_relation=repo and ("adapter" if adapter else "finetune"),
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=[
            "qwenla_jax",
            "jax",
            family.model_type,
            "visual-reasoning",
            options.stage,
            *([] if adapter else [CODE_FOLDER]),
        ],
    )
    link = f"[{repo}](https://huggingface.co/{repo})" + (f", revision `{revision}`" if revision else "")
    sources = parse(options.data.source) if options.data.source else ()
    parts = [f"{part.reader} ({Path(part.path).name})" if part.path else part.reader for part in sources]
    stage = "BRPO" if options.stage == "brpo" else "supervised training"
    card = ModelCard.from_template(
        data,
        str(Path(__file__).parents[1] / "templates" / "model_card.md"),
        options=options,
        step=step,
        stage=stage,
        adapter=adapter,
        kind="Low-rank adapters" if adapter else f"A {family.name}",
        family=family,
        base=link if repo else f"`{start}`, which is not on the Hub by that name",
        base_path=repo or "BASE",
        data=", ".join(parts),
        system=f" --system={shlex.quote(options.data.system)}" if options.data.system else "",
        metrics=_metrics(workdir, step),
        settings=list(_changed(options)),
    )
    return card.content


def _changed(options: RunOptions) -> Iterator[tuple[str, str]]:
    """Settings that are not the default, as JSON."""
    of = lambda values, key: functools.reduce(getattr, key.split("."), values)  # noqa: E731
    defaults = RunOptions()
    for leaf in leaves(RunOptions):
        value = of(options, leaf.key)
        if leaf.key not in _ELSEWHERE and value != of(defaults, leaf.key):
            yield leaf.key, json.dumps(value, ensure_ascii=False)


def _metrics(workdir: Path, step: int) -> list[tuple[str, str, str]]:
    """Name, value before the first step, and the newest value at `step`; none where they cannot be read."""
    before, after = {}, {}
    try:
        lines, _ = whole_lines(workdir / METRICS_FILE)
    except (ValueError, OSError):
        return []
    for number, line in lines:
        row = json.loads(line)
        if number == 0:
            before |= row
        elif number <= step:
            after |= row
    tell = lambda value: f"{value:.4g}" if isinstance(value, int | float) else ""  # noqa: E731
    return [(name, tell(before.get(name)), tell(after.get(name))) for name in _METRICS if name in after]
