r"""Answers without the wrappings that do not change what they say.

Paper silent on all of it. What is taken off: case is kept; runs of whitespace and LaTeX's spaces, `\left`, `\right`,
`\displaystyle`; the punctuation at the ends; quotes; markdown emphasis; `$...$`, `\(...\)`, `\[...\]`; `\text{...}`
and its kin; a lead-in such as "The final answer is", a heading's or a check mark before it; everything around the last
`\boxed{...}`; full-width forms of ASCII; marks that have no width. Marks that reorder what is read (U+202A to U+202E,
U+2066 to U+2069) stay, so that an answer with them is like no other.
"""

import re

_BOX = re.compile(r"\\f?boxed\s*\{")
_BRACE = re.compile(r"[{}]")
# What stands between two boxes that are offered side by side.
_SIDE_BY_SIDE = re.compile(r"[\s$,;/&|().\\\[\]]*(?:(?:and/or|or|and)?[\s$,;/&|().\\\[\]]*)")
# Formulas inside text, told from two amounts of money by what they begin with or hold.
_INLINE = re.compile(r"(?<!\\)\$([A-Za-z][^$]*|[^$\\]*\\[^$]*)\$")
_EMPHASIS = re.compile(r"(?<!\w)\*\*([^*]+)\*\*(?!\w)")
_MATH_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
_AFTER_VALUE = re.compile(r"(?<=[0-9}])(?=\\(?:text|textrm|mathrm|mbox)\s*\{)")
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|\\[,!])(?=[0-9]{3}(?![0-9]))")
_NO_SPACE = re.compile(r"\\!|\\(?:left|right|displaystyle|limits)(?![A-Za-z])")
_SPACE = re.compile(r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~")
_WRAPPED = (
    re.compile(r"\$\$([^$]+)\$\$"),
    re.compile(r"\$([^$]+)\$"),
    re.compile(r"\\\((.+)\\\)"),
    re.compile(r"\\\[(.+)\\\]"),
    re.compile(r'"([^"]+)"'),
    re.compile(r"'([^']+)'"),
    re.compile(r"“([^“”]+)”"),
    re.compile(r"`([^`]+)`"),
    re.compile(r"\*([^*]+)\*"),
    # Brackets only around what holds no list: (1, 2) and [1, 2] are different things.
    re.compile(r"[({]([\w.+ -]+)[)}]"),
)
_LEAD_IN = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?"
    r"(?:(?:(?:the|my) )?(?:(?:final|correct|right) )?(?:answer|result)(?: is(?: ?:)?| ?[:=]|(?= \S+$))"
    r"|(?:the )?(?:(?:correct|right) )?(?:option|choice)(?: is(?: ?:)?| ?[:=]|(?= ))) ?"
    r"(?:(?:the )?(?:option|choice) (?=\S))?",
    re.IGNORECASE,
)
# Marks that say no more than "here it is"; not a cross, nor an arrow that may be a limit's.
_MARKS = "✅✔☑✓👉🎯📌⭐💡🔑🏁\ufe0f"
_HEADING = re.compile(r"#{1,6} +(?=\S)")
_EXCLAMATION = re.compile(r"(?<=[^\W\d]{2})!+$")  # after a word; after a digit or a lone letter it is a factorial
_ROUNDS = 8  # wrappings inside wrappings; a bound keeps the time linear on `((((...`
_LOOSE_SPACE = re.compile(r"(?<![\w.,]) | (?![\w.,])")
# Left sides that only name the value, never a part or a multiple of it: x, AB, x_1, \angle ABC, (x, y), sin A, Area.
_POINTS = r"\{?(?:[A-Za-z]{1,3}|[A-Za-z]')\}?"
_INDEX = r"(?:_(?:\w|\{(?:\\triangle ?)?[\w ]{1,16}\}))"
_ANGLE = rf"m? ?(?:\\(?:angle|measuredangle|sphericalangle)|∠) ?(?:{_POINTS}|\{{?[1-9][0-9]?\}}?)"
_ARC = (
    r"m? ?(?:\\(?:widehat|wideparen|overparen|overarc|overset ?\{ ?\\frown ?\}) ?\{[A-Z]{2,3}\}|⌒ ?[A-Z]{2,3}"
    r"|arc [A-Z]{2,3})"
)
_SEGMENT = rf"m? ?\\(?:overline|overleftrightarrow|overrightarrow) ?{_POINTS}"
_GREEK = r"\\(?:theta|alpha|beta|gamma|phi|lambda|mu|omega|rho)|[θαβγφλμωρ]"
_SINE = rf"\\?(?:sin|cos|tan|cot|sec|csc) ?(?:{_ANGLE}|[A-Za-z]|{_GREEK}|\([A-Za-z]\)|\((?:{_GREEK})\))"
_NOUN = (
    r"(?:the )?(?:(?:total|surface|lateral|shaded|side|arc|final) )?(?:area|perimeter|volume|circumference|length|width"
    r"|height|depth|radius|diameter|hypotenuse|base|side|slope|distance|displacement|speed|velocity|acceleration|force"
    r"|mass|time|angle|measure|age|cost|price|profit|total|sum|difference|product|quotient|remainder|mean|average|median"
    r"|mode|range|probability|value|number|count)"
)
_NAME = re.compile(
    rf"(m? ?\\triangle {_POINTS}|(?:{_ANGLE}|{_ARC}|{_SEGMENT}|{_POINTS}){_INDEX}?|{_GREEK}|{_SINE}"
    rf"|(?i:{_NOUN}){_INDEX}?|\([a-z](?:, ?[a-z]){{1,2}}\)) ?= ?([^=<>]+)"
)
# Two writings of one name. The measure of an angle, or of an arc or a segment, is what an equation with it speaks of.
_SAME_NAME = (
    (re.compile(r"^m ?(?=\\|∠|⌒|arc )"), ""),
    (re.compile(r"\\(?:measuredangle|sphericalangle)|∠"), r"\\angle"),
    (re.compile(r"\\(?:wideparen|overparen|overarc|overset ?\{ ?\\frown ?\})|⌒|^arc "), r"\\widehat"),
    (re.compile(r"\\overline ?(?=\{?[A-Z]{2}\b)"), ""),
    (re.compile(r"^\\?(?=(?:sin|cos|tan|cot|sec|csc))"), ""),
    (re.compile(r"^the ", re.IGNORECASE), ""),
    (re.compile(r"[{}() ]"), ""),
)
_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}
_CHARACTERS = _WIDTH | {
    ord("\N{MINUS SIGN}"): "-",
    ord("\N{RIGHT SINGLE QUOTATION MARK}"): "'",
    ord("\N{MASCULINE ORDINAL INDICATOR}"): "°",
    **dict.fromkeys((0x00AD, 0x200B, 0x200E, 0x200F, 0x2060, 0xFEFF)),
}


def plain(text: str) -> str:
    """The text without the wrappings that this module lists; case is kept. Never raises; time linear in the text."""
    text = last_box(text.translate(_CHARACTERS).replace("\x0crac", r"\frac"))  # "\frac" read as JSON's form feed
    text = _THOUSANDS.sub("", _INLINE.sub(r"\1", text))
    text = _SPACE.sub(" ", _NO_SPACE.sub("", _AFTER_VALUE.sub(" ", text)))
    text = _MATH_TEXT.sub(r"\1", _EMPHASIS.sub(r"\1", text))
    text = " ".join(text.split())
    for _ in range(_ROUNDS):
        before = text
        text = _strip_ends(text)
        for pattern in _WRAPPED:
            if match := pattern.fullmatch(text):
                text = match[1].strip()
        if (bare := text.strip(f"{_MARKS} ")) and bare != text:
            text = bare
        if heading := _HEADING.match(text):
            text = text[heading.end() :]
        if (lead := _LEAD_IN.match(text)) and lead.end() and text[lead.end() :].strip():
            text = text[lead.end() :].strip()
        if text == before:
            break
    return text


def key(text: str) -> str:
    """What two texts from `plain` share where they are the same: no loose spaces, and no case except in LaTeX."""
    text = _LOOSE_SPACE.sub("", text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac"))
    return text if "\\" in text else text.casefold()


def without_name(text: str) -> tuple[str, str]:
    """The name and value of a text from `plain`: "x = 3" is ("x", "3"), "3" is ("", "3"), "1 = 3" ("", "1 = 3")."""
    match = _NAME.fullmatch(text)
    if match is None:
        return "", text
    name = match[1]
    for pattern, writing in _SAME_NAME:
        name = pattern.sub(writing, name)
    return key(name), match[2]


def last_box(text: str) -> str:
    r"""The content of the last `\boxed{...}` with balanced braces, or the text itself.

    The text itself too where the last two boxes are offered side by side, as in `\boxed{3} or \boxed{4}`.
    """
    boxes = [match.end() for match in _BOX.finditer(text)]
    if not boxes or (end := _closing(text, boxes[-1])) is None:
        return text
    if len(boxes) > 1 and (before := _closing(text, boxes[-2])) is not None and before < boxes[-1]:
        between = text[before + 1 : boxes[-1]]
        if _SIDE_BY_SIDE.fullmatch(_BOX.sub("", between)):
            return text
    return text[boxes[-1] : end]


def _closing(text: str, start: int) -> int | None:
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    return None


def _strip_ends(text: str) -> str:
    """Drops punctuation around the text, but not what a number or a factorial needs: ".5", "5!"."""
    return _EXCLAMATION.sub("", text.rstrip(".,;:? ")).lstrip(",;:!? ")
