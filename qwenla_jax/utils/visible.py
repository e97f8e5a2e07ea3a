"""Text that others wrote, made safe for a terminal and for a log."""

from __future__ import annotations

import re

# Control characters (a terminal obeys them), line separators, what turns the direction of writing, half characters.
HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str, keep: str = "") -> str:
    r"""The text with its control characters but those of `keep` spelled out: an escape becomes the four `\x1b`."""
    return HIDDEN.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], text)


def in_brief(text: str, most: int = 200) -> str:
    """The text on one line without control characters, its middle cut out where it has more than `most` characters."""
    line = visible(" ".join(text.split()))
    tail = (most - 3) // 3
    return line if len(line) <= most else f"{line[: most - 3 - tail]}...{line[len(line) - tail :]}"
