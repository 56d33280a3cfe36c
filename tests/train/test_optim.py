"""Optimizers: every parameter once, whole logical matrices, decay where it belongs."""

from __future__ import annotations

import pytest
import torch
from model_cases import SMALL

from llm_mlp.config import ModelConfig, OptimizerConfig, ScheduleConfig, build
from llm_mlp.models import build_model
from llm_mlp.train.optim import Muon, make_optimizers, newton_schulz, optimizer_tensors, set_rates
from llm_mlp.train.schedule import rate_factor, warmup_steps


@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 40, 90), (2, 90, 40)])
def test_newton_schulz_orthogonalises(shape):
    """U diag(s) V^T becomes U diag(s') V^T with every s' near 1."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    x = u * torch.linspace(1, 0.05, 40, dtype=torch.float64) @ v
    inside = u.mT @ newton_schulz(x) @ v.mT
    values = inside.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.6 and values.max() < 1.3
    assert (inside - torch.diag_embed(values)).abs().max() < 1e-9


def muon(p: torch.nn.Parameter, rows: tuple[int, ...] = ()) -> Muon:
    return Muon([{"params": [p], "rows": [rows], "names": [""]}], lr=0.1, momentum=0.9, weight_decay=0.1)


def stepped(p: torch.Tensor, g: torch.Tensor, rows: tuple[int, ...] = ()) -> torch.Tensor:
    own = torch.nn.Parameter(p.clone())
    optimizer = muon(own, rows)
    for scale in (1.0, 0.5):
        own.grad = scale * g
        optimizer.step()
    return own.detach()


def test_fused_and_grouped_weights_are_matrices_of_their_own():
    torch.manual_seed(0)
    p, g = torch.randn(96, 64, dtype=torch.float64), torch.randn(96, 64, dtype=torch.float64)
    rows = (32, 40, 24)
    apart = torch.cat([stepped(a, b) for a, b in zip(p.split(rows), g.split(rows), strict=True)])
    torch.testing.assert_close(stepped(p, g, rows), apart)
    assert (stepped(p, g) - apart).abs().max() > 1e-3
    p3, g3 = p.view(3, 32, 64), g.view(3, 32, 64)
    apart = torch.stack([stepped(a, b) for a, b in zip(p3, g3, strict=True)])
    torch.testing.assert_close(stepped(p3, g3), apart)


def test_updates_have_adamws_size():
    torch.manual_seed(0)
    p = torch.zeros(64, 256, dtype=torch.float64)
    change = stepped(p, torch.randn(64, 256, dtype=torch.float64)) / 0.1
    assert 0.3 < change.square().mean().sqrt() < 0.5  # 0.2 a step


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("extra", [{}, {"perception": {"features": 64, "erase": "free"}}, {"pattern": ["attention"]}])
def test_every_parameter_once_and_decay_on_matrices_only(name, extra):
    values = {**SMALL, "d_model": 64, "attention": {"heads": 4, "head_dim": 16}, "ffn": {"hidden": 96}}
    values["perception"] = {**SMALL["perception"], "read_width": 64, "features": 64, "gate_rank": 32, "value_width": 8}
    values |= {k: {**values[k], **v} if isinstance(v, dict) else v for k, v in extra.items()}
    model = build_model(build(ModelConfig, values)).randomize_()
    names = {id(p): n for n, p in model.named_parameters()}
    optimizers = make_optimizers(model, build(OptimizerConfig, {"name": name}))
    held = [names[id(p)] for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(names.values())
    decayed = {names[id(p)] for o in optimizers for g in o.param_groups for p in g["params"] if g["weight_decay"] > 0}
    assert any(n.endswith("in_proj.weight") or n.endswith("qkv.weight") for n in decayed)
    for n in names.values():
        if n.endswith(("bias", "slope", "log_rate", "sink", "gain", "conv")) or not n.startswith("blocks."):
            assert n not in decayed, n
    model(torch.arange(10)[None], targets=torch.arange(10)[None]).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    state = optimizer_tensors(model, optimizers)
    assert {key.rpartition("/")[0] for key in state} == set(names.values())


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_matrices_and_embedding_have_rates_of_their_own(name):
    values = {**SMALL, "d_model": 64, "ffn": {"hidden": 96}}
    model = build_model(build(ModelConfig, values))
    config = OptimizerConfig(name=name, matrix_rate=0.5, embedding_rate=16)
    optimizers = make_optimizers(model, config)
    set_rates(optimizers, 0.01, 1.0, 0.95)
    rates = {id(p): g["lr"] for o in optimizers for g in o.param_groups for p in g["params"]}
    expected = {"embedding.weight": 0.16, "blocks.0.ffn.up.weight": 0.005, "head.weight": 0.01}
    named = dict(model.named_parameters())
    assert {n: pytest.approx(rates[id(named[n])]) for n in expected} == expected


# -- schedules -----------------------------------------------------------------------------------------------------


def test_warm_up_is_capped_at_a_tenth():
    assert warmup_steps(ScheduleConfig(warmup=2000), 100_000) == 2000
    assert warmup_steps(ScheduleConfig(warmup=2000), 500) == 50
    assert rate_factor(ScheduleConfig(warmup=0), 0, 10) == 1


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_schedules(kind):
    config = ScheduleConfig(kind=kind, warmup=10, decay=0.5, final=0.1 if kind != "constant" else 0.0)
    factors = [rate_factor(config, step, 200) for step in range(200)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(factors) <= 1
    falling = factors[10:]
    assert all(a >= b for a, b in zip(falling, falling[1:], strict=False))
    if kind == "constant":
        assert set(falling) == {1.0}
        return
    assert 0.1 <= factors[-1] < 0.2
    flat = {"cosine": 11, "linear": 101, "wsd": 101}[kind]
    assert all(f == pytest.approx(1, abs=1e-3) for f in factors[10:flat])
    half = {"cosine": 104, "linear": 150, "wsd": 150}[kind]
    expected = {"cosine": 0.55, "linear": 0.55, "wsd": 0.1 + 0.9 * (1 - 0.5**0.5)}[kind]
    assert factors[half] == pytest.approx(expected, abs=0.02)
