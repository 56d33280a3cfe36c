"""float8 FFNs in training: the same model and checkpoints, a loss near bfloat16's, under everything that wraps it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from model_cases import SMALL
from ranks import together
from train_cases import run, tiny

from llm_mlp.checkpoint import load_model, read_tensors
from llm_mlp.config import ConfigError, ModelConfig, build
from llm_mlp.models import build_model
from llm_mlp.train import float8
from llm_mlp.train.float8 import Float8Linear, check_float8, use_float8

FP8 = ("precision=bf16", "module_precision.ffn=fp8")


def test_the_model_keeps_its_parameters_and_its_evaluation():
    config = build(ModelConfig, {**SMALL, "ffn": {"hidden": 48, "activation": "adaptive", "adaptive_groups": 6}})
    model = build_model(config).randomize_()
    before, names = model.state_dict(), [n for n, _ in model.named_parameters()]
    tokens = torch.arange(40)[None]
    model.eval()
    plain = model(tokens).logits
    use_float8(model)
    assert [n for n, _ in model.named_parameters()] == names
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert sum(isinstance(m, Float8Linear) for m in model.modules()) == 2 * config.n_layers
    assert torch.equal(model(tokens).logits, plain)
    model.train()
    trained = model(tokens).logits
    assert not torch.equal(trained, plain)
    assert (trained - plain).norm() < 0.1 * plain.norm()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["precision=fp32"], "needs precision = bf16, in which its products end, not fp32"),
        (["model.d_model=40", "model.attention.heads=5"], "model.d_model = 40 is not one"),
        (["model.ffn.hidden=40"], "model.ffn.hidden = 40 is not one"),
        (["parallel.tensor=2"], r"model.ffn.hidden = 48 \(a part of 24\) is not one"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, overrides, said):
    with pytest.raises(ConfigError, match=said):
        tiny(tmp_path, *FP8, *overrides)


def test_a_device_without_float8_is_refused(tmp_path, monkeypatch):
    def none(*_):
        raise RuntimeError("torch._scaled_mm is only supported on newer devices")

    monkeypatch.setattr(float8, "linear_float8", none)
    with pytest.raises(ConfigError, match=r"capability 8.9 .* only supported on newer devices"):
        run(tmp_path, *FP8)
    monkeypatch.setattr(float8, "linear_float8", lambda x, w: x @ w.T + 1)
    with pytest.raises(ConfigError, match="are wrong"):
        check_float8(torch.device("cpu"))


def test_the_loss_is_near_bfloat16s(tmp_path, caplog):
    plain = run(tmp_path, "steps=60", "precision=bf16", out="plain")
    found = run(tmp_path, "steps=60", *FP8)
    assert "for tests" in caplog.text
    assert found.curve != plain.curve
    assert found.loss == pytest.approx(plain.loss, rel=0.02) and found.loss < 0.7 * plain.curve[0][1]


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputing_changes_nothing(tmp_path, mode):
    run(tmp_path, *FP8, out="plain")
    run(tmp_path, *FP8, f"activation_checkpointing={mode}")
    a, b = (read_tensors(tmp_path / name / "model/model.safetensors") for name in ("plain", "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("before", "after"), [(FP8, ["precision=bf16"]), (["precision=bf16"], FP8)])
def test_a_run_starts_from_the_others_checkpoint(tmp_path, before, after):
    run(tmp_path, *before, "steps=3", out="first")
    load_model(tmp_path / "first")
    second = run(tmp_path, *after, "steps=3", out="second", init_from=tmp_path / "first")
    a, b = (read_tensors(tmp_path / name / "model/model.safetensors") for name in ("first", "second"))
    assert a.keys() == b.keys() and second.steps == 3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_without_a_break():
    config = build(ModelConfig, SMALL)
    found = []
    for compiled in (False, True):
        model = build_model(config).randomize_()
        use_float8(model)
        ffn = model.blocks[0].ffn
        if compiled:
            ffn.compile(dynamic=False, fullgraph=True)
        x = torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            y = ffn(x)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), [x, ffn.up.weight, ffn.down.weight])])
    for a, b in zip(*found, strict=True):
        assert (a.double() - b.double()).norm() <= 0.02 * a.double().norm()


def curve(folder: str, overrides: tuple[str, ...], out: str) -> list:
    return run(Path(folder), *overrides, out=out).curve


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.data=ddp"],
        ["parallel.data=fsdp"],
        ["parallel.data=fsdp", "activation_checkpointing=full", "micro_batch=1"],
        ["parallel.context=2"],
        ["parallel.pipeline=2", "micro_batch=2"],
        ["parallel.tensor=2"],
    ],
    ids=" ".join,
)
def test_processes_train_as_one(tmp_path, layout):
    """As far as float8 rounds alike: a number near the edge between two codes falls to either side."""
    common = (*FP8, "steps=10", "model.ffn.hidden=64")
    one = curve(str(tmp_path), common, "one")
    for found in together(2, curve, str(tmp_path), (*common, *layout), "many"):
        for (_, a), (_, b) in zip(one, found, strict=True):
            assert b == pytest.approx(a, rel=0.01)
    a, b = (read_tensors(tmp_path / name / "model/model.safetensors") for name in ("one", "many"))
    assert a.keys() == b.keys()
