"""Re-attention in torch: `custom_generate/generate.py` of an export, which transformers runs, and its settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from qwenla_jax.config.shared_options import ReattentionOptions
from qwenla_jax.text import special_tokens as st
from qwenla_jax.text.tokenizer import Tokenizer

CODE_FOLDER = "custom_generate"  # where transformers looks for it
REQUIREMENTS = "torch\ntransformers>=5.23\n"
# A module of the package would be imported with it, and needs torch: so it is no module until it is copied.
_SOURCE = Path(__file__).parents[1] / "templates" / "custom_generate.py.txt"
_OF_JAX = ("rows_at_once",)  # settings that change nothing of what is inserted


def write_custom_generate(
    folder: Path, tokenizer: Tokenizer | None, reattention: ReattentionOptions | None = None
) -> dict[str, Any]:
    """Writes `custom_generate/` into a Hugging Face folder whose tokenizer has `<REFLECTION>`; otherwise nothing.

    Args:
      folder: of the export.
      tokenizer: its tokenizer, None where it has none.
      reattention: what the model was trained with, the defaults of `custom_generate`; None: text-only.

    Returns:
      What generation_config.json gets: `reattention`, an object of settings and token ids; {} where nothing was
      written.
    """
    if tokenizer is None or tokenizer.token_to_id(st.REFLECTION_OPEN) is None:
        return {}
    (folder / CODE_FOLDER).mkdir()
    (folder / CODE_FOLDER / "generate.py").write_text(_SOURCE.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / CODE_FOLDER / "requirements.txt").write_text(REQUIREMENTS, encoding="utf-8")
    settings = dataclasses.asdict(reattention or ReattentionOptions())
    (trigger,) = tokenizer.encode(settings.pop("trigger"))
    suppressed = (st.VISION_START, st.VISION_END, st.VISION_PAD, st.IMAGE_PAD, st.VIDEO_PAD)
    ids = [i for token in suppressed if (i := tokenizer.token_to_id(token)) is not None]
    tokens = {
        "reflection_token_id": trigger,
        "suppressed_token_ids": ids,
        "vocab_size": tokenizer.vocab_size,
    }
    return {"reattention": {key: value for key, value in settings.items() if key not in _OF_JAX} | tokens}
