"""Qwen Look Again in JAX: a Qwen2.5-VL that puts its visual tokens into the sequence a second time.

`load` and `save` read and write Hugging Face folders; they are imported on first use, so that `import qwenla_jax`
costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwenla_jax.model.hf_io import load, save

__all__ = ["__version__", "load", "save"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports `load` and `save` when they are first asked for."""
    if name in ("load", "save"):
        from qwenla_jax.model import hf_io

        return getattr(hf_io, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
