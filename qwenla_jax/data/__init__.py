"""Data: sources of records, pictures as patches, batches."""
