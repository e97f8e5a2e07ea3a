"""BRPO."""
