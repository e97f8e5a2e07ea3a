"""Trying a model out, and looking at what it looks at."""
