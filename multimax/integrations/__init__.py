"""Bridges to other code: official checkpoints, and the frameworks MultiMax can be plugged into."""
