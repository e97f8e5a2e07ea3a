"""Everything that is wrong with a run's questions, told before the run meets it; and whether its evaluation leaks."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence

from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.data.batching.example import to_prompt_example, to_sft_example
from qwenla_jax.data.contamination import Fingerprints, find_leaks, take_fingerprints
from qwenla_jax.data.images.preprocess import ProcessorSettings
from qwenla_jax.data.record import Record, Split
from qwenla_jax.data.sources.factory import open_part
from qwenla_jax.data.sources.spec import BUILT_IN_SOURCES, parse
from qwenla_jax.data.sources.splits import SelectedRecords
from qwenla_jax.data.synthetic.tokenizer_texts import tokenizer_texts
from qwenla_jax.inference.load import checkpoint_folder, model_config, tiny_processor
from qwenla_jax.inference.read_examples import fitting
from qwenla_jax.inference.runtime import layout_of, processor_of
from qwenla_jax.text.answers.normalize import plain
from qwenla_jax.text.tokenizer import Tokenizer, train_tiny_tokenizer

_LONG_ANSWER = 200  # characters


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
    for role, spec, split, whole in asked:
        copied = role == "training" and sft
        check = _check(options, with_response=copied)
        for part in parse(spec):
            if part.reader in BUILT_IN_SOURCES:
                lines.append(f"{role} {part.text}: made by the program, in splits of its own; nothing to check")
                continue
            source = open_part(part, split, seed=options.seed, whole=whole)
            assert isinstance(source, SelectedRecords)
            result = take_fingerprints(source, f"{role} {part.text}", check)
            lines += [*_told(source, result), *_hints(source, compared=not copied)]
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


def _told(source: SelectedRecords, result: Fingerprints) -> list[str]:
    """What there is of a source, what was left out of it and why, and its invalid records by name."""
    split = len(source) - len(result.unread)
    lines = [f"{result.name}: {source.total} records, of them {split} usable in this split"]
    counts = Counter([*(reason for _, reason, _ in source.faults), *result.reasons])
    for what, reasons in (("invalid", counts), ("left out by filter", source.left_out), ("refused", source.refused)):
        lines += [f"  {what}, {reason}: {count}" for reason, count in sorted(reasons.items())]
    lines += [f"  {where}: {message}" for where, _, message in source.faults]
    return lines + [f"  {message}" for message in result.unread]


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


def _check(options: RunOptions, with_response: bool) -> Callable[[Record], object]:
    """Makes an example of a record as the run would, and throws it away."""
    name = options.init_from or ""
    if name == "random:tiny":
        tokenizer, processor = train_tiny_tokenizer(tokenizer_texts()), tiny_processor()
    else:
        folder = checkpoint_folder(name)
        tokenizer = Tokenizer.from_folder(folder).with_tags()
        processor = ProcessorSettings.from_json(folder / "preprocessor_config.json")
    make = functools.partial(
        to_sft_example if with_response else to_prompt_example,
        tok=tokenizer,
        settings=processor_of(options.inference, processor),
        layout=layout_of(model_config(options.inference)),
        system=options.data.system,
    )
    return lambda record: fitting(make(record), options.inference)
