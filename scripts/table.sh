#!/usr/bin/env bash
# The runs of a table that are missing, then the table; table1.sh and its like call it.
#   scripts/table.sh TABLE [SETTINGS...]      settings of train.py, for all runs
#   GPUS=8 scripts/table.sh TABLE ...         each run on 8 GPUs of this machine, with torchrun
set -euo pipefail
cd "$(dirname "$0")/.."
table=$1
shift
scale=small
output=outputs
changed=()                    # what makes the runs others than those of the study
for setting in "$@"; do
    case $setting in
        scale=*) scale=${setting#*=} ;;
        output_dir=*) output=${setting#*=} ;;
        cells=* | recorded=* | seed=* | hydra/* | hydra.*) ;;
        *) changed+=("$setting") ;;
    esac
done
python=${PYTHON:-python}
[[ -n ${PYTHON:-} || ! -x .venv/bin/python ]] || python=.venv/bin/python
start=("$python")
[[ -z ${GPUS:-} ]] || start=("$python" -m torch.distributed.run --standalone --nproc-per-node "$GPUS")
status=0
"${start[@]}" train.py -m "study=$table" "$@" || status=$?   # a run that fails costs its cell alone
sweeps=("$output/sweeps")     # which know the runs that diverged
[[ -d ${sweeps[0]} ]] || sweeps=()
"$python" -m experiments.results "$output/$scale" "${sweeps[@]}"
"$python" -m experiments.tables "$table" "${changed[@]}" --scale "$scale"
exit "$status"
