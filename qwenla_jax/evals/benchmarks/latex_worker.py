"""What `latex_values`' worker processes import: the library at once, so that no pair has to wait for it."""

from __future__ import annotations

import latex2sympy2_extended  # noqa: F401

from qwenla_jax.evals.benchmarks.latex_values import value_reward as same

__all__ = ["same"]
