"""The doctor: well where everything agrees, and it finds what does not."""

from __future__ import annotations

import json

import pytest
import torch
from model_cases import random_model

from llm_mlp.doctor import environment, examine, report
from llm_mlp.models import LM
from llm_mlp.models.perception import PerceptionMixer


@pytest.mark.parametrize("case", ["plain", "hybrid", "softmax-read", "fast-weights-only"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sound_model_passes(case, dtype):
    checks, chosen = examine(random_model(case).to(dtype), tokens=60)
    found = report(checks, chosen, environment(torch.device("cpu")))
    json.dumps(found)
    assert found["passed"], [c for c in checks if not c.passed]
    assert len(checks) == (8 if case == "hybrid" else 10)  # the engine serves no attention
    assert {row["op"] for row in chosen} >= {"perceive", "perceive_step"}
    assert all(row["backend"] == "chunked" and "cpu" in row["why"] for row in chosen)


@pytest.mark.parametrize(
    ("broken", "finds"),
    [
        ("step", {"token by token", "in a pool, with padding"}),
        ("state", {"in pieces"}),
        ("nan", {"at once"}),
        ("random", {"a second time"}),
        ("rows", {"engine, default"}),
        ("padding", {"engine, invariant"}),
    ],
)
def test_what_is_wrong_is_found(broken, finds, monkeypatch):
    if broken == "step":
        step = LM.step
        monkeypatch.setattr(LM, "step", lambda self, *a: step(self, *a) + torch.arange(61.0) / 100)
    elif broken == "state":
        forward = PerceptionMixer.forward
        monkeypatch.setattr(PerceptionMixer, "forward", lambda self, x, state=None, cu=None: forward(self, x, None, cu))
    elif broken in ("rows", "padding"):  # what a row says depends on their number, or on which are empty
        step = LM.step

        def wrong_step(self, ids, *a):
            share = len(ids) if broken == "rows" else (ids == 0).double().mean()
            return step(self, ids, *a) * (1 + 0.01 * share)

        monkeypatch.setattr(LM, "step", wrong_step)
    else:
        forward = LM.forward

        def wrong(self, *a, **k):
            out = forward(self, *a, **k)
            if out.logits is not None:
                out.logits = out.logits + (torch.nan if broken == "nan" else 1e-7 * torch.rand(()))
            return out

        monkeypatch.setattr(LM, "forward", wrong)
    checks, _ = examine(random_model("plain"), tokens=40)
    assert finds <= {c.name for c in checks if not c.passed}
