"""The models of the three tasks, each over any normalizer in attention and output."""
