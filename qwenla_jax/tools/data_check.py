"""Everything that is wrong with a run's questions, told before the run meets it; and whether its evaluation leaks."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.data.batching.example import to_prompt_example, to_sft_example
from qwenla_jax.data.contamination import Prints, find_leaks, take_prints
from qwenla_jax.data.images.preprocess import ProcessorSettings
from qwenla_jax.data.record import Record, Split
from qwenla_jax.data.sources.factory import open_part
from qwenla_jax.data.sources.spec import BUILT_IN_SOURCES, parse
from qwenla_jax.data.sources.splits import Chosen
from qwenla_jax.data.synthetic.tokenizer_texts import tokenizer_texts
from qwenla_jax.inference.load import model_config, tiny_processor
from qwenla_jax.inference.read_examples import fitting
from qwenla_jax.inference.runtime import layout_of, processor_of
from qwenla_jax.text.answers.normalize import plain
from qwenla_jax.text.tokenizer import Tokenizer, train_tiny_tokenizer
from qwenla_jax.weights.hf import EMBEDDED

_LONG_ANSWER = 200  # characters


@dataclasses.dataclass(frozen=True)
class DataCheck:
    """What was found.

    Attributes:
      lines: the report.
      broken: records that cannot be used.
      leaked: pictures of the training data that an evaluation has, too.
    """

    lines: tuple[str, ...]
    broken: int
    leaked: int

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.broken and not self.leaked

    def text(self) -> str:
        """The report, with its end."""
        end = f"{self.broken} broken records, {self.leaked} leaked pictures"
        return "\n".join([*self.lines, end if not self.ok else "nothing is wrong"])


def check_data(options: RunOptions, against: Sequence[str] = ()) -> DataCheck:
    """Reads every record of a run's training and evaluation sources, as the run would, and compares their pictures.

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
    asked += [("against", spec, "held_out", True) for spec in against]
    lines: list[str] = []
    broken: dict[str, None] = {}  # a row that both splits meet counts once
    prints: dict[str, list[Prints]] = {"training": [], "evaluation": []}
    for role, spec, split, whole in asked:
        copied = role == "training" and sft
        check = _check(options, with_response=copied)
        for part in parse(spec):
            if part.reader in BUILT_IN_SOURCES:
                lines.append(f"{role} {part.text}: made by the program, in splits of its own; nothing to check")
                continue
            source = open_part(part, split, seed=options.seed, whole=whole)
            assert isinstance(source, Chosen)
            found = take_prints(source, f"{role} {part.text}", check)
            lines += [*_told(source, found), *_hints(source, compared=not copied)]
            broken |= dict.fromkeys([f"{where}: {message}" for where, _, message in source.faults])
            broken |= dict.fromkeys(found.unread)
            prints["training" if role == "training" else "evaluation"].append(found)
    leaked = set()
    for trained in prints["training"]:
        for evaluated in prints["evaluation"]:
            report = find_leaks(trained, evaluated)
            leaked |= {(trained.name, leak.trained) for leak in report.leaks}
            if report.leaks or report.same_ids:
                lines += report.text().splitlines()
    pairs = len(prints["training"]) * len(prints["evaluation"])
    lines.append(f"compared the pictures of {pairs} pairs of sources: {len(leaked)} of the training data leak")
    return DataCheck(tuple(lines), len(broken), len(leaked))


def _told(source: Chosen, found: Prints) -> list[str]:
    """What there is of a source, what was left out of it and why, and its broken records by name."""
    split = len(source) - len(found.unread)
    lines = [f"{found.name}: {source.total} records, of them {split} usable in this split"]
    counts = Counter([*(reason for _, reason, _ in source.faults), *found.reasons])
    for what, reasons in (("broken", counts), ("left out by filter", source.left_out), ("refused", source.refused)):
        lines += [f"  {what}, {reason}: {count}" for reason, count in sorted(reasons.items())]
    lines += [f"  {where}: {message}" for where, _, message in source.faults]
    return lines + [f"  {message}" for message in found.unread]


def _hints(source: Chosen, compared: bool) -> list[str]:
    """What is no fault and yet may not be meant: records without a picture, and answers that are hardly ever matched.

    Args:
      source: the records.
      compared: responses are compared with their answers.
    """
    entries = [source.entry(index) for index in range(len(source))]
    bare = sum(not entry.pictures for entry in entries)
    long = [entry for entry in entries if compared and len(plain(entry.answer)) > _LONG_ANSWER]
    lines = [f"  without a picture: {bare}"] if bare else []
    if long:
        lines.append(f"  with an answer of over {_LONG_ANSWER} characters, matched word for word only: {len(long)}")
    return lines + [f"  {entry.where}: {entry.answer[:60]!r}..." for entry in long[:5]]


def _check(options: RunOptions, with_response: bool) -> Callable[[Record], object]:
    """Makes an example of a record as the run would, and throws it away."""
    name = options.init_from or ""
    if name == "random:tiny":
        tokenizer, processor = train_tiny_tokenizer(tokenizer_texts()), tiny_processor()
    else:
        folder = EMBEDDED if name == "tiny" else Path(name.removeprefix("random:"))
        folder = folder.parent if folder.is_file() else folder
        tokenizer = Tokenizer.from_folder(folder).with_tags()
        processor = ProcessorSettings.from_json(folder / "preprocessor_config.json")
    make = functools.partial(
        to_sft_example if with_response else to_prompt_example,
        tok=tokenizer,
        settings=processor_of(options, processor),
        layout=layout_of(model_config(options)),
        system=options.data.system,
    )
    return lambda record: fitting(make(record), options.data)
