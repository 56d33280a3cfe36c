"""Sweeps: every rate once, everything else equal, an interior optimum recognised."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from train_cases import tiny

from llm_mlp.config import ConfigError
from llm_mlp.train import TrainingError
from llm_mlp.train import sweep as module
from llm_mlp.train.sweep import SweepResult, sweep


def test_a_sweep(tmp_path):
    results = tmp_path / "results.jsonl"
    (found,) = sweep(tiny(tmp_path, "steps=4"), [], [0.01, 1e-6], results=results, quiet=True, label="here")
    assert list(found.losses) == [1e-6, 0.01]
    assert found.losses[1e-6] == pytest.approx(math.log(257), abs=0.02)
    assert found.best == 0.01 and not found.interior
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["lr"] for line in lines] == [1e-6, 0.01]
    for line in lines:
        assert line["kind"] == "sweep" and line["label"] == "here" and line["steps"] == 4
        assert {"device", "torch", "commit", "seed", "time", "held_out_loss", "bits_per_byte"} <= line.keys()
    assert not (tmp_path / "run").exists()


def test_interior():
    assert SweepResult("a", {1.0: 3.0, 2.0: 2.0, 4.0: 5.0}).interior
    assert not SweepResult("a", {1.0: 2.0, 2.0: 3.0, 4.0: 5.0}).interior


def test_a_rate_that_fails_counts_as_infinite(tmp_path, monkeypatch):
    def failing(config, quiet):
        raise TrainingError("step 1: loss nan")

    monkeypatch.setattr(module, "train", failing)
    (found,) = sweep(tiny(tmp_path), [], [0.1, 0.2], quiet=True)
    assert set(found.losses.values()) == {math.inf}


def test_what_cannot_be_compared_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "train", None)
    for config, models, rates, results, says in (
        (tiny(tmp_path), [], [0.1], None, "at least two rates"),
        (tiny(tmp_path), [], [0.1, 0.1], None, "at least two rates"),
        (tiny(tmp_path), [], [0.1, float("nan")], None, r"optimizer\.lr: .*finite"),
        (tiny(tmp_path), [], [0.1, -1.0], None, r"optimizer\.lr: "),
        (tiny(tmp_path), ["demo", "nope"], [0.1, 0.2], None, "unknown preset 'nope'"),
        (tiny(tmp_path, "data.held_out=0"), [], [0.1, 0.2], None, r"data\.held_out must be above 0"),
        (tiny(tmp_path), [], [0.1, 0.2], tmp_path, "name a file for the results"),
    ):
        with pytest.raises(ConfigError, match=says):
            sweep(config, models, rates, results=results)


def test_an_interrupt_ends_the_sweep_and_leaves_nothing(tmp_path, monkeypatch):
    seen = []

    def interrupted(config, quiet):
        seen.append(Path(config.out))
        return SimpleNamespace(interrupted=True)

    monkeypatch.setattr(module, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(tiny(tmp_path), [], [0.1, 0.2], quiet=True)
    assert len(seen) == 1 and not seen[0].parent.parent.exists()
