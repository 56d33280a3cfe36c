"""The fused token of a perception layer against its parts in plain torch and float64."""

from __future__ import annotations

import pytest
import torch
from model_cases import SMALL
from op_cases import DEVICE

from llm_mlp.config import ModelConfig, build
from llm_mlp.models import build_model
from llm_mlp.ops.backend import assuming
from llm_mlp.ops.checks import check

pytest.importorskip("triton", reason="the kernels are optional")


@pytest.mark.parametrize(
    ("dtype", "states", "rows"),
    [
        ("float32", "float32", "float32"),
        ("bfloat16", "float32", "bfloat16"),
        ("bfloat16", "bfloat16", "float8_e4m3fn"),
    ],
)
@pytest.mark.parametrize("activation", ["relu2", "softmax"])
@pytest.mark.parametrize(("m", "V", "slots"), [(2, 16, 4), (1, 32, 0)])
def test_perception_step(dtype, states, rows, activation, m, V, slots):
    """In a pool with padding rows, over the end of a block."""
    sizes = {"R": 16, "m": m, "V": V, "taps": 4, "rank": 8, "block": 8, "slots": slots, "activation": activation}
    sizes |= {"dtype": dtype, "states": states, "rows": rows}
    found = check("perception_step", tuple(sizes.items()), DEVICE)
    assert found.failures == [] and found.differing == 0 and bool(found.slots) == bool(slots)


def test_a_models_steps_take_it(monkeypatch):
    """Whole models: steps by the fused kernels and by plain torch agree."""
    from llm_mlp.ops.perception_step import kernels

    values = {**SMALL, "perception": {**SMALL["perception"], "read_width": 16, "features": 16, "value_width": 16}}
    values["perception"] |= {"gate_rank": 8, "heads_per_group": 2}
    model = build_model(build(ModelConfig, values), device=DEVICE).randomize_().eval()
    tokens = torch.randint(values["vocab_size"], (3, 2), device=DEVICE)
    run, calls = kernels.run, []
    monkeypatch.setattr(kernels, "run", lambda *given: calls.append(1) or run(*given))

    def logits(kind: str) -> torch.Tensor:
        state = model.init_state(2, dtype=torch.float32, device=DEVICE)
        with torch.no_grad(), assuming(kind):
            return torch.stack([model.step(token, state) for token in tokens])

    fused = logits("triton")
    assert len(calls) == len(tokens) * model.config.mixers.count("perception")
    torch.testing.assert_close(fused, logits("chunked"), rtol=1e-4, atol=1e-5)
