"""What `--user-dir` points to: importing it registers the models and the criterion."""

import multimax.integrations.fairseq.criterion
import multimax.integrations.fairseq.models  # noqa: F401
