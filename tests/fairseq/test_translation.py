"""Translation models through the command-line tools, and the way to ours and back."""

import math
import re

import pytest
import torch
from conftest import COMMON, FLAGS, MODELS, TRAIN, USER, batch, forked, number, tool, words
from fairseq.checkpoint_utils import load_model_ensemble_and_task

from multimax.decoding import beam_search
from multimax.files import load_checkpoint
from multimax.integrations.fairseq.convert import load_model, to_multimax

NAME = "transformer_iwslt_de_en"
MODEL = ["--arch", f"multimax_{NAME}", *words(MODELS[NAME]), *FLAGS[NAME]]
MODEL += ["--attention-normalizer", "multimax:order=1"]
MODEL += ["--encoder-attention-normalizer", "entmax:alpha=1.3,learned=true"]
MODEL += ["--cross-attention-normalizer", "topk:k=4"]
MODEL += ["--output-normalizer", "evsoftmax:floor=1e-5", "--criterion", "multimax_output_loss"]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A checkpoint, and what fairseq-train printed."""
    folder = tmp_path_factory.mktemp("translation")
    line = [data / "mt", *MODEL, "--label-smoothing", "0.1"]
    line += ["--eval-bleu", "--best-checkpoint-metric", "bleu"]
    line += ["--maximize-best-checkpoint-metric", "--dropout", "0.0", "--max-epoch", "6"]
    log = tool("fairseq-train", *line, *TRAIN, "--save-dir", folder)
    return folder / "checkpoint_best.pt", log


def generate(run, data, checkpoint):
    """Score and words of all hypotheses of each sentence, by its number, and BLEU."""
    line = [data / "mt", "--path", checkpoint, "--beam", "5", "--nbest", "5", *COMMON]
    text, found = run("fairseq-generate", *line), {}
    for index, score, tokens in re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", text, re.MULTILINE):
        found.setdefault(int(index), []).append((float(score), tokens))
    return found, number("BLEU4 =", text)


def test_there_and_back(trained, data, tmp_path):
    checkpoint, log = trained
    assert (
        "normalizers: encoder entmax:alpha=1.3,learned=true, decoder multimax:order=1, "
        "cross topk:k=4, output evsoftmax:floor=1e-05" in log
    )
    found, bleu = generate(tool, data, checkpoint)
    assert len(found) == 16
    assert all(len({tokens for _, tokens in hypotheses}) == 5 for hypotheses in found.values())
    assert number(r"best_bleu", log) > 5 < bleu  # it has learned something

    convert = ["-m", "multimax.integrations.fairseq.convert"]
    tool("python", *convert, "to-multimax", checkpoint, tmp_path / "ours.pt")
    forked("convert", "to-fairseq", tmp_path / "ours.pt", tmp_path / "back.pt")
    assert generate(forked, data, tmp_path / "back.pt") == (found, bleu)

    ours = load_model(tmp_path / "ours.pt")
    _, _, task = load_model_ensemble_and_task([str(checkpoint)])
    sample, dictionary = batch(task, 16, "test"), task.target_dictionary
    lists = beam_search(ours, sample["net_input"]["src_tokens"], eos=dictionary.eos(), beam=5)
    for index, hypotheses in zip(sample["id"].tolist(), lists, strict=True):
        assert [dictionary.string(h.tokens) for h in hypotheses] == [t for _, t in found[index]]
        scores = [h.score / math.log(2) for h in hypotheses]
        assert scores == pytest.approx([score for score, _ in found[index]], abs=1e-3)


def test_finetune_a_converted_checkpoint(trained, data, tmp_path):
    content = to_multimax(load_checkpoint(trained[0]))
    assert content["options"]["cross_attention"] == {"name": "topk", "k": 4}
    forked("convert", "to-multimax", trained[0], tmp_path / "ours.pt")
    forked("convert", "to-fairseq", tmp_path / "ours.pt", tmp_path / "back.pt")
    line = [data / "mt", *MODEL, "--finetune-from-model", tmp_path / "back.pt"]
    line += [*TRAIN, "--save-dir", tmp_path, "--lr", "0", "--max-update", "1"]
    assert "loading pretrained model from" in forked("fairseq-train", *line)
    tuned = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)["model"]
    assert all(torch.equal(value, content["model"][key]) for key, value in tuned.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_learned_pos": True}, r"decoder_learned_pos=True \(only False\)"),
        ({"encoder_ffn_embed_dim": 64}, r"encoder_ffn_embed_dim=64 \(only 48\)"),
        ({"activation_fn": "gelu"}, "activation_fn='gelu'"),
        ({"decoder_layers": 3}, "do not fit the options"),
        ({"attention_normalizer": "softmacks"}, "unknown normalizer"),
        ({"decoder_embed_dim": None}, "no Transformer of fairseq: the checkpoint lacks"),
    ],
)
def test_what_ours_is_not(trained, changes, message):
    checkpoint = load_checkpoint(trained[0])
    settings = vars(checkpoint["cfg"]["model"]) | changes
    settings = {key: value for key, value in settings.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        to_multimax({"cfg": {"model": settings}, "model": checkpoint["model"]})


def test_what_is_no_checkpoint(tmp_path):
    torch.save({"model": {}}, tmp_path / "x.pt")
    for direction, source, message in (
        ("to-multimax", "x.pt", r"x\.pt: no checkpoint of fairseq"),
        ("to-fairseq", "x.pt", "no converted model: 'class' must be one of"),
        ("to-fairseq", "z.pt", r"no checkpoint at .*z\.pt"),
    ):
        with pytest.raises(AssertionError, match=message):
            forked("convert", direction, tmp_path / source, tmp_path / "y.pt")
        assert not (tmp_path / "y.pt").exists()


def test_user_dir_is_printed():
    assert tool("python", "-m", "multimax.integrations.fairseq").splitlines()[-1] == USER[1]
