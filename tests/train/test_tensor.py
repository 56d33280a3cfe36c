"""Layers shared out by groups: what is cut where, and what is refused. Runs of several processes: test_parallel.py."""

from __future__ import annotations

import pytest
import torch
from model_cases import config_of
from train_cases import run, tiny

from llm_mlp.config import ConfigError
from llm_mlp.models import build_model
from llm_mlp.models.lm import LM
from llm_mlp.train.tensor import _cuts, part_config

# Parameters of layers that belong to all groups (of the fused projection: the gates' first factors).
SHARED = {"units_gain"}


@pytest.mark.parametrize("case", ["plain", "wide", "erase-free", "no-gates", "nothing-per-head", "adaptive-ffn"])
def test_a_layer_is_the_sum_of_its_parts(case):
    """Cut and joined again every parameter is itself; the parts' outputs add up."""
    config = config_of(case)
    model = build_model(config).double().randomize_()
    with torch.device("meta"):
        part = LM(part_config(config, 2))
    x = torch.randn(2, 9, config.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for kind in ("mixer", "ffn"):
        full, own = getattr(model.blocks[0], kind), getattr(part.blocks[0], kind)
        cuts = _cuts(full, own)
        outs = []
        held = [{name: cuts[name].take(p, rank) for name, p in full.named_parameters()} for rank in range(2)]
        for weights in held:
            own.load_state_dict(weights, assign=True)
            outs.append(own(x))
        for name, p in full.named_parameters():
            assert torch.equal(cuts[name].join([weights[name] for weights in held]), p)
            assert cuts[name].shared == (name in SHARED)
        y, parts = (full(x), outs) if kind == "ffn" else (full(x)[0], [out for out, _ in outs])
        torch.testing.assert_close(parts[0] + parts[1], y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.perception.groups=3"], "parallel.tensor = 2 does not divide the model's perception.groups = 3"),
        (["model.ffn.hidden=49"], "parallel.tensor = 2 does not divide the model's ffn.hidden = 49"),
        (
            ["model.ffn={activation: adaptive, adaptive_groups: 3}"],
            "parallel.tensor = 2 does not divide the model's ffn.adaptive_groups = 3",
        ),
        (["model.pattern=[perception, attention]"], "parallel.tensor = 2 shares out layers by groups"),
        (["data.packing=streams"], "parallel.tensor > 1 does not carry streams' states"),
        (["precision=fp16"], "precision = fp16 has a loss scale that parts of a layer do not share"),
    ],
)
def test_what_cannot_be_shared_out_is_named(tmp_path, overrides, says):
    with pytest.raises(ConfigError, match=says):
        run(tmp_path, "parallel.tensor=2", *overrides)


def test_one_process_is_no_tensor_group(tmp_path):
    tiny(tmp_path)
    with pytest.raises(ConfigError, match=r"tensor need several processes"):
        run(tmp_path, "parallel.tensor=2")
