r"""MathVision: open and five-way mathematics, read as its own scorer does.

Paper, evaluation: accuracy. Values of LaTeX expressions are compared by latex2sympy2_extended where the official scorer
has its predecessor latex2sympy2, which reads fewer expressions, such as degrees, percent and mixed fractions: a right
answer is more often found to be right here. As there, text behind the first expression does not matter.
`Settings.algebra` switches values off.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from qwenla_jax.evals.benchmarks.latex_values import MAX_LENGTH, same_values
from qwenla_jax.evals.lettered import check_letter, options_of
from qwenla_jax.evals.result import Figure, Result
from qwenla_jax.evals.table_files import Row
from qwenla_jax.evals.task import Answer, Item, Settings

_LEADS = tuple(
    f"{article}{rest}"
    for rest in ("e final answer is", "e answer is", "e correct answer is", "e answer should be")
    for article in ("th", "Th")
)
# Taken out one after the other: what is left may be another one's beginning.
_DROPPED = (r"\text", r"\mbox", r"\left", r"\right", r"^{\circ}", r"^\circ", "{m}^3", "m^3", "{units}", "units")
_DROPPED += ("{km}", "km")
_UNWRAPPED = tuple(f"({letter})" for letter in "abcde") + tuple(f"{{{letter}}}" for letter in "abcde")
_PLAIN = re.compile(r"[a-z]?")


def mathvision_answer(text: str) -> str:
    """The answer in a response, in lower case and without blanks or LaTeX around it."""
    text = text.strip()
    for letter in "ABCDE":
        ends = (f" {letter}.", f" ({letter}).")
        if text.endswith(ends) or text.startswith((f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")):
            text = letter
    after = text.rpartition("is ")[2].rstrip(".")
    if _is_number(after):
        text = after
    boxes = text.count("oxed{")
    if boxes > 1:
        text = r"\boxed{" + text.rpartition("oxed{")[2]
    elif not boxes:
        for lead in _LEADS:
            if lead in text:
                text = text.rpartition(lead)[2].strip().partition("\n")[0].partition(". ")[0]
            else:
                text = text.strip()
    result = _cleaned(_unboxed(text.lower().replace("{}", "")))
    for wrapped in _UNWRAPPED:
        result = result.replace(wrapped, wrapped[1])
    return result.rstrip(".").lstrip(":").strip()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _unboxed(text: str) -> str:
    start, end = text.find("oxed{"), text.rfind("}")
    if 0 <= start and start + 5 <= end:
        text = text[start + 5 : end]
    close, opening = text.find("}"), text.find("{")
    if close >= 0 and (opening < 0 or close < opening):
        text = text[:close]
    return text.rpartition("=")[2].rpartition(r"\approx")[2]


def _cleaned(text: str) -> str:
    text = text.replace(" ", "").replace(r"\,", "").replace("∞", r"\infty").replace(r"+\infty", r"\infty")
    text = text.replace("\\\\", "\\").replace("\n", "")
    for part in _DROPPED[:2]:
        text = text.replace(part, "")
    text = text.replace("bmatrix", "pmatrix")
    for part in _DROPPED[2:]:
        text = text.replace(part, "")
    return _stripped(text)


def _stripped(text: str) -> str:
    """LaTeX's ornaments off, roots and fractions in braces; text without blanks."""
    text = text.replace(r"\!", "").replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    for part in (r"\left", r"\right", r"^{\circ}", r"^\circ", r"\$", "$", r"\%"):
        text = text.replace(part, "")
    text = text.replace("{.", "{0.")
    text = f"0{text}" if text.startswith(".") else text
    if "sqrt" in text:
        text = _braced_fractions(re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text))
    if text == "0.5":
        return r"\frac{1}{2}"
    whole = re.fullmatch(r"(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)", text)
    return rf"\frac{{{whole[1]}}}{{{whole[2]}}}" if whole else text


def _braced_fractions(text: str) -> str:
    r"""`\frac12` as `\frac{1}{2}`; unchanged where one of them has not two characters after it."""
    first, *rest = text.split(r"\frac")
    done = [first]
    for part in rest:
        if part.startswith("{"):
            done.append(part)
        elif len(part) < 2:
            return text
        else:
            done.append(f"{{{part[0]}}}{part[1:]}" if part[1] == "{" else f"{{{part[0]}}}{{{part[1]}}}{part[2:]}")
    return r"\frac".join(done)


def mathvision_ids(row: Row) -> tuple[str, ...]:
    """The row's id."""
    return (row.need("id", "index"),)


def mathvision_item(row: Row, name: str) -> Item:
    """A question of MathVision; its kind is the subject.

    Raises:
      ValueError: the row lacks something, or its answer is no letter and it has options.
    """
    answer = row.need("answer")
    options = options_of(row, answer.strip())
    if options:
        answer = answer.strip()
        check_letter(row, answer, options)
    question = "\n".join([row.text("question") or "", *(f"({key}) {text}" for key, text in options.items())])
    details = {"level": row.text("level") or ""}
    return Item(name, question.strip(), answer, options, row.text("subject", "category") or "all", details, row.images)


def right_texts(item: Item) -> tuple[str, ...]:
    """What an answer may be: the letter and its option's text, or the free answer."""
    answer = item.answer if isinstance(item.answer, str) else item.answer[0]
    return (answer, item.options[answer]) if answer in item.options else (answer,)


def same_text(got: str, want: str) -> bool | None:
    """Whether two answers are the same text, False where they cannot have one value; None where that has to be seen."""
    got, want = got.lower(), want.lower()
    if not got.strip() or not want.strip():
        return False
    if got.strip() == want.strip():
        return True
    # A letter has no value, and what is too long is no answer.
    if any(_PLAIN.fullmatch(text.strip()) or len(text) > MAX_LENGTH for text in (got, want)):
        return False
    try:
        return round(float(got), 2) == round(float(want), 2)
    except (ValueError, OverflowError):
        return None


def score_mathvision(answers: Sequence[Answer], settings: Settings) -> Result:
    """Accuracy in percent: of all, by subject and by level.

    Raises:
      ValueError: values of LaTeX are to be compared and the library is not installed.
    """
    said = [mathvision_answer(one.text) if one.given else "" for one in answers]
    sure = [[same_text(got, want) for want in right_texts(one.item)] for got, one in zip(said, answers, strict=True)]
    right = [any(result) for result in sure]
    open_pairs = [
        (n, (got.lower(), want.lower()))
        for n, (got, one) in enumerate(zip(said, answers, strict=True))
        if not right[n]
        for want, result in zip(right_texts(one.item), sure[n], strict=True)
        if result is None
    ]
    failed = by_value = 0
    if settings.algebra:
        unique = list(dict.fromkeys(pair for _, pair in open_pairs))
        verdicts = dict(zip(unique, same_values(unique), strict=True))
        failed = sum(verdict is None for verdict in verdicts.values())
        for n, pair in open_pairs:
            if verdicts[pair] and not right[n]:
                right[n], by_value = True, by_value + 1
    groups: dict[str, list[bool]] = defaultdict(list)
    for one, good in zip(answers, right, strict=True):
        groups[f"accuracy/{one.item.kind}"].append(good)
        if one.item.details["level"]:
            groups[f"accuracy/level {one.item.details['level']}"].append(good)
    figures = {"accuracy": Figure.of_counts(sum(right), len(right))}
    figures |= {name: Figure.of_counts(sum(groups[name]), len(groups[name])) for name in sorted(groups)}
    counts = {"right": sum(right), "questions": len(right)}
    counts |= {"right_by_value_of_latex": by_value, "values_given_up": failed} if settings.algebra else {}
    notes = {"values": "by latex2sympy2_extended" if settings.algebra else "of plain numbers alone"}
    rows = [
        {"id": one.item.id, "read": got, "answer": one.item.answer, "right": good}
        for one, got, good in zip(answers, said, right, strict=True)
    ]
    return Result("mathvision", figures, counts, notes, tuple(rows))
