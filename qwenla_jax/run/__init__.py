"""What any long run needs: work folder, checkpoints, metrics, watchdog, signals."""
