import json
import math
import threading
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from sacrebleu.metrics import BLEU, CHRF

from multimax import EvSoftMax, MultiMax, SoftMax, SparseMax
from multimax.data.pairs.sources import Languages, LibreOfficeHelp
from multimax.decoding import beam_search
from multimax.tasks import build_task, translation
from multimax.tasks.translation import Translation
from multimax.training.config import read_config
from multimax.training.run import run

ROOT = Path(__file__).parents[2]
TINY = [
    "model.embed_dim=16", "model.ffn_dim=16", "model.num_heads=2", "model.encoder_depth=1",
    "model.decoder_depth=1", "data.vocabulary_size=400", "trainer.batch_size=512",
    "trainer.eval_batch_size=200", "decoding.beam=3", "decoding.max_len_a=0",
    "decoding.max_len_b=8", "logger.wandb=disabled",
]  # fmt: skip


def composed(*overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return read_config(compose("config", overrides=list(overrides)))


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Builds a task over 40 pairs a split from overrides."""
    whole = LibreOfficeHelp._columns
    monkeypatch.setattr(
        LibreOfficeHelp, "_columns", lambda self, split: islice(whole(self, split), 40)
    )

    def make(*overrides, rank=0, world_size=1):
        config = composed(
            "experiment=mt_softmax", *TINY, f"data.cache={tmp_path}", f"output_dir={tmp_path}",
            *overrides,
        )  # fmt: skip
        torch.manual_seed(0)
        return build_task(config, rank, world_size, torch.device("cpu"))

    return make


def evaluate(task, split, reduce=lambda tensor: tensor):
    with torch.inference_mode():
        return task.evaluate(task.model.eval(), split, reduce)


def varied(task):
    """With weights that are large enough for each source to have a translation of its own."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in task.model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(generator=generator)
    return task


def one_by_one(task, split, **options):
    """The plain translations and the summed log-likelihood of a split, a sentence at a time."""
    pairs, vocabulary = task.data.splits[split], task.data.languages.target_vocabulary
    model, eos = task.model.eval(), vocabulary.eos_index
    lines, likelihood = [], 0.0
    for i in range(len(pairs)):
        source = torch.tensor([pairs.source[i].tolist()])
        target = pairs.target[i].tolist()
        with torch.no_grad():
            found = beam_search(model, source, eos=eos, max_len_b=8, **options)[0][0].tokens
            features = model(source, torch.tensor([[eos, *target[:-1]]]))
            log_p = model.output.log_probabilities(features)[0].double()
        lines.append(vocabulary.plain(vocabulary.decode(found)))
        likelihood += sum(log_p[j, token].item() for j, token in enumerate(target))
    return lines, likelihood


@pytest.mark.slow
@pytest.mark.parametrize(("split", "beam"), [("valid", 1), ("test", 3)])
def test_figures_are_those_of_sentences_one_by_one(build, split, beam):
    task = varied(build())
    metrics = evaluate(task, split)
    lines, likelihood = one_by_one(task, split, beam=beam)
    assert len(set(lines)) > 5
    tokens = int(task.data.splits[split].target.lengths.sum())
    references = [task.data.references[split]]
    assert metrics == {
        "bleu": BLEU().corpus_score(lines, references).score,
        "chrf": CHRF().corpus_score(lines, references).score,
        "loss": pytest.approx(-likelihood / tokens, rel=1e-5),
        "perplexity": pytest.approx(math.exp(-likelihood / tokens), rel=1e-5),
    }
    assert metrics["chrf"] > 0


@pytest.mark.slow
def test_the_beam_of_the_test_split_is_wider_and_all_options_reach_the_search(build, monkeypatch):
    seen = []

    def search(model, source, **options):
        seen.append(options)
        return beam_search(model, source, **options)

    monkeypatch.setattr(translation, "beam_search", search)
    task = build("decoding.length_penalty=0.7", "decoding.max_len_a=0.1")
    expected = {"eos": 1, "length_penalty": 0.7, "max_len_a": 0.1, "max_len_b": 8}
    for split, beam in (("valid", 1), ("test", 3)):
        seen.clear()
        evaluate(task, split)
        assert len(seen) > 1
        assert all(options == expected | {"beam": beam} for options in seen)


@pytest.mark.slow
def test_processes_share_the_evaluation(build):
    whole = varied(build())
    alone = evaluate(whole, "test")
    tasks = [build(rank=rank, world_size=3) for rank in range(3)]
    for task in tasks:
        task.model.load_state_dict(whole.model.state_dict())
    barrier, given, results = threading.Barrier(3), [None] * 3, [None] * 3

    def work(rank):
        def reduce(tensor):
            given[rank] = tensor
            barrier.wait()
            total = sum(given)
            barrier.wait()
            return total

        results[rank] = evaluate(tasks[rank], "test", reduce)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert result == pytest.approx(alone, rel=1e-6)


@pytest.mark.slow
def test_a_sentence_that_no_process_evaluated_is_noticed(build):
    with pytest.raises(RuntimeError, match="not every test sentence was evaluated exactly once"):
        evaluate(build(rank=1, world_size=2), "test")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["count", "sentence"])
def test_tokens_and_sentences_are_both_counted(build, part):
    task = build("decoding.max_len_b=1")

    def reduce(tensor):
        if part == "count" and tensor.shape == (3,):
            tensor[2] -= 1
        if part == "sentence" and tensor.dim() == 2:
            tensor[7] = 0
        return tensor

    with pytest.raises(RuntimeError, match="not every valid sentence was evaluated exactly once"):
        evaluate(task, "valid", reduce)


@pytest.mark.slow
def test_divergence_is_said(build):
    task = build("decoding.max_len_b=1")
    with torch.no_grad():
        task.model.output.weight.mul_(1e6)
    with pytest.raises(FloatingPointError, match=r"valid loss is .*lr"):
        evaluate(task, "valid")


@pytest.mark.slow
def test_batches_are_summed_in_double(build):
    task = build("decoding.max_len_b=1")
    metrics = evaluate(task, "valid")
    sums, tokens = [], 0
    with torch.inference_mode():
        for _, batch in task.eval_loaders["valid"]:
            counts = batch.target != task.model.padding_index
            features = task.model(batch.source, batch.target_in)[counts]
            loss = task.model.output.loss(features, batch.target[counts], reduction="sum")
            sums.append(loss.item())
            tokens += int(counts.sum())
    assert len(sums) > 2
    assert metrics["loss"] == pytest.approx(sum(sums) / tokens, rel=1e-12)


@pytest.mark.slow
def test_a_sparse_output_has_a_smoothed_perplexity(build):
    task = build("output=sparsemax", "model.embed_dim=32")
    with torch.no_grad():
        task.model.output.weight.mul_(20)  # so that many words get nothing
    metrics = evaluate(task, "valid")
    assert list(metrics) == ["bleu", "chrf", "loss", "smoothed_perplexity"]
    nll, tokens = 0.0, 0
    with torch.inference_mode():
        for _, batch in task.eval_loaders["valid"]:
            counts, output = batch.target != task.model.padding_index, task.model.output
            p = output.probabilities(task.model(batch.source, batch.target_in)[counts])
            p = p.gather(1, batch.target[counts][:, None])
            nll -= (0.99 * p + 0.01 / 400).log().sum().item()
            tokens += len(p)
    assert metrics["smoothed_perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    assert one_by_one(task, "valid", beam=1)[1] == -math.inf


@pytest.mark.slow
def test_training_loss_is_smoothed_and_weighs_by_target_tokens(build):
    task = build("loss.label_smoothing=0.3")
    batch = next(task.train_loader.batches(0))
    model = task.model.eval()
    features = model(batch.source, batch.target_in)
    log_p = model.output.log_probabilities(features)
    counts = batch.target != model.padding_index
    observed = log_p.gather(-1, batch.target.unsqueeze(-1)).squeeze(-1)[counts].mean()
    expected = -0.7 * observed - 0.3 * log_p[counts].mean()
    torch.testing.assert_close(task.loss(model, batch), expected)
    assert task.weight(batch) == counts.sum() < counts.numel()
    assert not any(torch.equal(batch.target_in, other) for other in (batch.target, batch.source))


@pytest.mark.slow
def test_batches_are_counted_in_tokens_of_an_update(build):
    whole, half = build(), build(world_size=2)
    accumulated = build("trainer.accumulation=4")
    for task, limit in ((whole, 512), (half, 256), (accumulated, 128)):
        largest = max(
            max(batch.source.size(1), batch.target.size(1)) * len(batch.source)
            for batch in task.train_loader.batches(0)
        )
        assert 0.5 * limit < largest <= limit


@pytest.mark.slow
def test_attention_is_chosen_for_each_place(build):
    task = build(
        "attention=multimax",
        "model.encoder_attention=sparsemax",
        "model.cross_attention={name: softmax, temperature: 2.0}",
    )
    layer = task.model.decoder.layers[0]
    assert isinstance(task.model.encoder.layers[0].self_attn.normalizer, SparseMax)
    assert isinstance(layer.self_attn.normalizer, MultiMax)
    assert isinstance(layer.encoder_attn.normalizer, SoftMax)
    text = task.describe()["attention"]
    assert "encoder SparseMax" in text
    assert "decoder MultiMax" in text
    assert "cross SoftMax(temperature=2" in text
    everywhere = build("attention=evsoftmax").model
    found = [m for m in everywhere.modules() if isinstance(m, EvSoftMax)]
    assert len(found) == 3


@pytest.mark.slow
def test_what_is_said_before_training(build):
    said = build("data.max_length=20").describe()
    assert said["data"].startswith("libreoffice_help de-en: ")
    assert said["data"].endswith("40 valid, 40 test pairs, vocabularies of 400 and 400")
    assert said["left out"].endswith("train longer than 20 tokens")
    assert build().describe()["left out"] == "nothing"
    shared = build("trainer.batch_size=600", world_size=2)
    left = len(build("trainer.batch_size=300").train_loader) - 2 * len(shared.train_loader)
    assert left == 1
    assert shared.describe()["left out"] == "1 batches of an epoch, each time others"
    assert said["output"].startswith("SoftMax(")


@pytest.mark.slow
def test_every_normalizer_is_inspected_without_padding(build):
    task = build("attention=multimax", "output=multimax")
    with torch.no_grad():
        rows = task.inspect(task.model.eval())
    places = ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn",
              "decoder.layers.0.encoder_attn", "decoder.output_projection"]  # fmt: skip
    assert list(rows) == [f"{place}.normalizer" for place in places]
    test = task.data.splits["test"]
    assert rows["decoder.output_projection.normalizer"]["entropy_count"] == (
        test.target.lengths.sum()
    )
    heads = 2
    assert rows["encoder.layers.0.self_attn.normalizer"]["entropy_count"] == (
        heads * test.source.lengths.sum()
    )


@pytest.mark.slow
def test_a_run_has_its_signatures_and_counts_in_its_result(build, tmp_path):
    task = build()  # so that the data is small here too
    config = composed(
        "experiment=mt_multimax", "debug=two_updates", *TINY, f"data.cache={tmp_path}",
        f"output_dir={tmp_path}", "data.max_length=30",
    )  # fmt: skip
    with open("/dev/null", "w") as nowhere:
        result = run(config, Console(file=nowhere))
    (file,) = tmp_path.rglob("result.json")
    assert json.loads(file.read_text()) == result
    assert result["notes"]["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|")
    assert result["notes"]["chrf"].startswith("nrefs:1|")
    (reason,) = result["notes"]["left_out"]["train"]
    assert reason == "longer than 30 tokens"
    assert result["metrics"]["test"]["examples"] == 40
    assert result["best"]["metric"] == "valid/bleu"
    (checkpoint,) = tmp_path.rglob("best.pt")
    fingerprint = torch.load(checkpoint, weights_only=True)["fingerprint"]
    assert fingerprint == task.data.languages.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("beam", 0, r"a whole number in \[1, 1000\]"),
        ("monitor_beam", "true", r"a whole number in \[1, 1000\]"),
        ("length_penalty", "long", "a number"),
        ("max_len_a", -1, r"a number in \[0, 100\]"),
        ("max_len_b", 2.5, r"a whole number in \[1, 10000\]"),
    ],
)
def test_bad_decoding_options(build, field, value, remedy):
    with pytest.raises(ValueError, match=rf"decoding\.{field}=.* must be {remedy}"):
        build(f"decoding.{field}={value}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["beam", "monitor_beam"])
def test_a_beam_has_at_least_one_word_to_spare(build, name):
    build(f"decoding.{name}=399")
    with pytest.raises(ValueError, match=f"decoding.{name}=400 must be less than 400, the number"):
        build(f"decoding.{name}=400")


def test_a_normalizer_that_does_not_exist(build):
    with pytest.raises(ValueError, match="'hardmax'"):
        build("model.cross_attention=hardmax")


def test_the_paper_recipe_is_fairseqs_transformer_iwslt_de_en():
    config = composed("experiment=mt_multimax", "scale=paper", "data.root=/somewhere")
    model = config.model
    assert (model.encoder_depth, model.decoder_depth, model.embed_dim) == (6, 6, 512)
    assert (model.ffn_dim, model.num_heads, model.pre_norm) == (1024, 4, False)
    assert (model.tie_embeddings, model.dropout) == (True, 0.3)
    assert (model.attention_dropout, model.activation_dropout) == (0, 0)
    optimizer, schedule, trainer = config.optimizer, config.schedule, config.trainer
    assert (optimizer.name, optimizer.lr, optimizer.betas) == ("adamw", 5e-4, [0.9, 0.98])
    assert (optimizer.weight_decay, optimizer.filter_bias_and_bn) == (1e-4, False)
    assert (schedule.name, schedule.warmup, schedule.warmup_lr) == ("inverse_sqrt", 4000, 1e-7)
    assert (trainer.batch_size, trainer.epochs, trainer.clip_norm) == (4096, 50, None)
    assert (config.loss.label_smoothing, config.decoding.beam) == (0.1, 5)
    assert (config.data.name, config.data.source, config.data.target) == ("iwslt14", "de", "en")
    assert trainer.report == "best"

    class Sized:
        padding_index = 1

        def __init__(self, size):
            self.size = size

    with torch.device("meta"):  # the sizes of fairseq's dictionaries
        languages = Languages("de", "en", Sized(8848), Sized(6632))
        network = Translation.build_model(config, SimpleNamespace(languages=languages))
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == 39.5
