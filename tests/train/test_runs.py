"""``llm-mlp run``: which samples a step read, and that a killed run is resumed exactly."""

from __future__ import annotations

import json

import pytest
from train_cases import run, tiny
from typer.testing import CliRunner

from llm_mlp.checkpoint import CheckpointError
from llm_mlp.cli import app
from llm_mlp.config import ConfigError, dump
from llm_mlp.data import DataError
from llm_mlp.train.gradients import Gradients
from llm_mlp.train.runs import samples_of, which_samples
from llm_mlp.train.verify import VerifyError, verify_resume


@pytest.mark.parametrize("packing", ["joined", "reset", "streams"])
def test_the_samples_of_a_step_are_those_it_was_trained_on(tmp_path, monkeypatch, packing):
    seen = []
    real = Gradients._loss

    def loss(self, batch, carried):
        seen.append(bytes(batch.tokens.flatten().clamp_max(255).tolist()))
        return real(self, batch, carried)

    monkeypatch.setattr(Gradients, "_loss", loss)
    run(tmp_path, f"data.packing={packing}")
    found = which_samples(tmp_path / "run", 3)
    assert [s.sample for s in found] == [8, 9, 10, 11]
    for sample, row in zip(found, [seen[2][i * 32 : i * 32 + 32] for i in range(4)], strict=True):
        # The separator is no text and no byte.
        assert sample.text.encode() == row[: sample.tokens].replace(b"\xff", b"")
    shown = CliRunner().invoke(app, ["run", "which-samples", str(tmp_path / "run"), "--step", "3", "--json"])
    assert [s["sample"] for s in json.loads(shown.stdout)] == [8, 9, 10, 11]


def test_samples_after_the_batch_has_grown(tmp_path):
    run(tmp_path)
    line = {"step": 2, "controller": "batch_noise", "what": "batch_size", "value": 8, "reason": "noise"}
    (tmp_path / "run/actions.jsonl").write_text(json.dumps(line) + "\n")
    assert [samples_of(tmp_path / "run", n) for n in (1, 2, 3, 4)] == [
        range(4),
        range(4, 8),
        range(8, 16),
        range(16, 24),
    ]
    with pytest.raises(ConfigError, match="--step 5: the run ends with step 4"):
        samples_of(tmp_path / "run", 5)
    with pytest.raises(ConfigError, match="--step 0: steps count from 1"):
        samples_of(tmp_path / "run", 0)


def test_samples_of_what_is_no_run_or_has_other_data(tmp_path):
    with pytest.raises(CheckpointError, match="not the folder of a run"):
        which_samples(tmp_path, 1)
    run(tmp_path)
    path = tmp_path / "docs.jsonl"
    path.write_text(path.read_text() + json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(DataError, match="the data differ"):
        which_samples(tmp_path / "run", 1)


def recipe(folder) -> str:
    path = folder / "tiny.yaml"
    path.write_text(dump(tiny(folder, "device=cpu")))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["joined", "streams"])
def test_a_killed_run_is_resumed_to_the_bit(tmp_path, packing):
    verdict = verify_resume(recipe(tmp_path), [f"data.packing={packing}"], folder=tmp_path / "runs", steps=50)
    assert verdict.passed and verdict.bound == 0 and verdict.loss_error == 0 and verdict.weight_error == 0
    assert verdict.steps == 100 and verdict.resumed_from == 50 < verdict.killed_after < 100


@pytest.mark.slow
def test_verify_resume_needs_no_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the text that ships with the package is tokenised
    shown = CliRunner().invoke(app, ["run", "verify-resume"])
    assert shown.exit_code == 0 and "resumed from step 10 on 1" in shown.stdout, shown.output
    assert shown.stdout.endswith("passed\n")


@pytest.mark.slow
def test_a_killed_run_is_resumed_by_other_processes(tmp_path):
    options = ["run", "verify-resume", recipe(tmp_path), "precision=fp64", "--steps", "30"]
    options += ["--processes", "2", "--resume-processes", "1", "--json"]
    shown = CliRunner().invoke(app, options)
    verdict = json.loads(shown.stdout)
    assert shown.exit_code == 0 and verdict["passed"] and verdict["samples_equal"]
    assert verdict["bound"] == 1e-9 and verdict["loss_error"] < 1e-9


@pytest.mark.slow
def test_a_run_that_fails_or_ends_too_soon_says_so(tmp_path):
    with pytest.raises(VerifyError, match="the run failed"):
        verify_resume(recipe(tmp_path), ["model.vocab_size=100"], folder=tmp_path / "runs")
    with pytest.raises(ConfigError, match="is there already"):
        verify_resume(recipe(tmp_path), [], folder=tmp_path / "runs")
