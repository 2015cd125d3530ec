import pytest
from accelerate.state import AcceleratorState
from hydra import compose, initialize_config_dir
from tiny_language_model import ROOT, TEXT, TINY

from multimax.training.config import read_config


@pytest.fixture
def composed(tmp_path):
    """Composes an experiment, on a small text if it is `tiny`."""
    folder = tmp_path / "text"
    folder.mkdir()
    for split, text in TEXT.items():
        (folder / f"{split}.txt").write_text(text)

    def compose_experiment(experiment, *overrides, tiny=True):
        places = [f"data.root={folder}", f"data.cache={tmp_path}", f"output_dir={tmp_path}/out"]
        chosen = [*TINY, *places] if tiny else []
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            return read_config(compose("config", [f"experiment={experiment}", *chosen, *overrides]))

    yield compose_experiment
    AcceleratorState._reset_state()
