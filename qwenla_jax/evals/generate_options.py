"""Settings of the answers that a model gives to a benchmark. Nothing here imports jax."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenla_jax.config.checks import inference_relations, init_problems
from qwenla_jax.config.inference_config import InferenceConfig
from qwenla_jax.config.schema import ConfigError, build, option
from qwenla_jax.config.shared_options import DTYPES, MODES, ReattentionOptions
from qwenla_jax.data.datasets.parquet import is_parquet, shards
from qwenla_jax.evals.prompts import check_form
from qwenla_jax.weights.hub import local_folder

_SAMPLE = 65_536  # bytes


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Everything that answers depend on, and what is scored of them."""

    task: str = option("mathvision", "the benchmark")
    gold: tuple[str, ...] = option((), "its files: name and digest")
    images: str | None = option(None, "folder of its images; none: that of each file")
    model: str = option("tiny", "a checkpoint's folder, a model of the Hugging Face Hub, or tiny: the embedded one")
    weights: str = option("", "that folder's files, as a digest of names, sizes and samples of their content")
    reattention: str = option("none", f"what stands before a reflection: {', '.join(MODES)}", choices=MODES)
    keep_ratio: float = option(0.5, "route: share of the visual tokens that is kept", low=0, high=1)
    max_insertions: int = option(2, "most insertions of a response", low=0)
    max_response_tokens: int = option(1024, "longest response in tokens, the stop token included", low=1)
    max_prompt_tokens: int = option(8192, "a question with more, visual tokens included, cannot be used", low=1)
    max_pixels: int | None = option(None, "shrink larger images to so many pixels; none: the checkpoint's bound", low=1)
    batch_size: int = option(8, "questions answered at once", low=1)
    temperature: float = option(0.0, "0 is greedy", low=0)
    top_p: float = option(1.0, "with a temperature: draw from the likeliest tokens that hold it", above=0, high=1)
    sampling_seed: int = option(0, "with a temperature: of the random numbers", low=0, high=2**31 - 1)
    system: str | None = option(None, "text of a system turn; none: no such turn")
    dtype: str = option("float32", "type of parameters and of what is computed", choices=DTYPES)
    size: int | None = option(None, "only the first so many questions; none: all", low=1)
    prompt: str = option("structured", "structured, plain, or a text with {question} in it")
    missing: str = option("refuse", "a question that cannot be used: refuse, wrong, leave_out")

    @property
    def inference(self) -> InferenceConfig:
        """What sampling needs of these settings."""
        return InferenceConfig(
            init_from=self.model,
            seed=self.sampling_seed,
            dtype=self.dtype,
            param_dtype=self.dtype,
            batch_size=self.batch_size,
            max_prompt_tokens=self.max_prompt_tokens,
            max_response_tokens=self.max_response_tokens,
            max_pixels=self.max_pixels,
            system=self.system,
            reattention=ReattentionOptions(self.reattention, self.keep_ratio, max_insertions=self.max_insertions),
        )


# What the command line takes under these names; the others come from its other flags and from the files.
_OTHERS = ("task", "gold", "weights", "missing")
FLAGS = tuple(field.name for field in dataclasses.fields(GenerateOptions) if field.name not in _OTHERS)


def make_options(values: Mapping[str, Any], gold: Sequence[Path]) -> GenerateOptions:
    """Checked settings, with the digests of the files.

    Raises:
      ConfigError: a wrong value; all of them at once, one a line.
      FileNotFoundError, ValueError: a file that is not there, or a prompt that is none.
    """
    if not gold:
        raise ValueError("--gold is missing: the benchmark's questions are to be answered, in files of them")
    check_form(str(values.get("prompt", "structured")))
    try:
        options = build(GenerateOptions, {**values, "gold": [_signed(path) for path in gold]})
    except ConfigError as error:
        raise ConfigError(flags_of(str(error))) from error
    if options.model != "tiny":
        try:
            folder = local_folder(options.model)
        except FileNotFoundError as error:
            raise ValueError(f"--model: {error}") from error
        options = dataclasses.replace(options, model=str(folder.absolute()), weights=_digest(_sampled(folder)))
    config = options.inference
    if problems := [*inference_relations(config), *init_problems(config, "tiny")]:
        raise ConfigError(flags_of("\n".join(problems)))
    return options


def flags_of(text: str) -> str:
    """A message on settings with the names of flags."""
    for group in ("config.data.", "config.reattention.", "config."):
        text = text.replace(group, "--")
    return text


def _signed(path: Path) -> str:
    """A file's name and digest of its content; of parquet files that of their names and sizes."""
    if is_parquet(path):
        return f"{path.name} {_digest((each.name, each.stat().st_size) for each in shards(path))}"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        return f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"


def _sampled(folder: Path) -> Iterator[tuple[str, int, bytes]]:
    """Name, size and three samples of each file: whole checkpoints take minutes, and training changes all of one."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            size = path.stat().st_size
            with path.open("rb") as file:
                parts = []
                for place in (0, (size - _SAMPLE) // 2, size - _SAMPLE):
                    file.seek(max(0, place))
                    parts.append(file.read(_SAMPLE))
            yield path.relative_to(folder).as_posix(), size, hashlib.sha256(b"".join(parts)).digest()


def _digest(pairs: Any) -> str:
    return hashlib.sha256(repr(list(pairs)).encode()).hexdigest()[:16]
