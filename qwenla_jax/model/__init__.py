"""The models in Flax Linen; what leaves this folder are plain arrays and dictionaries."""
