"""Training: cold start by supervised fine-tuning and BRPO, their options, checkpoints, metrics and loop."""
