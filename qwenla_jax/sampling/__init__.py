"""Sampling: one compiled program from the prompt to the last token."""
