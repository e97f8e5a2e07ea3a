"""The settings that sampling needs: model, devices and limits. Nothing here imports jax."""

from __future__ import annotations

import dataclasses
from typing import Any

from qwenla_jax.config.shared_options import MeshOptions, ReattentionOptions


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
    """A model and how to sample from it. The settings of training, distillation and evaluation each contain one.

    Attributes:
      init_from: the model, as `config.init_from` of a run.
      seed: of random parameters and of sampling.
      dtype, param_dtype: types of computation, and of stored parameters.
      remat, attention: as in `model.config.ModelConfig`.
      mesh: devices along each axis.
      batch_size: questions answered at once.
      max_prompt_tokens, max_response_tokens: longest prompt, visual tokens included, and response.
      max_images: most images of a question.
      min_pixels, max_pixels: bounds of an image; None: the checkpoint's.
      max_invalid: most records that may be invalid.
      system: text of a system turn; None: no such turn.
      reattention: what is inserted before a reflection.
    """

    init_from: str | None = "tiny"
    seed: int = 0
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    mesh: MeshOptions = MeshOptions()
    batch_size: int = 64
    max_prompt_tokens: int = 128
    max_images: int = 1
    max_response_tokens: int = 64
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_invalid: int = 0
    system: str | None = None
    reattention: ReattentionOptions = ReattentionOptions()

    @classmethod
    def of(cls, options: Any, **own: Any) -> InferenceConfig:
        """From settings with a group `data`: what they or `data` have under a field's name, and what is in `own`."""
        names = [field.name for field in dataclasses.fields(cls)]
        shared = {
            name: getattr(part, name) for part in (options.data, options) for name in names if hasattr(part, name)
        }
        return cls(**shared | own)
