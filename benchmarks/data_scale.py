"""How long full-size data takes until the first batch, and how much memory, with made data.

    python -m benchmarks.data_scale text FOLDER       # WikiText-103: 103 M tokens, 268 k words
    python -m benchmarks.data_scale images FOLDER     # ImageNet: 1.28 M + 50 k files, 1,000 classes

The data are made in FOLDER in the real format, once: random words through the real preparation
(about 1.5 GB), and links to a few JPEG files. Each size is measured in a process of its own, whose
imports are not counted. Memory is what the process holds for itself: pages of mapped files, which
the system takes back when it needs them, are not part of it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.report import Row, context, print_table, write_csv
from multimax.data.images import build_image_data
from multimax.data.loading import SPLITS
from multimax.data.prepare.wikitext103 import OFFICIAL, Sizes, prepare
from multimax.data.text import build_text_source
from multimax.data.vocabulary import FAIRSEQ_SPECIALS

LINE = 100  # words
FILES_OF_IMAGENET = {"train": 1_281_167, "val": 50_000}
LINKS = 30_000  # to one file: file systems take no more than some
COLUMNS = {
    "data": "data",
    "size": "size",
    "load_s": "loaded, s",
    "first_batch_s": "first batch, s",
    "held_mib": "held, MiB",
}


def make_text(folder: Path, sizes: Sizes) -> None:
    """A prepared WikiText-103 of random words with these sizes, unless it is there."""
    if (folder / "facts.json").exists():
        return
    raw = folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    words = np.array([f"word{index}" for index in range(sizes.vocabulary - len(FAIRSEQ_SPECIALS))])
    for split in SPLITS:
        with (raw / f"wiki.{split}.tokens").open("w") as stream:
            for start in range(0, getattr(sizes, split), LINE):
                length = min(getattr(sizes, split) - start, LINE) - 1  # and the end of the line
                first = start // LINE * (LINE - 1)
                if split == "train" and first < len(words):  # each once, then by Zipf's law
                    index = (np.arange(length) + first) % len(words)
                else:
                    index = generator.zipf(1.2, length) % len(words)
                stream.write(" ".join(words[index]) + "\n")
    prepare(raw, folder, sizes)


def make_images(folder: Path, files: dict[str, int], classes: int = 1000) -> None:
    """Folders of links to a few images of random colours, unless they are there."""
    for split, number in files.items():
        done = folder / f"{split}.made"
        if done.exists():
            continue
        for index in range(number):
            place = folder / split / f"n{index % classes:08d}"
            if index < classes:
                place.mkdir(parents=True, exist_ok=True)
            source = folder / f"{split}{index // LINKS}.jpg"
            if index % LINKS == 0 and not source.exists():
                Image.effect_noise((64, 64), 50).convert("RGB").save(source)
            os.link(source, place / f"{split}_{index:08d}.JPEG")
        done.touch()


def load(kind: str, folder: str) -> Row:
    """Seconds and memory until the first batch of training."""
    started = time.monotonic()
    if kind == "text":
        data = build_text_source(
            "wikitext103", root=folder, block_size=512, context_window=0
        ).load()
        loader = data.train_loader(8, 0, 1, "cpu", 0)
    else:
        data = build_image_data("imagenet", root=folder, num_workers=2)
        loader = data.train_loader(64, 0, 1, "cpu", 0)
    loaded = time.monotonic()
    next(iter(loader.batches(0)))
    status = Path("/proc/self/status").read_text().split("RssAnon:")[1]
    return {
        "load_s": loaded - started,
        "first_batch_s": time.monotonic() - started,
        "held_mib": int(status.split()[0]) / 1024,
    }


def measured(kind: str, folder: Path) -> Row:
    """`load` in a process of its own."""
    code = (
        "import json; from benchmarks.data_scale import load; "
        f"print(json.dumps(load({kind!r}, {str(folder)!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def rows(kind: str, folder: Path, parts: Sequence[int]) -> list[Row]:
    """Make the data of each size, and measure it; a size is the full one by a number of `parts`."""
    found: list[Row] = []
    for part in parts:
        place = folder / f"{kind}-{part}"
        if kind == "text":
            sizes = Sizes(OFFICIAL.train // part, *OFFICIAL[1:])
            make_text(place, sizes)
            size = f"{sizes.train:,} tokens"
        else:
            files = {split: number // part for split, number in FILES_OF_IMAGENET.items()}
            make_images(place, files)
            size = f"{files['train']:,} files"
        measured(kind, place)  # so that the files are cached for all sizes
        found.append({"data": kind, "size": size, **measured(kind, place)})
    return found


def main(command: Sequence[str] | None = None) -> None:
    """Measure, print and write `data_scale_<kind>.csv`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("text", "images"))
    parser.add_argument("folder", type=Path, help="where the data is made, and stays")
    parser.add_argument("--parts", type=int, nargs="+", default=[50, 1], help="of the full size")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder to write to")
    arguments = parser.parse_args(command)
    found = rows(arguments.kind, arguments.folder, arguments.parts)
    print_table("Until the first batch", found, COLUMNS)
    path = arguments.results / "benchmarks" / f"data_scale_{arguments.kind}.csv"
    write_csv(path, found, context(1))
    print(path)


if __name__ == "__main__":
    main()
