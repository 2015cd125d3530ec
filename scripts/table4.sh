#!/usr/bin/env bash
# Table 4: Translation, each normalizer in the attention, and MultiMax in the output layer too
#   scripts/table4.sh                                     small scale, one run after the other
#   scripts/table4.sh hydra/launcher=workstation          small scale, side by side
#   GPUS=8 scripts/table4.sh scale=paper data.root=/path/to/iwslt14
#   scripts/table4.sh scale=paper data.root=/path/to/iwslt14 hydra/launcher=slurm hydra.launcher.partition=gpu
exec "$(dirname "$0")/table.sh" table4 "$@"
