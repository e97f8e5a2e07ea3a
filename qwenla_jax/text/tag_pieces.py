"""Responses cut at their tags, for pages and terminals that set tags and reflections apart."""

from __future__ import annotations

import re

from qwenla_jax.text.special_tokens import REFLECTION_CLOSE, REFLECTION_OPEN, TAGS

_TAG = re.compile("(" + "|".join(map(re.escape, TAGS)) + ")")
_REFLECTION = re.compile(rf"({re.escape(REFLECTION_OPEN)}.*?(?:{re.escape(REFLECTION_CLOSE)}|\Z))", re.DOTALL)


def split_tags(text: str) -> list[str]:
    """Text and tags in turn: those at odd places are tags. Text may be empty."""
    return _TAG.split(text)


def split_reflections(response: str) -> list[list[str]]:
    """Text outside and inside of reflections in turn, each cut by `split_tags`: those at odd places are reflections.

    A reflection has its tags. One that is not closed ends with the response; an opening tag inside one starts none.
    """
    return [split_tags(part) for part in _REFLECTION.split(response)]
