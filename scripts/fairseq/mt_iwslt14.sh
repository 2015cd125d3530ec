#!/usr/bin/env bash
# IWSLT14 German to English with fairseq's transformer_iwslt_de_en (39.5 M parameters).
#
#   scripts/fairseq/mt_iwslt14.sh IWSLT [ATTENTION [OUTPUT [ARGUMENT...]]]
#   scripts/fairseq/mt_iwslt14.sh /data/iwslt14                                # MultiMax
#   scripts/fairseq/mt_iwslt14.sh /data/iwslt14 softmax                        # the baseline
#   scripts/fairseq/mt_iwslt14.sh /data/iwslt14 multimax softmax \
#       --cross-attention-normalizer softmax
#
# IWSLT holds {train,valid,test}.{de,en}, tokenized and split by BPE, as multimax.data.prepare.iwslt14
# writes them. ATTENTION is multimax where it is not given, OUTPUT is ATTENTION; further arguments
# go to fairseq-train. Needs fairseq (see requirements/fairseq.txt) and one GPU. DRY_RUN=1 prints
# the commands and runs none. Results go to outputs/fairseq/.
#
# Expected: not run yet.
set -euo pipefail
[[ $# -ge 1 ]] || { sed -n '2,7p' "$0" >&2; exit 2; }
iwslt=$1 attention=${2:-multimax} output=${3:-${2:-multimax}}
data=outputs/fairseq/data/iwslt14.de-en
save=outputs/fairseq/mt_iwslt14/${attention//[^a-z0-9]/_}-${output//[^a-z0-9]/_}
user_dir=$(python -m multimax.integrations.fairseq)

run() {
    printf '%q ' "$@"
    echo
    [[ -n ${DRY_RUN:-} ]] || "$@"
}

if [[ ! -e $data/dict.en.txt ]]; then
    run fairseq-preprocess --source-lang de --target-lang en --destdir "$data" --workers 20 \
        --trainpref "$iwslt/train" --validpref "$iwslt/valid" --testpref "$iwslt/test"
fi

run fairseq-train "$data" --task translation --user-dir "$user_dir" \
    --arch multimax_transformer_iwslt_de_en --share-decoder-input-output-embed \
    --attention-normalizer "$attention" --output-normalizer "$output" \
    --dropout 0.3 --criterion label_smoothed_cross_entropy --label-smoothing 0.1 \
    --optimizer adam --adam-betas '(0.9, 0.98)' --weight-decay 1e-4 --clip-norm 0 \
    --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000 --max-tokens 4096 \
    --eval-bleu --eval-bleu-args '{"beam": 5, "max_len_a": 1.2, "max_len_b": 10}' \
    --eval-tokenized-bleu --eval-bleu-remove-bpe \
    --best-checkpoint-metric bleu --maximize-best-checkpoint-metric \
    --max-epoch 50 --keep-last-epochs 1 --save-dir "$save" "${@:4}"

run fairseq-generate "$data" --user-dir "$user_dir" --path "$save/checkpoint_best.pt" \
    --gen-subset test --beam 5 --remove-bpe --batch-size 128 --num-workers 0
