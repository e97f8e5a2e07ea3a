"""The chat template that goes with an exported tokenizer: it renders what `prompts` builds, token for token."""

from __future__ import annotations

import json
import re
from typing import Any, cast

import tokenizers

# One turn after the other in Qwen2.5-VL's layout, content a string or a list of texts, images and videos. No system
# turn is made up where the conversation has none.
CHAT_TEMPLATE = (
    "{%- set seen = namespace(images=0, videos=0) -%}"
    "{%- for turn in messages -%}"
    "{{- '<|im_start|>' + turn['role'] + '\n' -}}"
    "{%- if turn['content'] is string -%}{{- turn['content'] -}}{%- else -%}"
    "{%- for part in turn['content'] -%}"
    "{%- if part['type'] in ['image', 'image_url'] or 'image' in part or 'image_url' in part -%}"
    "{%- set seen.images = seen.images + 1 -%}"
    "{%- if add_vision_id -%}{{- 'Picture ' ~ seen.images ~ ': ' -}}{%- endif -%}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part['type'] == 'video' or 'video' in part -%}"
    "{%- set seen.videos = seen.videos + 1 -%}"
    "{%- if add_vision_id -%}{{- 'Video ' ~ seen.videos ~ ': ' -}}{%- endif -%}"
    "{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- elif 'text' in part -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
# A system turn of fixed text, as the released templates make one up; line breaks as they are or escaped in a string.
_MADE_UP = re.compile(r"<\|im_start\|>system(?:\\n|\n)[^'\"{}<]*<\|im_end\|>(?:\\n|\n)")
_IMAGE, _VIDEO, _TEXT = {"type": "image"}, {"type": "video"}, {"type": "text", "text": " how\n many? "}
_PROBES: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": [_IMAGE, _TEXT]}],
    [{"role": "user", "content": " one?\n"}],
    [
        {"role": "system", "content": " be brief\n"},
        {"role": "user", "content": [_TEXT, _IMAGE, _IMAGE, _VIDEO]},
        {"role": "assistant", "content": "\n<SUMMARY>two</SUMMARY> "},
        {"role": "user", "content": "and now?"},
    ],
)


def fitting_template(own: str | None, system: str | None = None) -> str:
    """A chat template for a model that was trained on `conversation.build_prompt`'s layout.

    Args:
      own: the template that the tokenizer came with.
      system: text of the system turn that the model was trained with, which goes before conversations without one.

    Returns:
      `own` where it gives this layout, `own` without the system turn that it makes up, or else `CHAT_TEMPLATE`; each
      with the turn of `system` in front.
    """
    wanted = _with_system(CHAT_TEMPLATE, system)
    if own is None or own == CHAT_TEMPLATE:
        return wanted
    candidates = [_with_system(template, system) for template in (own, _MADE_UP.sub("", own))]
    texts = _rendered(wanted)
    return next((template for template in candidates if _renders(template, texts)), wanted)


def _with_system(template: str, system: str | None) -> str:
    if system is None:
        return template
    turn = json.dumps(f"<|im_start|>system\n{system}<|im_end|>\n", ensure_ascii=False)
    return "{%- if messages[0]['role'] != 'system' -%}{{- " + turn + " -}}{%- endif -%}" + template


def _renders(template: str, texts: list[str]) -> bool:
    try:
        return _rendered(template) == texts
    except Exception:  # whatever a template of others can raise
        return False


def _rendered(template: str) -> list[str]:
    """What transformers makes of the probes with a template."""
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()))
    return [
        cast(str, theirs.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=end))
        for turns in _PROBES
        for end in (True, False)
    ]
