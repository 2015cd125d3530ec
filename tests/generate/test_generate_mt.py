import io
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from rich.console import Console

from multimax.data.pairs.sources import LibreOfficeHelp
from multimax.data.vocabulary import BytePairs
from multimax.generate import main
from multimax.generate.translation import load
from multimax.training.run import run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
OPTIONS = [
    "experiment=mt_multimax", "model.embed_dim=32", "model.ffn_dim=32", "model.num_heads=2",
    "model.encoder_depth=1", "model.decoder_depth=2", "model.dropout=0", "loss.label_smoothing=0",
    "data.vocabulary_size=320", "data.max_length=40", "trainer.epochs=null", "trainer.updates=250",
    "trainer.evaluate_every=250", "trainer.batch_size=1024", "optimizer.lr=1e-2",
    "schedule.warmup=10", "logger.wandb=disabled",
]  # fmt: skip


class Input:
    """Standard input of some bytes."""

    def __init__(self, content):
        self.buffer = io.BytesIO(content)

    def isatty(self):
        return False


@pytest.fixture(scope="module")
def pairs():
    """16 short pairs, which are all splits of the embedded data."""
    whole, found = LibreOfficeHelp._columns, []
    for german, english in whole(LibreOfficeHelp(), "train"):
        if 15 < len(german) < 30 and german.isascii():
            found.append((german, english))
    chosen = found[:16]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LibreOfficeHelp, "_columns", lambda self, split: islice(chosen, None))
        yield chosen


@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory):
    """The folder of a run that knows the pairs by heart."""
    root = tmp_path_factory.mktemp("mt")
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose(
            "config", overrides=[*OPTIONS, f"data.cache={root}", f"output_dir={root}/out"]
        )
    with open("/dev/null", "w") as nowhere:
        result = run(config, Console(file=nowhere))
    assert result["metrics"]["test"]["bleu"] > 95
    (path,) = root.rglob("result.json")
    return path.parent


@pytest.fixture
def generate(trained, monkeypatch, capsys):
    """Runs the command; returns what it printed on standard output and standard error."""

    def call(content, *arguments, checkpoint=None):
        monkeypatch.setattr(sys, "stdin", Input(content))
        main(["mt", str(checkpoint or trained), *arguments])
        return capsys.readouterr()

    return call


def lines(pairs, side):
    return "".join(pair[side] + "\n" for pair in pairs)


def test_lines_are_translated_in_order(generate, pairs, trained):
    said, warned = generate(lines(pairs, 0).encode())
    assert warned == ""
    right = [a == b for a, b in zip(said.split("\n"), lines(pairs, 1).split("\n"), strict=True)]
    assert sum(right) >= 16  # of 17, the end included
    again, _ = generate(lines(pairs, 0).encode(), checkpoint=trained / "best.pt")
    assert again == said


def test_a_line_does_not_depend_on_the_others(generate, pairs):
    together, _ = generate(lines(pairs, 0).encode())
    alone = "".join(generate(lines([pair], 0).encode())[0] for pair in pairs)
    assert alone == together


def test_empty_lines_stay_empty_lines(generate, pairs):
    german, english = pairs[0]
    said, _ = generate(f"\n{german}\n  \n\n{german}".encode())
    assert said == f"\n{english}\n\n\n{english}\n"
    assert generate(b"")[0] == ""
    assert generate(b"\r\n")[0] == "\n"


def test_more_lines_than_are_read_at_once(generate, pairs):
    content = lines(pairs, 0) * 20
    said, _ = generate(content.encode())
    once, _ = generate(lines(pairs, 0).encode())
    assert said == once * 20


def test_a_line_that_is_too_long_is_shortened_with_a_warning(generate, pairs):
    words = " ".join(pair[0] for pair in pairs)
    said, warned = generate(f"{pairs[0][0]}\n{words}\n".encode())
    assert said.startswith(pairs[0][1] + "\n")
    assert said.count("\n") == 2
    assert "more than any training sentence: only its first 40 are translated" in warned
    assert warned.count("\n") == 1


def test_beam_and_length_penalty_reach_the_search(generate, pairs, monkeypatch):
    from multimax.generate import translation as generate_mt

    seen, search = [], generate_mt.beam_search

    def spy(model, source, **options):
        seen.append(options)
        return search(model, source, **options)

    monkeypatch.setattr(generate_mt, "beam_search", spy)
    generate(pairs[0][0].encode())
    generate(pairs[0][0].encode(), "--beam", "2", "--length-penalty", "0.5")
    assert [(o["beam"], o["length_penalty"]) for o in seen] == [(5, 1.0), (2, 0.5)]
    assert seen[0]["max_len_a"] == 1.2


def test_the_heat_map_of_the_first_sentence(generate, pairs, tmp_path):
    picture = tmp_path / "attention.png"
    said, noted = generate(f"\n{lines(pairs[:2], 0)}".encode(), "--attention", str(picture))
    assert said.count("\n") == 3
    assert f"{picture} drawn of {pairs[0][0]!r}" in noted
    image = Image.open(picture)
    assert image.width > image.height > 100
    assert len(image.convert("RGB").getcolors(2**24)) > 20


def test_dollar_signs_in_a_picture(trained, pairs, tmp_path, monkeypatch):
    translator = load(trained)
    monkeypatch.setattr(BytePairs, "pieces", lambda self, tokens: [r"$\frac$" for _ in tokens])
    translator.draw_attention(pairs[0][0], tmp_path / "attention.pdf")
    assert (tmp_path / "attention.pdf").stat().st_size > 1000


def test_cross_attention_is_a_distribution_over_the_source(trained, pairs):
    translator = load(trained)
    source = translator._encode(pairs[0][0])
    target = translator.languages.target_vocabulary.encode([pairs[0][1]])[0]
    maps = translator.cross_attention(source, target)
    assert [tuple(weights.shape) for weights in maps] == [(len(target), len(source))] * 2
    for weights in maps:
        torch.testing.assert_close(weights.sum(1), torch.ones(len(target)))
    assert not torch.equal(maps[0], maps[1])
    # The last row is of the word that predicts the end: it sees all words but the end itself.
    shorter = translator.cross_attention(source, target[:-1])
    torch.testing.assert_close(shorter[0], maps[0][:-1])


class TestBadInput:
    def refused(self, generate, message, *arguments, content=b"Hallo", checkpoint=None):
        with pytest.raises(SystemExit, match=message):
            generate(content, *arguments, checkpoint=checkpoint)

    def test_no_checkpoint(self, generate, tmp_path):
        self.refused(generate, "there is no .*config.yaml", checkpoint=tmp_path / "best.pt")
        self.refused(generate, "there is no .*config.yaml", checkpoint=tmp_path)

    def copy(self, trained, tmp_path, **changes):
        config = (trained / "config.yaml").read_text()
        for old, new in changes.items():
            assert old in config
            config = config.replace(old, new)
        (tmp_path / "config.yaml").write_text(config)
        (tmp_path / "best.pt").write_bytes((trained / "best.pt").read_bytes())
        return tmp_path

    def test_a_truncated_checkpoint(self, generate, trained, tmp_path):
        folder = self.copy(trained, tmp_path)
        content = (folder / "best.pt").read_bytes()
        (folder / "best.pt").write_bytes(content[: len(content) // 2])
        self.refused(generate, r"best\.pt cannot be read as a checkpoint", checkpoint=folder)

    def test_another_vocabulary_of_the_same_size(self, generate, trained, tmp_path):
        swap = {"source: de": "source: en", "target: en": "target: de"}
        folder = self.copy(trained, tmp_path, **swap)
        self.refused(generate, r"another vocabulary than that of libreoffice", checkpoint=folder)

    def test_another_vocabulary_size(self, generate, trained, tmp_path):
        folder = self.copy(trained, tmp_path, **{"vocabulary_size: 320": "vocabulary_size: 300"})
        self.refused(generate, r"another vocabulary than that of libreoffice", checkpoint=folder)

    def test_another_model(self, generate, trained, tmp_path):
        folder = self.copy(trained, tmp_path, **{"decoder_depth: 2": "decoder_depth: 1"})
        self.refused(generate, "does not fit the model in config.yaml", checkpoint=folder)

    def test_another_task(self, generate, trained, tmp_path):
        folder = self.copy(trained, tmp_path, **{"name: translation": "name: language_modeling"})
        self.refused(generate, "was trained for language_modeling: .*mt_", checkpoint=folder)

    def test_a_beam_of_no_hypotheses(self, generate):
        self.refused(generate, r"decoding\.beam=0 must be a whole number in", "--beam", "0")

    def test_a_line_in_another_encoding(self, generate):
        content = "gut\nÄhnlich\n".encode("latin1")
        self.refused(generate, r"line 2 is not UTF-8 .*iconv", content=content)

    def test_good_lines_before_a_bad_one(self, trained, pairs, monkeypatch, capsys):
        good = lines(pairs[:3], 0)
        monkeypatch.setattr(sys, "stdin", Input(good.encode()))
        main(["mt", str(trained)])
        expected = capsys.readouterr().out
        monkeypatch.setattr(sys, "stdin", Input(good.encode() + b"\xff\xfe\nHallo\n"))
        with pytest.raises(SystemExit, match=r"error: line 4 is not UTF-8"):
            main(["mt", str(trained)])
        assert capsys.readouterr().out == expected
        assert expected.count("\n") == 3

    def test_a_length_penalty_that_is_no_number(self, generate):
        for value in ("nan", "inf"):
            message = rf"decoding\.length_penalty={value} must be a finite number in \[-10, 10\]"
            self.refused(generate, message, "--length-penalty", value)

    def test_a_picture_of_an_unknown_format(self, generate, tmp_path):
        self.refused(generate, "(?i)format", "--attention", str(tmp_path / "picture.docx"))
        assert list(tmp_path.iterdir()) == []


def test_the_command_says_how_it_is_used(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["mt", "--help"])
    said = capsys.readouterr().out
    for option in ("checkpoint", "--beam", "--length-penalty", "--attention", "--data-root"):
        assert option in said
