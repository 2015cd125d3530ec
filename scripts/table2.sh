#!/usr/bin/env bash
# Table 2: DeiT, each normalizer in the attention, in the output layer, and in both
#   scripts/table2.sh                                     small scale, one run after the other
#   scripts/table2.sh hydra/launcher=workstation          small scale, side by side
#   GPUS=8 scripts/table2.sh scale=paper data.root=/path/to/imagenet
#   scripts/table2.sh scale=paper data.root=/path/to/imagenet hydra/launcher=slurm hydra.launcher.partition=gpu
exec "$(dirname "$0")/table.sh" table2 "$@"
