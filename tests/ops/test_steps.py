"""One token at a time = whole, over a permuted part of a pool whose other rows do not change by a bit."""

from __future__ import annotations

import pytest
import torch
from op_cases import (
    carried_units,
    close,
    copied,
    memorise_inputs,
    naive_memorise,
    perceive_inputs,
    perceive_state,
    same_units,
)

from llm_mlp.ops import Units, memorise, memorise_step, perceive, perceive_step, units_init

G, F, m, V, R = 2, 8, 3, 4, 4


@pytest.mark.parametrize("decay", ["none", "mild", "mixed"])
@pytest.mark.parametrize("T", [1, 70])
def test_perceive_steps_are_the_whole(decay, T):
    inputs = perceive_inputs(3, T, G, F, m, V, decay=decay)
    state = perceive_state(3, G, F, m, V)
    y, after, residual = perceive(*inputs, state, return_residual=True, backend="reference")
    own = state.clone()
    for t in range(T):
        step_y, step_residual = perceive_step(*(x[:, t] for x in inputs), own, return_residual=True)
        close(step_y, y[:, t])
        close(step_residual, residual[:, t])
    close(own, after)
    alone = perceive_step(*(x[:, 0] for x in inputs), state.clone())
    assert isinstance(alone, torch.Tensor)
    close(alone, y[:, 0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_perceive_steps_in_a_pool(dtype):
    T, rows = 20, [4, 0, -1, 2, -1]
    inputs = perceive_inputs(len(rows), T, G, F, m, V)
    pool = perceive_state(6, G, F, m, V)
    before = pool.clone()
    real = [b for b, row in enumerate(rows) if row >= 0]
    used = [rows[b] for b in real]
    y, after, residual = perceive(*(x[real] for x in inputs), before[used], return_residual=True)
    for t in range(T):
        step_y, step_residual = perceive_step(
            *(x[:, t] for x in inputs), pool, torch.tensor(rows, dtype=dtype), return_residual=True
        )
        close(step_y[real], y[:, t])
        close(step_residual[real], residual[:, t])
        assert not step_y[[2, 4]].any() and not step_residual[[2, 4]].any()
    close(pool[used], after)
    others = [n for n in range(6) if n not in used]
    assert torch.equal(pool[others], before[others])


def test_perceive_steps_of_another_dtype():
    """States in bfloat16, arithmetic in float32: each step rounds the state once."""
    inputs = perceive_inputs(2, 30, G, F, m, V, dtype=torch.float32)
    own = perceive_state(2, G, F, m, V, dtype=torch.bfloat16)
    rounded = own.clone()
    for t in range(30):
        token = [x[:, t] for x in inputs]
        y, exact = perceive(*(x[:, None] for x in token), rounded.float())
        got = perceive_step(*token, own)
        assert got.dtype == torch.float32 and own.dtype == torch.bfloat16
        close(got, y[:, 0], 1e-4)
        assert (own.float() - exact).abs().max() <= 2**-7 * exact.abs().max()
        rounded = own.clone()
    pool, rows = perceive_state(3, G, F, m, V, dtype=torch.bfloat16), torch.tensor([2, 0])
    own = pool[rows]
    y = perceive_step(*(x[:, 0] for x in inputs), own)
    close(perceive_step(*(x[:, 0] for x in inputs), pool, rows), y, 0)
    assert torch.equal(pool[rows], own)
    # bfloat16 tokens over float32 states: y in their dtype, the state is not rounded.
    token = [x[:, 0].bfloat16() for x in inputs[:4]] + [inputs[4][:, 0]]
    own = perceive_state(2, G, F, m, V, dtype=torch.float32)
    _, exact = perceive(*(x[:, None].float() for x in token), own.clone())
    assert perceive_step(*token, own).dtype == torch.bfloat16
    close(own, exact, 1e-5)


def test_perceive_step_into_a_strided_pool():
    """A state that is a slice of something larger is written where it lies, and nothing beside it."""
    token = [x[:, 0] for x in perceive_inputs(2, 1, G, F, m, V)]
    large = perceive_state(4, G, F, m, 2 * V)
    before = large.clone()
    own = before[::2, ..., :V].clone()
    close(perceive_step(*token, large[::2, ..., :V]), perceive_step(*token, own))
    close(large[::2, ..., :V], own)
    assert torch.equal(large[1::2], before[1::2]) and torch.equal(large[..., V:], before[..., V:])


def test_perceive_step_of_nothing():
    token = [x[:, 0] for x in perceive_inputs(2, 1, G, F, m, V)]
    pool = perceive_state(3, G, F, m, V)
    before = pool.clone()
    y = perceive_step(*token, pool, torch.tensor([-1, -1]))
    assert y.shape == (2, G, m, V) and not y.any() and torch.equal(pool, before)
    y = perceive_step(*(x[:0] for x in token), pool, torch.zeros(0, dtype=torch.long))
    assert y.shape == (0, G, m, V) and torch.equal(pool, before)


def test_padding_rows_may_hold_anything():
    """A padding row is not read: NaN in it reaches neither outputs nor the pool."""
    token = [x[:, 0].clone() for x in perceive_inputs(2, 1, G, F, m, V)]
    for x in token:
        x[1] = torch.nan
    pool = perceive_state(2, G, F, m, V)
    rows = torch.tensor([0, -1])
    y, residual = perceive_step(*token, pool, rows, return_residual=True)
    assert pool.isfinite().all() and not y[1].any() and not residual[1].any() and y.isfinite().all()
    q, k, w, score, sink = (x if i == 4 else x[:, 0].clone() for i, x in enumerate(memorise_inputs(2, 1, G, R, m, V)))
    for x in (q, k, w, score):
        x[1] = torch.nan
    units = carried_units([3, 5], G, R, m, V, block=4, slots=3)
    y = memorise_step(q, k, w, score, sink, units, rows, block=4, slots=3)
    assert units.keys.isfinite().all() and not units.scores.isnan().any() and not y[1].any()


# -- memorise ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu2", "softmax"])
@pytest.mark.parametrize("sizes", [(8, 5), (8, 0), (4, 64), (1, 3), (0, 0)])
@pytest.mark.parametrize("scores", ["ties", "distinct", "lost"])
def test_memorise_steps_are_the_whole(sizes, activation, scores):
    block, slots = sizes
    how = dict(block=block, slots=slots, activation=activation)
    q, k, w, score, sink = memorise_inputs(4, 37, G, R, m, V, scores=scores)
    b = max(block, 2)
    units = carried_units([0, b - 1, 2 * b, 3 * b + 1], G, R, m, V, block=block, slots=slots)
    y, after = naive_memorise(q, k, w, score, sink, units, **how)
    own = copied(units)
    for t in range(37):
        close(memorise_step(q[:, t], k[:, t], w[:, t], score[:, t], sink, own, **how), y[:, t])
        if t in (0, 7, 20):  # and on the way the units are what the whole leaves there
            same_units(own, memorise(*(x[:, : t + 1] for x in (q, k, w, score)), sink, units, **how)[1])
    same_units(own, after)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_memorise_steps_in_a_pool(dtype):
    T, rows = 13, [4, 0, -1, 2, -1]
    how = dict(block=4, slots=3)
    q, k, w, score, sink = memorise_inputs(len(rows), T, G, R, m, V)
    pool = carried_units([1, 3, 4, 9, 14, 0], G, R, m, V, **how)
    before = copied(pool)
    real = [b for b, row in enumerate(rows) if row >= 0]
    used = [rows[b] for b in real]
    y, after = memorise(*(x[real] for x in (q, k, w, score)), sink, Units(*(x[used] for x in before)), **how)
    for t in range(T):
        step_y = memorise_step(
            q[:, t], k[:, t], w[:, t], score[:, t], sink, pool, torch.tensor(rows, dtype=dtype), **how
        )
        close(step_y[real], y[:, t])
        assert not step_y[[2, 4]].any()
    same_units(Units(*(x[used] for x in pool)), after)
    others = [n for n in range(6) if n not in used]
    for name, x, old in zip(Units._fields, pool, before, strict=True):
        assert torch.equal(x[others], old[others]), name
    before = copied(pool)
    assert not memorise_step(q[:, 0], k[:, 0], w[:, 0], score[:, 0], sink, pool, torch.full((5,), -1), **how).any()
    same_units(pool, before, 0)


def test_memorise_steps_of_another_dtype():
    """Units in bfloat16 are the tokens rounded once; the scores stay float32, so the same rows are kept."""
    how = dict(block=4, slots=3)
    q, k, w, score, sink = memorise_inputs(2, 11, G, R, m, V, scores="distinct", dtype=torch.float32)
    own = units_init(2, G, R, m, V, **how, dtype=torch.bfloat16)
    for t in range(11):
        y = memorise_step(q[:, t], k[:, t], w[:, t], score[:, t], sink, own, **how)
        assert y.dtype == torch.float32
    rounded = k.bfloat16().float(), w.bfloat16().float()
    whole, after = memorise(q, *rounded, score, sink, **how)
    close(y, whole[:, -1], 1e-5)
    assert own.keys.dtype == torch.bfloat16 and own.scores.dtype == torch.float32
    close(own.keys.float(), after.keys, 0)
    close(own.values.float(), after.values, 0)
    assert torch.equal(own.scores, after.scores)


@pytest.mark.parametrize("op", ["perceive_step", "memorise_step"])
def test_state_indices_are_checked(op):
    token = [x[:, 0] for x in perceive_inputs(3, 1, G, F, m, V)]
    states = perceive_state(4, G, F, m, V)
    q, k, w, score, sink = (x if i == 4 else x[:, 0] for i, x in enumerate(memorise_inputs(3, 1, G, R, m, V)))
    units = units_init(4, G, R, m, V, block=4, slots=3, dtype=torch.float64)
    before, units_before = states.clone(), copied(units)

    def run(indices: torch.Tensor):
        if op == "perceive_step":
            return perceive_step(*token, states, indices)
        return memorise_step(q, k, w, score, sink, units, indices, block=4, slots=3)

    for indices, message in (
        (torch.tensor([1, 2, 1]), r"\[1, 2, 1\] are not distinct"),
        (torch.tensor([0, 1, 4]), r"outside 0 .. 3"),
        (torch.tensor([0, 1, -2]), r"outside 0 .. 3"),
        (torch.tensor([0, 1]), r"state_indices has shape \(2,\), expected \(3,\)"),
        (torch.tensor([0.0, 1.0, 2.0]), "must be int32 or int64"),
    ):
        with pytest.raises(ValueError, match=f"{op}: .*{message}"):
            run(indices)
    assert torch.equal(states, before)
    same_units(units, units_before, 0)
    run(torch.tensor([-1, 3, -1]))  # padding may repeat
    with pytest.raises(ValueError, match=f"{op}: (states|units.keys) has shape"):
        if op == "perceive_step":
            perceive_step(*token, states)
        else:
            memorise_step(q, k, w, score, sink, units, block=4, slots=3)
