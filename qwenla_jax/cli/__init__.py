"""Commands: one file a subcommand of `qwenla`."""
