"""Figures, drawn from recorded results."""
