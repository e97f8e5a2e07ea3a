"""Looking again: the images' visual tokens stand in the response once more (paper, section Visual re-attention)."""
