"""Print the folder that fairseq's `--user-dir` takes."""

from multimax.integrations.fairseq import USER_DIR

print(USER_DIR)
