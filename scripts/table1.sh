#!/usr/bin/env bash
# Table 1: DeiT, SoftMax over temperatures, with average pooling and with a class token
#   scripts/table1.sh                                     small scale, one run after the other
#   scripts/table1.sh hydra/launcher=workstation          small scale, side by side
#   GPUS=8 scripts/table1.sh scale=paper data.root=/path/to/imagenet
#   scripts/table1.sh scale=paper data.root=/path/to/imagenet hydra/launcher=slurm hydra.launcher.partition=gpu
exec "$(dirname "$0")/table.sh" table1 "$@"
