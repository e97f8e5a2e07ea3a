"""Looking again: the pictures' visual tokens stand in the response once more (paper, section Visual re-attention)."""
