"""Rendered scenes and easy-VQA: data with known answers that needs no download."""
