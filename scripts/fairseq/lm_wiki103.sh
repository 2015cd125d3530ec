#!/usr/bin/env bash
# WikiText-103 with fairseq's transformer_lm_wiki103: adaptive input and output, 16 layers.
#
#   scripts/fairseq/lm_wiki103.sh WIKITEXT [ATTENTION [OUTPUT [ARGUMENT...]]]
#   scripts/fairseq/lm_wiki103.sh /data/wikitext-103                           # MultiMax
#   scripts/fairseq/lm_wiki103.sh /data/wikitext-103 softmax                   # the baseline
#   scripts/fairseq/lm_wiki103.sh /data/wikitext-103 multimax softmax --seed 2
#
# WIKITEXT holds wiki.{train,valid,test}.tokens of the official archive. ATTENTION is multimax where
# it is not given, OUTPUT is ATTENTION, one normalizer for each band of the adaptive output; further
# arguments go to fairseq-train. Needs fairseq (see requirements/fairseq.txt) and GPUs: GPUS=8, the
# recipe's, or another divisor of 24 for the same batch. DRY_RUN=1 prints the commands and runs none.
# Results go to outputs/fairseq/.
#
# Expected: not run yet.
set -euo pipefail
[[ $# -ge 1 ]] || { sed -n '2,6p' "$0" >&2; exit 2; }
wikitext=$1 attention=${2:-multimax} output=${3:-${2:-multimax}}
data=outputs/fairseq/data/wikitext-103
save=outputs/fairseq/lm_wiki103/${attention//[^a-z0-9]/_}-${output//[^a-z0-9]/_}
user_dir=$(python -m multimax.integrations.fairseq)

run() {
    printf '%q ' "$@"
    echo
    [[ -n ${DRY_RUN:-} ]] || "$@"
}

if [[ ! -e $data/dict.txt ]]; then
    run fairseq-preprocess --only-source --destdir "$data" --workers 20 \
        --trainpref "$wikitext/wiki.train.tokens" \
        --validpref "$wikitext/wiki.valid.tokens" \
        --testpref "$wikitext/wiki.test.tokens"
fi

run fairseq-train "$data" --task language_modeling --user-dir "$user_dir" \
    --arch multimax_transformer_lm_wiki103 \
    --attention-normalizer "$attention" --output-normalizer "$output" \
    --criterion adaptive_loss --ddp-backend legacy_ddp \
    --optimizer nag --clip-norm 0.1 \
    --lr 1.0 --lr-scheduler cosine --lr-period-updates 270000 --t-mult 2 --lr-shrink 0.75 \
    --min-lr 1e-4 --stop-min-lr 1e-9 --warmup-updates 16000 --warmup-init-lr 1e-7 \
    --tokens-per-sample 3072 --sample-break-mode none --max-tokens 3072 \
    --update-freq $((24 / ${GPUS:-8})) --distributed-world-size "${GPUS:-8}" \
    --skip-invalid-size-inputs-valid-test --max-update 286000 --fp16 --save-dir "$save" "${@:4}"

# --num-workers 0: with more, the perplexity of a context window depends on their number.
run fairseq-eval-lm "$data" --user-dir "$user_dir" --path "$save/checkpoint_best.pt" \
    --gen-subset test --max-tokens 3072 --tokens-per-sample 3072 --context-window 2560 \
    --num-workers 0
