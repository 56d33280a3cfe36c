"""`perceive`: the loop is the equations, the chunked form is the loop, in values, gradients and carried states."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    DECAYS,
    LENGTHS,
    PACKINGS,
    PERCEIVE_SHAPES,
    all_close,
    close,
    naive_perceive,
    perceive_inputs,
    perceive_state,
    sequences,
    with_gradients,
)
from torch import Tensor

from llm_mlp.ops import perceive, perceive_transition


def full(*inputs: Tensor | None, backend: str = "chunked", cu_seqlens: Tensor | None = None):
    return perceive(*inputs, cu_seqlens=cu_seqlens, return_residual=True, backend=backend)


def both(inputs: list[Tensor | None], cu_seqlens: Tensor | None = None, what: str = "") -> None:
    """chunked = reference in every output and gradient."""
    outputs, grads = with_gradients(partial(full, backend="reference", cu_seqlens=cu_seqlens), inputs)
    got, got_grads = with_gradients(partial(full, backend="chunked", cu_seqlens=cu_seqlens), inputs)
    all_close(got, outputs, what=f"{what} outputs")
    all_close(got_grads, grads, what=f"{what} gradients")


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("shape", PERCEIVE_SHAPES)
@pytest.mark.parametrize("carried", [False, True])
def test_reference_is_the_equations(shape, decay, carried):
    B, G, F, m, V = shape
    inputs = perceive_inputs(B, 7, G, F, m, V, decay=decay)
    inputs[4][0, 3] = -torch.inf  # in the middle of every case
    state = perceive_state(B, G, F, m, V) if carried else None
    outputs, grads = with_gradients(naive_perceive, [*inputs, state])
    got, got_grads = with_gradients(partial(full, backend="reference"), [*inputs, state])
    all_close(got, outputs, 1e-11)
    all_close(got_grads, grads, 1e-10)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("shape", PERCEIVE_SHAPES)
def test_chunked_is_reference(T, decay, shape):
    B, G, F, m, V = shape
    both([*perceive_inputs(B, T, G, F, m, V, decay=decay), None], what="fresh")
    both([*perceive_inputs(B, T, G, F, m, V, decay=decay), perceive_state(B, G, F, m, V)], what="carried")


@pytest.mark.parametrize("bounds", PACKINGS)
@pytest.mark.parametrize("decay", ["mild", "mixed"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_chunked_is_reference(bounds, decay, dtype):
    _, G, F, m, V = PERCEIVE_SHAPES[0]
    inputs = perceive_inputs(1, bounds[-1], G, F, m, V, decay=decay)
    cu = torch.tensor(bounds, dtype=dtype)
    both([*inputs, None], cu, "fresh")
    both([*inputs, perceive_state(len(bounds) - 1, G, F, m, V)], cu, "carried")


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("bounds", PACKINGS)
def test_packed_is_separate(bounds, backend):
    _, G, F, m, V = PERCEIVE_SHAPES[0]
    inputs = perceive_inputs(1, bounds[-1], G, F, m, V, decay="mixed")
    state = perceive_state(len(bounds) - 1, G, F, m, V)

    def separately(*x: Tensor):
        *tokens, s = x
        parts = [full(*(t[:, a:b] for t in tokens), s[n : n + 1]) for n, (a, b) in enumerate(sequences(bounds))]
        y, states, residual = zip(*parts, strict=True)
        return torch.cat(y, 1), torch.cat(states), torch.cat(residual, 1)

    outputs, grads = with_gradients(separately, [*inputs, state])
    got, got_grads = with_gradients(partial(full, backend=backend, cu_seqlens=torch.tensor(bounds)), [*inputs, state])
    all_close(got, outputs)
    all_close(got_grads, grads)


@given(lengths=st.lists(st.sampled_from([0, 1, 2, 5, 63, 64, 65, 90]), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_any_packing(lengths, seed):
    G, F, m, V = 1, 4, 2, 2
    inputs = perceive_inputs(1, sum(lengths), G, F, m, V, decay="mixed", seed=seed)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    state = perceive_state(len(lengths), G, F, m, V, seed=seed + 1)
    all_close(full(*inputs, state, cu_seqlens=cu), full(*inputs, state, cu_seqlens=cu, backend="reference"))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_no_tokens_leave_the_state_unchanged(backend):
    B, G, F, m, V = PERCEIVE_SHAPES[0]
    state = perceive_state(B, G, F, m, V)
    y, after, residual = full(*perceive_inputs(B, 0, G, F, m, V), state, backend=backend)
    assert y.shape == (B, 0, G, m, V) and residual.shape == (B, 0, G, m)
    assert torch.equal(after, state)
    # Every sequence of a packed batch is empty.
    y, after, residual = full(
        *perceive_inputs(1, 0, G, F, m, V), state, backend=backend, cu_seqlens=torch.zeros(B + 1, dtype=torch.long)
    )
    assert y.shape == (1, 0, G, m, V) and torch.equal(after, state)
    # Empty sequences beside a full one.
    three = perceive_state(3, G, F, m, V)
    _, after, _ = full(
        *perceive_inputs(1, 70, G, F, m, V), three, backend=backend, cu_seqlens=torch.tensor([0, 0, 70, 70])
    )
    assert torch.equal(after[[0, 2]], three[[0, 2]]) and not torch.equal(after[1], three[1])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_no_sequences(backend):
    _, G, F, m, V = PERCEIVE_SHAPES[0]
    y, after = perceive(
        *perceive_inputs(1, 0, G, F, m, V), cu_seqlens=torch.zeros(1, dtype=torch.long), backend=backend
    )
    assert y.shape == (1, 0, G, m, V) and after.shape == (0, G, F, m, V)
    y, after = perceive(*perceive_inputs(0, 70, G, F, m, V), backend=backend)
    assert y.shape == (0, 70, G, m, V) and after.shape == (0, G, F, m, V)


def test_none_is_zeros_and_the_input_state_is_not_written():
    B, G, F, m, V = PERCEIVE_SHAPES[0]
    inputs = perceive_inputs(B, 70, G, F, m, V)
    zeros = torch.zeros(B, G, F, m, V, dtype=torch.float64)
    all_close(full(*inputs, None), full(*inputs, zeros), 0)
    assert not zeros.any()
    assert len(perceive(*inputs)) == 2
    all_close(perceive(*inputs), full(*inputs, None)[:2], 0)


@pytest.mark.parametrize("at", [0, 1, 63, 64, 65, 100, 129, 130])
@pytest.mark.parametrize("decay", ["mild", "mixed"])
def test_split_anywhere_is_whole(at, decay):
    B, G, F, m, V = PERCEIVE_SHAPES[0]
    inputs = [*perceive_inputs(B, 130, G, F, m, V, decay=decay), perceive_state(B, G, F, m, V)]

    def in_two(*x: Tensor):
        *tokens, state = x
        first = full(*(t[:, :at] for t in tokens), state)
        second = full(*(t[:, at:] for t in tokens), first[1])
        return torch.cat([first[0], second[0]], 1), second[1], torch.cat([first[2], second[2]], 1)

    outputs, grads = with_gradients(partial(full, backend="reference"), inputs)
    got, got_grads = with_gradients(in_two, inputs)
    all_close(got, outputs)
    all_close(got_grads, grads)


def test_decays_forget():
    """After -inf nothing of the past is left; with decay 0 and no erase the state is a plain sum."""
    B, G, F, m, V = PERCEIVE_SHAPES[0]
    q, k, e, w, log_decay = perceive_inputs(B, 100, G, F, m, V, decay="none")
    log_decay[:, 40] = -torch.inf
    y, state = perceive(q, k, e, w, log_decay, perceive_state(B, G, F, m, V))
    later = perceive(*(x[:, 40:] for x in (q, k, e, w, log_decay)))
    close(y[:, 40:], later[0])
    close(state, later[1])
    _, state = perceive(q, k, torch.zeros_like(e), w, torch.zeros_like(log_decay))
    close(state, torch.einsum("btgf,btgmv->bgfmv", k, w))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck(backend):
    inputs = [*perceive_inputs(1, 5, 1, 3, 2, 2, decay="mild"), perceive_state(2, 1, 3, 2, 2)]
    leaves = [x.requires_grad_() for x in inputs]
    cu = torch.tensor([0, 2, 5])
    assert torch.autograd.gradcheck(lambda *x: full(*x, backend=backend, cu_seqlens=cu), leaves)


def test_gradients_of_gradients_are_refused():
    """The backward pass is written out, for one differentiation; a second one must not be silently wrong."""
    inputs = [x.requires_grad_() for x in perceive_inputs(1, 5, 1, 4, 2, 2)]
    (grad,) = torch.autograd.grad(perceive(*inputs)[0].square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_backward_inside_autocast_is_not_rounded():
    inputs = [x.requires_grad_() for x in perceive_inputs(1, 70, 1, 16, 2, 4, dtype=torch.float32)]
    loss = perceive(*inputs)[0].square().sum()
    plain = torch.autograd.grad(loss, inputs, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(loss, inputs)
    for a, b in zip(plain, inside, strict=True):
        assert torch.equal(a, b)


def test_gradients_with_resets_are_finite():
    """A decay of -inf has gradient 0, and no NaN spreads from it."""
    inputs = [*perceive_inputs(2, 70, 1, 4, 2, 2, decay="mixed"), perceive_state(2, 1, 4, 2, 2)]
    inputs[4][:, 0] = -torch.inf
    inputs[4][:, 63:65] = -torch.inf
    _, grads = with_gradients(full, inputs)
    assert all(g.isfinite().all() for g in grads)
    assert not grads[4][inputs[4] == -torch.inf].any()
    assert not grads[5].any()  # forgotten with the first token


# -- lower precision ---------------------------------------------------------------------------------------------


def errors(dtype: torch.dtype, backend: str, decay: str, seed: int = 3) -> list[float]:
    """Largest error of y, state, residual and all gradients against float64 on the same (rounded) inputs."""
    B, G, F, m, V = 2, 2, 32, 2, 16
    inputs = perceive_inputs(B, 192, G, F, m, V, decay=decay, seed=seed, dtype=dtype)
    state = perceive_state(B, G, F, m, V, dtype=torch.float32)
    exact = with_gradients(partial(full, backend="reference"), [x.double() for x in (*inputs, state)])
    got = with_gradients(partial(full, backend=backend), [*inputs, state])
    assert [o.dtype for o in got[0]] == [dtype, torch.float32, torch.float32]
    assert [g.dtype for g in got[1]] == [x.dtype for x in (*inputs, state)]
    return [
        ((a.double() - b).abs().max() / b.abs().max()).item()
        for part, other in zip(got, exact, strict=True)
        for a, b in zip(part, other, strict=True)
    ]


@pytest.mark.parametrize("decay", ["none", "mild", "resets", "twenty", "mixed"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 0.008)])
def test_lower_precision_is_earned(decay, dtype, limit):
    """The loop's error is rounding; the chunked form's (which rounds states and products too) a few times that."""
    loop = max(errors(dtype, "reference", decay))
    assert loop < limit
    assert max(errors(dtype, "chunked", decay)) < 4 * loop


def test_float32_keeps_small_decays_beside_large_ones():
    """What a decay of -39 leaves is nothing, but the tokens behind it decay as exactly as any others."""
    q, k, e, w, log_decay = perceive_inputs(1, 64, 1, 8, 1, 4, decay="mild", dtype=torch.float32)
    log_decay[:, :48] = -39.0
    y, state = perceive(q, k, e, w, log_decay)
    exact_y, exact = perceive(*(x.double() for x in (q, k, e, w, log_decay)), backend="reference")
    loop_y, loop = perceive(q, k, e, w, log_decay, backend="reference")
    for got, plain, true in ((y, loop_y, exact_y), (state, loop, exact)):
        earned = 4 * (plain.double() - true).abs().max().item()
        close(got.double(), true, max(earned, 4e-6))


@pytest.mark.parametrize("keys", ["equal", "alternating", "orthogonal", "opposite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hostile_keys_stay_bounded(keys, dtype):
    """An erase of 1.98 along the key is contractive: what is left of the state shrinks, whatever the keys."""
    T, F, V = 4096, 16, 8
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(F, F, generator=g, dtype=torch.float64))[0]
    t = torch.arange(T)
    k = {
        "equal": basis[t * 0],
        "alternating": torch.nn.functional.normalize(basis[t * 0] + (t % 2)[:, None] * basis[1], dim=-1),
        "orthogonal": basis[t % F],
        "opposite": basis[t * 0] * (1 - 2 * (t % 2))[:, None],
    }[keys]
    k = k.to(dtype)[None, :, None]
    w = torch.randn(1, T, 1, 2, V, generator=g).to(dtype)
    state = 10 * torch.randn(1, 1, F, 2, V, generator=g)
    log_decay = torch.zeros(1, T, 1, 2)
    e = 1.98 * k
    y, after, residual = perceive(k, k, e, w, log_decay, state, return_residual=True)
    assert y.isfinite().all() and after.isfinite().all() and residual.isfinite().all()
    # 0.98^n of the state and of each write remain, and a write is below 6: 6 / 0.02 bounds any sum of them.
    assert after.norm() < state.norm() + 6 * 50 * V
    if dtype == torch.float32:
        exact = perceive(*(x.double() for x in (k, k, e, w, log_decay, state)), return_residual=True)
        scale = exact[1].abs().max().item()
        close(after.double(), exact[1], 1e-4 * scale)
        close(y.double(), exact[0], 1e-4 * scale)


# -- what the op equals ------------------------------------------------------------------------------------------


def test_is_gated_deltanet():
    """F = R, m = 1, e = beta k, w = beta v: S_t = alpha_t S_{t-1} (I - beta k k^T) + beta v k^T (arXiv 2412.06464)."""
    B, T, F, V = 2, 70, 8, 4
    q, k, _, v, log_decay = perceive_inputs(B, T, 1, F, 1, V, decay="mild")
    beta = torch.rand(B, T, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y, state = perceive(q, k, beta[:, :, None, None] * k, beta[:, :, None, None, None] * v, log_decay)
    for b in range(B):
        S = torch.zeros(V, F, dtype=torch.float64)
        for t in range(T):
            kt, vt, bt = k[b, t, 0], v[b, t, 0, 0], beta[b, t]
            S = log_decay[b, t, 0, 0].exp() * S @ (torch.eye(F, dtype=torch.float64) - bt * torch.outer(kt, kt))
            S = S + bt * torch.outer(vt, kt)
            close(y[b, t, 0, 0], S @ q[b, t, 0])
        close(state[b, 0, :, 0], S.T.contiguous())


def test_heads_of_a_group_share_keys_only():
    """Heads do not mix: a group of three is three groups of one with the same q, k, e."""
    B, T, m = 2, 70, 3
    q, k, e, w, log_decay = perceive_inputs(B, T, 1, 8, m, 4, decay="mixed")
    together = full(q, k, e, w, log_decay)
    alone = full(*(x.expand(B, T, m, 8) for x in (q, k, e)), w.transpose(2, 3), log_decay.transpose(2, 3))
    close(together[0], alone[0].transpose(2, 3))
    close(together[1], alone[1].transpose(1, 3))
    close(together[2], alone[2].transpose(2, 3))


# -- transition --------------------------------------------------------------------------------------------------


def apply(P: Tensor, log_a: Tensor, S: Tensor, Z: Tensor) -> Tensor:
    return log_a.exp()[:, :, None, :, None] * torch.einsum("bgij,bgjmv->bgimv", P, S) + Z


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("decay", ["none", "mild", "resets", "mixed"])
@pytest.mark.parametrize("shape", PERCEIVE_SHAPES)
def test_transition_is_the_span(T, decay, shape):
    B, G, F, m, V = shape
    inputs = perceive_inputs(B, T, G, F, m, V, decay=decay)
    state = perceive_state(B, G, F, m, V)
    P, log_a = perceive_transition(inputs[1], inputs[2], inputs[4])
    assert P.shape == (B, G, F, F) and log_a.shape == (B, G, m) and P.dtype == log_a.dtype == torch.float64
    close(apply(P, log_a, state, perceive(*inputs)[1]), perceive(*inputs, state)[1])
    close(log_a, inputs[4].sum(1))


@pytest.mark.parametrize("at", [0, 1, 64, 77, 130])
def test_two_spans_compose(at):
    B, G, F, m, V = PERCEIVE_SHAPES[0]
    inputs = perceive_inputs(B, 130, G, F, m, V, decay="resets")
    _, k, e, _, log_decay = inputs
    P, log_a = perceive_transition(k, e, log_decay)
    (P1, a1), (P2, a2) = (perceive_transition(k[:, s], e[:, s], log_decay[:, s]) for s in (slice(at), slice(at, None)))
    Z1, Z2 = (perceive(*(x[:, s] for x in inputs))[1] for s in (slice(at), slice(at, None)))
    close(P2 @ P1, P)
    close(a1 + a2, log_a)
    close(apply(P2, a2, Z1, Z2), perceive(*inputs)[1])


def test_transition_of_nothing_and_its_gradient():
    _, k, e, _, log_decay = perceive_inputs(2, 0, 2, 4, 3, 2)
    P, log_a = perceive_transition(k, e, log_decay)
    assert torch.equal(P, torch.eye(4, dtype=torch.float64).expand(2, 2, 4, 4)) and not log_a.any()
    _, k, e, _, log_decay = perceive_inputs(1, 4, 1, 3, 2, 2)
    assert torch.autograd.gradcheck(perceive_transition, [x.requires_grad_() for x in (k, e, log_decay)])
    P, log_a = perceive_transition(k.detach().bfloat16(), e.detach().bfloat16(), log_decay.detach().float())
    assert P.dtype == log_a.dtype == torch.float32


def test_transition_forgets():
    _, k, e, _, log_decay = perceive_inputs(1, 70, 1, 4, 2, 2)
    log_decay[:, 30, :, 0] = -torch.inf
    _, log_a = perceive_transition(k, e, log_decay)
    assert log_a[0, 0, 0] == -torch.inf and log_a[0, 0, 1].isfinite()


# -- compile -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiles():
    inputs = [
        *perceive_inputs(2, 100, 2, 8, 3, 4, decay="mixed", dtype=torch.float32),
        perceive_state(2, 2, 8, 3, 4, dtype=torch.float32),
    ]
    compiled = torch.compile(full, fullgraph=False)
    outputs, grads = with_gradients(full, inputs)
    got, got_grads = with_gradients(compiled, inputs)
    for a, b in zip([*got, *got_grads], [*outputs, *grads], strict=True):
        close(a, b, 1e-4 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_one_erase_a_group_is_that_times_k(backend):
    inputs = perceive_inputs(2, 70, 2, 8, 3, 4, decay="mixed", scalar=True)
    vector = [*inputs[:2], inputs[1] * inputs[2][..., None], *inputs[3:]]
    all_close(full(*inputs, None, backend=backend), full(*vector, None, backend=backend), 0)
    grads = [
        torch.autograd.grad(perceive(*x, backend=backend)[0].sum(), x[:1])
        for x in ([y.clone().requires_grad_() for y in given] for given in (inputs, vector))
    ]
    all_close(*grads, 0)
    with pytest.raises(ValueError, match="perceive: e has shape"):
        perceive(*inputs[:2], inputs[2][:, :, :1], *inputs[3:])
    P, log_a = perceive_transition(inputs[1], inputs[2], inputs[4])
    all_close((P, log_a), perceive_transition(inputs[1], vector[2], inputs[4]), 0)
