"""Recipe brpo; see qwenla_jax/recipes/brpo.py."""

from qwenla_jax.recipes.brpo import get_config  # noqa: F401
