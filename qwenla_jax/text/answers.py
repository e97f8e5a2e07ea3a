r"""Reading the answer out of a response, and comparing it with the right one.

Paper, section BRPO: the content of the conclusion is matched with the right answer by regular expression; which one is
not said. Paper silent, our choices: the whole conclusion has to be the answer in one of its usual writings. Nothing is
searched for inside longer text, because "A or B" contains "A" and a policy finds that out. A right answer that is put
in an unusual way therefore counts as wrong.

Usual writings:
- case, runs of whitespace, the full stop at the end, quotes, markdown emphasis, `$...$`, `\(...\)`, `\text{...}`;
- a lead-in such as "Answer:" or "The final answer is";
- `\boxed{...}`, of which the last one counts and replaces everything around it;
- options: "B", "b", "(B)", "B.", "B)", "Option B", and "B. red", "(B) red" where no other option is named;
- numbers by value: "3", "3.0", "three", "1,000", "1/2", `\frac{1}{2}`; a unit of %, degrees or dollars may be left out
  on one side, but two different units are never equal;
- yes and no: "Yes.", "Yes, there is." where the explanation does not take it back.
"""

import re
from fractions import Fraction

_CONCLUSION_TAG = re.compile(r"<(/?)CONCLUSION>")
_BOX = re.compile(r"\\f?boxed\s*\{")
_BRACE = re.compile(r"[{}]")
_EMPHASIS = re.compile(r"(?<!\w)\*\*([^*]+)\*\*(?!\w)")
_MATH_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_WRAPPED = (
    re.compile(r"\$([^$]+)\$"),
    re.compile(r"\\\((.+)\\\)"),
    re.compile(r"\\\[(.+)\\\]"),
    re.compile(r'"([^"]+)"'),
    re.compile(r"'([^']+)'"),
    re.compile(r"“([^“”]+)”"),
    re.compile(r"`([^`]+)`"),
    re.compile(r"\*([^*]+)\*"),
    # Brackets only around one plain token: (1, 2) and [1, 2] are different things.
    re.compile(r"[({]([\w.+-]+)[)}]"),
)
_LEAD_IN = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?"
    r"(?:(?:(?:the|my) )?(?:(?:final|correct|right) )?(?:answer|result)(?: is(?: ?:)?| ?[:=]|(?= \S+$))"
    r"|(?:the )?(?:(?:correct|right) )?(?:option|choice)(?: is(?: ?:)?| ?[:=]|(?= ))) ?"
    r"(?:(?:the )?(?:option|choice) (?=\S))?",
    re.IGNORECASE,
)
_EXCLAMATION = re.compile(r"(?<=[^\W\d]{2})!+$")  # after a word; after a digit or a lone letter it is a factorial
_ROUNDS = 8  # wrappings inside wrappings; a bound keeps the time linear on `((((...`

_OPTION = re.compile(r"[A-Z]", re.IGNORECASE)
_OPTION_WITH_TEXT = re.compile(r"\(?([A-Z])[).:](?: (.*))?", re.IGNORECASE)
# Another option in the text after the letter: a lone capital (not the article "A"), or a letter with a delimiter.
_OTHER_OPTION = re.compile(r"(?<![\w'])(?:(?!A (?!or\b|and\b)[a-z])[A-Z]|[a-z](?=[).]))(?![\w'])|\b(?:or|and/or)\b")
_YES_NO = re.compile(r"(yes|no)[,.;:] (.+)")
_TAKEN_BACK = {
    "yes": re.compile(r"\b(?:no|not|never|or|maybe|perhaps|cannot)\b|n't\b"),
    "no": re.compile(r"\b(?:yes|or|maybe|perhaps)\b"),
}

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,9}|[0-9]{1,40})"
_NUMBER = re.compile(rf"([-+]?) ?({_DIGITS}(?:\.[0-9]{{0,40}})?|\.[0-9]{{1,40}})(?:e([-+]?[0-9]{{1,2}}))?")
_RATIO = re.compile(r"([-+]?) ?([0-9]{1,40}) ?/ ?([0-9]{1,40})")
_LATEX_RATIO = re.compile(r"([-+]?) ?\\[dt]?frac ?\{ ?([0-9]{1,40}) ?\} ?\{ ?([0-9]{1,40}) ?\}")
_UNITS = (
    ("percent", re.compile(r"(.+?) ?(?:\\?%|percent)")),
    ("degree", re.compile(r"(.+?) ?(?:°|\^ ?\{? ?\\circ ?\}?|degrees?)")),
    ("dollar", re.compile(r"\\?\$ ?(.+)|(.+?) dollars?")),
)
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
_MAX_VALUE_LENGTH = 256  # longer text is no number


def extract_conclusion(text: str) -> str | None:
    """The content of the last complete conclusion, in time linear in the text.

    Args:
      text: a response; any string.

    Returns:
      What stands between the last `<CONCLUSION>` that is closed and its closing tag, without whitespace at the ends, or
      None where there is none. Other tags in it are kept. The rest of the format does not matter.
    """
    tags = list(_CONCLUSION_TAG.finditer(text))
    for first, second in zip(reversed(tags[:-1]), reversed(tags[1:]), strict=True):
        if not first[1] and second[1]:
            return text[first.end() : second.start()].strip()
    return None


def matches(conclusion: str, answer: str) -> bool:
    """Whether a conclusion is the right answer in one of the usual writings that this module lists.

    Args:
      conclusion: the content of the conclusion; any string.
      answer: the right answer: an option's letter, a number, yes or no, or a short text.

    Returns:
      True where they are the same. A blank conclusion or a blank answer never matches. Never raises.
    """
    got, want = _plain(conclusion), _plain(answer)
    if not got or not want:
        return False
    if got.casefold() == want.casefold():
        return True
    if _OPTION.fullmatch(want):
        return _option(got) == want.upper()
    if want.casefold() in ("yes", "no"):
        return _yes_no(got.casefold()) == want.casefold()
    return _same_value(got.casefold(), want.casefold())


def _plain(text: str) -> str:
    """The text without the wrappings that do not change what it says; case is kept."""
    text = _last_box(text)
    text = text.replace("\N{MINUS SIGN}", "-").replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    text = _MATH_TEXT.sub(r"\1", _EMPHASIS.sub(r"\1", text))
    text = " ".join(text.split())
    for _ in range(_ROUNDS):
        before = text
        text = _strip_ends(text)
        for pattern in _WRAPPED:
            if match := pattern.fullmatch(text):
                text = match[1].strip()
        if (lead := _LEAD_IN.match(text)) and lead.end() and text[lead.end() :].strip():
            text = text[lead.end() :].strip()
        if text == before:
            break
    return text


def _strip_ends(text: str) -> str:
    """Drops punctuation around the text, but not what a number or a factorial needs: ".5", "5!"."""
    return _EXCLAMATION.sub("", text.rstrip(".,;:? ")).lstrip(",;:!? ")


def _last_box(text: str) -> str:
    """The content of the last `\\boxed{...}` with balanced braces, or the text itself."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return text
    start, depth = boxes[-1].end(), 1
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : brace.start()]
    return text


def _option(text: str) -> str | None:
    """The option's letter, upper case, where the text names exactly one; else None."""
    match = _OPTION_WITH_TEXT.fullmatch(text)
    if match is None or _OTHER_OPTION.search(match[2] or ""):
        return None
    return match[1].upper()


def _yes_no(text: str) -> str | None:
    """ "yes" or "no" where the text says so with an explanation that does not take it back; else None."""
    match = _YES_NO.fullmatch(text)
    return None if match is None or _TAKEN_BACK[match[1]].search(match[2]) else match[1]


def _same_value(got: str, want: str) -> bool:
    """Whether both are numbers of the same value, with no two different units."""
    first, second = _value(got), _value(want)
    if first is None or second is None or first[0] != second[0]:
        return False
    return first[1] == second[1] or "" in (first[1], second[1])


def _value(text: str) -> tuple[Fraction, str] | None:
    """The number that the text is, with its unit ("" where it has none); None where it is no number."""
    if len(text) > _MAX_VALUE_LENGTH:
        return None
    unit = ""
    for name, pattern in _UNITS:
        if match := pattern.fullmatch(text):
            unit, text = name, next(group for group in match.groups() if group is not None)
            break
    if text in _WORDS:
        return Fraction(_WORDS.index(text)), unit
    if match := _NUMBER.fullmatch(text):
        value = Fraction(match[2].replace(",", "")) * Fraction(10) ** int(match[3] or 0)
    elif (match := _RATIO.fullmatch(text) or _LATEX_RATIO.fullmatch(text)) and int(match[3]):
        value = Fraction(int(match[2]), int(match[3]))
    else:
        return None
    return (-value if match[1] == "-" else value), unit
