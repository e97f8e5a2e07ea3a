"""Recipe sft_route; see qwenla_jax/recipes/sft_route.py."""

from qwenla_jax.recipes.sft_route import get_config  # noqa: F401
