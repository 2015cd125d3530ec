import io
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console

from multimax.data.prepare.wikitext103 import MEMBERS, Sizes, prepare
from multimax.data.vocabulary import WordVocabulary
from multimax.generate import language_model as generate_lm
from multimax.generate import main
from multimax.training.run import run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TEXT = "the cat sat on the mat\nthe dog ate the hat of the cat\n\na naïve cat\n" * 20
TINY = (
    "experiment=lm_multimax", "data.block_size=16", "data.context_window=8", "model.embed_dim=16",
    "model.ffn_dim=16", "model.depth=1", "model.num_heads=2", "trainer.epochs=null",
    "trainer.updates=3", "trainer.batch_size=4", "trainer.evaluate_every=2", "schedule.warmup=1",
    "logger.wandb=disabled",
)  # fmt: skip


def train(folder, *overrides):
    """The folder of a run."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("config", [*TINY, f"output_dir={folder}/out", *overrides])
    with open("/dev/null", "w") as nowhere:
        run(config, Console(file=nowhere))
    AcceleratorState._reset_state()
    (result,) = (folder / "out").rglob("result.json")
    return result.parent


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text(TEXT)
    return folder


def files(text_folder, cache):
    """The overrides for byte pairs of a small text."""
    places = f"data.root={text_folder}", f"data.cache={cache}"
    return "data=text_files", "data.vocabulary_size=270", *places


@pytest.fixture(scope="module")
def trained(text_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return train(folder, *files(text_folder, folder), "trainer.updates=40", "optimizer.lr=1e-2")


@pytest.fixture(scope="module")
def trained_on_words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    for name in MEMBERS.values():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(TEXT)
    size = len(TEXT.split()) + TEXT.count("\n")
    words = -(-(4 + len(set(TEXT.split()))) // 8) * 8
    prepare(folder, folder / "prepared", Sizes(size, size, size, words), report=lambda line: None)
    return train(folder, "data=wikitext103", f"data.root={folder}/prepared")


def said(capsys, *arguments):
    main(["lm", *map(str, arguments)])
    return capsys.readouterr().out


def refused(*arguments):
    """How the command ends."""
    with pytest.raises(SystemExit) as stop:
        main(["lm", *map(str, arguments)])
    return str(stop.value)


def test_it_continues_the_prompt(trained, capsys):
    text = said(capsys, trained, "the cat", "--tokens", 40)
    assert text.startswith("the cat")
    assert text.endswith("\n")
    assert len(text) > 60
    assert said(capsys, trained, "the cat", "--tokens", 40) == text
    assert said(capsys, trained, "the cat", "--tokens", 40, "--seed", 1) != text
    assert said(capsys, trained, "the cat", "--tokens", 40, "--temperature", 5) != text


@pytest.mark.parametrize("prompt", ["", "the naïve 東京", "two\n\nlines "])
def test_any_prompt(trained, capsys, prompt):
    assert said(capsys, trained, prompt, "--tokens", 3).startswith(prompt)


def test_top_k_of_one_takes_the_best_token_each_time(trained):
    model, vocabulary = generate_lm.load(trained)
    tokens = [vocabulary.eos_index, *vocabulary.encode("the ")]
    start = len(tokens)
    with torch.inference_mode():
        for _ in range(12):
            p = model.output.probabilities(model(torch.tensor([tokens]))[0, -1])
            p[vocabulary.padding_index] = 0
            tokens.append(int(p.argmax()))
    pieces = generate_lm.continue_text(model, vocabulary, "the ", max_tokens=12, top_k=1)
    assert "".join(pieces) == "the " + "".join(vocabulary.decode(tokens[start:]))


def test_number_of_tokens_and_options_reach_the_sampler(trained, monkeypatch):
    calls = []

    def sample(model, prompt, **options):
        calls.append((prompt.tolist(), options))
        return iter([5])

    monkeypatch.setattr(generate_lm, "sample", sample)
    main(["lm", str(trained), "a", "--tokens", "7", "--temperature", "0.5", "--top-k", "3",
          "--top-p", "0.8"])  # fmt: skip
    ((prompt, options),) = calls
    _, vocabulary = generate_lm.load(trained)
    assert prompt == [vocabulary.eos_index, *vocabulary.encode("a")]
    assert options.pop("generator").initial_seed() == 0
    assert options == {
        "max_tokens": 7, "temperature": 0.5, "top_k": 3, "top_p": 0.8, "exclude": [],
    }  # fmt: skip


class Terminal(io.StringIO):
    """Shows what was flushed."""

    shown = ""

    def flush(self):
        self.shown = self.getvalue()


def test_text_is_printed_as_it_is_sampled(trained, monkeypatch):
    seen, terminal = [], Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    _, vocabulary = generate_lm.load(trained)

    def sample(*_, **__):
        for token in vocabulary.encode("xyz"):
            yield token
            seen.append(terminal.shown)

    monkeypatch.setattr(generate_lm, "sample", sample)
    main(["lm", str(trained), "a"])
    assert seen == ["ax", "axy", "axyz"]


def test_ctrl_c_ends_quietly(trained, monkeypatch, capsys):
    _, vocabulary = generate_lm.load(trained)

    def sample(*_, **__):
        yield from vocabulary.encode("xyz")
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_lm, "sample", sample)
    with pytest.raises(SystemExit, match="130"):
        main(["lm", str(trained), "a"])
    out, err = capsys.readouterr()
    assert (out, err) == ("axyz\n", "")


def test_checkpoints_of_a_run(trained, capsys):
    last = said(capsys, trained / "last.pt", "the", "--tokens", 9)
    assert said(capsys, trained, "the", "--tokens", 9) == last
    assert said(capsys, trained / "best.pt", "the", "--tokens", 9).startswith("the")


def test_a_sparse_output_samples_only_what_has_probability(text_folder, tmp_path, monkeypatch):
    run_folder = train(tmp_path, *files(text_folder, tmp_path), "output=sparsemax",
                       "trainer.updates=40", "optimizer.lr=1e-2")  # fmt: skip
    model, vocabulary = generate_lm.load(run_folder)
    tokens = [vocabulary.eos_index, *vocabulary.encode("the")]
    start, original = len(tokens), generate_lm.sample

    def remembering(*arguments, **options):
        for token in original(*arguments, **options):
            tokens.append(token)
            yield token

    monkeypatch.setattr(generate_lm, "sample", remembering)
    list(generate_lm.continue_text(model, vocabulary, "the", max_tokens=60))
    with torch.inference_mode():
        p = model.output.probabilities(model(torch.tensor([tokens[:-1]])))[0, start - 1 :]
    assert len(p) == 60
    assert (p.gather(1, torch.tensor(tokens[start:])[:, None]) > 0).all()
    assert (p == 0).any(-1).all()


def test_words(trained_on_words, capsys):
    main(["lm", str(trained_on_words), "the  zebra sat", "--tokens", "200", "--seed", "3"])
    out, err = capsys.readouterr()
    assert out.startswith("the <unk> sat ")
    assert err == "<unk> in place of unknown words: zebra\n"
    counts = Counter(out.split()[3:])
    assert set(counts) <= set(TEXT.split())
    assert len(counts) > 5


def test_moved_data(trained_on_words, capsys, tmp_path):
    config = OmegaConf.load(trained_on_words / "config.yaml")
    prepared, config.data.root = config.data.root, "/gone"
    moved = tmp_path / "run"
    moved.mkdir()
    (moved / "last.pt").symlink_to(trained_on_words / "last.pt")
    OmegaConf.save(config, moved / "config.yaml")
    assert "there is no /gone/facts.json" in refused(moved, "the")
    assert said(capsys, moved, "the", "--data-root", prepared, "--tokens", 2).startswith("the")


def copy_of(folder, trained, change=lambda config: None):
    folder.mkdir()
    (folder / "last.pt").symlink_to(trained / "last.pt")
    config = OmegaConf.load(trained / "config.yaml")
    change(config)
    OmegaConf.save(config, folder / "config.yaml")
    return folder


def test_another_vocabulary(trained, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "train.txt").write_text("quite an other text with other pairs of words in it\n" * 20)
    for split in ("valid", "test"):
        (other / f"{split}.txt").write_text(TEXT)
    problem = refused(trained, "a", "--data-root", other)
    assert problem.startswith(f"error: {trained}/last.pt was trained with another vocabulary")

    def larger(config):
        config.data.vocabulary_size = 272

    assert "another vocabulary" in refused(copy_of(tmp_path / "larger", trained, larger), "a")


def test_configuration_of_another_model(trained, tmp_path):
    def deeper(config):
        config.model.depth = 2

    problem = refused(copy_of(tmp_path / "deeper", trained, deeper), "a")
    assert "does not fit the model in config.yaml beside it" in problem
    assert "decoder.layers.1" in problem


def test_wrong_task(trained, tmp_path):
    def other(config):
        config.task.name = "image_classification"

    problem = refused(copy_of(tmp_path / "image", trained, other), "a")
    assert "was trained for image_classification: give the run of an experiment lm_" in problem


def test_missing_or_damaged_files(trained, tmp_path):
    whole = (trained / "last.pt").read_bytes()
    assert f"there is no {tmp_path}/config.yaml" in refused(tmp_path, "a")
    (tmp_path / "config.yaml").write_bytes((trained / "config.yaml").read_bytes())
    assert f"no checkpoint at {tmp_path}/last.pt" in refused(tmp_path, "a")
    (tmp_path / "last.pt").write_bytes(whole[:1000])
    assert "cannot be read as a checkpoint" in refused(tmp_path, "a")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["a", "--tokens", "0"], "--tokens must be >= 1, got 0"),
        (["a", "--temperature", "0"], "temperature must be a finite number > 0"),
        (["a", "--temperature", "inf"], "temperature must be a finite number > 0, got inf"),
        (["a", "--temperature", "nan"], "temperature must be a finite number > 0, got nan"),
        (["a", "--top-p", "nan"], "top_p must be in"),
        (["a", "--top-k", "0"], "top_k must be >= 1"),
        (["a", "--top-p", "1.5"], "top_p must be in"),
        (["caf\udce9"], "is not UTF-8"),
    ],
)
def test_arguments_out_of_range(trained, arguments, problem):
    assert problem in refused(trained, *arguments)


def test_words_that_are_no_words_are_never_sampled():
    vocabulary = WordVocabulary(["a", "b", "madeupword0000", "madeupword0001"])
    names = [vocabulary.words[token] for token in vocabulary.never_sampled]
    assert names == ["<s>", "<unk>", "madeupword0000", "madeupword0001"]
