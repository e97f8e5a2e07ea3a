"""Recipe distill; see qwenla_jax/recipes/distill.py."""

from qwenla_jax.recipes.distill import get_config  # noqa: F401
