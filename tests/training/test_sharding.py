"""Sharded models have the gradients, norms and weights of plain ones."""

import copy
import gc
import weakref

import pytest
import torch
from accelerate import Accelerator
from tiny import Regression, assert_same, build_trainer, run_quietly, tiny_config
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from two_processes import in_processes, in_two_processes, needs_fork

from multimax.files import load_checkpoint
from multimax.models.retrieval import AttentionRegressor
from multimax.models.transformer import LanguageModel, TranslationModel
from multimax.parameters import GradientClipping, normalizer_parameters
from multimax.training import sharding
from multimax.training.config import check_processes, read_config
from multimax.training.sharding import (
    WholeModel,
    average_gradients,
    local,
    no_exchange,
    shard,
    whole,
)

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
        shard(model, accelerator.device)
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


def bytes_of(tensors):
    """Memory of tensors, of which some may have the same."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def whole_parameters():
    """Parameters that are not sharded, of all models that there are."""
    return [p for p in gc.get_objects() if type(p) is nn.Parameter]


def whole_weights(model):
    return {name: whole(tensor).numpy() for name, tensor in model.state_dict().items()}


@needs_fork
def test_copies_of_the_model_are_never_whole(tmp_path, monkeypatch):
    def work():
        before = {id(parameter) for parameter in whole_parameters()}
        task = Regression((5, 3))
        task.model = MODELS["tied"][0]()
        start = copy.deepcopy(task.model.state_dict())
        together = task.model, task.model.decoder.layers[0]
        most = sum(bytes_of(module.parameters()) for module in together)
        found, real = [], sharding.fully_shard

        def fully_shard(*arguments, **options):
            found.append(bytes_of(p for p in whole_parameters() if id(p) not in before))
            return real(*arguments, **options)

        monkeypatch.setattr(sharding, "fully_shard", fully_shard)
        trainer = build_trainer(tmp_path, task, "+trainer.shard=true", "trainer.ema_decay=0.9")
        networks = [whole_weights(network) for network in (trainer.task.model, trainer.ema.module)]
        parts = zip(trainer.task.model.parameters(), trainer.ema.module.parameters(), strict=True)
        apart = all(local(one).data_ptr() != local(other).data_ptr() for one, other in parts)
        return found, most, {name: t.numpy() for name, t in start.items()}, networks, apart

    for found, most, start, networks, apart in in_two_processes(work):
        assert len(found) == 8  # three layers and the rest, of the model and of its average
        assert max(found) <= most
        assert apart
        for network in networks:
            assert network.keys() == start.keys()
            for name, expected in start.items():
                assert (network[name] == expected).all(), name


@needs_fork
def test_a_checkpoint_gathers_one_tensor_at_a_time_for_the_main_process(tmp_path, monkeypatch):
    """`cpu` copies here too, as from another device."""

    def work():
        options = "+trainer.shard=true", "trainer.ema_decay=0.9", "optimizer.name=adamw"
        trainer = build_trainer(tmp_path, Regression((5, 3)), *options)
        trainer._update(trainer.task.train_loader.given[:1])
        networks = {"model": trainer.task.model, "ema": trainer.ema.module}
        expected = {name: whole_weights(network) for name, network in networks.items()}
        means = trainer.optimizer.state_dict()["state"]
        expected["optimizer"] = [whole(mean["exp_avg"]).numpy() for mean in means.values()]
        gathered, copied, alive, gather = [], [], [], DTensor.full_tensor

        def full_tensor(tensor):
            gathered.append(weakref.ref(found := gather(tensor)))
            alive.append([sum(r() is not None for r in known) for known in (gathered, copied)])
            return found

        def cpu(tensor):
            copied.append(weakref.ref(found := tensor.clone()))
            return found

        with monkeypatch.context() as context:
            context.setattr(DTensor, "full_tensor", full_tensor)
            context.setattr(Tensor, "cpu", cpu)
            trainer.save()
        return alive, expected

    (main, expected), (other, _) = in_two_processes(work)
    sharded = 4  # weights and biases of two layers; the scalars are whole
    tensors = sharded * (2 + 2)  # model and average, and two means of Adam
    assert main == [[1, before] for before in range(tensors)]
    assert other == tensors * [[1, 0]]
    state = load_checkpoint(tmp_path / "last.pt")
    for name in ("model", "ema"):
        assert_same({key: tensor.numpy().tolist() for key, tensor in state[name].items()},
                    {key: array.tolist() for key, array in expected[name].items()})  # fmt: skip
    means = state["optimizer"]["state"].values()
    assert [m["exp_avg"].tolist() for m in means] == [m.tolist() for m in expected["optimizer"]]


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
