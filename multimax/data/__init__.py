"""Data sets of the tasks, and the small embedded ones that need no download."""
