"""The step kernels against plain torch in float64: in a pool, with padding rows, block after block."""

from __future__ import annotations

import pytest
import torch
from op_cases import DEVICE, carried_units, close, copied, memorise_inputs, perceive_inputs, perceive_state, same_units

from llm_mlp.ops import Units, memorise_step, perceive_step, units_init
from llm_mlp.ops.heads import head_inputs_step

pytest.importorskip("triton", reason="the kernels are optional")

ROWS = [4, 0, -1, 2, -1]


def to_double(x):
    return x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("rows", [None, ROWS], ids=["all", "pool"])
@pytest.mark.parametrize("scalar", [True, False], ids=["scalar", "vector"])
@pytest.mark.parametrize(("F", "m", "V"), [(16, 3, 16), (32, 2, 4), (128, 1, 32)])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
def test_perceive(rows, scalar, F, m, V, state):
    B, G, T = 5, 2, 6
    inputs = perceive_inputs(B, T, G, F, m, V, decay="mixed", dtype=torch.float32, scalar=scalar)
    pool = perceive_state(B + 2, G, F, m, V, dtype=state)
    if rows is None:
        pool = pool[:B].contiguous()
    index = None if rows is None else torch.tensor(rows)
    own = pool.to(DEVICE)
    for t in range(T):
        token = [x[:, t] for x in inputs]
        exact = own.cpu().double()
        want = perceive_step(*(x.double() for x in token), exact, index, return_residual=True)
        got = perceive_step(
            *(x.to(DEVICE) for x in token), own, None if index is None else index.to(DEVICE), return_residual=True,
            backend="triton",
        )  # fmt: skip
        for a, b in zip(got, want, strict=True):
            assert a.dtype == torch.float32
            close(a.cpu().double(), b, 2e-6 * float(b.abs().max()) + 1e-6)
        limit = 2e-6 if state == torch.float32 else 2**-8
        close(own.cpu().double(), exact, limit * float(exact.abs().max()))
    if rows is not None:
        others = [n for n in range(len(pool)) if n not in rows]
        assert torch.equal(own.cpu()[others], pool[others])


def test_padding_rows_are_not_read():
    token = [x[:, 0].clone() for x in perceive_inputs(2, 1, 1, 16, 1, 16, dtype=torch.float32)]
    for x in token:
        x[1] = torch.nan
    pool = perceive_state(2, 1, 16, 1, 16, dtype=torch.float32).to(DEVICE)
    token, rows = [x.to(DEVICE) for x in token], torch.tensor([0, -1], device=DEVICE)
    y, residual = perceive_step(*token, pool, rows, return_residual=True, backend="triton")
    assert pool.isfinite().all() and y.isfinite().all() and not y[1].any() and not residual[1].any()


@pytest.mark.parametrize("rows", [None, ROWS], ids=["all", "pool"])
@pytest.mark.parametrize("activation", ["relu2", "softmax"])
@pytest.mark.parametrize(
    ("block", "slots"),
    [(4, 5), (3, 0), (1, 3), *(pytest.param(*s, marks=pytest.mark.slow) for s in ((8, 5), (4, 20), (40, 17)))],
)
@pytest.mark.parametrize("scores", ["ties", "distinct", "lost"])
def test_memorise(rows, activation, block, slots, scores):
    B, G, R, m, V, T = 5, 2, 16, 2, 8, 2 * block + 3
    how = {"block": block, "slots": slots, "activation": activation}
    q, k, w, score, sink = memorise_inputs(B, T, G, R, m, V, scores=scores, dtype=torch.float32)
    score, sink = score.float(), sink.float()
    lengths = [0, block - 1, 2 * block, 3 * block + block // 2, block, 0, 7][: B if rows is None else B + 2]
    start = carried_units(lengths, G, R, m, V, block=block, slots=slots)
    exact = Units(*(x.float().double() if x.is_floating_point() else x.clone() for x in start))
    own = Units(*(x.float().to(DEVICE) if x.is_floating_point() else x.clone().to(DEVICE) for x in start))
    before = copied(own)
    index = None if rows is None else torch.tensor(rows)
    for t in range(T):
        token = q[:, t], k[:, t], w[:, t], score[:, t]
        want = memorise_step(*(x.double() for x in token), sink.double(), exact, index, **how)
        got = memorise_step(
            *(x.to(DEVICE) for x in token), sink.to(DEVICE), own, None if index is None else index.to(DEVICE),
            backend="triton", **how,
        )  # fmt: skip
        close(got.cpu().double(), want, 2e-5)
    mine = Units(*(to_double(x.cpu()) for x in own))
    same_units(mine, exact, 1e-6)
    assert torch.equal(mine.scores, exact.scores)  # exactly the same rows
    if rows is not None:
        others = [n for n in range(len(lengths)) if n not in rows]
        for x, old in zip(own, before, strict=True):
            assert torch.equal(x[others], old[others])


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_memorise_adds_scores_up(backend):
    how = {"block": 4, "slots": 3, "backend": backend}
    q, k, w, score, sink = memorise_inputs(2, 9, 1, 16, 1, 16, scores="distinct", dtype=torch.float32)
    parts = torch.stack([0.25 * score, 0.5 * score, 0.25 * score], -1).float().to(DEVICE)
    q, k, w, score, sink = (x.float().to(DEVICE) for x in (q, k, w, score, sink))
    one, other = (units_init(2, 1, 16, 1, 16, block=4, slots=3, dtype=torch.float32, device=DEVICE) for _ in range(2))
    for t in range(9):
        a = memorise_step(q[:, t], k[:, t], w[:, t], score[:, t], sink, one, **how)
        b = memorise_step(q[:, t], k[:, t], w[:, t], parts[:, t], sink, other, **how)
        assert torch.equal(a, b)
    assert torch.equal(one.keys, other.keys)


@pytest.mark.parametrize("rows", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_memorise_rows_in_another_dtype(rows):
    how = {"block": 4, "slots": 3}
    q, k, w, score, sink = memorise_inputs(2, 11, 1, 16, 1, 16, scores="distinct", dtype=torch.float32)
    score, sink = score.float(), sink.float()
    k[:, 3::6], w[:, 4::4] = (
        3e3 * k[:, 3::6],
        1e-3 * w[:, 4::4],
    )  # beyond what 8 bits hold; below their normal ones
    own, other = (units_init(2, 1, 16, 1, 16, **how, dtype=rows, device=d) for d in (DEVICE, "cpu"))
    for t in range(11):
        token = [x[:, t] for x in (q, k, w, score)]
        y = memorise_step(*(x.to(DEVICE) for x in token), sink.to(DEVICE), own, backend="triton", **how)
        close(y.cpu(), memorise_step(*token, sink, other, backend="chunked", **how), 1e-5)
    if rows == torch.float8_e4m3fn:
        assert float(own.keys.float().abs().max()) == 448  # saturated, not NaN
    for a, b in zip(own, other, strict=True):
        assert torch.equal(a.cpu().float(), b.float())


@pytest.mark.parametrize("rows", [None, [3, -1, 0]], ids=["all", "pool"])
@pytest.mark.parametrize("off", [(), ("slope", "write", "gain"), ("conv", "tails")])
@pytest.mark.parametrize("K", [4, 1, 2])
def test_inputs(rows, off, K):
    B, G, R, m, V = 3, 2, 16, 3, 16
    C, g = 2 * G * R + G * m * V, torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    given = {
        "x": normal(B, C), "conv": normal(C, K), "slope": 1 + normal(C) / 4, "write": normal(B, G * m * V),
        "gain": 1 + normal(2, R) / 4, "tails": normal(B + 1 if rows else B, K - 1, C),
    }  # fmt: skip
    given.update(dict.fromkeys(off))
    index = None if rows is None else torch.tensor(rows)

    def run(backend, device, wide):
        own = {name: None if x is None else x.clone().to(wide).to(device) for name, x in given.items()}
        at = None if index is None else index.to(device)
        found = head_inputs_step(**own, state_indices=at, groups=G, heads=(m, V), eps=1e-6, backend=backend)
        return [None if y is None else y.cpu().double() for y in (*found, own["tails"])]

    got, want = run("triton", DEVICE, torch.float32), run("chunked", "cpu", torch.float64)
    real = [b for b in range(B) if rows is None or rows[b] >= 0]
    for n, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            close(a if n == len(got) - 1 else a[real], b if n == len(got) - 1 else b[real], 1e-5)


def test_what_is_not_served_is_named():
    token = [x[:, 0].to(DEVICE) for x in perceive_inputs(1, 1, 1, 24, 1, 16, dtype=torch.float32)]
    pool = perceive_state(1, 1, 24, 1, 16, dtype=torch.float32).to(DEVICE)
    with pytest.raises(ValueError, match="perceive_step: backend 'triton' cannot run: it does not serve F = 24"):
        perceive_step(*token, pool, backend="triton")
    with pytest.raises(ValueError, match="needs tails"):
        head_inputs_step(torch.zeros(1, 48), torch.zeros(48, 4), None, None, None, None, groups=1, heads=(1, 16), eps=0)
