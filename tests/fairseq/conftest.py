import logging
import multiprocessing
import random
import re
import subprocess
import sys
import tempfile
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairseq import options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.modules import MultiheadAttention
from fairseq_cli.train import cli_main

from multimax.integrations.fairseq import USER_DIR, convert

utils.import_user_module(SimpleNamespace(user_dir=str(USER_DIR)))
USER = ["--user-dir", str(USER_DIR)]

# Two layers of width 32 for each architecture of recipes.md.
DECODER = {
    "--decoder-layers": 2,
    "--decoder-embed-dim": 32,
    "--decoder-ffn-embed-dim": 48,
    "--decoder-attention-heads": 4,
}
ENCODER = {
    "--encoder-layers": 2,
    "--encoder-embed-dim": 32,
    "--encoder-ffn-embed-dim": 48,
    "--encoder-attention-heads": 4,
}
ADAPTIVE = {"--adaptive-softmax-cutoff": "20,40", "--adaptive-input-cutoff": "20,40"}
LANGUAGE = {"--task": "language_modeling", "--tokens-per-sample": 16}
LANGUAGE |= {"--decoder-input-dim": 32, "--decoder-output-dim": 32}
MODELS = {
    "transformer_lm": LANGUAGE | DECODER,
    "transformer_lm_wiki103": LANGUAGE | DECODER | ADAPTIVE,
    "transformer_iwslt_de_en": {"--task": "translation"} | DECODER | ENCODER,
}
FLAGS = {
    "transformer_lm": ["--decoder-normalize-before", "--share-decoder-input-output-embed"],
    "transformer_lm_wiki103": [],
    "transformer_iwslt_de_en": ["--share-decoder-input-output-embed"],
}
CRITERIA = {
    "transformer_lm": ["--criterion", "cross_entropy"],
    "transformer_lm_wiki103": ["--criterion", "adaptive_loss", "--ddp-backend", "legacy_ddp"],
    "transformer_iwslt_de_en": [
        *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1")
    ],
}
NORMALIZERS = ["softmax:temperature=0.5", "topk:k=3", "sparsemax", "entmax15", "evsoftmax"]
NORMALIZERS += ["entmax:alpha=1.3,learned=true", "multimax", "multimax:order=1,affine=true"]

COMMON = [*USER, "--cpu", "--num-workers", "0", "--no-progress-bar", "--batch-size", "8"]
TRAIN = [*COMMON, "--optimizer", "adam", "--lr", "1e-2", "--no-epoch-checkpoints"]
TRAIN += ["--batch-size-valid", "4"]


def words(mapping):
    """A command line from options and values."""
    return [str(word) for pair in mapping.items() for word in pair]


def normalizers(attention, output=None):
    chosen = ["--attention-normalizer", attention]
    return chosen + ([] if output is None else ["--output-normalizer", output])


def perturb(model, scale=0.3):
    """Learned scalars away from where they start, so that a forgotten normalizer shows."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "normalizer" in name:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model


def own_path(model):
    """A stock model without torch's fused attention, which rounds differently."""
    for module in model.modules():
        if isinstance(module, MultiheadAttention):
            module._set_skip_embed_dim_check()
    return model


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def tool(name, *arguments, **options):
    """Run a command-line tool of fairseq, or `python`; what it printed."""
    command = [Path(sys.executable).with_name(name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


def forked(name, *arguments):
    """The same as `tool`, without the seconds that it takes to import fairseq once more."""
    if name == "convert":
        main = convert.main
    else:
        (entry,) = entry_points(group="console_scripts", name=name)
        main = entry.load()
    argv = [name, *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as printed:
        child = multiprocessing.get_context("fork").Process(target=_run, args=(main, argv, printed))
        child.start()
        child.join(300)
        printed.seek(0)
        text = printed.read()
    assert child.exitcode == 0, text[-8000:]
    return text


def _run(main, argv, printed):
    sys.argv, sys.stdout, sys.stderr = argv, printed, printed
    logging.basicConfig(stream=printed, level=logging.INFO, force=True)
    main()


def sentence(generator):
    start, step = generator.randrange(56), generator.randrange(1, 4)
    return [f"w{(start + step * i) % 56}" for i in range(generator.randint(3, 9))]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Folders `lm` and `mt` of a made text that fairseq-preprocess has read.

    A translation is the reversed source in capitals; 60 words and symbols in each dictionary.
    """
    folder = tmp_path_factory.mktemp("data")
    generator = random.Random(0)
    for split, count in {"train": 400, "valid": 16, "test": 16}.items():
        lines = [sentence(generator) for _ in range(count)]
        lines += [[f"w{i}" for i in range(56)]] if split == "train" else []
        (folder / f"{split}.de").write_text("".join(" ".join(x) + "\n" for x in lines))
        reverse = "".join(" ".join(reversed(x)).upper() + "\n" for x in lines)
        (folder / f"{split}.en").write_text(reverse)
    splits = {f"--{split}pref": folder / split for split in ("train", "valid", "test")}
    pair = ["-s", "de", "-t", "en", "--destdir", folder / "mt", "--workers", 1]
    forked("fairseq-preprocess", *words(splits), *pair)
    splits = {key: f"{path}.en" for key, path in splits.items()}
    forked("fairseq-preprocess", "--only-source", *words(splits), "--destdir", folder / "lm")
    return folder


@pytest.fixture(scope="session")
def build(data):
    """Build the model of a command line: `build(architecture, *arguments)`, and its task."""

    @cache
    def configure(architecture, *arguments):
        name = architecture.removeprefix("multimax_")
        folder = data / ("mt" if "iwslt" in name else "lm")
        line = [str(folder), *USER, "--arch", architecture, *words(MODELS[name]), *FLAGS[name]]
        line += [*CRITERIA[name], "--batch-size", "4", *arguments]
        parser = options.get_training_parser()
        config = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, line))
        return config, tasks.setup_task(config.task)

    def build(architecture, *arguments):
        config, task = configure(architecture, *arguments)
        torch.manual_seed(1)
        return SimpleNamespace(
            model=task.build_model(config.model).eval(),
            model_config=config.model,
            task=task,
            criterion=task.build_criterion(config.criterion),
        )

    return build


def batch(task, count=5, split="train"):
    """A batch with padding, of the first sentences or blocks."""
    if split not in task.datasets:
        task.load_dataset(split)
    dataset = task.dataset(split)
    return dataset.collater([dataset[i] for i in range(count)])


def incremental(model, sample):
    """Outputs of the decoder, position by position."""
    net_input, state = sample["net_input"], {}
    tokens = net_input.get("prev_output_tokens", net_input["src_tokens"])
    encoder_out = None
    if hasattr(model, "encoder"):
        encoder_out = model.encoder(net_input["src_tokens"], net_input["src_lengths"])
    steps = [
        model.decoder(tokens[:, : i + 1], encoder_out=encoder_out, incremental_state=state)[0]
        for i in range(tokens.size(1))
    ]
    return torch.cat(steps, dim=1)


def number(pattern, text):
    """The number that follows `pattern` for the last time."""
    return float(re.findall(pattern + r"\s*([-+0-9.e]+)", text)[-1])


def train(monkeypatch, folder, save_dir, architecture, *arguments):
    """Run fairseq-train in this process; the path of its last checkpoint."""
    name = architecture.removeprefix("multimax_")
    line = [*USER, "--arch", architecture, *words(MODELS[name]), *FLAGS[name], *CRITERIA[name]]
    line += ["--optimizer", "adam", "--lr", "1e-2", "--batch-size", "4", "--max-update", "2"]
    line += ["--num-workers", "0", "--cpu", "--no-progress-bar", "--save-dir", str(save_dir)]
    monkeypatch.setattr(sys, "argv", ["fairseq-train", str(folder), *line, *arguments])
    cli_main()
    return save_dir / "checkpoint_last.pt"
