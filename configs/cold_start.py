"""Recipe cold_start; see qwenla_jax/recipes/cold_start.py."""

from qwenla_jax.recipes.cold_start import get_config  # noqa: F401
