"""Settings: the schema of option classes (imported by low rooms), and the settings of a run (by high ones)."""
