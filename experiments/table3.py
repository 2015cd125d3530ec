"""Table 3: translation from German to English, every normalizer.

python -m experiments.table3                # results/runs -> results/tables/table3_small.*
python -m experiments.table3 --scale paper

The runs it needs, for each scale:
    python train.py -m seed=0,1,2 experiment=mt_softmax,mt_topk,mt_sparsemax,mt_entmax15,\
mt_evsoftmax,mt_multimax
    python -m experiments.results outputs/small
"""

from experiments.tables import LABELS, Table, main

TABLE = Table(
    name="table3",
    title="Translation",
    prefix="mt",
    variants=tuple(variant for variant in LABELS if variant != "temperature"),
    metrics={"BLEU": "bleu", "chrF": "chrf"},
    unit="sentences",
)

if __name__ == "__main__":
    main(TABLE, __doc__ or "")
