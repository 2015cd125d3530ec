"""Faster forms of the same functions; never the definition."""
