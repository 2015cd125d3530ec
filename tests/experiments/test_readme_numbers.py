"""Numbers in README.md's text are those of the files that it names."""

import json
import math
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = re.sub(r"\s+", " ", (ROOT / "README.md").read_text())
NUMBER = re.compile(r"(?<![\w.])\d+\.\d+(?:e-\d+)?")
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


def test_what_is_said_of_the_studies_is_in_their_tables():
    page = (ROOT / "docs" / "which-normalizer.md").read_text()
    choice = page.partition("At the small scale")[2].partition("## Retrieval")[0]
    said = README.partition("**In short**")[2].partition("<details>")[0]
    names = ("table1", "table2", "table3", "table4", "ablation")
    tables = (ROOT / "results" / "tables" / f"{name}_small.md" for name in names)
    known = set(NUMBER.findall("\n".join(file.read_text() for file in tables)))
    others = {"0.1", "0.8"}  # a temperature; 100 sqrt(p (1 - p) / n), see below
    assert len(set(NUMBER.findall(said))) > 30
    assert set(NUMBER.findall(said)) - others <= known
    assert set(NUMBER.findall(choice)) <= known
    assert len(set(NUMBER.findall(choice))) > 5
    assert round(100 * math.sqrt(0.864 * (1 - 0.864) / 2000), 1) == 0.8


def test_what_is_said_of_retrieval_is_in_its_tables():
    page = (ROOT / "docs" / "which-normalizer.md").read_text().partition("## Retrieval")[2]
    names = ("retrieval", "retrieval_seeds", "max_retrieval", "recall", "mqmtar", "reverse", "sort")
    files = [ROOT / "results" / "tables" / f"{name}_small.md" for name in names]
    files.append(ROOT / "results" / "tables" / "reachable.md")
    known = set(NUMBER.findall("\n".join(file.read_text() for file in files)))
    assert set(NUMBER.findall(page)) <= known
    verdicts = re.compile(r"^- (.*?): \*\*(\w+)\*\*", re.MULTILINE).findall(files[0].read_text())
    assert len(verdicts) == 12
    for claim, verdict in verdicts:
        assert f"| {claim} | **{verdict}** | " in page
