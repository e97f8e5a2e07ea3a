"""The Qwen2.5-VL model in Flax Linen; what leaves this folder are plain arrays and dictionaries."""
