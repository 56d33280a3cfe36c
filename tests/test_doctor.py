"""The doctor: well where everything agrees, and it finds what does not."""

from __future__ import annotations

import json

import pytest
import torch
from model_cases import random_model

from llm_mlp.doctor import environment, examine, report, table
from llm_mlp.models import LM, perception
from llm_mlp.models.perception import PerceptionMixer


@pytest.mark.parametrize("case", ["plain", "hybrid", "softmax-read", "fast-weights-only"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sound_model_passes(case, dtype):
    checks, chosen = examine(random_model(case).to(dtype), tokens=60)
    found = report(checks, chosen, environment(torch.device("cpu")))
    json.dumps(found)
    assert found["passed"], [c for c in checks if not c.passed]
    assert len(checks) == (8 if case == "hybrid" else 10)  # the engine serves no attention
    assert {c.slots for c in checks} == {0 if case == "fast-weights-only" else 2 * 2 * 4}
    assert all(c.differing_slots == 0 for c in checks if c.note == "to the bit" or dtype == torch.float32)
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


def test_slots_that_differ_are_counted_and_no_failure(monkeypatch):
    """Steps whose scores are those of another order keep other tokens than reading at once does."""
    step = perception.memorise_step

    def other_order(q, k, w, score, *more, **sizes):
        return step(q, k, w, 1 / score.sum(-1), *more, **sizes)

    monkeypatch.setattr(perception, "memorise_step", other_order)
    monkeypatch.setattr("llm_mlp.doctor.FACTOR", 1e9)  # what is read is other, too
    checks, chosen = examine(random_model("plain").float(), tokens=60)
    differing = {c.name: c.differing_slots for c in checks if c.differing_slots}
    assert differing.keys() == {"token by token", "in a pool, with padding"} and all(c.passed for c in checks)
    found = next(c for c in report(checks, chosen, {})["checks"] if c["name"] == "token by token")
    assert 0 < found["slot_rate"] == found["differing_slots"] / 16
    assert found["differing_slots"] == sum(sum(layer["differing"]) for layer in found["choices"])
    text = "\n".join(table(checks))
    assert (
        f"{found['differing_slots']} of 16 ({found['slot_rate']:.2%})" in text and "other slots of each group" in text
    )


def test_the_engines_first_other_token_is_counted(monkeypatch):
    step = LM.step
    monkeypatch.setattr(LM, "step", lambda self, ids, *a: step(self, ids, *a).roll(int(len(ids) > 1), -1))
    checks, chosen = examine(random_model("plain"), tokens=40)
    found = next(c for c in report(checks, chosen, {})["checks"] if c["name"] == "engine, default")
    assert found["differing"] == 1 and found["token_rate"] == 1 / found["tokens"] and found["slot_rate"] is None
    assert f"after {found['tokens'] - 1}" in found["note"]


def test_kernels_are_held_against_plain_torch(monkeypatch):
    def kernels(run):
        run()
        return [{"op": "perceive", "backend": "triton"}]

    monkeypatch.setattr("llm_mlp.doctor.backends", kernels)
    checks, _ = examine(random_model("plain"), tokens=40)
    assert [c.passed for c in checks if c.name == "in plain torch"] == [True]
