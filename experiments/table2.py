"""Table 2: language modelling, every normalizer.

python -m experiments.table2                # results/runs -> results/tables/table2_small.*
python -m experiments.table2 --scale paper

The runs it needs, for each scale:
    python train.py -m seed=0,1,2 experiment=lm_softmax,lm_topk,lm_sparsemax,lm_entmax15,\
lm_evsoftmax,lm_multimax
    python -m experiments.results outputs/small
"""

from experiments.tables import LABELS, Table, main

TABLE = Table(
    name="table2",
    title="Language model",
    prefix="lm",
    variants=tuple(variant for variant in LABELS if variant != "temperature"),
    metrics={"perplexity": "perplexity", "bits per byte": "bits_per_byte"},
    unit="tokens",
    digits=3,
)

if __name__ == "__main__":
    main(TABLE, __doc__ or "")
