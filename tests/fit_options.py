"""The paper's settings of BRPO, for plans."""

from qwenla_jax.config.run_options import DataOptions, EvalOptions, OptimOptions, RunOptions

LARGE = RunOptions(
    preset="7b",
    init_from=None,
    dtype="bfloat16",
    remat="full",
    data=DataOptions(batch_size=16, max_prompt_tokens=7168, max_response_tokens=1024, max_pixels=640 * 480),
    optim=OptimOptions(accumulation=2),
    eval=EvalOptions(batch_size=16),
)
