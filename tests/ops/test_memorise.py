"""`memorise` and its units: the loop is the specification, the blocked form is the loop, on scores with ties too."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    all_close,
    carried_units,
    close,
    copied,
    memorise_inputs,
    naive_memorise,
    same_units,
    sequences,
    with_gradients,
)
from torch import Tensor

from llm_mlp.ops import Units, memorise, units_init, units_select

G, R, m, V = 2, 4, 2, 3
# (block, slots): ordinary; no slots; more slots than tokens; one row a block; neither.
SIZES = [(8, 5), (8, 0), (4, 64), (1, 3), (0, 0), (16, 1)]
ACTIVATIONS = ["relu2", "softmax"]
SCORES = ["ties", "distinct", "lost"]
PACKINGS = [[0, 0, 3, 20, 20, 37, 37], [0, 37], [0, 8, 16, 37], [0, 1, 2, 3, 37]]


def lengths_of(N: int, block: int) -> list[int]:
    """Carried lengths that differ from row to row: none, an open block, whole blocks, both."""
    b = max(block, 2)
    return [[0, b - 1, 2 * b, 3 * b + 1, 1, 5 * b - 1][n % 6] for n in range(N)]


def run_naive(*x, score, units, bounds=None, **sizes):
    """As `memorise`, for packed sequences one after another."""
    q, k, w, sink = x
    if bounds is None:
        return naive_memorise(q, k, w, score, sink, units, **sizes)
    ys, left = [], []
    for n, (a, b) in enumerate(sequences(bounds)):
        own = None if units is None else Units(*(t[n : n + 1] for t in units))
        y, after = naive_memorise(q[:, a:b], k[:, a:b], w[:, a:b], score[:, a:b], sink, own, **sizes)
        ys.append(y)
        left.append(after)
    return torch.cat(ys, 1), Units(*(torch.cat(t) for t in zip(*left, strict=True)))


def run_ops(*x, score, units, bounds=None, **sizes):
    q, k, w, sink = x
    cu = None if bounds is None else torch.tensor(bounds)
    return memorise(q, k, w, score, sink, units, cu_seqlens=cu, **sizes)


def outcome(run, inputs: Sequence[Tensor], units: Units | None = None, **sizes):
    """Outputs and gradients of y, keys, values with respect to q, k, w, sink and the carried keys and values."""
    q, k, w, score, sink = inputs
    rest = {}

    def differentiable(*x: Tensor | None):
        own = None if units is None else Units(x[4], x[5], units.scores, units.length)
        y, after = run(*x[:4], score=score, units=own, **sizes)
        rest["left"] = after
        return y, after.keys, after.values

    carried = [None, None] if units is None else [units.keys, units.values]
    outputs, grads = with_gradients(differentiable, [q, k, w, sink, *carried])
    if units is not None and q.shape[1] == 0:  # nothing is read; of a row that holds no token any gradient will do
        used = units.keys.any(-1)
        grads[4:] = [grads[4] * used[..., None], grads[5] * used[..., None, None]]
    return outputs, grads, rest["left"]


def compare(a, b, what: str = "") -> None:
    all_close(a[0], b[0], what=f"{what} outputs")
    all_close(a[1], b[1], what=f"{what} gradients")
    close(a[2].scores, b[2].scores, 0, f"{what} scores")
    assert torch.equal(a[2].length, b[2].length), what
    assert not a[2].scores.requires_grad and not a[2].length.is_floating_point()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("scores", SCORES)
def test_reference_is_the_specification(sizes, activation, scores):
    how = dict(block=sizes[0], slots=sizes[1], activation=activation)
    inputs = memorise_inputs(3, 21, G, R, m, V, scores=scores)
    for units in (None, carried_units(lengths_of(3, sizes[0]), G, R, m, V, block=sizes[0], slots=sizes[1])):
        compare(
            outcome(partial(run_ops, backend="reference"), inputs, units, **how),
            outcome(run_naive, inputs, units, **how),
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("T", [0, 1, 8, 37])
def test_chunked_is_the_specification(sizes, activation, scores, T):
    how = dict(block=sizes[0], slots=sizes[1], activation=activation)
    inputs = memorise_inputs(6, T, G, R, m, V, scores=scores)
    aligned = [0, 2 * sizes[0], 0, sizes[0], 0, 0]
    for lengths in (None, lengths_of(6, sizes[0]), aligned):
        units = None if lengths is None else carried_units(lengths, G, R, m, V, block=sizes[0], slots=sizes[1])
        compare(
            outcome(partial(run_ops, backend="chunked"), inputs, units, **how),
            outcome(run_naive, inputs, units, **how),
            f"lengths {lengths}",
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("bounds", PACKINGS)
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_packed_is_separate(sizes, activation, bounds, backend):
    how = dict(block=sizes[0], slots=sizes[1], activation=activation, bounds=bounds)
    inputs = memorise_inputs(1, 37, G, R, m, V)
    N = len(bounds) - 1
    for units in (None, carried_units(lengths_of(N, sizes[0]), G, R, m, V, block=sizes[0], slots=sizes[1])):
        compare(
            outcome(partial(run_ops, backend=backend), inputs, units, **how), outcome(run_naive, inputs, units, **how)
        )


@pytest.mark.parametrize("T", [40, 300])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_default_sizes(T, activation):
    """Block 256 and 64 slots, at lengths below and above a block."""
    inputs = memorise_inputs(1, T, 1, R, 1, 2)
    how = dict(activation=activation)
    naive = outcome(run_naive, inputs, block=256, slots=64, **how)
    compare(outcome(run_ops, inputs, **how), naive)
    assert naive[2].keys.shape == (1, 1, 320, R)


@given(
    lengths=st.lists(st.sampled_from([0, 1, 3, 4, 5, 8, 13]), min_size=1, max_size=5),
    carried=st.lists(st.integers(0, 13), min_size=5, max_size=5),
    sizes=st.sampled_from([(4, 3), (4, 0), (3, 9)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_any_packing(lengths, carried, sizes, seed):
    block, slots = sizes
    inputs = memorise_inputs(1, sum(lengths), 1, R, 1, 2, seed=seed)
    units = carried_units(carried[: len(lengths)], 1, R, 1, 2, block=block, slots=slots, seed=seed + 50)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    q, k, w, score, sink = inputs
    got = run_ops(q, k, w, sink, score=score, units=units, bounds=bounds, block=block, slots=slots)
    want = run_naive(q, k, w, sink, score=score, units=units, bounds=bounds, block=block, slots=slots)
    close(got[0], want[0])
    same_units(got[1], want[1])


@pytest.mark.parametrize("at", [0, 1, 7, 8, 9, 20, 24, 36, 37])
@pytest.mark.parametrize("sizes", [(8, 5), (8, 0), (4, 64), (0, 0)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_split_anywhere_is_whole(at, sizes, activation):
    how = dict(block=sizes[0], slots=sizes[1], activation=activation)
    inputs = memorise_inputs(2, 37, G, R, m, V)
    units = carried_units([0, 11], G, R, m, V, block=sizes[0], slots=sizes[1])

    def in_two(q, k, w, sink, *, score, units, **sizes):
        y1, middle = memorise(q[:, :at], k[:, :at], w[:, :at], score[:, :at], sink, units, **sizes)
        y2, after = memorise(q[:, at:], k[:, at:], w[:, at:], score[:, at:], sink, middle, **sizes)
        return torch.cat([y1, y2], 1), after

    compare(outcome(in_two, inputs, units, **how), outcome(run_naive, inputs, units, **how))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("sizes", SIZES)
def test_no_tokens_leave_the_units_unchanged(backend, sizes):
    block, slots = sizes
    units = carried_units(lengths_of(3, block), G, R, m, V, block=block, slots=slots)
    before = copied(units)
    q, k, w, score, sink = memorise_inputs(3, 0, G, R, m, V)
    y, after = memorise(q, k, w, score, sink, units, block=block, slots=slots, backend=backend)
    assert y.shape == (3, 0, G, m, V)
    same_units(after, before, 0)
    # All sequences of a packed batch empty; then only some of them.
    q, k, w, score, sink = memorise_inputs(1, 0, G, R, m, V)
    cu = torch.zeros(4, dtype=torch.long)
    same_units(
        memorise(q, k, w, score, sink, units, block=block, slots=slots, cu_seqlens=cu, backend=backend)[1], before, 0
    )
    q, k, w, score, sink = memorise_inputs(1, 9, G, R, m, V)
    cu = torch.tensor([0, 0, 9, 9])
    _, after = memorise(q, k, w, score, sink, units, block=block, slots=slots, cu_seqlens=cu, backend=backend)
    for n in (0, 2):
        same_units(Units(*(x[n] for x in after)), Units(*(x[n] for x in before)), 0)
    assert after.length[1] == before.length[1] + 9
    same_units(units, before, 0)  # and the argument is not written


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_no_sequences(backend):
    q, k, w, score, sink = memorise_inputs(1, 0, G, R, m, V)
    y, units = memorise(
        q, k, w, score, sink, block=8, slots=5, cu_seqlens=torch.zeros(1, dtype=torch.long), backend=backend
    )
    assert y.shape == (1, 0, G, m, V) and units.keys.shape == (0, G, 13, R) and units.length.shape == (0,)
    q, k, w, score, sink = memorise_inputs(0, 20, G, R, m, V)
    y, units = memorise(q, k, w, score, sink, block=8, slots=5, backend=backend)
    assert y.shape == (0, 20, G, m, V) and units.values.shape == (0, G, 13, m, V)


def test_no_block_reads_nothing():
    q, k, w, score, sink = memorise_inputs(2, 7, G, R, m, V)
    y, units = memorise(q, k, w, score, sink, block=0, slots=0)
    assert y.shape == w.shape and not y.any()
    assert units.keys.shape == (2, G, 0, R) and units.length.tolist() == [7, 7]


def test_a_lost_score_is_read_inside_its_block_only():
    """-inf: read while its block is open, never kept."""
    q, k, w, score, sink = memorise_inputs(1, 8, 1, R, 1, 2, scores="distinct")
    score[:, 1] = -torch.inf
    y, units = memorise(q, k, w, score, sink, block=4, slots=3)
    assert not (units.scores == score[0, 1, 0]).any() or units.scores.isinf().sum() == 4  # the empty open block
    kept = units.keys[0, 0, :3]
    assert not (kept == k[0, 1, 0]).all(-1).any()
    changed = w.clone()
    changed[:, 1] += 1
    moved = (memorise(q, k, changed, score, sink, block=4, slots=3)[0] != y)[0, :, 0, 0].any(-1)
    z = (k[0, 1, 0] * q[0, :, 0]).sum(-1)
    expected = [t for t in range(8) if 1 <= t < 4 and z[t] > 0]
    assert expected and moved.nonzero()[:, 0].tolist() == expected


def test_one_row_by_hand():
    """z = q.k / sqrt(R);  relu2: z^2 / (z^2 + e^sink);  softmax: e^z / (e^z + e^sink)."""
    q = torch.tensor([1.0, 2.0, 0.0, 1.0], dtype=torch.float64).view(1, 1, 1, 4)
    k = torch.tensor([2.0, 1.0, 5.0, 0.0], dtype=torch.float64).view(1, 1, 1, 4)
    w = torch.tensor([3.0, -1.0], dtype=torch.float64).view(1, 1, 1, 1, 2)
    sink, score = torch.tensor([0.5], dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.float64)
    z = 2.0  # 4 / sqrt(4)
    sink_share = torch.tensor(0.5, dtype=torch.float64).exp()
    for activation, weight in (("relu2", torch.tensor(z**2)), ("softmax", torch.tensor(z, dtype=torch.float64).exp())):
        for backend in ("reference", "chunked"):
            y, _ = memorise(q, k, w, score, sink, block=4, slots=2, activation=activation, backend=backend)
            close(y, w * weight / (weight + sink_share), 1e-12)


def test_units_layout():
    """Slots by score, ties the earlier token first; the open block by age; unused rows zero with score -inf."""
    scores = [1.0, 3.0, 2.0, 3.0, -torch.inf, 1.0, 3.0, 0.0, 9.0, -torch.inf, 7.0]
    T = len(scores)
    k = torch.arange(1, T + 1, dtype=torch.float64).view(1, T, 1, 1).expand(1, T, 1, 2)
    w = -k[..., None]
    score = torch.tensor(scores, dtype=torch.float64).view(1, T, 1)

    def tokens(units: Units) -> list[int]:
        """Which token lies in each row, counted from 0; -1: an empty row."""
        close(units.values[..., 0], -units.keys, 0)
        return (units.keys[0, 0, :, 0] - 1).long().tolist()

    none = -1
    after = units_select(k, w, score, block=4, slots=5)
    # Blocks 0-3 and 4-7 are taken in: 3.0 at 1, 3, 6; 2.0 at 2; 1.0 at 0 before 1.0 at 5. Open: 8, 9, 10.
    assert tokens(after) == [1, 3, 6, 2, 0, 8, 9, 10, none]
    assert after.scores[0, 0].tolist() == [3, 3, 3, 2, 1, 9, -torch.inf, 7, -torch.inf]
    assert after.length.tolist() == [T]
    at_end = units_select(k[:, :8], w[:, :8], score[:, :8], block=4, slots=5)
    assert tokens(at_end) == [1, 3, 6, 2, 0, none, none, none, none]
    assert at_end.scores[0, 0, 5:].tolist() == [-torch.inf] * 4
    many = units_select(k, w, score, block=4, slots=8)
    assert tokens(many) == [1, 3, 6, 2, 0, 5, 7, none, 8, 9, 10, none]
    assert not many.keys[0, 0, 7].any() and not many.values[0, 0, 11].any()
    no_slots = units_select(k, w, score, block=4, slots=0)
    assert tokens(no_slots) == [8, 9, 10, none]


def test_dtypes():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        q, k, w, score, sink = memorise_inputs(2, 11, G, R, m, V, dtype=dtype)
        for backend in ("reference", "chunked"):
            y, units = memorise(q, k, w, score, sink, block=4, slots=3, backend=backend)
            assert y.dtype == units.keys.dtype == units.values.dtype == dtype
            assert units.scores.dtype == wide and units.length.dtype == torch.int64
            again, _ = memorise(q, k, w, score, sink, units, block=4, slots=3, backend=backend)
            assert again.dtype == dtype and again.isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_lower_precision_is_earned(activation, dtype, limit):
    """Scores with ties, so that the choice of rows is the same in every dtype."""
    inputs = memorise_inputs(2, 200, 2, 32, 2, 16, dtype=dtype)
    how = dict(block=32, slots=16, activation=activation)
    exact = outcome(partial(run_ops, backend="reference"), [x.double() for x in inputs], **how)

    def errors(backend: str) -> list[float]:
        got = outcome(partial(run_ops, backend=backend), inputs, **how)
        pairs = zip([*got[0], *got[1]], [*exact[0], *exact[1]], strict=True)
        return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs]

    assert max(errors("chunked")) < limit
    assert max(errors("reference")[:3]) < limit  # its gradients add up in the inputs' dtype, token by token


def test_scores_have_no_gradient():
    q, k, w, score, sink = memorise_inputs(1, 10, G, R, m, V, scores="distinct")
    score.requires_grad_()
    k.requires_grad_()
    y, units = memorise(q, k, w, score, sink, block=4, slots=3)
    assert not units.scores.requires_grad
    assert torch.autograd.grad(y.sum(), [k, score], allow_unused=True)[1] is None


def test_gradcheck():
    q, k, w, score, sink = memorise_inputs(1, 5, 1, 2, 1, 2, scores="distinct")
    units = carried_units([3], 1, 2, 1, 2, block=2, slots=2, scores="distinct")

    def run(q, k, w, sink, keys, values):
        y, after = memorise(
            q, k, w, score, sink, units._replace(keys=keys, values=values), block=2, slots=2, activation="softmax"
        )
        return y, after.keys, after.values

    leaves = [x.requires_grad_() for x in (q, k, w, sink, units.keys, units.values)]
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reading_in_several_goes(activation, monkeypatch):
    """Long inputs are read a few blocks at a time; the result is the same."""
    from llm_mlp.ops.memorise import chunked

    inputs = memorise_inputs(2, 37, G, R, m, V)
    how = dict(block=4, slots=3, activation=activation)
    whole = outcome(run_ops, inputs, **how)
    for numbers in (1, 3 * G * 4 * 7):
        monkeypatch.setattr(chunked, "_READ_NUMBERS", numbers)
        compare(outcome(run_ops, inputs, **how), whole)


def test_units_init():
    units = units_init(3, G, R, m, V, block=4, slots=2, dtype=torch.bfloat16)
    assert units.keys.shape == (3, G, 6, R) and units.values.shape == (3, G, 6, m, V)
    assert units.scores.shape == (3, G, 6) and units.length.shape == (3,)
    assert units.keys.dtype == units.values.dtype == torch.bfloat16 and units.scores.dtype == torch.float32
    assert not units.keys.any() and not units.values.any() and not units.length.any()
    assert (units.scores == -torch.inf).all()
    assert units_init(1, G, R, m, V).keys.shape == (1, G, 320, R)
    assert units_init(1, G, R, m, V).keys.dtype == torch.get_default_dtype()
    assert units_init(1, G, R, m, V, dtype=torch.float64).scores.dtype == torch.float64
    # Starting from them is starting afresh.
    q, k, w, score, sink = memorise_inputs(3, 9, G, R, m, V)
    empty = units_init(3, G, R, m, V, block=4, slots=2, dtype=torch.float64)
    a, b = (memorise(q, k, w, score, sink, u, block=4, slots=2) for u in (None, empty))
    assert torch.equal(a[0], b[0])
    same_units(a[1], b[1], 0)


@pytest.mark.slow
def test_compiles():
    inputs = memorise_inputs(2, 37, G, R, m, V, dtype=torch.float32)

    def run(q, k, w, score, sink):
        y, units = memorise(q, k, w, score, sink, block=8, slots=5)
        return y, units.keys, units.values

    for got, want in zip(torch.compile(run)(*inputs), run(*inputs), strict=True):
        close(got, want, 1e-5)
