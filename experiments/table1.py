"""Table 1: image classification with a DeiT, every normalizer.

python -m experiments.table1                # results/runs -> results/tables/table1_small.*
python -m experiments.table1 --scale paper

The runs it needs, for each scale:
    python train.py -m seed=0,1,2 experiment=deit_softmax,deit_temperature,deit_topk,\
deit_sparsemax,deit_entmax15,deit_evsoftmax,deit_multimax
    python -m experiments.results outputs/small
"""

from experiments.tables import LABELS, Table, main

TABLE = Table(
    name="table1",
    title="DeiT",
    prefix="deit",
    variants=tuple(LABELS),
    metrics={"top-1 %": "top1"},
    unit="images",
)

if __name__ == "__main__":
    main(TABLE, __doc__ or "")
