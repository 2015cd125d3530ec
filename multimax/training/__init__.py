"""The trainer and what it needs: configuration checks, checkpoints, loggers, results."""
