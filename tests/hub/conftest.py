from tiny_runs import few_pairs, runs, trained

__all__ = ["few_pairs", "runs", "trained"]
