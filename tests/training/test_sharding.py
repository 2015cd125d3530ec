"""Sharded models have the gradients, norms and weights of plain ones."""

import pytest
import torch
from accelerate import Accelerator
from tiny import run_quietly, tiny_config
from torch.distributed.fsdp import FSDPModule
from two_processes import in_processes, in_two_processes, needs_fork

from multimax.models.retrieval import AttentionRegressor
from multimax.models.transformer import LanguageModel, TranslationModel
from multimax.parameters import GradientClipping, normalizer_parameters
from multimax.training.config import check_processes, read_config
from multimax.training.sharding import WholeModel, average_gradients, no_exchange, shard, whole

SIZES = {"embed_dim": 8, "ffn_dim": 12, "num_heads": 2}
MULTIMAX = {"attention": {"name": "multimax"}, "output": {"name": "multimax"}}
TEMPERATURE = {"name": "softmax", "learned": True}


def tokens():
    return torch.randint(1, 11, (3, 6))


def loss_of_language(model):
    return model.output.loss(model(tokens()).flatten(0, 1), tokens().flatten())


def loss_of_translation(model):
    return model.output.loss(model(tokens(), tokens()).flatten(0, 1), tokens().flatten())


def loss_of_items(model):
    return model(torch.randn(3, 5, 4)).square().mean()


MODELS = {
    "tied": (lambda: LanguageModel(11, 0, depth=3, **SIZES, **MULTIMAX), loss_of_language),
    "adaptive": (
        lambda: LanguageModel(
            11, 0, depth=1, **SIZES, **MULTIMAX, adaptive_cutoffs=[4, 8], adaptive_factor=2
        ),
        loss_of_language,
    ),
    "translation": (
        lambda: TranslationModel(11, 11, 0, encoder_depth=2, decoder_depth=2, **SIZES, **MULTIMAX),
        loss_of_translation,
    ),
    "temperature": (lambda: AttentionRegressor(4, 3, TEMPERATURE), loss_of_items),
}


def backward(model, loss, rank, exchange):
    """Gradients of two batches of a process, of which only the second is to be exchanged."""
    for batch in range(2):
        torch.manual_seed(10 * rank + batch)
        with exchange if batch == 0 else torch.enable_grad():
            loss(model).backward()


def sharded_and_plain(build, loss, processes=2):
    """In each process: gradients, their norms and the weights of both, and what is sharded."""

    def work():
        torch.set_num_threads(1)
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        plain, model = build(), build()
        model.load_state_dict(plain.state_dict())
        for rank in range(processes):
            backward(plain, loss, rank, torch.enable_grad())
        for parameter in plain.parameters():
            parameter.grad /= processes
        gathering = WholeModel(model)
        shard(model)
        backward(model, loss, accelerator.process_index, no_exchange(model))
        average_gradients(normalizer_parameters(model), accelerator)
        gathered = [whole(parameter.grad).numpy() for parameter in model.parameters()]
        norms = [
            [norm.item() for norm in GradientClipping(each, None).norms()]
            for each in (model, plain)
        ]
        torch.manual_seed(5)
        expected = loss(plain).item()
        torch.manual_seed(5)
        with gathering.of(model) as again:
            found = loss(again).item()
        units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
        expected_gradients = [parameter.grad.numpy() for parameter in plain.parameters()]
        return gathered, expected_gradients, norms, (found, expected), units

    return in_processes(processes, work)


@needs_fork
@pytest.mark.parametrize(("name", "processes"), [*((name, 2) for name in MODELS), ("tied", 4)])
def test_gradients_and_weights_are_those_of_a_plain_model(name, processes):
    units = {
        "tied": ["", "decoder.layers.0", "decoder.layers.1", "decoder.layers.2"],
        "adaptive": ["", "decoder.layers.0"],
        "translation": ["", "encoder.layers.0", "encoder.layers.1"],
        "temperature": [""],
    }
    for gathered, expected, norms, losses, found in sharded_and_plain(*MODELS[name], processes):
        for one, other in zip(gathered, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        assert losses[0] == losses[1]
        assert found == units[name]


def test_one_process_has_nothing_to_share_out(tmp_path):
    config = read_config(tiny_config(tmp_path, "+trainer.shard=true"))
    with pytest.raises(ValueError, match=r"trainer\.shard=true needs several processes"):
        check_processes(config, 1)
    check_processes(config, 2)
    config = read_config(tiny_config(tmp_path, "+trainer.shard=true", "trainer.precision=fp16"))
    with pytest.raises(ValueError, match=r"trainer\.precision=fp16 cannot go with trainer\.shard"):
        check_processes(config, 2)


@needs_fork
def test_every_process_of_a_diverging_run_says_what_broke(tmp_path):
    config = tiny_config(
        tmp_path, "+trainer.shard=true", "optimizer.lr=1e30", "trainer.evaluate_every=4"
    )

    def work():
        torch.set_num_threads(1)
        try:
            run_quietly(config)
        except FloatingPointError as error:
            return str(error)

    said = in_two_processes(work)
    for line in said:
        assert "at update 2; first non-finite: output of blocks.0.norm1 (" in line
        assert "The last checkpoint is intact" in line
    assert len({line.partition(";")[0] for line in said}) == 1  # the loss and the update
    assert not list(tmp_path.rglob("result.json"))
