r"""Right answers as datasets write them: the wrappings that no response repeats, and what no response can match.

Paper silent. A comparison takes the wrappings off that people put round an answer (`normalize`). Datasets have
others, made for another format of responses: `<answer> 3 </answer>` of R1-style `solution` columns, with or without the
thoughts before it, `<CONCLUSION>`, `<|begin_of_box|>`, GSM8K's `#### 3`, and worked solutions that end with a line
"The answer is: 3".
"""

import re

from qwenla_jax.text.answers.normalize import plain

_OPENING = re.compile(r"<(answer|final[_ ]?answer|conclusion|solution|result)>", re.IGNORECASE)
_BOX = ("<|begin_of_box|>", "<|end_of_box|>")
_THOUGHTS = "</think>"
_HASHES = "\n####"
_LAST_LINE = re.compile(r"(?:the )?(?:(?:final|correct) )?answer(?: is ?:?|:) *(\S.*)", re.IGNORECASE)
_TAG = re.compile(r"<(/?(?:SUMMARY|CAPTION|REASONING|REFLECTION|CONCLUSION))>|<\|\w{1,40}\|>")
_PAIR = re.compile(r"<([A-Za-z][\w -]{0,40})>")
_ROUNDS = 4  # wrappings inside wrappings


def unwrap_gold(text: str) -> str:
    """A right answer without the wrappings that this module lists; case and all else are kept. Time linear."""
    text = text.strip()
    for _ in range(_ROUNDS):
        before, text = text, _unwrapped(text).strip()
        if text == before:
            break
    return text


def unmatchable(answer: str) -> str | None:
    """Why no response can match a right answer (unwrapped), and what would be right; None where one can."""
    shown = f"the answer {answer[:80]!r}"
    if not any(map(str.isalnum, answer)) and answer.strip() and not plain(answer):
        return f"{shown} is nothing but punctuation, which no response can match; expected text"
    tag = None
    if "<" in answer:
        tag = _TAG.search(answer) or _OPENING.search(answer)
        pair = _PAIR.match(answer)
        tag = pair if tag is None and pair and answer.endswith(f"</{pair[1]}>") else tag
    if tag is None:
        return None
    return f"{shown} is wrapped in {tag[0]}, which no response repeats; expected the bare answer"


def _unwrapped(text: str) -> str:
    if "<" in text:
        text = text.rpartition(_THOUGHTS)[2].strip() or text
        if _BOX[0] in text:
            return text.rpartition(_BOX[0])[2].partition(_BOX[1])[0]
        if openings := list(_OPENING.finditer(text)):
            opening = openings[-1]
            closing = re.compile(f"</{opening[1]}>", re.IGNORECASE).search(text, opening.end())
            return text if closing is None else text[opening.end() : closing.start()]
    before, hashes, after = f"\n{text}".rpartition(_HASHES)
    if hashes and "\n" not in after.strip():
        return after if after.strip() else text
    above, newline, line = text.rpartition("\n")
    if newline and above and (match := _LAST_LINE.fullmatch(line.strip())):
        return match[1]
    return text
