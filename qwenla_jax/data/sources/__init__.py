"""Random-access sources: specs, splits, filters, mixtures, and the replacement of invalid records."""
