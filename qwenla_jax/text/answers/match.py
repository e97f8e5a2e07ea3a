r"""Reading the answer out of a response, and comparing it with the right one.

Paper, section BRPO: the content of the conclusion is matched with the right answer by regular expression; which one is
not said. `exact_matches` is that in its barest form. Paper silent, our choices in `matches`: the whole conclusion has
to be the answer in one of its usual writings. Nothing is searched for inside longer text, because "A or B" contains
"A" and a policy finds that out. A right answer that is put in an unusual way therefore counts as wrong.

Usual writings:
- wrappings, lead-ins, boxes: `normalize`;
- options: "B", "b", "(B)", "B.", "B)", "Option B", and "B. red", "(B) red" where no other option is named; where the
  options are known also the exact text of option B, if no other option is the same;
- numbers by value, with a unit: `units`; "x = 3" for "3";
- tuples, intervals, sets and lists: `lists`;
- yes and no: "Yes.", "Yes, there is." where the explanation does not take it back.

Expressions that are equal by algebra: `algebra`.
"""

import re
from collections.abc import Callable, Sequence

from qwenla_jax.text.answers.lists import same_parts
from qwenla_jax.text.answers.normalize import key, plain, without_name
from qwenla_jax.text.answers.units import same_quantity

_CONCLUSION_TAG = re.compile(r"<(/?)CONCLUSION>")
_OPTION = re.compile(r"[A-Z]", re.IGNORECASE)
_OPTION_WITH_TEXT = re.compile(r"\(?([A-Z])[).:](?: (.*))?", re.IGNORECASE)
# Another option in the text after the letter: a lone capital (not the article "A"), or a letter with a delimiter.
_OTHER_OPTION = re.compile(r"(?<![\w'])(?:(?!A (?!or\b|and\b)[a-z])[A-Z]|[a-z](?=[).]))(?![\w'])|\b(?:or|and/or)\b")
_YES_NO = re.compile(r"(yes|no)[,.;:] (.+)")
_TAKEN_BACK = {
    "yes": re.compile(r"\b(?:no|not|never|or|maybe|perhaps|cannot)\b|n't\b"),
    "no": re.compile(r"\b(?:yes|or|maybe|perhaps)\b"),
}


def extract_conclusion(text: str) -> str | None:
    """The content of the last complete conclusion without whitespace at the ends, None without one; linear in time.

    Other tags in it are kept. The rest of the response's format does not matter.
    """
    tags = list(_CONCLUSION_TAG.finditer(text))
    for first, second in zip(reversed(tags[:-1]), reversed(tags[1:]), strict=True):
        if not first[1] and second[1]:
            return text[first.end() : second.start()].strip()
    return None


def exact_matches(conclusion: str, answer: str) -> bool:
    r"""Whether a conclusion is the right answer letter by letter, whitespace at the ends aside.

    The paper's form: what `<CONCLUSION>\s*(.*?)\s*</CONCLUSION>` finds is compared as it stands. Case, "B." and "3.0"
    count. A blank conclusion or a blank answer never matches. Never raises.
    """
    return conclusion.strip() == answer.strip() != ""


def matches(conclusion: str, answer: str, options: Sequence[str] = ()) -> bool:
    """Whether a conclusion is the right answer in one of the usual writings that this module lists. Never raises.

    Args:
      conclusion: the content of the conclusion; a blank one never matches.
      answer: the right answer: an option's letter, a number, yes or no, a list of them, or a short text.
      options: the texts of options A, B, C, ... where the question has them. Then the answer may also be the text of
        one of them. A conclusion that is a letter of an option is that letter, whatever the texts are.
    """
    got, want = plain(conclusion), plain(answer)
    if not got or not want:
        return False
    if options and (index := right_option(want, options)) is not None:
        return _is_option(got, index, options)
    if _OPTION.fullmatch(want):
        return got.casefold() == want.casefold() or _option(got) == want.upper()
    if want.casefold() in ("yes", "no"):
        return want.casefold() in (got.casefold(), _yes_no(got.casefold()))
    return same(got, want)


def same(got: str, want: str, also: Callable[[str, str], bool] = lambda got, want: False) -> bool:
    """Whether two texts are the same text, number or list.

    Args:
      got, want: texts from `normalize.plain`, the second of them the right answer.
      also: asked about texts, and about parts of lists, that are not the same.
    """
    if key(got) == key(want):
        return True
    (first_name, got), (second_name, want) = without_name(got), without_name(want)
    if first_name and second_name and first_name != second_name:
        return False

    def part(got: str, want: str) -> bool:
        return key(got) == key(want) or same_quantity(got, want) or also(got, want)

    return part(got, want) or same_parts(got, want, part)


def right_option(want: str, options: Sequence[str]) -> int | None:
    """Which option the right answer, a text from `normalize.plain`, means by letter or text; None where none."""
    index = _index(want if _OPTION.fullmatch(want) else _option(want), options)
    if index is not None:
        return index
    result = [index for index in range(len(options)) if same(want, option_text(index, options))]
    return result[0] if len(result) == 1 else None


def option_text(index: int, options: Sequence[str]) -> str:
    """The plain text of an option without a label of its own: of ("A. red", "B. blue") number 1 is "blue"."""
    text = plain(options[index])
    label = _OPTION_WITH_TEXT.fullmatch(text)
    return label[2] if label and label[2] and _index(label[1], options) == index else text


def is_letter(text: str, options: Sequence[str]) -> bool:
    """Whether a plain text is no more than the letter of one of the options."""
    return _index(text, options) is not None


def _is_option(got: str, index: int, options: Sequence[str]) -> bool:
    """Whether a text names the option of this index and no other."""
    if (named := _index(got, options)) is not None:
        return named == index
    label = _OPTION_WITH_TEXT.fullmatch(got)
    if label and (named := _index(label[1], options)) is not None:
        meant = _with_text(plain(label[2] or ""), options)
        return named == index and (meant == [index] or not meant and _option(got) is not None)
    return _with_text(got, options) == [index]


def _with_text(got: str, options: Sequence[str]) -> list[int]:
    """The options whose text a text is."""
    texts = [option_text(index, options) for index in range(len(options))]
    for alike in (str.__eq__, lambda text, got: key(text) == key(got), lambda text, got: matches(got, text)):
        # The strictest first: "XAXa" and "XAXA" are two genotypes, and 50 is one of "50" and "50%".
        if result := [index for index, text in enumerate(texts) if got and text and alike(text, got)]:
            return result
    return []


def _index(letter: str | None, options: Sequence[str]) -> int | None:
    """The index of an option's letter; None where it is none of theirs."""
    if letter is None or not _OPTION.fullmatch(letter) or ord(letter.upper()) - ord("A") >= len(options):
        return None
    return ord(letter.upper()) - ord("A")


def _option(text: str) -> str | None:
    """The option's letter, upper case, where the text names exactly one; else None."""
    match = _OPTION_WITH_TEXT.fullmatch(text)
    if match is None or _OTHER_OPTION.search(match[2] or ""):
        return None
    return match[1].upper()


def _yes_no(text: str) -> str | None:
    """ "yes" or "no" where the text reports it with an explanation that does not take it back; else None."""
    match = _YES_NO.fullmatch(text)
    return None if match is None or _TAKEN_BACK[match[1]].search(match[2]) else match[1]
