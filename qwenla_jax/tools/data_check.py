"""Checks a run's data before the run: invalid records, lengths, rendered prompts, and leaks of its evaluation."""

from __future__ import annotations

import dataclasses
import functools
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from types import MappingProxyType

from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.data.batching.example import to_prompt_example, to_sft_example
from qwenla_jax.data.contamination import Fingerprints, find_leaks, take_fingerprints
from qwenla_jax.data.datasets.multiple_choice import LETTERS
from qwenla_jax.data.images.preprocess import ProcessorSettings
from qwenla_jax.data.record import Record, Split
from qwenla_jax.data.sources.factory import open_part
from qwenla_jax.data.sources.spec import BUILT_IN_SOURCES, ROWS, parse
from qwenla_jax.data.sources.splits import SelectedRecords
from qwenla_jax.data.synthetic.tokenizer_texts import tokenizer_texts
from qwenla_jax.inference.load import checkpoint_folder, model_config, tiny_processor
from qwenla_jax.inference.read_examples import fitting
from qwenla_jax.inference.runtime import layout_of, processor_of
from qwenla_jax.text.answers.normalize import plain
from qwenla_jax.text.tokenizer import Tokenizer, train_tiny_tokenizer

_LONG_ANSWER = 200  # characters
_PROMPTS = 3  # rendered prompts of a source
_MAX_INVALID = "config.data.max_invalid"
# The settings that change what happens to the records of a reason; `_MAX_INVALID` for all others.
_SETTINGS = MappingProxyType(
    {
        "too_long": "config.data.max_prompt_tokens, config.data.max_response_tokens, config.data.max_pixels",
        "field": "#columns=FIELD:COLUMN of the source",
        "options": "#columns=options:COLUMN of the source",
        "answer_not_among_options": "#columns=options:COLUMN of the source",
        "several_turns": "#turns=first of the source",
        "later_turn": "#turns=first of the source",
        "turn_points_back": "#turns=first of the source",
        "no_response": "#columns=response:COLUMN of the source",
        "no_image": "#images=1 of the source",
        "several_images": "#images=1 of the source",
        "many_options": "#max_options of the source",
        "other_kind": "#kinds of the source",
    }
)


@dataclasses.dataclass(frozen=True)
class DataCheck:
    """What was found.

    Attributes:
      lines: the report.
      invalid: records that cannot be used.
      leaked: images of the training data that an evaluation has, too.
    """

    lines: tuple[str, ...]
    invalid: int
    leaked: int

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.invalid and not self.leaked

    def text(self) -> str:
        """The report, with its end."""
        end = f"{self.invalid} invalid records, {self.leaked} leaked images"
        return "\n".join([*self.lines, end if not self.ok else "nothing is wrong"])


def check_data(options: RunOptions, against: Sequence[str] = ()) -> DataCheck:
    """Reads every record of a run's training and evaluation sources, as the run would, and compares their images.

    Args:
      options: the run's settings; its tokenizer and image processor are loaded, no model.
      against: further evaluations, named as sources are; all of their records are compared.

    Raises:
      ValueError, OSError, ModuleNotFoundError: a source that cannot be opened at all, or no tokenizer.
    """
    data = options.data
    assert data.source is not None
    sft = options.stage == "sft"
    apart = data.eval_source is not None
    asked: list[tuple[str, str, Split, bool]] = [("training", data.source, "cold_start" if sft else "train", apart)]
    if options.eval.final_size or options.eval.every:
        asked.append(("evaluation", data.eval_source or data.source, "held_out", apart))
    asked.extend(("against", spec, "held_out", True) for spec in against)
    lines: list[str] = []
    invalid: dict[str, None] = {}  # a row that both splits meet counts once
    prints: dict[str, list[Fingerprints]] = {"training": [], "evaluation": []}
    tokenizer, processor = _load(options)
    for role, spec, split, whole in asked:
        copied = role == "training" and sft
        for part in parse(spec):
            if part.reader in BUILT_IN_SOURCES:
                lines.append(f"{role} {part.text}: made by the program, in splits of its own; nothing to check")
                continue
            source = open_part(part, split, seed=options.seed, whole=whole)
            assert isinstance(source, SelectedRecords)
            examples = _Examples(options, tokenizer, processor, with_response=copied)
            result = take_fingerprints(source, f"{role} {part.text}", examples.check)
            lines += [
                *_findings(source, result, part.reader in ROWS),
                *_hints(source, compared=not copied),
                *examples.lines(),
            ]
            invalid |= dict.fromkeys([f"{where}: {message}" for where, _, message in source.faults])
            invalid |= dict.fromkeys(result.unread)
            prints["training" if role == "training" else "evaluation"].append(result)
    leaked = set()
    for trained in prints["training"]:
        for evaluated in prints["evaluation"]:
            report = find_leaks(trained, evaluated)
            leaked |= {(trained.name, leak.trained) for leak in report.leaks}
            if report.leaks or report.same_ids:
                lines += report.text().splitlines()
    pairs = len(prints["training"]) * len(prints["evaluation"])
    lines.append(f"compared the images of {pairs} pairs of sources: {len(leaked)} of the training data leak")
    return DataCheck(tuple(lines), len(invalid), len(leaked))


def _findings(source: SelectedRecords, result: Fingerprints, columns: bool) -> list[str]:
    """The number of records, and what is invalid or left out: by reason, with the setting that changes it.

    Args:
      source, result: the records, and what reading them found.
      columns: the source's columns are a setting.
    """
    lines = [f"{result.name}: {source.total} records, of them {len(source) - len(result.unread)} usable in this split"]
    invalid = defaultdict[str, list[str]](list)
    for where, reason, message in source.faults:
        invalid[reason].append(f"{where}: {message}")
    for reason, message in zip(result.reasons, result.unread, strict=True):
        invalid[reason].append(message)
    for reason, messages in sorted(invalid.items()):
        setting = _SETTINGS.get(reason, _MAX_INVALID)
        setting = _MAX_INVALID if setting.startswith("#columns") and not columns else setting
        lines += [f"  invalid, {reason}: {len(messages)} ({setting})", *(f"    {message}" for message in messages)]
    for what, reasons in (("left out by filter", source.left_out), ("refused", source.refused)):
        lines += [f"  {what}, {reason}: {count} ({_SETTINGS[reason]})" for reason, count in sorted(reasons.items())]
    return lines


def _hints(source: SelectedRecords, compared: bool) -> list[str]:
    """What is no fault and yet may not be meant: records without an image, and answers that are hardly ever matched.

    Args:
      source: the records.
      compared: responses are compared with their answers.
    """
    raw_records = [source.raw_record(index) for index in range(len(source))]
    bare = sum(not raw_record.images for raw_record in raw_records)
    long = [raw_record for raw_record in raw_records if compared and len(plain(raw_record.answer)) > _LONG_ANSWER]
    lines = [f"  without an image: {bare}"] if bare else []
    if long:
        lines.append(f"  with an answer of over {_LONG_ANSWER} characters, matched word for word only: {len(long)}")
    return lines + [f"  {raw_record.where}: {raw_record.answer[:60]!r}..." for raw_record in long[:5]]


def _load(options: RunOptions) -> tuple[Tokenizer, ProcessorSettings]:
    name = options.init_from or ""
    if name == "random:tiny":
        return train_tiny_tokenizer(tokenizer_texts()), tiny_processor()
    folder = checkpoint_folder(name)
    return Tokenizer.from_folder(folder).with_tags(), ProcessorSettings.from_json(folder / "preprocessor_config.json")


class _Examples:
    """Makes an example of each record as the run would; keeps the lengths of all and the prompts of the first few."""

    def __init__(
        self, options: RunOptions, tokenizer: Tokenizer, processor: ProcessorSettings, with_response: bool
    ) -> None:
        self._make = functools.partial(
            to_sft_example if with_response else to_prompt_example,
            tok=tokenizer,
            settings=processor_of(options.inference, processor),
            layout=layout_of(model_config(options.inference)),
            system=options.data.system,
        )
        self._config, self._tokenizer = options.inference, tokenizer
        self._lengths = defaultdict[str, list[int]](list)
        self._prompts: list[str] = []

    def check(self, record: Record) -> None:
        """Raises ValueError for a record that the run cannot use."""
        example = self._make(record)
        n = example.prompt_length
        self._lengths["prompt"].append(n)
        if len(example.ids_T) > n:
            self._lengths["response"].append(len(example.ids_T) - n)
        fitting(example, self._config)
        if len(self._prompts) < _PROMPTS:
            pad = re.escape(self._tokenizer.decode([self._tokenizer.ids.image_pad]))
            text = self._tokenizer.decode(example.ids_T[:n].tolist()).rstrip("\n")
            text = re.sub(f"({pad})+", lambda run: f"{run[1]} x {len(run[0]) // len(run[1])}", text)
            options = ", ".join(f"{letter}. {option}" for letter, option in zip(LETTERS, record.options, strict=False))
            text += f"\noptions: {options or 'none'}; right answer: {record.answer[:_LONG_ANSWER]}"
            lines = [f"  a prompt, of record {record.id!r}:", *text.split("\n")]
            self._prompts.append("\n    ".join(lines))

    def lines(self) -> list[str]:
        """The lengths against the run's limits, and the prompts."""
        lines = []
        for what, lengths in self._lengths.items():
            key = f"max_{what}_tokens"
            spread = f"{min(lengths)} to {max(lengths)}, median {statistics.median_low(lengths)}"
            over = sum(length > getattr(self._config, key) for length in lengths)
            lines.append(f"  tokens of a {what}: {spread}; {over} over config.data.{key}={getattr(self._config, key)}")
        return lines + self._prompts
