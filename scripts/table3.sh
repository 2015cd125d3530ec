#!/usr/bin/env bash
# Table 3: Language model, each normalizer in the attention, in the output layer, and in both
#   scripts/table3.sh                                     small scale, one run after the other
#   scripts/table3.sh hydra/launcher=workstation          small scale, side by side
#   GPUS=8 scripts/table3.sh scale=paper data.root=/path/to/wikitext-103
#   scripts/table3.sh scale=paper data.root=/path/to/wikitext-103 hydra/launcher=slurm hydra.launcher.partition=gpu
exec "$(dirname "$0")/table.sh" table3 "$@"
