"""A language model and a text of a few words, for the tests of its task."""

from pathlib import Path

import torch

from multimax.tasks import build_task

ROOT = Path(__file__).parents[2]
TEXT = {
    "train": "the cat sat on the mat\nthe dog ate the hat of the cat\n\n" * 30,
    "valid": "the hat sat on the dog\n\nthe cat ate\n" * 3,
    "test": "a mat sat on the cat\nthe über-dog\n" * 4,
}
TINY = (
    "data=text_files", "data.vocabulary_size=270", "data.block_size=16", "data.context_window=8",
    "model.embed_dim=16", "model.ffn_dim=16", "model.depth=2", "model.num_heads=2", "scale.topk=4",
    "trainer.epochs=null", "trainer.updates=3", "trainer.batch_size=4", "trainer.eval_batch_size=3",
    "trainer.evaluate_every=2", "schedule.warmup=1", "logger.wandb=disabled",
)  # fmt: skip


def build(config, rank=0, world_size=1):
    torch.manual_seed(0)
    task = build_task(config, rank, world_size, torch.device("cpu"))
    if not config.model.adaptive_cutoffs:
        with torch.no_grad():  # scores that are far enough apart for exact zeros
            task.model.output.weight.mul_(4)
    return task
