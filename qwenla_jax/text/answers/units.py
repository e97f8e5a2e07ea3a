r"""Numbers with units.

Paper silent: two numbers are the same where their exact values are, with no tolerance (0.33 is not 1/3). A unit may be
left out on one side; two different units are never the same and nothing is converted, so 1 m is not 100 cm, and 50%
equals 50 (the sign left out) but not 0.5. Texts are those of `normalize.plain`.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,9}|[0-9]{1,40})"
_DECIMAL = rf"{_DIGITS}(?:\.[0-9]{{0,40}})?|\.[0-9]{{1,40}}"
_NUMBER = re.compile(rf"([-+]?) ?({_DECIMAL})(?:[eE]([-+]?[0-9]{{1,2}}))?")
_POWER = re.compile(
    rf"([-+]?) ?(?:({_DECIMAL}) ?(?:\\times|\\cdot|×|·|\*|x) ?)?"
    r"10 ?\^ ?(?:\{ ?([-+]?[0-9]{1,2}) ?\}|([-+]?[0-9]{1,2}))"
)
_RATIO = re.compile(r"([-+]?) ?(?:([0-9]{1,40}) )?([-+]?[0-9]{1,40}) ?/ ?([0-9]{1,40})")
_PART = r"(?:\{{ ?({0}[0-9]{{1,40}}) ?\}}|([0-9]))"
_LATEX_RATIO = re.compile(rf"([-+]?) ?([0-9]{{1,40}})? ?\\[dt]?frac ?{_PART.format('[-+]?')} ?{_PART.format('')}")
_WORDS: Sequence[str] = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
_MAX_LENGTH = 256  # longer text is no number

# Name of a unit: its other writings. A plural "s" and, for words, capitals are understood.
_WRITINGS = {
    "%": "percent percentage pct", "°": "degree deg circ", "$": "dollar usd", "€": "euro", "£": "pound",
    "¢": "cent", "unit": "",
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "dm": "decimeter decimetre", "m": "meter metre",
    "km": "kilometer kilometre", "nm": "nanometer nanometre", "in": "inch inches", "ft": "foot feet", "yd": "yard",
    "mi": "mile", "mg": "milligram", "g": "gram", "kg": "kilogram", "lb": "lbs", "oz": "ounce", "ton": "tonne",
    "ms": "millisecond", "s": "sec second", "min": "minute", "h": "hr hour", "day": "", "week": "", "month": "",
    "year": "yr", "mL": "ml milliliter millilitre", "L": "l liter litre", "mph": "", "N": "newton", "J": "joule",
    "kJ": "kilojoule", "W": "watt", "kW": "kilowatt", "V": "volt", "A": "amp ampere", "Ω": "ohm Omega", "Hz": "hertz",
    "Pa": "pascal", "kPa": "kilopascal", "K": "kelvin", "C": "coulomb", "mol": "mole", "M": "molar", "eV": "",
    "rad": "radian",
}  # fmt: skip
_UNITS = {writing: name for name, other in _WRITINGS.items() for writing in (name, *other.split())}
_SIGN = re.compile(r"\\?([$€£]) ?([-+\d.\\(].*)")  # before the value
_UNIT_START = re.compile(
    r"(?:(?<![\\A-Za-z])|(?:(?<=[0-9}])|(?<=\\pi))\{ ?)(?=[A-Za-z°%¢Ω])|\\(?=%|Omega|circ)|\^ ?\{? ?\\circ|\\?\$$"
)
_UNIT_WORD = re.compile(r"([A-Za-z°%¢$Ω]+)\^?(-?[1-9])?")
_SQUARE = re.compile(r"(square|sq|cubic|cu)\.? ?(?=[A-Za-z])")
_MAX_UNIT = 40


def value(text: str) -> Fraction | None:
    r"""The number that a text is; None where it is none.

    Digits are ASCII's. Numbers are "3", "3.0", ".5", "1,000", "1e3", `2 \times 10^{3}`, "three", "1/2", "1 1/2",
    `\frac{1}{2}`, `\frac12`, `1\frac{1}{2}`; exponents of ten have at most two digits.
    """
    if len(text) > _MAX_LENGTH:
        return None
    if text.casefold() in _WORDS:
        return Fraction(_WORDS.index(text.casefold()))
    if match := _NUMBER.fullmatch(text):
        sign, number = match[1], _decimal(match[2]) * Fraction(10) ** int(match[3] or 0)
    elif match := _POWER.fullmatch(text):
        sign, number = match[1], _decimal(match[2] or "1") * Fraction(10) ** int(match[3] or match[4])
    elif match := _RATIO.fullmatch(text):
        sign, whole, above, below = match.groups()
        if (number := _mixed(whole, above, below)) is None:
            return None
    elif match := _LATEX_RATIO.fullmatch(text):
        sign, whole, above, digit, below, below_digit = match.groups()
        if (number := _mixed(whole, above or digit, below or below_digit)) is None:
            return None
    else:
        return None
    return -number if sign == "-" else number


def split_unit(text: str, glued: bool = True) -> tuple[str, str]:
    r"""A value and its unit: "3 cm^2" is ("3", "cm2"), "$5" is ("5", "$"), "3" is ("3", "").

    Units are those of length, area, volume, mass, time, speed, money, angle, percent and physics, as symbols or English
    words, also as powers, quotients and products, and `\text{...}`. With `glued` a unit of one letter may stand right
    after the value: "3m" could be three times m.
    """
    if match := _SIGN.fullmatch(text):
        return match[2], match[1]
    for start in _UNIT_START.finditer(text, max(1, len(text) - _MAX_UNIT)):
        head, tail = text[: start.start()], text[start.start() :]
        name = _unit(tail)
        if name is None or not re.search(r"[0-9}]|\\[A-Za-z]|π", head) and head.strip().casefold() not in _WORDS:
            continue
        if not glued and len(name) == 1 and name.isalpha() and not head.endswith(" "):
            continue
        return head.strip(), name
    return text, ""


def same_unit(first: str, second: str) -> bool:
    """Whether two units from `split_unit` do not contradict each other."""
    return first == second or "" in (first, second)


def same_quantity(got: str, want: str) -> bool:
    """Whether both are numbers of the same value, with no two different units; `want` is the right answer."""
    (first, first_unit), (second, second_unit) = split_unit(got), split_unit(want, glued=False)
    number = value(first)
    return number is not None and number == value(second) and same_unit(first_unit, second_unit)


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _mixed(whole: str | None, above: str, below: str) -> Fraction | None:
    if int(below) == 0 or whole is not None and not above.isdigit():
        return None
    return int(whole or 0) + Fraction(int(above), int(below))


def _unit(text: str) -> str | None:
    """The name of the unit that a text is, such as "cm2", "m/s2" or "N*m"; None where it is none."""
    text = re.sub(r"[{}\\]|\^(?=[^0-9-]*circ)", "", text).replace("²", "2").replace("³", "3").strip()
    text = _SQUARE.sub(lambda match: "squared " if match[1].startswith("sq") else "cubed ", text.replace(" per ", "/"))
    words, power, names = re.findall(r"[^\s/·*]+|/", text), "", []
    for word in words:
        if word in ("squared", "cubed"):
            power = "2" if word == "squared" else "3"
            continue
        if word == "/":
            if not names or names[-1] == "/":
                return None
            names.append("/")
            continue
        match = _UNIT_WORD.fullmatch(word.rstrip("."))
        name = None if match is None else _lookup(match[1])
        if match is None or name is None or power and match[2]:
            return None
        names.append(name + (power or match[2] or ""))
        power = ""
    return None if not names or power or names[-1] == "/" else "*".join(names).replace("*/*", "/")


def _lookup(word: str) -> str | None:
    for form in (word, word.lower() if len(word) > 1 else word):
        for name in (form, form[:-1] if form.endswith("s") and len(form) > 3 else form):
            if name in _UNITS:
                return _UNITS[name]
    return None
