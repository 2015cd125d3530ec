#!/usr/bin/env bash
# Ablation: DeiT, MultiMax in attention and output layer, one setting changed at a time
#   scripts/ablation.sh                                     small scale, one run after the other
#   scripts/ablation.sh hydra/launcher=workstation          small scale, side by side
#   GPUS=8 scripts/ablation.sh scale=paper data.root=/path/to/imagenet
#   scripts/ablation.sh scale=paper data.root=/path/to/imagenet hydra/launcher=slurm hydra.launcher.partition=gpu
exec "$(dirname "$0")/table.sh" ablation "$@"
