"""Operations of a compiled program's matrix products, read from its text.

The compiler's own count sees a loop's body once; here a product counts as often as its loops run. The TPU compiler
writes products as convolutions, with a batch or a summed axis as a window. Kernels (custom calls) count nothing, for
the text does not say what they compute.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import numpy as np

from qwenla_jax.planner.hlo import Computations, Instruction, array_shape, parse, placed


def product_flops(text: str) -> float:
    """Floating-point operations of all products, a product and a sum being two.

    Args:
      text: `Compiled.as_text()`.

    Raises:
      ValueError: see `hlo.parse`.
    """
    entry, computations = parse(text)
    each = (
        (at, product) for at in placed(entry, computations) for product in _products(at.one, at.there, computations)
    )
    return float(sum(flops * at.times for at, flops in each))


def _products(one: Instruction, there: dict[str, Instruction], computations: Computations) -> Iterator[int]:
    """Operations of the products that an instruction is, or that it fuses."""
    if one.opcode == "fusion":
        inside = {each.name: each for each in computations.get(one.attribute("calls") or "", ())}
        for each in inside.values():
            yield from _products(each, inside, computations)
    elif one.opcode in ("dot", "convolution"):
        left, right = (array_shape(there[name].type) for name in one.operands()[:2])
        result = array_shape(one.type)
        if one.opcode == "dot":
            summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
            axes = summed[1].split(",") if summed and summed[1] else ()
            yield 2 * math.prod(result) * math.prod(left[int(axis)] for axis in axes)
        else:
            yield _convolution(one, left, right, result)


def _convolution(one: Instruction, left: tuple[int, ...], right: tuple[int, ...], result: tuple[int, ...]) -> int:
    """Rows x features x features summed over x pairs of a place and a tap of the window that meet a number."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    assert labels is not None  # the text always has them
    of_left, of_right, of_result = labels.groups()
    total = 2 * result[of_result.index("b")] * result[of_result.index("f")] * right[of_right.index("i")]
    for axis in range(len(left) - 2):
        name = str(axis)
        places, taps = result[of_result.index(name)], right[of_right.index(name)]
        step = int(_window(one, "stride", axis, "1"))
        before = int(_window(one, "pad", axis, "0_0").partition("_")[0])
        apart, spread = int(_window(one, "lhs_dilate", axis, "1")), int(_window(one, "rhs_dilate", axis, "1"))
        at = np.arange(places)[:, None] * step + np.arange(taps) * spread - before
        meets = (at >= 0) & (at <= (left[of_left.index(name)] - 1) * apart) & (at % apart == 0)
        total *= int(meets.sum())
    return total


def _window(one: Instruction, name: str, axis: int, default: str) -> str:
    """What a convolution's window says of an axis."""
    window = re.search(r"window=\{([^}]*)\}", one.rest)
    values = re.search(rf"\b{name}=(\S+)", window[1]) if window else None
    return values[1].split("x")[axis] if values else default
