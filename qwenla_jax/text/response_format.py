"""The answer format: what the sections of a response are, and the first reason why the format is broken.

Paper, the answer format: summary, caption, reasoning and conclusion in this order, once each; any number of reflections
between or after them, an empty one included; nothing inside anything else.

Paper silent, our choices, all strict because a format that lets things pass is one that a policy learns to use:
- between sections, before the first and after the last there may be whitespace and no other text;
- a reflection before the summary stands neither between nor after sections, so it breaks the format;
- only a reflection may be empty: a blank summary, caption, reasoning or conclusion breaks the format;
- tags are matched exactly, case included; anything else, such as `<summary>`, is ordinary text;
- control tokens such as `<|im_end|>` are text too: decode without them before parsing.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from qwenla_jax.text.special_tokens import REFLECTION_NAME, SECTION_NAMES

_TAG = re.compile(rf"<(/?)({'|'.join((*SECTION_NAMES, REFLECTION_NAME))})>")


class Fault(StrEnum):
    """Why a response is not in the format; the first thing that is wrong, reading from the left."""

    NO_TAGS = "no_tags"  # not a single tag, the empty response included
    STRAY_TEXT = "stray_text"  # text outside every section
    UNOPENED = "unopened"  # a closing tag where nothing is open
    UNCLOSED = "unclosed"  # the response ends inside a section, as one that was cut off does
    NESTED = "nested"  # an opening tag inside a section
    OVERLAP = "overlap"  # the closing tag of another section inside a section
    REPEATED = "repeated"  # a section stands a second time
    WRONG_ORDER = "wrong_order"  # a section stands before one that should precede it and comes later
    MISSING = "missing"  # a section does not stand anywhere
    EARLY_REFLECTION = "early_reflection"  # a reflection before the first section
    EMPTY_SECTION = "empty_section"  # a blank section that is not a reflection


@dataclass(frozen=True)
class Section:
    """One section with its tags.

    Attributes:
      name: "SUMMARY", "CAPTION", "REASONING", "CONCLUSION" or "REFLECTION".
      text: what stands between the tags, whitespace kept.
      start: index of the opening tag's first character in the response.
      end: index after the closing tag's last character.
    """

    name: str
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Parsed:
    """A response taken apart.

    Attributes:
      sections: every opening tag that is followed by its own closing tag with no tag in between, in order, reflections
        included. In a well-formed response these are all of its sections, in any other what can be read for certain.
      fault: None where the format is right, else the first reason why it is not.
      fault_at: index of the character where the fault shows, None where there is none.
    """

    sections: tuple[Section, ...]
    fault: Fault | None
    fault_at: int | None

    @property
    def ok(self) -> bool:
        """True where the response is in the format."""
        return self.fault is None

    @property
    def reflections(self) -> tuple[Section, ...]:
        """The reflections in order, those of a response that breaks the format included."""
        return tuple(section for section in self.sections if section.name == REFLECTION_NAME)


def parse(response: str) -> Parsed:
    """Takes a response apart, any text without control tokens, in time linear in its length. Never raises."""
    tags = list(_TAG.finditer(response))
    sections = tuple(
        Section(first[2], response[first.end() : second.start()], first.start(), second.end())
        for first, second in zip(tags, tags[1:], strict=False)
        if not first[1] and second[1] and first[2] == second[2]
    )
    fault, fault_at = _first_fault(response, tags)
    return Parsed(sections, fault, fault_at)


def _first_fault(response: str, tags: list[re.Match[str]]) -> tuple[Fault | None, int | None]:
    """The first fault and the character where it shows, or (None, None)."""
    if not tags:
        return Fault.NO_TAGS, 0
    opened_last = {tag[2]: tag.start() for tag in tags if not tag[1]}
    done = 0  # how many of the four sections are complete
    opening: re.Match[str] | None = None
    after = 0  # end of the last complete section
    for tag in tags:
        closing, name = bool(tag[1]), tag[2]
        if opening is not None:
            if not closing:
                return Fault.NESTED, tag.start()
            if name != opening[2]:
                return Fault.OVERLAP, tag.start()
            if name != REFLECTION_NAME:
                if not response[opening.end() : tag.start()].strip():
                    return Fault.EMPTY_SECTION, opening.start()
                done += 1
            opening, after = None, tag.end()
            continue
        if (stray := _stray_text(response, after, tag.start())) is not None:
            return Fault.STRAY_TEXT, stray
        if closing:
            return Fault.UNOPENED, tag.start()
        if name == REFLECTION_NAME:
            if done == 0:
                return Fault.EARLY_REFLECTION, tag.start()
        elif name in SECTION_NAMES[:done]:
            return Fault.REPEATED, tag.start()
        elif name != SECTION_NAMES[done]:
            comes_later = opened_last.get(SECTION_NAMES[done], -1) > tag.start()
            return (Fault.WRONG_ORDER if comes_later else Fault.MISSING), tag.start()
        opening = tag
    if opening is not None:
        return Fault.UNCLOSED, opening.start()
    if (stray := _stray_text(response, after, len(response))) is not None:
        return Fault.STRAY_TEXT, stray
    if done < len(SECTION_NAMES):
        return Fault.MISSING, len(response)
    return None, None


def _stray_text(response: str, start: int, end: int) -> int | None:
    """Index of the first character of response[start:end] that is not whitespace, None where there is none."""
    gap = response[start:end]
    rest = gap.lstrip()
    return start + len(gap) - len(rest) if rest else None
