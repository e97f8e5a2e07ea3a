"""Qwen Look Again in JAX: a Qwen2.5-VL that re-inserts its visual tokens into the response.

`load` and `save` read and write Hugging Face folders, `ask` answers a question about images with a loaded checkpoint,
and `show` displays the answer. They are imported on first use, so that `import qwenla_jax` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwenla_jax.inference.ask import ask
    from qwenla_jax.inference.show import show
    from qwenla_jax.weights.hf import load, save

__all__ = ["__version__", "ask", "load", "save", "show"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports a public function when it is first used."""
    if name in __all__:
        from qwenla_jax.utils.libtpu import skip_without_tpu

        skip_without_tpu()
    if name in ("load", "save"):
        from qwenla_jax.weights import hf

        return getattr(hf, name)
    if name == "ask":
        from qwenla_jax.inference.ask import ask

        return ask
    if name == "show":
        from qwenla_jax.inference.show import show

        return show
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
