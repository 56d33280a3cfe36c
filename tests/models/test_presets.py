"""Costs from the config alone = those of the built model; the presets and their twins."""

from __future__ import annotations

import pytest
import torch
from model_cases import CASES, config_of, random_tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llm_mlp.config import ConfigError, ModelConfig, build
from llm_mlp.models import LM, build_model, model_cost
from llm_mlp.presets import TWIN, preset, preset_names

PRESETS = ["demo", "30m", "125m", "360m", "900m"]
DTYPES = {8: torch.float64, 4: torch.float32, 2: torch.bfloat16}


def config(name: str) -> ModelConfig:
    return build(ModelConfig, {"preset": name})


def on_meta(c: ModelConfig) -> LM:
    with torch.device("meta"):
        return LM(c)


def state_bytes(model: LM, context: int, dtype: torch.dtype, device: str) -> int:
    state = model.init_state(1, dtype=dtype, device=device, context=context)
    return sum(x.numel() * x.element_size() for x in state.values())


# -- costs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_parameters_and_state_bytes(case):
    c = config_of(case)
    model = build_model(c)
    for context in (0, 1, 100):
        for size, dtype in DTYPES.items():
            cost = model_cost(c, context=context, dtype_bytes=size)
            assert cost.parameters == sum(p.numel() for p in model.parameters())
            assert cost.state_bytes == state_bytes(model, context, dtype, "cpu")
    # The bytes are those of a state that has really read so many tokens.
    with torch.no_grad():
        state = model.double()(random_tokens(1, 100)).state
    assert model_cost(c, context=100, dtype_bytes=8).state_bytes == sum(
        x.numel() * x.element_size() for x in state.values()
    )


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("T", [64, 192])
def test_flops(case, T):
    """The matrix products torch counts, a token, where T is whole chunks and blocks.

    Attention runs through the math backend, whose two products are counted like any others (all T x T of them, as a
    formula in the context does). The solve of a chunk (64 x 64, forward substitution) is no matrix product: neither
    side counts it.
    """
    c = config_of(case)
    model = build_model(c).eval()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(random_tokens(2, T))
    assert counter.get_total_flops() == 2 * T * model_cost(c, context=T).flops


def test_perception_does_not_grow_and_attention_does():
    perception, attention = config("30m"), config("30m" + TWIN)
    short, long = (model_cost(perception, context=n) for n in (512, 16_384))
    assert short == long
    short, long = (model_cost(attention, context=n) for n in (512, 16_384))
    assert short.parameters == long.parameters
    assert long.state_bytes - short.state_bytes == 8 * 2 * 512 * 2 * (16_384 - 512)
    assert long.flops > short.flops


# -- presets -----------------------------------------------------------------------------------------------------


def test_names():
    assert preset_names() == [name + end for name in PRESETS for end in ("", "-transformer")]


@pytest.mark.parametrize("name", preset_names())
def test_presets_build_and_cost_what_is_said(name):
    c = config(name)
    model = on_meta(c)
    cost = model_cost(c, context=1000, dtype_bytes=2)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.state_bytes == state_bytes(model, 1000, torch.bfloat16, "meta")
    if not name.endswith(TWIN):
        assert 32 <= c.perception.heads <= 128  # what presets use; 1 to 512 are allowed
        assert set(c.mixers) == {"perception"}
        p = c.perception
        assert (p.read_width, p.features, p.block, p.slots, p.read) == (128, 128, 256, 64, "relu2")
        assert p.value_width in (16, 32) and p.erase in ("scalar", "diagonal")  # contractive
    else:
        assert set(c.mixers) == {"attention"} and c.attention.qk_norm


@pytest.mark.parametrize("name", PRESETS)
def test_twins(name):
    c, twin = config(name), config(name + TWIN)
    assert c.vocab_size == twin.vocab_size and c.d_model == twin.d_model and c.n_layers == twin.n_layers
    a, b = model_cost(c).parameters, model_cost(twin).parameters
    assert abs(a - b) / a < 0.03
    embedding = c.vocab_size * c.d_model
    assert abs(a - b) / (a - embedding) < 0.03  # also without what both share


@pytest.mark.parametrize(("name", "millions"), [("30m", 30), ("125m", 125), ("360m", 360), ("900m", 900)])
def test_names_say_the_size(name, millions):
    """Without the token embedding, whose rows are looked up and not multiplied."""
    c = config(name)
    parameters = model_cost(c).parameters - c.vocab_size * c.d_model
    assert abs(parameters / 1e6 - millions) < 0.05 * millions


def test_900m_is_the_source_documents_size():
    assert abs(model_cost(config("900m"), context=2048).flops / 1.8e9 - 1) < 0.05


def test_a_preset_runs():
    c = config("demo")
    model = build_model(c).randomize_().eval()
    with torch.no_grad():
        logits = model(torch.randint(0, c.vocab_size, (1, 70))).logits
    assert logits.shape == (1, 70, c.vocab_size) and logits.isfinite().all()


# -- presets in configs ------------------------------------------------------------------------------------------


def test_refinements():
    c = build(ModelConfig, {"preset": "30m", "n_layers": 4, "perception": {"block": 0, "slots": 0}})
    base = config("30m")
    assert c.n_layers == 4 and (c.perception.block, c.perception.slots) == (0, 0)
    assert c.perception.groups == base.perception.groups and c.ffn == base.ffn and c.vocab_size == base.vocab_size
    assert preset("30m")["n_layers"] == 8  # the table is not changed by a refinement
    with pytest.raises(ConfigError, match="set slots: 0 too"):
        build(ModelConfig, {"preset": "30m", "perception": {"block": 0}})


@pytest.mark.parametrize(
    ("wrong", "right"), [("30", "30m"), ("125m-transformr", "125m-transformer"), ("dmo", "demo"), ("900M", "900m")]
)
def test_a_misspelt_preset_suggests(wrong, right):
    for values in ({"preset": wrong}, {"preset": wrong, "n_layers": 2}):
        with pytest.raises(ConfigError, match=rf"unknown preset '{wrong}'; did you mean '{right}'\? known: demo, "):
            build(ModelConfig, values)
    with pytest.raises(ConfigError, match="unknown preset"):
        build(ModelConfig, {"preset": "zzzzzz"})
    with pytest.raises(ConfigError, match="preset must be a name, got 30"):
        build(ModelConfig, {"preset": 30})
