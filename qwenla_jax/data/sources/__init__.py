"""Random-access sources: specs, splits, filters, mixtures, invalid records skipped."""
