"""Hugging Face, Orbax and PEFT files from and to parameters."""
