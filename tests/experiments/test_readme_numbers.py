"""Numbers in README.md's text are those of the files that it names."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = re.sub(r"\s+", " ", (ROOT / "README.md").read_text())
WORDS = {"deit": "in DeiT", "lm": "in the language model", "mt": "in translation"}


def test_multi_modality_at_equal_sparsity():
    found = json.loads((ROOT / "results" / "pareto.json").read_text())
    assert found.keys() == WORDS.keys()
    for task, result in found.items():
        learned = result["scores_of"]["MultiMax"]["comparisons"][0]
        assert (learned["multimax"], learned["against"]) == ("learned", "SoftMax")
        value, low, high = (f"{number:.3f}" for number in learned["difference_by_layer"].values())
        assert f"+{value} [{low}, {high}] {WORDS[task]}" in README


def test_shares_of_rows_better_in_both():
    table = (ROOT / "results" / "propositions.md").read_text().splitlines()
    trained = [line.split("|")[6:10] for line in table if "trained with SoftMax" in line]
    shares = [float(cell.split()[0]) for cells in trained for cell in cells]
    assert len(shares) == 12
    assert f"improve both for {min(shares):.0f} to {max(shares):.0f} % of the rows" in README
