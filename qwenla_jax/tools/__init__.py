"""Checks and conversions around a run."""
