"""One small model for every field of the config, switched on in turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm_mlp.config import ModelConfig, _merge, build
from llm_mlp.models import LM, build_model

VOCABULARY = 61
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "n_layers": 2,
    "perception": {
        "groups": 2,
        "heads_per_group": 3,
        "read_width": 8,
        "features": 8,
        "value_width": 4,
        "gate_rank": 5,
        "block": 8,
        "slots": 4,
    },
    "attention": {"heads": 4, "head_dim": 8},
    "ffn": {"hidden": 48, "adaptive_groups": 6},
    "routing": {"hidden": 7},
}


def perception(**fields: Any) -> dict[str, Any]:
    return {"perception": fields}


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention": {"pattern": ["attention"]},
    "attention-no-qk-norm": {"pattern": ["attention"], "attention": {"qk_norm": False, "rope_theta": 500.0}},
    "hybrid": {"pattern": ["perception", "attention"], "n_layers": 3},
    "wide": perception(features=16),
    "wide-fixed-slope": perception(features=32, learned_slope=False),
    "erase-diagonal": perception(erase="diagonal"),
    "erase-free": perception(erase="free", features=16),
    "erase-none": perception(erase="none"),
    "softmax-read": perception(read="softmax"),
    "no-slots": perception(slots=0),
    "fast-weights-only": perception(block=0, slots=0),
    "no-conv": perception(conv_width=0),
    "conv-1": perception(conv_width=1),
    "no-decay": perception(decay=False),
    "no-gates": perception(write_gate=False, output_gate=False, erase="none"),
    "nothing-per-head": perception(decay=False, block=0, slots=0),
    "surprise": perception(surprise=True),
    "fixed-slope": perception(learned_slope=False),
    "one-head": perception(groups=1, heads_per_group=1, value_width=16),
    "adaptive-ffn": {"ffn": {"activation": "adaptive"}},
    "routing": {"routing": {"last_layers": 2}, "n_layers": 3},
    "routing-hybrid": {"routing": {"last_layers": 1}, "n_layers": 3, "pattern": ["attention", "perception"]},
    "tied": {"tie_embeddings": True},
    "no-cap": {"logit_cap": 0.0},
    "dropout": {"dropout": 0.2},
    "everything": {
        "n_layers": 3,
        "pattern": ["perception", "attention", "perception"],
        "perception": {"features": 16, "erase": "diagonal", "surprise": True, "read": "softmax"},
        "ffn": {"activation": "adaptive"},
        "routing": {"last_layers": 2},
        "tie_embeddings": True,
    },
}


def config_of(case: str | dict[str, Any]) -> ModelConfig:
    return build(ModelConfig, _merge(SMALL, CASES[case] if isinstance(case, str) else case))


def random_model(case: str | dict[str, Any], dtype: torch.dtype = torch.float64, seed: int = 0) -> LM:
    """In eval mode; no parameter is what it starts from."""
    return build_model(config_of(case), seed=seed).to(dtype).randomize_(seed).eval()


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def differs(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype
    assert a.isfinite().all() and b.isfinite().all()
    return (a - b).abs().max().item() if a.numel() else 0.0


def same_states(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    """Equal names, shapes and values; of a key/value cache the filled part."""
    assert list(a) == list(b)
    for name, x in a.items():
        y = b[name]
        if name.endswith((".keys", ".values")) and ".units." not in name:
            length = a[name.rsplit(".", 1)[0] + ".length"]
            for n, filled in enumerate(length.tolist()):
                assert differs(x[n, :, :filled], y[n, :, :filled]) <= tolerance, name
            continue
        assert x.shape == y.shape and x.dtype == y.dtype, name
        finite = x.isfinite()
        assert torch.equal(finite, y.isfinite()), name
        assert differs(x[finite], y[finite]) <= tolerance, name
