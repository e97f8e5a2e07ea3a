"""Text from the model: one compiled program from the prompt to the last token."""
