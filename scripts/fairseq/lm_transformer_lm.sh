#!/usr/bin/env bash
# WikiText-103 with fairseq's transformer_lm (156 M parameters) and any normalizer.
#
#   scripts/fairseq/lm_transformer_lm.sh WIKITEXT [ATTENTION [OUTPUT [ARGUMENT...]]]
#   scripts/fairseq/lm_transformer_lm.sh /data/wikitext-103                    # MultiMax
#   scripts/fairseq/lm_transformer_lm.sh /data/wikitext-103 softmax            # the baseline
#   scripts/fairseq/lm_transformer_lm.sh /data/wikitext-103 topk:k=100 softmax --seed 2
#
# WIKITEXT holds wiki.{train,valid,test}.tokens of the official archive. ATTENTION is multimax where
# it is not given, OUTPUT is ATTENTION; further arguments go to fairseq-train. Needs fairseq (see
# requirements/fairseq.txt) and GPUs: GPUS=2, the recipe's, or another divisor of 32 for the same
# batch. DRY_RUN=1 prints the commands and runs none. Results go to outputs/fairseq/.
#
# Expected: test perplexity 30.46 with SoftMax, as fairseq published it. MultiMax: not run yet.
set -euo pipefail
[[ $# -ge 1 ]] || { sed -n '2,6p' "$0" >&2; exit 2; }
wikitext=$1 attention=${2:-multimax} output=${3:-${2:-multimax}}
data=outputs/fairseq/data/wikitext-103
save=outputs/fairseq/lm_transformer_lm/${attention//[^a-z0-9]/_}-${output//[^a-z0-9]/_}
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

# --decoder-normalize-before: fairseq 0.12 no longer implies the pre-norm of its own recipe.
run fairseq-train "$data" --task language_modeling --user-dir "$user_dir" \
    --arch multimax_transformer_lm --decoder-normalize-before --share-decoder-input-output-embed \
    --attention-normalizer "$attention" --output-normalizer "$output" \
    --dropout 0.1 --criterion cross_entropy \
    --optimizer adam --adam-betas '(0.9, 0.98)' --adam-eps 1e-8 --weight-decay 0.01 --clip-norm 0 \
    --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000 --warmup-init-lr 1e-7 \
    --tokens-per-sample 512 --sample-break-mode none --max-tokens 2048 \
    --update-freq $((32 / ${GPUS:-2})) --distributed-world-size "${GPUS:-2}" \
    --max-update 50000 --fp16 --save-dir "$save" "${@:4}"

# --num-workers 0: with more, the perplexity of a context window depends on their number.
run fairseq-eval-lm "$data" --user-dir "$user_dir" --path "$save/checkpoint_best.pt" \
    --gen-subset test --batch-size 2 --tokens-per-sample 512 --context-window 400 --num-workers 0
