"""Processes that rewards run in, where a stuck one can be killed."""
