"""Made data of full size: its form, and how its loading is measured."""

import numpy as np
import pytest

from benchmarks import data_scale
from multimax.data.prepare.wikitext103 import Sizes

pytestmark = pytest.mark.slow


def test_text_has_the_sizes_that_are_asked_for(tmp_path):
    sizes = Sizes(train=8000, valid=650, test=700, vocabulary=1208)
    data_scale.make_text(tmp_path, sizes)
    assert len(np.load(tmp_path / "train.npy")) == 8000
    data_scale.make_text(tmp_path, sizes)  # is there
    row = data_scale.load("text", str(tmp_path))
    assert 0 < row["load_s"] <= row["first_batch_s"]
    assert row["held_mib"] > 10


def test_images_are_links_in_folders_of_classes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_scale, "LINKS", 2000)
    monkeypatch.setattr(data_scale, "FILES_OF_IMAGENET", {"train": 2500, "val": 1000})
    monkeypatch.setattr(data_scale, "measured", lambda kind, place: data_scale.load(kind, place))
    data_scale.main(["images", str(tmp_path), "--parts", "1", "--results", str(tmp_path)])
    files = list((tmp_path / "images-1" / "train").rglob("*.JPEG"))
    assert len(files) == 2500
    assert len({file.stat().st_ino for file in files}) == 2
    assert "2,500 files" in capsys.readouterr().out
    written = (tmp_path / "benchmarks" / "data_scale_images.csv").read_text()
    assert written.startswith("data,size,load_s,first_batch_s,held_mib")
