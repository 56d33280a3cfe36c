"""`perceive` as chunked matrix products in plain torch: linear in T, differentiable, on any device.

Per group, with E, K, Q the [C, F] blocks of a chunk and g the cumulative log decay inside it (architecture,
section 3; the inverse is computed once for all heads of a group because (I + G*X)^-1 = G * (I + X)^-1 for a
scalar decay's ratio matrix G)::

    M = (I + tril(E K^T, -1))^-1        A = tril(Q K^T)        Gamma[i, j] = exp(g_i - g_j), i >= j
    U = (M * Gamma) (W - exp(g) E S)    O = exp(g) Q S + (A * Gamma) U
    S <- exp(g_C) S + K^T (exp(g_C - g) U)

The backward pass is written out (docs/perceive.md): only the inputs, the output and the state before each chunk are
kept, and Gamma, the one large intermediate, lives a tile of chunks at a time in both passes. The gradient of the
decays needs no Gamma at all: dg_i = dO_i . O_i - dW_i . W_i + 2 |U_i|^2 d|U_i|^2, and <dS', S'> at the chunk's end.

Precision: products over F run in the inputs' dtype with the state rounded to it; the solve, U and everything
with Gamma run in float32 (float64 for float64 inputs), because an erase near 2 amplifies rounding there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm_mlp.ops.layout import Pieces, pieces

CHUNK = 64
RESET = -40.0  # a float32 log decay below this (the square of its eps) counts as a reset; twice this for float64
# Numbers of Gamma in a tile: on a CPU it should stay in the caches; on a GPU every chunk at once fills the chip.
_TILE_NUMBERS = {"cpu": 2**19}


def _chunks(x: Tensor, layout: Pieces) -> Tensor:
    """[B, T, G, ..., X] -> [chunks, G, ..., C, X]: the chunk's tokens next to the last dimension."""
    return layout.split(x).movedim(1, -2)


def _heads(x: Tensor, m: int) -> Tensor:
    """[.., C, m V] -> [.., m, C, V]."""
    return x.unflatten(-1, (m, -1)).transpose(-3, -2)


def _group(x: Tensor) -> Tensor:
    """[.., m, C, V] -> [.., C, m V]."""
    return x.transpose(-3, -2).flatten(-2)


class _Gates(NamedTuple):
    """What a chunk's log decays mean, all at most 1."""

    gamma: Tensor  # [n, G, m, C, C] exp(g_i - g_j), i >= j
    carry: Tensor  # [n, G, m, C, 1] exp(g)
    tail: Tensor  # [n, G, m, C, 1] exp(g_C - g)
    total: Tensor  # [n, G, 1, m] exp(g_C)


def _resets(log_decay: Tensor) -> Tensor:
    """Decays too small to matter (below the square of the dtype's eps, so also -inf), which count as resets."""
    return log_decay < (2 * RESET if log_decay.dtype == torch.float64 else RESET)


def _gates(log_decay: Tensor) -> _Gates:
    """``log_decay [n, G, m, C]``.

    Resets are 0 in the cumulative sum, and nothing passes them: that keeps exponents small and -inf - (-inf) out.
    """
    reset = _resets(log_decay)
    # The sum in float64, as two float32 terms: a difference of neighbours is then exact to its own size, however
    # large the decays before them were.
    sums = torch.where(reset, 0.0, log_decay).double().cumsum(-1)
    g = sums.to(log_decay.dtype)
    rest = (sums - g).to(log_decay.dtype)
    r = reset.cumsum(-1)
    between = (g[..., :, None] - g[..., None, :]).add_(rest[..., :, None] - rest[..., None, :])
    # Mask before exp: above the diagonal g_i - g_j is positive and may overflow.
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=log_decay.device).triu(1)
    between = between.masked_fill_(later, -torch.inf).masked_fill_(r[..., :, None] != r[..., None, :], -torch.inf)
    gamma = between.exp_()
    carry = torch.where(r == 0, g, -torch.inf).exp()
    tail = torch.where(r == r[..., -1:], (g[..., -1:] - g) + (rest[..., -1:] - rest), -torch.inf).exp()
    return _Gates(gamma, carry[..., None], tail[..., None], carry[..., None, :, -1])


def _inverse(e: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
    """(I + tril(E K^T, -1))^-1 of every chunk, [n, G, C, C] in ``dtype`` (forward substitution: stable)."""
    L = torch.tril((e @ k.mT).to(dtype), -1)
    eye = torch.eye(CHUNK, dtype=dtype, device=e.device).expand_as(L)
    return torch.linalg.solve_triangular(L + eye, eye, upper=False, unitriangular=True)


def _tiles(rounds: list[int], numbers: int, device: torch.device) -> Iterator[tuple[slice, list[slice]]]:
    """Chunks of consecutive rounds that are worked on at once, and each round's chunks within them.

    ``numbers``: of Gamma, a chunk.
    """
    limit = _TILE_NUMBERS.get(device.type, 2**62)
    first, inside = 0, [0]
    for active in rounds:
        if inside[-1] and (inside[-1] + active) * numbers > limit:
            yield slice(first, first + inside[-1]), [slice(a, b) for a, b in zip(inside, inside[1:])]
            first, inside = first + inside[-1], [0]
        inside.append(inside[-1] + active)
    yield slice(first, first + inside[-1]), [slice(a, b) for a, b in zip(inside, inside[1:])]


class _Chunked(torch.autograd.Function):
    """q, k, e ``[c, G, C, F]``, w ``[c, G, m, C, V]``, log_decay ``[c, G, m, C]``, S ``[N, G, F, m V]`` in rounds:
    y and residual in S's dtype, and the last S."""

    @staticmethod
    def forward(ctx, q, k, e, w, log_decay, S, rounds):
        dtype, wide = q.dtype, S.dtype
        m, V = w.shape[2], w.shape[4]
        S = S.clone()
        y = torch.empty_like(w, dtype=wide, memory_format=torch.contiguous_format)
        residual = torch.empty_like(log_decay, memory_format=torch.contiguous_format)
        before = S.new_empty((q.shape[0], *S.shape[1:]), dtype=dtype)
        for here, turns in _tiles(rounds, log_decay[0].numel() * CHUNK, q.device):
            qt, kt, et, wt = q[here], k[here], e[here], w[here].to(wide)
            gates = _gates(log_decay[here])
            MG = _inverse(et, kt, wide)[:, :, None] * gates.gamma
            us = []
            for t in turns:
                n = t.stop - t.start
                Sr = S[:n].to(dtype)
                before[here][t] = Sr
                seen = _heads(et[t] @ Sr, m)
                u = MG[t] @ torch.addcmul(wt[t], gates.carry[t], seen.to(wide), value=-1)
                written = _group(gates.tail[t] * u).to(dtype)
                total = gates.total[t].repeat_interleave(V, -1)
                S[:n] = torch.addcmul((kt[t].mT @ written).to(wide), total, S[:n])
                us.append(u)
            u = us[0] if len(us) == 1 else torch.cat(us)
            AG = torch.tril((qt @ kt.mT).to(wide))[:, :, None] * gates.gamma
            y[here] = torch.addcmul(AG @ u, gates.carry, _heads(qt @ before[here], m).to(wide))
            residual[here] = u.square().sum(-1)
        ctx.save_for_backward(q, k, e, w, log_decay, before, y, residual)
        ctx.rounds = rounds
        return y, S, residual

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dS, dresidual):
        # A backward pass inside autocast would round the products that must not be rounded.
        with torch.autocast(dy.device.type, enabled=False):
            return _Chunked._backward(ctx, dy, dS, dresidual)

    @staticmethod
    def _backward(ctx, dy, dS, dresidual):
        q, k, e, w, log_decay, before, y, residual = ctx.saved_tensors
        dtype, wide = q.dtype, y.dtype
        m, V = w.shape[2], w.shape[4]
        dS = dS.clone()
        dq, dk, de, dw = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, e, w))
        dlog = torch.empty_like(log_decay, memory_format=torch.contiguous_format)
        for here, turns in reversed(list(_tiles(ctx.rounds, log_decay[0].numel() * CHUNK, q.device))):
            qt, kt, et, wt, S0 = q[here], k[here], e[here], w[here].to(wide), before[here]
            dyt, drt = dy[here], dresidual[here][..., None]
            gates = _gates(log_decay[here])
            M = _inverse(et, kt, wide)
            MG = M[:, :, None] * gates.gamma
            AG = torch.tril((qt @ kt.mT).to(wide))[:, :, None] * gates.gamma
            r = torch.addcmul(wt, gates.carry, _heads(et @ S0, m).to(wide), value=-1)
            u = MG @ r
            du = torch.addcmul(AG.mT @ dyt, u, drt, value=2)  # what comes through the state is added below
            dread = _group(gates.carry * dyt).to(dtype)  # d(Q S)
            dSq = qt.mT @ dread
            dr, dseen, dafter = torch.empty_like(u), torch.empty_like(dread), torch.empty_like(S0)
            dtotal = torch.empty_like(gates.total[..., 0, :])
            for t in reversed(turns):
                n = t.stop - t.start
                dSr = dS[:n].to(dtype)
                dafter[t] = dSr
                du[t] += gates.tail[t] * _heads(kt[t] @ dSr, m).to(wide)
                dr[t] = MG[t].mT @ du[t]
                dseen[t] = _group(gates.carry[t] * dr[t]).to(dtype).neg_()
                dtotal[t] = (dS[:n] * S0[t]).unflatten(-1, (m, V)).sum((-3, -1))
                more = (dSq[t] + et[t].mT @ dseen[t]).to(wide)
                dS[:n] = torch.addcmul(more, gates.total[t].repeat_interleave(V, -1), dS[:n])
            written = _group(gates.tail * u).to(dtype)
            dM = (du @ r.mT).mul_(gates.gamma).sum(2)
            dA = torch.tril((dyt @ u.mT).mul_(gates.gamma).sum(2)).to(dtype)
            dX = torch.tril(-(M.mT @ dM @ M.mT), -1).to(dtype)
            S0T = S0.mT
            dq[here] = dA @ kt + dread @ S0T
            de[here] = dX @ kt + dseen @ S0T
            dk[here] = dX.mT @ et + dA.mT @ qt + written @ dafter.mT
            dw[here] = dr
            dg = (dyt * y[here]).sum(-1) - (dr * wt).sum(-1) + 2 * residual[here] * dresidual[here]
            # <dS', S'> at the end: what the state after the chunk owes to the chunk's tokens and to the state before.
            through = (written * (kt @ dafter)).to(wide).unflatten(-1, (m, V)).sum((-3, -1))
            dg[..., -1] += through + gates.total[..., 0, :] * dtotal
            dlog[here] = dg.flip(-1).cumsum(-1).flip(-1).masked_fill_(_resets(log_decay[here]), 0)
        return dq, dk, de, dw, dlog, dS, None


def perceive(
    q: Tensor, k: Tensor, e: Tensor, w: Tensor, log_decay: Tensor, state: Tensor, bounds: list[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `llm_mlp.ops.perceive` on checked inputs; ``bounds`` are the packed sequences' ends (or None)."""
    B, T, G, F = q.shape
    m, V = w.shape[-2:]
    if T == 0 or B == 0:
        return w, state, log_decay
    layout = pieces(CHUNK, B, T, bounds, q.device)
    q, k, e = (_chunks(x, layout).contiguous() for x in (q, k, e))
    S = state.flatten(3)
    if layout.order is not None:
        S = S.index_select(0, layout.order)
    y, S, residual = _Chunked.apply(
        q,
        k,
        e,
        _chunks(w, layout).contiguous(),
        _chunks(log_decay[..., None], layout)[..., 0].contiguous(),
        S,
        layout.rounds,
    )
    if layout.rank is not None:
        S = S.index_select(0, layout.rank)
    return (
        layout.join(y.to(w.dtype).movedim(-2, 1)),
        S.unflatten(-1, (m, V)),
        layout.join(residual.movedim(-1, 1)),
    )


def transition(k: Tensor, e: Tensor, dtype: torch.dtype) -> Tensor:
    """P of `perceive_transition`: a chunk is I - K^T M E, chunks compose from the left."""
    B, T, G, F = k.shape
    P = torch.eye(F, dtype=dtype, device=k.device).expand(B, G, F, F)
    if T == 0 or B == 0:
        return P.clone()
    layout = pieces(CHUNK, B, T, None, k.device)
    k, e = (_chunks(x, layout).to(dtype) for x in (k, e))
    ME = _inverse(e, k, dtype) @ e
    for kr, MEr in zip(k.split(layout.rounds), ME.split(layout.rounds), strict=True):
        P = P - kr.mT @ (MEr @ P)
    return P
