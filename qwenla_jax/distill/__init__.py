"""Distillation (paper's stage 3): sample answers, verify them, keep the accepted, queue the rest for a person."""
