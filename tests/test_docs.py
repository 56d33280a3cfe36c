"""README, docs and examples: commands parse, links lead somewhere, examples run, tables are what was measured."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from llm_mlp.cli import app
from llm_mlp.config import ModelConfig, TrainConfig, build, load
from llm_mlp.models import model_cost
from llm_mlp.presets import TWIN, preset_names
from llm_mlp.recipes import find

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    line.strip().partition("  #")[0]
    for page in PAGES
    for line in page.read_text(encoding="utf8").splitlines()
    if re.match(r"^    (\.venv/bin/)?llm-mlp ", line)
]


def test_there_are_commands():
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    words = shlex.split(command)[1:]
    group = typer.main.get_command(app)
    context = typer.Context(group)
    while hasattr(group, "commands"):
        assert words[0] in group.commands, f"no verb {words[0]}"
        group = group.commands[words.pop(0)]
    context = group.make_context(group.name, list(words))  # an unknown option or a bad value raises
    overrides = context.params.get("overrides") or []
    recipe = context.params.get("recipe") or (context.params.get("config") if group.name != "demo" else None)
    if recipe:
        assert load(TrainConfig, find(recipe), overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"\b(?:examples|benchmarks|docs)/[\w./-]+\w", (ROOT / "README.md").read_text()):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_run(path):
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_cluster_examples_are_well_formed():
    """Their shell scripts are bash, and start training with options that there are."""
    service, job = yaml.safe_load_all((ROOT / "examples/kubernetes.yaml").read_text(encoding="utf8"))
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    options = {name for p in typer.main.get_command(app).commands["train"].params for name in p.opts}
    for script in ((ROOT / "examples/slurm.sh").read_text(encoding="utf8"), container["args"][0]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        arguments = script[script.index("-m llm_mlp train") :]
        used = re.findall(r"RESUME=\((--\S+)\)", script) + re.findall(r"(?<=\s)--\w\S*", arguments)
        assert set(used) == {"--resume", "--out"} and set(used) <= options


def test_the_table_of_the_study_is_its_results():
    lines = [json.loads(line) for line in (ROOT / "benchmarks/results/30m.jsonl").read_text().splitlines()]
    found = {(r["corpus"], r["variant"]): r for r in lines if r["kind"] == "train"}
    text = (ROOT / "docs/model.md").read_text(encoding="utf8")
    rows = text[text.index("<!-- table: study -->") :].split("\n\n")[0].splitlines()[3:]
    names = {"`30m`": "preset", "softmax": "softmax", "pure": "pure", "transformer": "twin", "wide": "wide"}
    assert len(rows) == len({variant for _, variant in found})
    for row in rows:
        name, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        own = [found[corpus, names[name.split()[0]]] for corpus in ("text", "code")]
        for cell, r in zip(cells[:2], own, strict=True):
            assert cell == f"{r['held_out_loss']:.3f} ({r['bits_per_byte']:.3f})", row
        for cell, r in zip(cells[2:], own, strict=True):
            assert cell == f"{r['loss_by_position']['4096-8192']:.3f}", row


def test_the_table_of_the_presets_is_the_presets():
    text = (ROOT / "docs/model.md").read_text(encoding="utf8")
    rows = text[text.index("<!-- table: presets -->") :].split("\n\n")[0].splitlines()[3:]
    assert [row.split("`")[1] for row in rows] == [name for name in preset_names() if not name.endswith(TWIN)]
    for row in rows:
        name, *cells = (cell.strip().strip("`") for cell in row.strip("|").split("|"))
        own, twin = (build(ModelConfig, {"preset": n}) for n in (name, name + TWIN))
        p, cost, other = own.perception, model_cost(own), model_cost(twin)
        sizes = (own.d_model, own.n_layers, p.groups, p.heads_per_group, p.read_width, p.features, p.value_width)
        sizes += (p.block, p.slots, own.ffn.hidden, own.vocab_size)
        assert cells[:11] == [str(size) for size in sizes]
        assert cells[11:14] == [
            f"{cost.parameters / 1e6:.1f}",
            f"{cost.flops / 1e9:.3f}",
            f"{cost.state_bytes / 1e6:.1f}",
        ]
        assert cells[14:] == [str(twin.attention.heads), str(twin.ffn.hidden), f"{other.parameters / 1e6:.1f}"]


def test_the_table_of_the_settings_is_its_results():
    lines = [json.loads(line) for line in (ROOT / "benchmarks/results/settings.jsonl").read_text().splitlines()]
    losses = {(r["weights"], r["state"]): r for r in lines if r["kind"] == "loss-of-settings"}
    speeds = {(r["weights"], r["state"], r["context"]): r for r in lines if r["kind"] == "decode-speed"}
    text = (ROOT / "docs/bits.md").read_text(encoding="utf8")
    rows = text[text.index("<!-- table: settings -->") :].split("\n\n")[0].splitlines()[3:]
    assert len(rows) == len(losses)
    for row in rows:
        weights, state, *cells = (cell.strip().strip("`") for cell in row.strip("|").split("|"))
        own = losses[weights, state]
        assert cells[:2] == [f"{own[name]:.4f}" for name in ("loss_in_pieces", "loss_by_steps")]
        for cell, context in zip(cells[4:], (512, 4096), strict=True):
            if (r := speeds.get((weights, state, context))) is not None:
                speed, plain = (r["tokens_per_second"][name] for name in ("30m", "30m bfloat16"))
                assert cell == f"{speed:.1f}, {speed / plain:.2f}"
                assert cells[2:4] == [f"{r[name]['30m'] / 1e6:.1f}" for name in ("weight_bytes", "state_bytes")]
