"""Option classes and bounds that several rooms share. Nothing here imports jax."""

from __future__ import annotations

import dataclasses

from qwenla_jax.config.schema import option

DTYPES = ("float32", "bfloat16")

# Far above any useful value, and far below what would fill memory before it is rejected.
MOST_ROWS = 2**16
MOST_TOKENS = 2**18  # the positions of Qwen2.5-VL end at 128,000
MOST_PIXELS = 2**26
MOST_IMAGES = 256  # of a question
MOST_INSERTIONS = 256
MOST_WORKERS = 1024  # threads or processes
MOST_SECONDS = 10**6

# The modes of re-attention with their help; `reattention.options` and `reattention.route` implement them.
_MODES = {
    "none": "nothing",
    "copy": "all visual tokens",
    "route": "the most attended visual tokens",
    "vision_only": "as copy, and the reflection is closed at once",
}
MODES = tuple(_MODES)
MODES_HELP = "what is inserted before a reflection: " + ", ".join(f"{mode} ({text})" for mode, text in _MODES.items())
FORMS = ("compact", "bias")
POSITIONS = ("again", "original")
# What an insertion shows. All but the first are controls: they tell whether a gain comes from the image.
_CONTENTS = {
    "image": "the image",
    "blank": "an image of one colour, the processor's mean",
    "other": "the next image of the batch, for images of one size",
    "pause": "as many tokens of one embedding, without an image",
}
CONTENTS = tuple(_CONTENTS)


@dataclasses.dataclass(frozen=True)
class ReattentionOptions:
    """Whether and how images are re-inserted before reflections, in sampling, training and evaluation alike."""

    mode: str = option("none", MODES_HELP, choices=MODES)
    keep_ratio: float = option(0.5, "route: m, the share of the visual tokens that is kept", low=0, high=1)
    form: str = option(
        "compact",
        "route: compact (insert the selected tokens only) or bias (insert all, and mask the others)",
        choices=FORMS,
    )
    max_insertions: int = option(
        2, "most insertions of a response; later reflections are text alone", low=0, high=MOST_INSERTIONS
    )
    max_inserted_tokens: int | None = option(
        None, "most inserted tokens of a response; none: no such limit", low=0, high=MOST_TOKENS
    )
    rows_at_once: int = option(
        8, "sampling: insertions of so many pending rows are run together", low=1, high=MOST_ROWS
    )
    delimiters: bool = option(True, "insert the vision delimiters around the images too")
    positions: str = option(
        "again",
        "again: the images take the next positions, as if given a second time; original: those in the prompt",
        choices=POSITIONS,
    )
    trigger: str = option("<REFLECTION>", "the token, one of the tokenizer's, before which images are inserted")
    content: str = option(
        "image",
        "what an insertion shows; controls in place of the image: "
        + ", ".join(f"{content} ({text})" for content, text in _CONTENTS.items()),
        choices=CONTENTS,
    )

    def slots(self, images: int, tokens: int) -> int:
        """Slots of an insertion of `images` images with `tokens` visual tokens each, all of them selected."""
        return images * (tokens + 2 * self.delimiters)


@dataclasses.dataclass(frozen=True)
class PromptOptions:
    """How prompts, responses and images are cut to size."""

    max_prompt_tokens: int = option(
        128, "a longer prompt, its visual tokens included, is an error", low=1, high=MOST_TOKENS
    )
    max_response_tokens: int = option(64, "most tokens of a response, the stop token included", low=1, high=MOST_TOKENS)
    min_pixels: int | None = option(
        None, "enlarge images with fewer pixels; none: as the checkpoint says", low=1, high=MOST_PIXELS
    )
    max_pixels: int | None = option(
        None, "shrink images with more pixels; none: as the checkpoint says", low=1, high=MOST_PIXELS
    )
    system: str | None = option(None, "system prompt; none: no system turn")


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """How many devices each mesh axis has; one of them may be -1: the remaining devices."""

    data: int = option(-1, "devices that split the batch", low=-1)
    fsdp: int = option(1, "devices that split the batch, the parameters and the optimizer state", low=-1)
    tensor: int = option(1, "devices that split heads and feed-forward widths", low=-1)
    gather_to_sample: bool = option(
        False,
        "sampling: gather the parameters over fsdp once, before the first token, not in every layer of every token",
    )
