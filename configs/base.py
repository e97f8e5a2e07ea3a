"""Recipe base; see qwenla_jax/recipes/base.py."""

from qwenla_jax.recipes.base import get_config  # noqa: F401
