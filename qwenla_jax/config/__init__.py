"""Settings: the schema of option classes (low), and what a run is made of (high)."""
