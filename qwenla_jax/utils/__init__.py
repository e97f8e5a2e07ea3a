"""What every room may use and that knows nothing of models: files and their formats."""
