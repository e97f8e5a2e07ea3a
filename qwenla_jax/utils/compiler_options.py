"""Options of XLA's compiler that are no public interface: a release may drop any of them."""

from __future__ import annotations

from collections.abc import Mapping

import jax

Option = bool | int | float | str


def accepted(options: Mapping[str, Option]) -> dict[str, Option]:
    """Those of the options that the installed compiler has, for `compiler_options`; found by trying each of them.

    Nothing may depend on them but time, memory and the rounding of sums.
    """
    return {name: value for name, value in options.items() if _is_accepted(name, value)}


def _is_accepted(name: str, value: Option) -> bool:
    try:
        jax.jit(lambda x: x + 1, compiler_options={name: value}).lower(0.0).compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True
