"""Head statistics: that they are what their names say, and are recorded with every evaluation."""

from __future__ import annotations

import math

import pytest
import torch
from model_cases import SMALL
from train_cases import run

from llm_mlp.config import ModelConfig, ParallelConfig, build
from llm_mlp.models import build_model
from llm_mlp.train.console import read_metrics
from llm_mlp.train.heads import HeadStatistics
from llm_mlp.train.parallel import World


def test_statistics_are_those_of_the_first_text():
    model = build_model(build(ModelConfig, SMALL)).randomize_()
    statistics = HeadStatistics(model)
    seen = {}
    tokens = torch.arange(40).view(1, -1) % model.config.vocab_size
    with statistics.watching():
        mixer = model.blocks[0].mixer
        watch = mixer.watcher
        mixer.watcher = lambda *args: (seen.setdefault("args", args), watch(*args))
        model(tokens)
        model(tokens.flip(1))
    assert model.blocks[0].mixer.watcher is None
    found = statistics.values(World(ParallelConfig(), torch.device("cpu")))
    k, w, log_decay, beta, residual = seen["args"]
    half_lives = (math.log(2) / -log_decay.detach().flatten(0, 1).mean(0)).flatten().tolist()
    assert found["heads/half_life/layer0"] == pytest.approx(sorted(half_lives)[(len(half_lives) - 1) // 2], rel=1e-5)
    assert found["heads/erase/layer0"] == pytest.approx(float(beta.mean()), rel=1e-5)
    wanted = math.sqrt(float(residual.mean()) / float(w.square().sum(-1).mean()))
    assert found["heads/surprise/layer0"] == pytest.approx(wanted, rel=1e-5)
    assert 0 <= found["heads/dead_features/layer0"] < 1


def test_a_feature_that_never_answers_is_dead():
    model = build_model(build(ModelConfig, SMALL)).randomize_()
    statistics = HeadStatistics(model)
    k = torch.ones(1, 9, 2, 8)
    k[..., 1, :2] = 0
    w, scalars = torch.ones(1, 9, 2, 2, 4), torch.full((1, 9, 2, 2), -0.1)
    statistics._see(0, k, w, scalars, None, -scalars)
    found = statistics.values(World(ParallelConfig(), torch.device("cpu")))
    assert found["heads/dead_features/layer0"] == 2 / 16 and found["heads/erase/layer0"] == 0.0


def test_evaluations_record_them(tmp_path):
    run(tmp_path, "evaluation.every=3")
    lines = [line for line in read_metrics(tmp_path / "run") if "bits_per_byte" in line]
    assert len(lines) == 2 and all(line["heads/half_life/layer0"] > 0 for line in lines)
