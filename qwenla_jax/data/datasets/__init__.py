"""Readers of public datasets."""
