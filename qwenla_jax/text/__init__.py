"""Text: special tokens, the tokenizer, prompts, the sections of a response and its answer."""
