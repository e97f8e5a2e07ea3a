"""Everything that needs a model and trains nothing."""
