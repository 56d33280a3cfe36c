"""Which tokens slots hold: those that the scores chose, told by their values alone."""

from __future__ import annotations

import pytest
import torch
from model_cases import SMALL, random_model, random_tokens

from llm_mlp.models.choices import Written
from llm_mlp.models.perception import watching
from llm_mlp.weights import exact_copy

SLOTS, T = SMALL["perception"]["slots"], 6 * SMALL["perception"]["block"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_slots_hold_the_tokens_that_surprised_most(dtype):
    model, ids = random_model("plain", dtype), random_tokens(1, T)
    scores = {}
    with (
        torch.no_grad(),
        watching(model, lambda n, k, w, decay, beta, residual: scores.update({n: residual[0].sum(-1)})),
    ):
        state = model(ids).state
    written = Written(exact_copy(model), ids)
    for layer, score in scores.items():
        assert model.blocks[layer].mixer.watcher is None
        for held, best in zip(written._held(state, layer), score.T.topk(SLOTS).indices, strict=True):
            assert held.nonzero().flatten().tolist() == sorted(best.tolist())


@torch.no_grad()
def test_what_is_kept_counts_and_not_where():
    model, ids = random_model("plain"), random_tokens(1, T)
    written, state = Written(model, ids), model(ids).state
    other = {name: t.clone() for name, t in state.items()}
    for part in ("keys", "values", "scores"):
        rows = other[f"layers.0.units.{part}"][0]
        rows[0, [0, 1]] = rows[0, [1, 0]]
    assert [(c.layer, c.slots, c.differing) for c in written.compare(state, other)] == [
        (0, [SLOTS, SLOTS], [0, 0]),
        (1, [SLOTS, SLOTS], [0, 0]),
    ]
    values = other["layers.1.units.values"][0, 1]
    values[2] = values[0]
    assert [c.differing for c in written.compare(state, other)] == [[0, 0], [0, 1]]
    other["layers.1.units.scores"][0, 0, SLOTS - 1] = -torch.inf  # not in use
    assert [c.differing for c in written.compare(other, state)] == [[0, 0], [1, 1]]


@torch.no_grad()
def test_tokens_that_wrote_the_same_stand_for_one_another():
    model, ids = random_model({"perception": {"conv_width": 0}}), random_tokens(1, T // 2).repeat(1, 2)
    written = Written(model, ids)
    first = written._names[0][0]
    assert torch.equal(first[T // 2 :], first[: T // 2]) and first.unique().numel() == ids.unique().numel()
    state = model(ids).state
    other = {name: t + 1e-9 * torch.randn_like(t) if "values" in name else t for name, t in state.items()}
    assert not any(sum(c.differing) for c in written.compare(state, other))


def test_without_slots_there_is_nothing_to_compare():
    model, ids = random_model("no-slots"), random_tokens(1, 20)
    written = Written(model, ids)
    assert written.compare(written.state, written.state) == []
