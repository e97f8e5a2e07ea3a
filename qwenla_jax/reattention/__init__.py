"""Re-attention: visual tokens are inserted into the response again (paper, section Visual re-attention)."""
