"""The page of all results: its form, and that it says what the tables and the results say."""

import base64
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pages import Page
from test_forest import small_study
from test_tables import result

from experiments.comparison import cells_of
from experiments.figures import tables as figure_of_tables
from experiments.figures.__main__ import FIGURES
from experiments.report import content, curves, pictures
from experiments.report.__main__ import main, page
from experiments.selection import run_of, study_of
from experiments.tables import build


def with_curve(entry, values, loss=2.0):
    """A result with a learning curve of these values of valid/top1, at updates 10, 20, ..."""
    lines = [{"update": 5, "train/loss": loss}, {"update": 15, "train/loss": loss / 2}]
    lines += [{"update": 10 * (i + 1), "valid/top1": v} for i, v in enumerate(values)]
    facts = {
        "curve": lines, "parameters": 1234567, "updates": 20, "processes": 2,
        "training_seconds": 1800.0, "hardware": {"device": "CPU <A&B>", "threads": 3},
        "versions": {"torch": "2.9"}, "commit": "0123456789abcdef", "finished": "2026-01-02T03:04",
    }  # fmt: skip
    return entry | facts


def some_results():
    entries = [with_curve(result(seed=s, top1=80 + s), [70, 80 + s]) for s in range(3)]
    entries += [
        with_curve(result("deit_multimax", s, 82.0 + 3 * s), [75, 82 + s], 3.0) for s in range(2)
    ]
    return {Path(f"runs/{number}-seed{e['seed']}.json"): e for number, e in enumerate(entries)}


def claimed():
    (claim, *_) = study_of("table2").claims
    return small_study(claims=(claim, claim.model_copy(update={"cell": "topk-attention"})))


def drawn(folder, results, study=None):
    runs = [run_of(entry, str(file)) for file, entry in results.items()]
    figure_of_tables.save(cells_of(study or claimed(), "small", runs), folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    results = some_results()
    return page(results, "small", [claimed()], drawn(tmp_path_factory.mktemp("f"), results))


@pytest.mark.slow
def test_the_page_is_well_formed_and_needs_nothing_else(text):
    found = Page(text)
    assert found.faults == []
    assert ("html", {"lang": "en"}) in found.attributes
    assert any(given.get("name") == "viewport" for _, given in found.attributes)
    assert all(image["src"].startswith("data:image/") for image in found.images)
    assert "url(" not in text
    assert "@import" not in text


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        ("<h1>a</h1><p><b>x</p></b>", "closes something else"),
        ("<h1>a</h1><p>", "<p> is not closed"),
        ("<h1>a</h1><h3>b</h3>", "<h3> follows <h1>"),
        ("<h1 id=a>a</h1><p id=a></p>", "id a twice"),
        ("<h1>a</h1><img src='data:image/png,'>", "no alt"),
        ("<h1>a</h1><img alt=a src='https://a/b.png'>", "needs the network"),
        ("<h1>a</h1><a href='#b'>b</a>", "no id b"),
        ("<h1>a</h1><script></script>", "runs a script"),
        ("<h1>a</h1><table><tr><th>b</th></tr></table>", "no scope"),
        ("<h2>a</h2>", "one <h1>"),
    ],
)
def test_the_reader_finds_faults(bad, fault):
    assert any(fault in found for found in Page(bad).faults)


@pytest.mark.slow
def test_a_table_is_that_of_the_markdown(text):
    runs = [run_of(entry, str(file)) for file, entry in some_results().items()]
    table = build(claimed(), "small", runs)
    shown = Page(text).tables[1]  # after the overview
    assert shown == [table.columns, *([row[c] for c in table.columns] for row in table.rows)]
    for remark in table.remarks:
        assert remark.replace("**", "") in Page(text).text
    assert "<strong>underpowered</strong>" in text
    assert Page(text).tables[0] == [
        ["study", "runs", "cells", "confirmed", "refuted", "underpowered", "not run"],
        ["Table 2", "5 of 18", "2 of 4", "0", "0", "1", "1"],
    ]


@pytest.mark.slow
def test_the_same_results_are_the_same_bytes(text, tmp_path):
    results = some_results()
    assert page(results, "small", [claimed()], drawn(tmp_path, results)) == text
    other = results | {Path("runs/9-seed2.json"): with_curve(result("deit_topk", 2), [1, 2])}
    assert page(other, "small", [claimed()], tmp_path) != text


def test_what_has_not_been_run_is_counted(text):
    said = Page(text).text
    assert "13 of 18 runs are missing; 2 of 4 cells are empty:" in said
    assert "top-k | SoftMax MultiMax, order 2 | SoftMax python train.py -m study=table2" in said


def test_where_the_numbers_are_from(text):
    facts = dict(row for row in Page(text).tables[2])
    assert facts["training, core hours"] == "15.00"  # 5 runs, half an hour, 2 processes, 3 threads
    assert facts["device"] == "CPU <A&B>"
    assert facts["commit"] == "0123456789"
    assert facts["finished"] == "2026-01-02"
    assert "1,234,567 parameters; 20 updates; 2,000 images of split 'test'" in Page(text).text
    mixed = content.provenance([{"processes": 1}, {"processes": 1}, {"processes": 4}])
    assert mixed["processes"] == "1 (2 runs), 4 (1 runs)"
    assert mixed["device"] == "unknown"


@pytest.mark.slow
def test_what_looks_like_html_is_shown_as_it_is(tmp_path):
    study = small_study(title="a <b> & 'c'")
    cell = study.cells["softmax"].model_copy(
        update={"row": ["<i>", "&amp;"], "settings": ["attention=softmax", "group='<u>&lt;\"'"]}
    )
    study = study.model_copy(update={"cells": {**study.cells, "softmax": cell}})
    found = Page(page(some_results(), "small", [study], drawn(tmp_path, some_results(), study)))
    assert found.faults == []
    assert not {"b", "i", "u"} & {tag for tag, _ in found.attributes}
    assert "Table 2: a <b> & 'c'" in found.text
    assert found.tables[1][1][:3] == ["<i>", "&amp;", "81.00"]
    assert 'group: <u>&lt;"' in found.text
    assert "Learning curves 2 cells" in found.text


@pytest.mark.slow
def test_without_runs_and_figures_it_says_what_to_run(tmp_path):
    found = Page(page({}, "paper", [claimed()], tmp_path / "none"))
    assert found.faults == []
    assert "No run has been recorded at this scale yet." in found.text
    assert "python train.py -m study=table2 scale=paper data.root=PATH runs the study" in found.text
    assert "tables: python -m experiments.figures tables" in found.text
    assert found.images == []


@pytest.mark.slow
def test_runs_of_no_study_have_their_curves_too():
    other = with_curve(result(overrides=("optimizer.lr=2e-3",)), [50, 60])
    found = Page(page({Path("runs/x-seed0.json"): other}, "small", [claimed()], Path("none")))
    assert found.faults == []
    assert "Runs that belong to no study" in found.text
    assert [image["alt"] for image in found.images] == [
        "Learning curves; valid/loss ends at no value"
    ]


def svg(panel):
    return base64.b64decode(panel.source.removeprefix("data:image/svg+xml;base64,")).decode()


def test_a_panel_has_a_line_for_each_seed_in_both_axes():
    groups = {
        "SoftMax": {s: with_curve(result(seed=s), [70, 80 + s]) for s in (0, 2)},
        "none": {},
        "MultiMax": {0: with_curve(result("deit_multimax"), [60, 90])},
    }
    softmax, multimax = curves.panels(groups, ["test/top1"], groups["SoftMax"])
    assert (softmax.label, multimax.label) == ("SoftMax", "MultiMax")
    assert softmax.alt == "Learning curves; valid/top1 ends at 80 (seed 0), 82 (seed 2)"
    picture = svg(softmax)
    ElementTree.fromstring(picture)
    lines = re.findall(r'<path d="[^"]*"[^>]*style="fill: none; stroke: (#\w+)', picture)
    for seed in (0, 2):
        assert lines.count(curves.color_of(seed)) == 2
    assert lines.count(curves.color_of(1)) == 0
    assert "top1" in picture
    assert "training loss" in picture


def heights(panel):
    """Where the labels of the two vertical axes stand, by their text."""
    found = re.findall(r'text-anchor: end" x="[\d.]+" y="([\d.]+)"[^>]*>([\d.]+)<', svg(panel))
    return {text: float(y) for y, text in found}


@pytest.mark.slow
def test_panels_can_be_compared():
    """Axes of a metric have the same limits; so have losses, if the output normalizer is one."""
    groups = {
        "SoftMax": {0: with_curve(result(), [70, 80])},
        "attention": {0: with_curve(result("deit_topk"), [60, 90], loss=2.4)},
        "both": {0: with_curve(result("deit_multimax"), [75, 85], loss=8.0)},
    }
    base, attention, both = curves.panels(groups, ["test/top1"], groups["SoftMax"])
    assert heights(base) == heights(attention)
    assert {"60", "80", "2"} <= set(heights(base))
    metric = {text: y for text, y in heights(base).items() if float(text) > 20}
    losses = {text: y for text, y in heights(both).items() if text not in metric}
    assert heights(both) == {**metric, **losses}
    assert list(losses) == ["4", "6", "8"]
    grey = [svg(panel).count("stroke: #8c8c8c") for panel in (base, attention, both)]
    assert grey == [1, 1, 1]
    (alone,) = curves.panels({"a": groups["both"]}, ["test/top1"])
    assert "stroke: #8c8c8c" not in svg(alone)
    assert heights(alone) != heights(both)


def test_the_curve_of_a_metric():
    entry = {"curve": [
        {"update": 1, "train/loss": 2.0}, {"update": 2, "valid/top1": None},
        {"update": 3, "valid/top1": 4.0}, {"update": 5, "valid/top1": float("inf")},
    ]}  # fmt: skip
    assert curves.points(entry, "valid/top1") == [(3, 4.0)]
    assert curves.points({}, "valid/top1") == []
    other = {"curve": [{"update": 3, "valid/top1": 5.0}, {"update": 4, "valid/top1": 9.0}]}
    assert curves.mean_curve({0: entry, 1: other}, "valid/top1") == [(3, 4.5)]
    assert curves.mean_curve({}, "valid/top1") == []


def test_the_metric_is_the_first_that_all_runs_have():
    dense = {"curve": [{"update": 1, "valid/perplexity": 9.0, "valid/bits": 1.0}]}
    sparse = {"curve": [{"update": 1, "valid/smoothed_perplexity": 9.0, "valid/bits": 1.0}]}
    columns = ["test/perplexity", "test/smoothed_perplexity", "attention/sparsity", "test/bits"]
    assert curves.validation_metric([dense], columns) == "valid/perplexity"
    assert curves.validation_metric([sparse], columns) == "valid/smoothed_perplexity"
    assert curves.validation_metric([dense, sparse], columns) == "valid/bits"
    assert curves.validation_metric([{}], columns) == "valid/loss"


def test_a_figure_has_the_caption_and_the_command_of_its_module(tmp_path):
    caption, command = pictures.described("table2_small")
    assert caption == figure_of_tables.CAPTION
    assert command == "python -m experiments.figures tables"
    caption, command = pictures.described("benchmark_attention")
    assert caption.startswith("Time and memory of attention next to torch's")
    assert "python" not in caption
    assert command == "python -m benchmarks.attention"
    assert pictures.described("something") == ("", "")
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"a\.png cannot be read"):
        pictures.pictures(tmp_path)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_a_caption(name):
    caption, _ = pictures.described(name)
    assert len(caption.split()) > 5


@pytest.mark.slow
def test_the_command_writes_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.report.__main__.STUDIES", ["table4"])
    monkeypatch.setattr(sys, "argv", ["report", "--output", "a/b.html"])
    main()
    assert Page((tmp_path / "a" / "b.html").read_text()).faults == []
    assert capsys.readouterr().out.startswith("a/b.html (0.")
    (tmp_path / "results" / "runs").mkdir(parents=True)
    (tmp_path / "results" / "runs" / "x.json").write_text("{")
    with pytest.raises(SystemExit, match=r"error: .*x\.json is damaged"):
        main()
