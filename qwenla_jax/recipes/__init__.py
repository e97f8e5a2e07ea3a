"""The settings of every stage, by preset."""
