import datasets
import pytest
from datasets.arrow_writer import ArrowWriter
from streams import NAMES, TRAIN, VALID, picture, write


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def noisy_shards(tmp_path_factory):
    return write(tmp_path_factory.mktemp("noisy"), noise=60)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The same images in folders, which Hugging Face's imagefolder reads too."""
    root = tmp_path_factory.mktemp("folder")
    for split, sizes in (("train", TRAIN), ("val", VALID)):
        for number in range(sum(sizes)):
            place = root / split / NAMES[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:06}.jpg").write_bytes(picture(number))
    return root


@pytest.fixture(scope="module")
def arrow(tmp_path_factory):
    """The same images in Arrow files with a data set card, as on the Hugging Face hub."""
    root = tmp_path_factory.mktemp("arrow")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=NAMES))
    card = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split, sizes in (("train", TRAIN), ("val", VALID)):
        card += [f"  - split: {split}", f"    path: {split}-*.arrow"]
        first = 0
        for shard, size in enumerate(sizes):
            mine = range(first, first + size)
            images = [dict(bytes=picture(number), path=None) for number in mine]
            rows = dict(image=images, label=[number % 2 for number in mine])
            with ArrowWriter(path=str(root / f"{split}-{shard}.arrow"), features=features) as file:
                file.write_table(datasets.Dataset.from_dict(rows, features).data.table)
                file.finalize()
            first += size
    card += ["dataset_info:", "  features:", "  - name: image", "    dtype: image"]
    card += ["  - name: label", "    dtype:", "      class_label:", "        names:"]
    card += [f"          '{label}': {name}" for label, name in enumerate(NAMES)] + ["  splits:"]
    for split, sizes in (("train", TRAIN), ("val", VALID)):
        card += [f"  - name: {split}", f"    num_examples: {sum(sizes)}", "    num_bytes: 1"]
    (root / "README.md").write_text("\n".join([*card, "---", ""]))
    return root
