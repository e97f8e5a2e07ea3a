"""Where metrics and completions go beside the files of the work folder: one file a sink."""
