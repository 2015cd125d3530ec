"""What the end of a run shows."""

import io

import torch
from rich.console import Console
from tiny import only, tiny_config

from multimax import EntMax, MultiMax, SoftMax
from multimax.parameters import learned_scalars, named_scalars
from multimax.training.result import print_metrics
from multimax.training.run import run


def test_learned_scalars_are_named_as_in_the_papers():
    multimax, single = MultiMax(order=2), MultiMax(order=1, affine=True)
    temperature, alpha = SoftMax(2.0, learned=True), EntMax(1.3, learned=True, heads=2)
    model = torch.nn.Module()
    model.attn = torch.nn.Module()
    model.attn.normalizer = multimax
    model.output, model.cold, model.entmax = single, temperature, alpha
    named = named_scalars(learned_scalars(model))
    assert list(named) == ["attn", "output", "cold", "entmax"]
    for module, layer in ((multimax, "attn"), (single, "output")):
        for name in ("t_b", "t_d", "b", "d"):
            torch.testing.assert_close(
                torch.tensor(named[layer][name]), getattr(module, name).detach()
            )
    assert named["output"]["scale"] == [1.0]
    torch.testing.assert_close(torch.tensor(named["cold"]["temperature"]), torch.tensor([2.0]))
    torch.testing.assert_close(torch.tensor(named["entmax"]["alpha"]), torch.full((2,), 1.3))
    assert named_scalars(learned_scalars(EntMax(1.3, learned=True))).keys() == {""}


def test_the_end_of_a_run_shows_what_was_learned(tmp_path):
    said = io.StringIO()
    result = run(tiny_config(tmp_path), Console(file=said, width=120))
    first, second = (result["learned_scalars"]["blocks.0.attn.normalizer.ts"][i] for i in (0, 2))
    line = next(line for line in said.getvalue().split("learned scalars")[1].splitlines()
                if "blocks.0.attn" in line)  # fmt: skip
    assert f"{1 - first:.3f}, {1 - second:.3f}" in line
    for name in ("t_b", "t_d", "b", "d"):
        assert name in said.getvalue()
    assert "wandb sync" not in said.getvalue()
    said = io.StringIO()
    run(tiny_config(tmp_path), Console(file=said, width=120))  # finished: the same again
    assert "learned scalars" in said.getvalue()
    assert only(tmp_path, "result.json")


def test_a_run_without_learned_scalars_has_no_table_of_them(tmp_path):
    said = io.StringIO()
    run(tiny_config(tmp_path, "experiment=deit_softmax"), Console(file=said))
    assert "learned scalars" not in said.getvalue()


def test_a_metric_that_a_split_does_not_have_is_empty_there():
    said = io.StringIO()
    metrics = {"valid": {"mse": 0.25, "examples": 3}, "test": {"mse_n128": 0.5, "examples": 4}}
    print_metrics(Console(file=said, width=120), "title", metrics)
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in said.getvalue().splitlines()
        if "│" in line
    ]
    assert rows == [["mse", "0.25", ""], ["mse_n128", "", "0.5"]]
