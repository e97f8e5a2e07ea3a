"""Does a run fit, and how fast at best: programs compiled for chips that are not there."""
