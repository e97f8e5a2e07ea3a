"""Data: sources of records, images as patches, batches."""
