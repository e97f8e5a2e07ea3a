"""Recipe sft_copy; see qwenla_jax/recipes/sft_copy.py."""

from qwenla_jax.recipes.sft_copy import get_config  # noqa: F401
