"""Parameters, FLOPs and memory on the meta device: closed forms, and real runs on the CPU."""

from itertools import islice
from statistics import mean

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from experiments.cost import META, KnownIntegers, Meter, cost_of
from experiments.selection import config_of
from multimax import use_backend
from multimax.tasks import TASKS, build_task

DEIT = "experiment=deit_softmax", "scale=paper"
SMALL = "experiment=deit_softmax", "model.depth=1"
LM = (
    "experiment=lm_multimax", "model.embed_dim=32", "model.ffn_dim=48", "model.num_heads=2",
    "model.depth=1", "data.block_size=64", "data.context_window=0", "data.vocabulary_size=300",
    "model.dropout=0", "trainer.batch_size=6", "trainer.accumulation=3",
)  # fmt: skip
RECALL = "experiment=recall_multimax", "data.vocabulary_size=64", "trainer.batch_size=8"
ADAPTIVE = (
    "experiment=lm_multimax", "scale=paper_wiki103", "model.embed_dim=32", "model.ffn_dim=32",
    "model.num_heads=2", "model.depth=1", "data=text_files", "data.vocabulary_size=600",
    "data.block_size=64", "data.context_window=0", "model.adaptive_cutoffs=[60,200]",
    "trainer.batch_size=4", "trainer.accumulation=1",
)  # fmt: skip


def real(*settings):
    """The task of a configuration on the CPU."""
    config = config_of(*settings)
    kind = TASKS[config.task.name]
    source = kind.make_data(config, 1)
    model = kind.build_model(config, source)
    return build_task(config, 0, 1, torch.device("cpu"), (source, model))


def test_deit_small_has_22_million_parameters_and_the_flops_of_its_products():
    cost = cost_of(config_of(*DEIT, "model.gradient_checkpointing=false"))
    tokens, width, depth = 196, 384, 12
    # 22,050,664 as published, without class token and its position and without qkv bias.
    assert cost.parameters == 22_050_664 - 2 * width - depth * 3 * width
    patches = tokens * 16 * 16 * 3 * width
    blocks = depth * (12 * tokens * width**2 + 2 * tokens**2 * width)
    forward = patches + blocks + width * 1000
    assert 2 * forward == pytest.approx(2 * 4.6e9, rel=0.02)  # as published: 4.6 G
    # Backward has a product for each factor, but the images need no gradient.
    assert cost.flops == 1024 * 2 * (3 * forward - patches)
    assert cost.units == 1024
    assert cost.updates == 300 * (1_281_167 // 1024)
    assert cost.state == pytest.approx(4 * 5 * cost.parameters, rel=1e-4)  # and step numbers


def test_gradient_checkpointing_computes_the_blocks_again_and_holds_less():
    settings = *DEIT, "model.depth=3"
    plain = cost_of(config_of(*settings, "model.gradient_checkpointing=false"), processes=4)
    again = cost_of(config_of(*settings), processes=4)
    assert 1.25 < again.flops / plain.flops <= 4 / 3
    assert again.eager < plain.eager * 2 / 3
    assert again.fused is not None
    assert plain.fused is not None
    assert again.fused < plain.fused * 2 / 3
    matrices = 4 * 256 * 6 * 196 * 196  # of a layer; SoftMax saves one, or its scores too
    assert 3 * matrices < plain.eager - plain.fused < 3 * 3 * matrices


def test_a_language_model_has_the_flops_of_its_products():
    cost = cost_of(config_of(*LM))
    tokens, width, hidden, depth, words, block = 6 * 64, 32, 48, 1, 300, 64
    layer = 4 * width**2 + 2 * width * hidden + 2 * block * width
    assert cost.flops == 3 * 2 * tokens * (depth * layer + words * width)
    assert (cost.units, cost.updates) == (tokens, 2000)
    halves = cost_of(config_of(*LM, "trainer.accumulation=1"), processes=3)
    assert (halves.flops, halves.units, halves.eager) == (cost.flops, cost.units, cost.eager)


@pytest.mark.parametrize("settings", [RECALL, ADAPTIVE, (*SMALL, "attention=entmax15")])
def test_flops_are_those_of_a_real_update_also_where_shapes_depend_on_tokens(settings):
    task = real(*settings)
    batches = list(islice(task.train_loader.batches(0), 16))
    sizes = [batch[0].numel() for batch in batches]  # all the same but for recall
    with use_backend("eager"), FlopCounterMode(display=False) as counter:
        expected = cost_of(config_of(*settings))
        before = counter.get_total_flops()
        task.loss(task.model, batches[sizes.index(max(sizes))]).backward()
    counted = counter.get_total_flops() - before
    assert expected.flops == pytest.approx(counted * mean(sizes) / max(sizes), rel=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        ("experiment=deit_multimax", "model.depth=2", "trainer.batch_size=100"),
        ("experiment=lm_multimax", "model.depth=1", "data.vocabulary_size=500"),
    ],
)
def test_memory_is_that_of_a_real_update(settings):
    """The peak of torch's allocator; the gradients, which are the rest of it, are smaller."""
    cost = cost_of(config_of(*settings))
    task = real(*settings)
    with (
        use_backend("eager"),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        batch = next(iter(task.train_loader.batches(0)))
        task.loss(task.model, batch).backward()
    events = profiler.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    peak = max(sum(changes[: i + 1]) for i in range(len(changes)))
    assert peak / 1.3 < cost.eager < 1.1 * peak


def test_the_meter_counts_what_is_held_once_and_gradients_until_they_are_added():
    model = nn.Linear(10, 20, bias=False, device="meta")
    with Meter(model) as meter:
        x = torch.empty(30, 10, device=META)  # 1,200 bytes
        y = model(x)  # 2,400, and a view
        y.view(-1)
        assert meter.peak == 1200 + 2400
        del y
        z = model(x) + 1  # 2,400 twice
        assert meter.peak == 1200 + 2400 + 2400
        z.sum().backward()
        del z
        torch.empty(1200, device=META)  # not beside the gradient, which the model has
    assert meter.flops == 3 * 2 * 30 * 10 * 20
    assert meter.peak == 1200 + 4800
    with Meter(model) as meter:
        assert model.weight.grad is not None
        torch.add(model.weight.grad, 1)
    assert meter.peak == 800


def test_states_are_those_of_the_optimizer_and_the_average():
    plain = cost_of(config_of(*SMALL))
    averaged = cost_of(config_of(*SMALL, "trainer.ema_decay=0.9"))
    momentum = ["optimizer.name=nesterov", "+optimizer.momentum=0.9", "optimizer.betas=null"]
    nesterov = cost_of(config_of(*SMALL, *momentum, "optimizer.eps=null"))
    weights = 4 * plain.parameters
    assert plain.state == pytest.approx(4 * weights, rel=1e-3)  # and the numbers of steps
    assert averaged.state - plain.state == weights
    assert nesterov.state == 3 * weights


def test_known_integers_have_the_shapes_of_their_values():
    tokens = torch.tensor([[3, 0, 5], [0, 0, 7]])
    with KnownIntegers():
        on_meta = tokens.to(META)
        assert (on_meta != 0).nonzero().shape == (3, 2)
        assert torch.empty(2, 3, 4, device=META)[on_meta != 0].shape == (3, 4)
        assert bool((on_meta > 6).any())
        assert not bool((torch.empty(3, device=META) > 0).any())  # nobody knows: no


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match=r"use trainer\.batch_size="):
        cost_of(config_of("experiment=deit_softmax"), processes=3)
