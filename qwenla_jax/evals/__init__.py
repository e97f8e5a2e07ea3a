"""Scores of saved answers, as pure functions: no model, no torch."""
