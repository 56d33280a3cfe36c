"""Optimizer state in 8 bits: codes as the paper says, small tensors in full, a loss near that of whole state."""

from __future__ import annotations

import pytest
import torch
from model_cases import SMALL
from train_cases import LARGER, run, tiny

from llm_mlp.config import ConfigError, ModelConfig, OptimizerConfig, build
from llm_mlp.models import build_model
from llm_mlp.train.eight_bit import AdamW8bit, Codes, block_of
from llm_mlp.train.optim import empty_state, make_optimizers, optimizer_tensors

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((1024, 4096), 256),
        ((96, 192), 192),
        ((64, 2208), 184),
        ((8, 128, 128), 128),
        ((32, 128), 128),
        ((31, 128), 0),  # fewer than 4,096 numbers
        ((8192,), 0),
        ((6144, 4), 0),  # a convolution's
        ((64, 257), 0),  # no divisor that is worth it
    ],
)
def test_blocks(shape, block):
    assert block_of(shape) == block


@pytest.mark.parametrize("signed", [True, False])
def test_codes(signed):
    codes = Codes(signed=signed, device=CPU)
    values = codes.values
    assert len(values) == 256 and values.max() == 1 and (values.diff() > 0).all() and 0 in values
    assert values.min() == pytest.approx(-0.993, abs=1e-3) if signed else values.min() == 0
    p = torch.zeros(64, 128)
    state = codes.zeros("m", p, 64)
    assert state["m_codes"].shape == p.shape and state["m_scale"].shape == (64, 2)
    assert not codes.read(state, "m", torch.float32).any()
    # What codes stand for comes back as it is, each block with a scale of its own.
    numbers = torch.cat([values[1:].repeat(33)[: 64 * 128 - 2 * 64 - 1], torch.ones(2 * 64 + 1)]).view(64, 128)
    numbers[:, ::64] = 1
    numbers = numbers * torch.logspace(-8, 3, 64)[:, None]
    codes.write(state, "m", numbers)
    torch.testing.assert_close(codes.read(state, "m", torch.float32), numbers, rtol=1e-6, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_errors_of_codes(signed):
    """Half of a step of 0.9/64 of the block's largest (0.9/128 where no code is for a sign), and 4 % of it, by which
    float16 moves borders; small numbers likewise, but that the smallest root is 3.25e-7."""
    codes = Codes(signed=signed, device=CPU)
    numbers = torch.randn(64, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    numbers = numbers if signed else numbers.abs()
    state = codes.zeros("m", numbers, 256)
    codes.write(state, "m", numbers)
    found = codes.read(state, "m", torch.float64)
    largest = numbers.abs().amax(-1, keepdim=True)
    step = 0.9 / (64 if signed else 128)
    assert ((found - numbers).abs() <= largest * step * 0.54).all()
    nearest = (codes.values.double() - (numbers / largest)[..., None]).abs().amin(-1) * largest
    assert ((found - numbers).abs() <= 1.16 * nearest + 4e-7 * largest).all()


def test_a_root_is_never_rounded_to_zero():
    codes = Codes(signed=False, device=CPU)
    numbers = torch.zeros(32, 128)
    numbers[0, 0], numbers[0, 1] = 1, 1e-20
    state = codes.zeros("root", numbers, 128)
    codes.write(state, "root", numbers)
    found = codes.read(state, "root", torch.float32)
    assert found[0, 0] == 1 and (found[0, 1:] > 0).all() and found[0, 1:].max() < 1e-6 and not found[1:].any()


def test_a_first_step_is_adamws_and_later_ones_are_near():
    torch.manual_seed(0)
    start, steps = torch.randn(64, 256), torch.randn(20, 64, 256) * torch.rand(64, 256)
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "fused": False}
    ends: dict[type, list] = {}
    for kind in (torch.optim.AdamW, AdamW8bit):
        p = torch.nn.Parameter(start.clone())
        optimizer = kind([{"params": [p], "weight_decay": 0.1}], **options)
        ends[kind] = []
        for g in steps:
            p.grad = g
            optimizer.step()
            ends[kind].append(p.detach().clone())
    whole, coded = ends.values()
    assert torch.equal(whole[0], coded[0])
    assert (whole[-1] - coded[-1]).norm() < 0.03 * (whole[-1] - start).norm()


def sized(**optimizer):
    values = {**SMALL, "vocab_size": 100, "d_model": 64, "attention": {"heads": 4, "head_dim": 16}}
    model = build_model(build(ModelConfig, values | {"ffn": {"hidden": 96}})).randomize_()
    return model, make_optimizers(model, build(OptimizerConfig, optimizer))


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_parameter_once_and_small_ones_in_full(name):
    model, optimizers = sized(name=name, state="8bit")
    held = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    tokens = torch.arange(40)[None]
    model(tokens, targets=tokens).loss.backward()
    for o in optimizers:
        o.step()
    found = optimizer_tensors(model, optimizers)
    for parameter, p in model.named_parameters():
        keys = {key.rpartition("/")[2] for key in found if key.rpartition("/")[0] == parameter}
        muon = "momentum" in keys or "momentum_codes" in keys
        assert any("codes" in key for key in keys) == (block_of(p.shape) > 0), parameter
        assert ("step" in keys) == (not muon)
    assert "embedding.weight/root_codes" in found and "blocks.0.mixer.slope/exp_avg" in found
    assert ("blocks.0.ffn.up.weight/momentum_codes" in found) == (name == "muon")
    made = {key: (t.dtype, t.shape) for key, t in found.items()}
    empty_state(optimizers)  # what a checkpoint fills is what a step makes
    assert made == {key: (t.dtype, t.shape) for key, t in optimizer_tensors(model, optimizers).items()}
    # Decayed are the same ones as in full.
    whole_model, whole = sized(name=name)
    decays = [
        {
            n
            for n, p in m.named_parameters()
            for o in os
            for g in o.param_groups
            if g["decay"]
            for q in g["params"]
            if p is q
        }
        for m, os in ((model, optimizers), (whole_model, whole))
    ]
    assert decays[0] == decays[1] and decays[0]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parallel.tensor=2"], "cannot be combined with parallel.tensor = 2"),
        (["control.rate_from_gradients=true"], "cannot be combined with control.rate_from_gradients"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, overrides, said):
    with pytest.raises(ConfigError, match=said):
        tiny(tmp_path, "optimizer.state=8bit", *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_the_loss_is_near_that_of_whole_state(tmp_path, name):
    """200 steps on the demo's stories."""
    more = (*LARGER, "data.sources=[]", "data.seq_len=64", "steps=200", f"optimizer.name={name}", "optimizer.lr=0.004")
    same, coded = (run(tmp_path, *more, f"optimizer.state={state}", out=state) for state in ("same", "8bit"))
    assert same.evaluations[-1][1] < 0.6 * same.curve[0][1]
    assert coded.evaluations[-1][1] == pytest.approx(same.evaluations[-1][1], rel=0.01)
