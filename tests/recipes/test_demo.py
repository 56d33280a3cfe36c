"""The demo: everything it promises to leave behind, and the command it ends with."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llm_mlp.checkpoint import CheckpointError, load_model
from llm_mlp.config import ConfigError, TrainConfig, load
from llm_mlp.recipes import find, recipe_names
from llm_mlp.recipes.demo import demo, next_command
from llm_mlp.recipes.report import Figure, Series, write_report

SMALL = ["data.seq_len=64", "batch_size=1", "evaluation.tokens=256", "data.tokenizer=byte"]


class Page(HTMLParser):
    """Counts tags, checks that they are closed, collects the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.text = ""
        self.loads: list[str] = []  # what a browser would fetch
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith("#")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "runs/demo"
    assert demo(out, steps=2, contexts=(16, 40), overrides=SMALL, quiet=True)
    return out


def test_what_it_leaves(made):
    for name in ("perception", "transformer"):
        model, _ = load_model(made / name)
        assert model.config.mixers[0] == {"perception": "perception", "transformer": "attention"}[name]
    lines = [json.loads(line) for line in (made / "results.jsonl").read_text().splitlines()]
    ours, twin = lines
    assert abs(ours["parameters"] / twin["parameters"] - 1) < 0.03
    assert ours["steps"] == twin["steps"] == 2 and ours["tokens"] == twin["tokens"] == 128
    ours, twin = ours["decoding"], twin["decoding"]
    assert ours["16"]["state_bytes"] == ours["40"]["state_bytes"] < 10e6
    assert twin["16"]["state_bytes"] < twin["40"]["state_bytes"]
    assert "prompt: 'The'\nThe" in (made / "samples.txt").read_text()


def test_report(made):
    page = Page((made / "report.html").read_text())
    assert page.open == [] and page.count["svg"] == 3 and page.count["table"] == 1
    for text in (
        "held-out bits per byte",
        "training, tokens/s",
        "decoding at 40",
        "state at 16",
        "It was a dark night",
    ):
        assert text in page.text
    assert not page.loads  # self-contained


def test_report_escapes(tmp_path):
    write_report(
        tmp_path / "r.html",
        "a < b",
        "x & y",
        [["", "<i>"]],
        [Figure("t", "x", "y", [Series("s", [1], [2])])],
        [("<b>", "</pre>")],
    )
    page = Page((tmp_path / "r.html").read_text())
    assert page.open == [] and "<b></pre>" in page.text and "a < b" in page.text
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_again_and_elsewhere(made, tmp_path):
    assert demo(made, steps=1, contexts=(16,), overrides=SMALL, quiet=True)
    assert json.loads((made / "results.jsonl").read_text().splitlines()[0])["steps"] == 1
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="not an earlier demo; choose another --out"):
        demo(tmp_path, steps=1)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_the_next_command_names_the_program(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    words = shlex.split(next_command(Path("runs/my demo")))
    assert Path(words[0]).name == "llm-mlp" and Path(words[0]).is_file()
    assert words[1:] == ["generate", "--model", "runs/my demo/perception", "--prompt", "The old man"]
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert next_command(Path("x")).startswith("llm-mlp generate")


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_are_valid(name):
    config = load(TrainConfig, find(name))
    assert config.steps > 0 and config.model.n_layers > 0


@pytest.mark.slow
def test_the_command_it_ends_with_works(tmp_path):
    program = str(Path(sys.executable).parent / "llm-mlp")
    done = subprocess.run(
        [program, "demo", "--steps", "3", "--contexts", "64,512"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    command = done.stdout.strip().splitlines()[-1]
    assert command.startswith("next: ")
    again = subprocess.run(
        shlex.split(command.removeprefix("next: ")), cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0 and again.stdout.startswith("The old man"), again.stderr


def test_what_cannot_be_is_said_before_anything_is_replaced(made):
    before = (made / "results.jsonl").read_text()
    for options, says in (
        ({"overrides": ["badfield=1"]}, "badfield: unknown field"),
        ({"steps": 0}, "steps: "),
        ({"contexts": (0,)}, "expected numbers of at least 1"),
        ({"overrides": ["data.held_out=0"]}, "held_out must be above 0"),
        ({"overrides": ["out=elsewhere"]}, "the demo sets this itself"),
        ({"overrides": ["device=cuda:9"]}, "device 'cuda:9' cannot be used"),  # found out by training itself
    ):
        with pytest.raises(ConfigError, match=says):
            demo(made, quiet=True, **options)
    assert [p.name for p in made.parent.iterdir()] == [made.name]
    assert (made / "results.jsonl").read_text() == before


def test_an_odd_folder_name(tmp_path):
    out = tmp_path / "a: b #c"
    assert demo(out, steps=1, contexts=(8,), overrides=SMALL, quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a: b #c"] and (out / "report.html").is_file()
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(CheckpointError, match="not a folder"):
        demo(file, steps=1)
