from tiny_runs import few_pairs, runs

__all__ = ["few_pairs", "runs"]
