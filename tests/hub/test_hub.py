"""Published models: the same network, figures and vocabulary from a folder, and from a Hub."""

import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard, hub_mixin
from safetensors.torch import load_file, save_file
from tiny_runs import settings_of, train

from multimax import evaluate, generate, hub
from multimax.hub import PublishedModel
from multimax.models.transformer import LanguageModel
from multimax.training.trained import load_run

pytestmark = pytest.mark.slow

TASKS = ("deit", "lm", "mt")


@pytest.fixture(scope="module")
def folders(runs, tmp_path_factory):
    """A published folder of each tiny run."""
    root = tmp_path_factory.mktemp("published")
    for name, run in runs.items():
        PublishedModel.from_run(run).save_pretrained(root / name)
    return {name: root / name for name in runs}


@pytest.fixture
def copy(folders, tmp_path):
    """Copies of a published folder, to be damaged."""
    return lambda name: shutil.copytree(folders[name], tmp_path / name)


def inputs_of(name):
    if name == "deit":
        return (torch.randn(3, 1, 28, 28),)
    tokens = torch.randint(2, 258, (2, 9))
    return (tokens,) if name == "lm" else (tokens, tokens[:, :5])


@pytest.mark.parametrize("name", TASKS)
def test_the_network_of_a_folder_is_that_of_the_run(runs, folders, name):
    published, trained = PublishedModel.from_pretrained(folders[name]), load_run(runs[name])
    expected = trained.model.state_dict()
    found = published.network.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert not any(module.training for module in published.modules())
    inputs = inputs_of(name)
    assert torch.equal(published(*inputs), trained.model(*inputs))


@pytest.mark.parametrize("name", TASKS)
def test_a_folder_gives_the_figures_of_its_run(runs, folders, tmp_path, name):
    own = settings_of(name, runs[name].parents[3])
    places = [setting for setting in own if setting.startswith("data.root")]
    command = [
        folders[name],
        "--json",
        tmp_path / "a.json",
        *(["--set", *places] if places else []),
    ]
    evaluate.main(list(map(str, command)))
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["metrics"] == json.loads((runs[name] / "result.json").read_text())["metrics"]
    assert report["data"] == report["trained_on"]


def test_vocabularies_travel(runs, folders):
    line = "the cat sat"
    published = PublishedModel.from_pretrained(folders["lm"]).vocabulary
    assert published.encode(line) == load_run(runs["lm"]).vocabulary.encode(line)
    assert "".join(published.decode(published.encode(line))) == line
    languages = PublishedModel.from_pretrained(folders["mt"]).vocabulary
    own = load_run(runs["mt"]).vocabulary
    assert (languages.source, languages.target) == (own.source, own.target)
    assert languages.source_vocabulary.encode([line]) == own.source_vocabulary.encode([line])
    assert languages.fingerprint == own.fingerprint
    assert PublishedModel.from_pretrained(folders["deit"]).vocabulary is None


def test_text_is_generated_from_a_folder(runs, folders, capsys):
    said = []
    for place in (runs["lm"], folders["lm"]):
        generate.main(["lm", str(place), "the cat", "--tokens", "12"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    with pytest.raises(SystemExit, match="was trained for language_modeling, not for translation"):
        generate.main(["mt", str(folders["lm"])])


def test_what_a_folder_holds(runs, folders):
    for name, vocabulary in {
        "deit": [],
        "lm": ["tokenizer.json"],
        "mt": ["tokenizer.json"],
    }.items():
        files = sorted(path.name for path in folders[name].iterdir())
        assert files == sorted(["README.md", "config.json", "model.safetensors", *vocabulary])
    tensors = load_file(folders["lm"] / "model.safetensors")
    assert "decoder.layers.0.self_attn.normalizer.ts" in tensors  # fairseq's names
    whole = load_run(runs["lm"]).model.state_dict()
    assert len(tensors) == len(whole) - 1  # the tied embedding is there once
    config = json.loads((folders["deit"] / "config.json").read_text())
    assert len(config["run"]["images"]["class_names"]) == 10
    assert config["model"]["num_classes"] == 10


def test_nothing_of_the_machine_is_published(runs, folders):
    for name, folder in folders.items():
        text = (folder / "config.json").read_text() + (folder / "README.md").read_text()
        assert str(runs[name].parents[3]) not in text
        assert not re.search(r"/(tmp|home|root|work)/", text)


@pytest.mark.parametrize("name", TASKS)
def test_the_card_says_what_it_is(runs, folders, name):
    result = json.loads((runs[name] / "result.json").read_text())
    card = ModelCard.load(folders[name] / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "multimax")
    found = {(r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    expected = {(s, m): v for s, of in result["metrics"].items() for m, v in of.items()}
    assert found == {key: v for key, v in expected.items() if key[1] != "examples"}
    text = card.text
    config = result["config"]
    for part in (
        config["data"]["name"],
        result["inputs"]["data"],
        f"seed {config['seed']}",
        "name: 'multimax'",
        f"{result['metrics']['test']['examples']:,}",
        f"torch {result['versions']['torch']}",
        result["config_hash"],
        "apache-2.0",
    ):
        assert part in text, part


@pytest.mark.parametrize("name", TASKS)
def test_the_code_of_the_card_runs(folders, name):
    (code,) = re.findall(
        r"^```python\n(.*?)^```", (folders[name] / "README.md").read_text(), re.M | re.S
    )
    images = torch.randn(2, 1, 28, 28)
    given = {"images": images, "source": inputs_of("mt")[0], "target_in": inputs_of("mt")[1]}
    exec(code.replace("FOLDER or USER/NAME", str(folders[name])), given)
    total = given["probabilities"].sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_licences_of_embedded_data_are_those_that_come_with_it():
    from importlib import resources

    from multimax.hub.card import DATA_LICENCES

    text = (resources.files("multimax.data") / "embedded" / "LICENSES.md").read_text()
    assert all(licence in text for licence in DATA_LICENCES.values())


class FakeHub:
    """A Hub that is a folder."""

    def __init__(self, root):
        self.root, self.created, self.asked = root, [], []

    def __call__(self, token=None):  # in the place of HfApi
        self.token = token
        return self

    def create_repo(self, repo_id, private, exist_ok):
        self.created.append((repo_id, private, exist_ok))
        return type("Url", (), {"repo_id": repo_id})

    def upload_folder(self, *, repo_id, folder_path, repo_type, **options):
        shutil.copytree(folder_path, self.root / repo_id)
        (self.root / repo_id / "pytorch_model.bin").write_bytes(b"a pickle")
        return f"commit of {repo_type} {repo_id}: {options['commit_message']}"

    def snapshot_download(self, repo_id, allow_patterns, **options):
        self.asked.append((repo_id, options))
        if not (self.root / repo_id).is_dir():
            raise FileNotFoundError(f"404 {repo_id}")
        kept = shutil.ignore_patterns("*.bin") if "*.bin" not in allow_patterns else None
        return str(shutil.copytree(self.root / repo_id, self.root / "cache", ignore=kept))


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(hub_mixin, "HfApi", fake)
    monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
    return fake


def test_push_and_load_by_name(runs, folders, fake_hub):
    pushed = PublishedModel.from_run(runs["lm"])
    commit = pushed.push_to_hub("someone/tiny", token="secret", private=True, commit_message="one")
    assert commit == "commit of model someone/tiny: one"
    assert fake_hub.created == [("someone/tiny", True, True)]
    assert fake_hub.token == "secret"
    there = fake_hub.root / "someone/tiny"
    for file in folders["lm"].iterdir():
        assert (there / file.name).read_bytes() == file.read_bytes()
    loaded = PublishedModel.from_pretrained("someone/tiny", revision="main")
    assert fake_hub.asked == [("someone/tiny", {"revision": "main"})]
    inputs = inputs_of("lm")
    assert torch.equal(loaded(*inputs), pushed(*inputs))
    assert not (fake_hub.root / "cache" / "pytorch_model.bin").exists()


def test_a_name_on_the_hub_in_commands(runs, fake_hub, capsys):
    PublishedModel.from_run(runs["lm"]).push_to_hub("someone/tiny")
    generate.main(["lm", "hf-hub:someone/tiny", "the", "--tokens", "3"])
    assert capsys.readouterr().out.startswith("the")
    with pytest.raises(SystemExit, match=r"error: someone/gone is no folder, and .*404"):
        generate.main(["lm", "hf-hub:someone/gone", "the"])


def test_saving_again_leaves_what_is_new(runs, folders, copy):
    folder = copy("deit")
    (folder / "README.md").write_text("old")
    published = PublishedModel.from_pretrained(folder)
    with torch.no_grad():
        published.network.head.bias.add_(1)
    published.save_pretrained(folder)
    assert (folder / "README.md").read_text() == (folders["deit"] / "README.md").read_text()
    again = PublishedModel.from_pretrained(folder)
    assert torch.equal(again.network.head.bias, published.network.head.bias)


def test_a_failed_save_leaves_no_model_that_seems_whole(folders, copy, monkeypatch):
    folder = copy("deit")
    published = PublishedModel.from_pretrained(folder)

    def fail(*_):
        raise OSError("disk is full")

    monkeypatch.setattr(hub, "_write", fail)
    with pytest.raises(OSError, match="full"):
        published.save_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"there is no .*config\.json"):
        PublishedModel.from_pretrained(folder)


def test_averaged_weights(tmp_path):
    folder = train(tmp_path, [*settings_of("deit", tmp_path), "trainer.ema_decay=0.5"])
    result = json.loads((folder / "result.json").read_text())["metrics"]["test"]
    trained, averaged = (PublishedModel.from_run(folder, averaged=a) for a in (False, True))
    assert trained.run["metrics"]["test"]["loss"] == result["loss"]
    assert averaged.run["metrics"]["test"]["loss"] == result["ema_loss"]
    assert "ema_loss" not in trained.run["metrics"]["test"]
    averaged.save_pretrained(tmp_path / "published")
    report = evaluate.evaluate_trained(hub.load_model(tmp_path / "published", open_data=True))
    assert report["metrics"]["test"]["loss"] == result["ema_loss"]


def test_scalars_that_layers_share(tmp_path):
    options = {"name": "transformer_lm", "vocabulary_size": 20, "padding_index": 1, "embed_dim": 8,
               "ffn_dim": 8, "depth": 2, "num_heads": 2, "output": {"name": "softmax"},
               "attention": {"name": "multimax", "shared": True}}  # fmt: skip
    published = PublishedModel("language_modeling", options)
    published.save_pretrained(tmp_path)
    loaded = PublishedModel.from_pretrained(tmp_path)
    first, second = (layer.self_attn.normalizer for layer in loaded.network.decoder.layers)
    assert first.ts is second.ts
    assert torch.equal(first.ts, published.network.decoder.layers[0].self_attn.normalizer.ts)
    assert isinstance(loaded.network, LanguageModel)
    with pytest.raises(ValueError, match="does not say how it was trained"):
        hub.load_model(tmp_path)


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_model(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    edit(folder, model=config["model"] | changes)


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def pickled(folder):
    torch.save({"a": torch.ones(1)}, folder / "model.safetensors")


DAMAGE = {
    "no config": ("deit", lambda f: (f / "config.json").unlink(), r"there is no .*config\.json"),
    "no weights": (
        "deit",
        lambda f: (f / "model.safetensors").unlink(),
        r"no .*model\.safetensors",
    ),
    "no JSON": ("deit", lambda f: (f / "config.json").write_text("{"), r"config\.json is damaged"),
    "of others": (
        "deit",
        lambda f: edit(f, library="timm"),
        r"config\.json is not of a model that",
    ),
    "newer": ("deit", lambda f: edit(f, format=2), r"config\.json has format=2, .* reads 1"),
    "no task": ("deit", lambda f: edit(f, task=None), r"task in .*config\.json is missing or dam"),
    "a list": ("deit", lambda f: (f / "config.json").write_text("[]"), r"config\.json is not of"),
    "unknown task": ("deit", lambda f: edit(f, task="chess"), r"config\.json describes .*'chess'"),
    "unknown model": (
        "lm",
        lambda f: edit_model(f, name="os.system"),
        r"unknown model 'os\.system'",
    ),
    "unknown option": ("lm", lambda f: edit_model(f, layers=3), r"has no option layers"),
    "out of range": ("lm", lambda f: edit_model(f, depth=0), r"depth=0 must be a whole number"),
    "a pickle": ("deit", pickled, r"model\.safetensors is damaged"),
    "half the weights": (
        "deit",
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-99]
        ),
        r"model\.safetensors is damaged",
    ),
    "a weight less": (
        "deit",
        lambda f: edit_weights(f, lambda t: t.pop("output.ts")),
        r"model\.safetensors does not fit .*output\.ts is missing there",
    ),
    "a weight more": (
        "deit",
        lambda f: edit_weights(f, lambda t: t.update(a=torch.ones(1))),
        r"model\.safetensors does not fit .*: a does not exist here",
    ),
    "another shape": (
        "deit",
        lambda f: edit_weights(f, lambda t: t.update({"head.bias": torch.ones(9)})),
        r"head\.bias is \(9,\) there and \(10,\) here",
    ),
    "no vocabulary": ("lm", lambda f: (f / "tokenizer.json").unlink(), r"no .*tokenizer\.json"),
    "damaged vocabulary": (
        "mt",
        lambda f: (f / "tokenizer.json").write_text("{}"),
        r"tokenizer\.json is damaged",
    ),
    "another vocabulary": (
        "lm",
        lambda f: shutil.copy(f.parent.parent / "mt" / "tokenizer.json", f),
        r"the vocabulary in .* is not the one that the model was trained with",
    ),
    "unknown vocabulary": (
        "lm",
        lambda f: edit(f, vocabulary={"kind": "runes"}),
        r"vocabulary\.kind='runes' in .*config\.json must be one of byte_pairs, words",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_refused_by_name(folders, copy, tmp_path, case):
    name, damage, message = DAMAGE[case]
    shutil.copytree(folders["mt"], tmp_path / "mt", dirs_exist_ok=True)
    folder = shutil.copytree(folders[name], tmp_path / "in" / name)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        PublishedModel.from_pretrained(folder)


def test_what_cannot_be_published(runs, tmp_path):
    with pytest.raises(ValueError, match=r"has no averaged weights"):
        PublishedModel.from_run(runs["deit"], averaged=True)
    unfinished = shutil.copytree(runs["deit"], tmp_path / "run")
    (unfinished / "result.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*result\.json"):
        PublishedModel.from_run(unfinished)


def test_settings_that_a_published_model_cannot_have(folders, tmp_path):
    for settings, message in {
        ("model.depth=3",): "its model, its attention and its output cannot be set",
        ("output.order=1",): "its model, its attention and its output cannot be set",
    }.items():
        with pytest.raises(SystemExit, match=message):
            evaluate.main([str(folders["deit"]), "--set", *settings])
