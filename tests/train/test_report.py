"""The report of runs: tables hold what was recorded, plots are there and described, errors name the path."""

from __future__ import annotations

import json
import logging
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from train_cases import run
from typer.testing import CliRunner

from llm_mlp.cli import app
from llm_mlp.page import STYLES, Figure, Series, figures, short
from llm_mlp.train.console import read_metrics
from llm_mlp.train.report import ReportError, read_runs, write_report

ODD = '<b>"wide" & $x_1$'  # a folder's name may be anything


class Page(HTMLParser):
    """Tables by caption (rows of cells), plots by title, text; checks that tags are closed and names are unique."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.plots: dict[str, str] = {}  # title: description
        self.headings: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.scopes: set[str] = set()
        self.text = self._part = ""
        self._rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open and len(self.ids) == len(set(self.ids)) and not self.fetched

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag != "meta":
            self.open.append(tag)
        if tag == "svg":
            assert values["role"] == "img"
            self.plots[self._title] = values["aria-label"]
        if tag == "th":
            self.scopes.add(values["scope"])
        if tag == "table":
            self._rows = []
        if tag == "tr":
            self._rows.append([])
        self.ids += [values["id"]] if "id" in values else []
        self.fetched += [v for k, v in attributes if k in ("src", "href", "xlink:href") and not v.startswith("#")]
        self._part = ""

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self._rows[-1].append(self._part)
        elif tag == "caption":
            self._caption = self.text.rstrip().splitlines()[-1]
        elif tag == "figcaption":
            self._title = self._part
        elif tag in ("h1", "h2"):
            self.headings.append(self._part)
        elif tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data):
        self.text += data
        self._part += data

    def row(self, caption: str, name: str) -> list[str]:
        rows = next(rows for key, rows in self.tables.items() if caption in key)
        return next(row[1:] for row in rows if row[0] == name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two runs that differ in one field; one has an action, a quarantined step and head statistics."""
    folder = tmp_path_factory.mktemp("report")
    options = ("evaluation.every=3", "average.ema=0.9")
    run(folder, *options, out="plain")
    run(folder, *options, "optimizer.lr=0.02", out="odd")
    other = folder / ODD
    (folder / "odd").rename(other)
    action = {"step": 4, "controller": "loss_watch", "what": "loss_factor", "value": 0.5, "reason": "a <spike>"}
    (other / "actions.jsonl").write_text(json.dumps(action) + "\n")
    refused = {"step": 5, "first_sample": 16, "last_sample": 19, "loss": "nan", "grad_norm": "inf", "why": "not finite"}
    (other / "quarantine.jsonl").write_text(json.dumps(refused) + "\n")
    with (other / "metrics.jsonl").open("a") as file:
        for step in (3, 6):
            file.write(json.dumps({"step": step, **{f"heads/half_life/layer{n}": 8.0 * step + n for n in range(12)}}))
            file.write("\n")
    return [folder / "plain", other]


@pytest.fixture(scope="module")
def report(runs) -> Page:
    return Page(write_report(runs, runs[0].parent / "new" / "report.html").read_text(encoding="utf8"))


def test_tables_hold_what_was_recorded(report, runs):
    recorded = [read_metrics(r) for r in runs]
    steps = [[m for m in lines if "loss" in m] for lines in recorded]
    scored = [[m for m in lines if "held_out_loss" in m] for lines in recorded]
    top = "What each run came to"
    assert report.row(top, "") == [r.name for r in runs]
    assert report.row(top, "steps") == ["6", "6"] and report.row(top, "progress") == ["100.0%", "100.0%"]
    assert report.row(top, "tokens") == [f"{lines[-1]['sample'] * 32:,}" for lines in steps] == ["768", "768"]
    assert report.row(top, "training loss, last recorded") == [f"{lines[-1]['loss']:.4f}" for lines in steps]
    for name, key in (
        ("held-out loss, best", "held_out_loss"),
        ("held-out bits per byte, best", "bits_per_byte"),
        ("held-out loss, best of average ema", "held_out_loss_ema"),
        ("bits per byte, best of average ema", "bits_per_byte_ema"),
    ):
        best = [min(lines, key=lambda m, k=key: m[k]) for lines in scored]
        assert report.row(top, name) == [f"{m[key]:.4f} (step {m['step']})" for m in best]
    speeds = [sorted(m["tokens_per_second"] for m in lines) for lines in steps]
    assert report.row(top, "tokens/s, median") == [f"{(s[2] + s[3]) / 2:,.0f}" for s in speeds]
    assert report.row(top, "peak memory, GB") == ["unavailable"] * 2  # on a CPU
    assert report.row(top, "model FLOPs utilization, median") == ["unavailable"] * 2
    assert report.row(top, "actions of controllers") == report.row(top, "quarantined steps") == ["0", "1"]
    assert report.row("actions.jsonl", runs[1].name) == ["4", "loss_watch", "loss_factor", "0.5", "a <spike>"]
    assert report.row("quarantine.jsonl", runs[1].name) == ["5", "16", "19", "nan", "inf", "not finite"]
    assert report.scopes == {"row", "col"}


def test_the_field_that_differs(report, runs):
    assert report.tables["Fields in which the runs differ, except for out"][1:] == [["optimizer.lr", "0.01", "0.02"]]
    same = runs[0].parent / "copy"
    shutil.copytree(runs[0], same)
    assert (
        "The runs have the same configuration" in Page(write_report([runs[0], same], same / "r.html").read_text()).text
    )
    assert "One run" in Page(write_report([same], same / "r.html").read_text()).text


def test_plots_are_described(report, runs):
    losses = [m["loss"] for m in read_metrics(runs[0]) if "loss" in m]
    label = report.plots["Training loss"]
    assert label.startswith("Training loss, nats a token by tokens: plain from ") and runs[1].name in label
    assert f"plain from {losses[0]:.4g} to " in label
    expected = {"Held-out bits per byte", "Held-out loss", "Learning rate", "Gradient norm, before clipping"}
    expected |= {"Batch size", "Data position", "Training speed", "heads/half_life", "Training loss, second half"}
    assert expected <= report.plots.keys()
    assert "not plotted: " in report.text and "Model FLOPs utilization" not in report.plots
    assert report.row("Head statistics: last values", "heads/half_life/layer11") == ["unavailable", "59"]
    assert "layer1, layer2, layer3" in report.text  # not layer1, layer10
    assert "Triangles: actions" in report.text
    assert report.headings[0] == "Report of 2 runs" and "Head statistics" in report.headings


def test_markup_is_text(runs, tmp_path):
    text = write_report(runs, tmp_path / "r.html").read_text(encoding="utf8")
    assert "<b>" not in text and "<spike>" not in text and "&lt;b&gt;&quot;wide&quot; &amp; $x_1$" in text
    assert write_report(runs, tmp_path / "r.html").read_text(encoding="utf8") == text  # the same each time
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_names_are_told_apart(runs, tmp_path):
    for name in ("a/x/run", "b/x/run", "a/other"):
        shutil.copytree(runs[0], tmp_path / name)
    folders = [tmp_path / name for name in ("a/x/run", "b/x/run", "a/other")]
    assert [r.name for r in read_runs(folders)] == ["a/x/run", "b/x/run", "other"]
    with pytest.raises(ReportError, match="a/other/../other: named twice"):
        read_runs([folders[2], tmp_path / "a/other/../other"])


def test_tokens_of_a_growing_batch(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)
    lines = [
        {"step": 1, "loss": 3.0, "batch_size": 4, "sample": 4},
        {"step": 3, "loss": "nan", "batch_size": 8, "sample": 20, "noise_scale": None},
        {"step": 4, "held_out_loss": 2.0, "bits_per_byte": 1.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = read_runs([folder])
    assert found.tokens([1, 2, 3, 4]) == [4 * 32, 12 * 32, 20 * 32, 28 * 32]
    assert found.column("held_out_loss") == ([28 * 32], [2.0]) and found.column("noise_scale") == ([], [])
    assert found.values("loss") == [3.0]
    page = Page(write_report([folder], tmp_path / "r.html").read_text(encoding="utf8"))
    assert page.row("What each run", "training loss, last recorded") == ["nan"]


def test_errors_name_the_path(runs, tmp_path, caplog):
    folder = tmp_path / "run"
    for make, says in (
        (lambda: None, "run: no such folder"),
        (folder.mkdir, "run: not a run's folder"),
        (lambda: shutil.copy(runs[0] / "config.yaml", folder), "run/metrics.jsonl: not there"),
        (lambda: (folder / "metrics.jsonl").write_text('{"step": 1, "lo'), "run/metrics.jsonl: no step is recorded"),
        (lambda: (folder / "metrics.jsonl").write_text("[1]\n"), "run: lines without a step"),
        (lambda: (folder / "config.yaml").write_text("stepz: 1\n"), "run/config.yaml: stepz: unknown field"),
    ):
        make()
        with pytest.raises(ReportError, match=says):
            write_report([runs[0], folder], tmp_path / "r.html")
    with pytest.raises(ReportError, match="a folder; name a file"):
        write_report([runs[0]], tmp_path)
    with pytest.raises(ReportError, match=f"expected 1 to {STYLES}"):
        read_runs([])
    assert not (tmp_path / "r.html").exists()

    whole = tmp_path / "whole"
    shutil.copytree(runs[0], whole)
    with (whole / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1')
    caplog.set_level(logging.WARNING)
    write_report([whole], tmp_path / "r.html")
    assert "whole/metrics.jsonl:9: half written; left out" in caplog.text


def test_the_command(runs, tmp_path):
    out = tmp_path / "r.html"
    done = CliRunner().invoke(app, ["run", "report", *map(str, runs), "--out", str(out)])
    assert done.exit_code == 0 and done.stdout == f"report: {out}\n" and out.is_file()


def test_lines_of_many_runs_differ():
    plot = Figure("t", "x", "y", [Series(f"run {n}", [1, 2], [n, n]) for n in range(STYLES)])
    text = figures([plot])
    styles = {part.partition('"')[0] for part in text.split('<li><span style="')[1:]}
    assert len(styles) == STYLES


def test_ticks():
    assert [short(v) for v in (0, 0.004, 1e-5, 12.5, 1024, 25_000, 1.5e6, 2e9)] == [
        *("0", "0.004", "1e-05", "12.5", "1,024", "25 k", "1.5 M", "2 G")
    ]
