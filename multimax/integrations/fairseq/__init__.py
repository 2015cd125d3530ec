"""A plug-in for fairseq: any normalizer in its Transformers, without a change to its files.

fairseq imports it through `--user-dir "$(python -m multimax.integrations.fairseq)"`.
"""

from pathlib import Path

# fairseq puts the parent of this folder on sys.path, and takes its name for a top-level module.
USER_DIR = Path(__file__).parent / "user_dir" / "multimax_fairseq"
