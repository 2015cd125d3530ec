"""Figures, drawn from what `results/` holds: `python -m experiments.figures [NAME ...]`."""
