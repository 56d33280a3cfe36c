"""`perceive` as chunked matrix products in plain torch: linear in T, differentiable, on any device.

Per group, with E, K, Q the [C, F] blocks of a chunk and g the cumulative log decay inside it (architecture,
section 3; the inverse is computed once for all heads of a group because (I + G*X)^-1 = G * (I + X)^-1 for a
scalar decay's ratio matrix G)::

    M = (I + tril(E K^T, -1))^-1        A = tril(Q K^T)        Gamma[i, j] = exp(g_i - g_j), i >= j
    U = (M * Gamma) (W - exp(g) E S)    O = exp(g) Q S + (A * Gamma) U
    S <- exp(g_C) S + K^T (exp(g_C - g) U)

Precision: products over F run in the inputs' dtype with the state rounded to it; the solve, U and everything
with Gamma run in float32 (float64 for float64 inputs), because an erase near 2 amplifies rounding there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_mlp.ops.layout import Pieces, pieces

CHUNK = 64


def _chunks(x: Tensor, layout: Pieces) -> Tensor:
    """[B, T, G, ..., X] -> [chunks, G, ..., C, X]: the chunk's tokens next to the last dimension."""
    return layout.split(x).movedim(1, -2)


def _gates(log_decay: Tensor, layout: Pieces) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gamma [c, G, m, C, C], exp(g) [c, G, m, C], exp(g_C - g) [c, G, m, C] and exp(g_C) [c, G, m].

    Decays too small to matter (below the square of the dtype's eps, so also -inf) count as resets: 0 in the
    cumulative sum, and Gamma is 0 across them. That keeps exponents small and -inf - (-inf) out.
    """
    floor = -80.0 if log_decay.dtype == torch.float64 else -40.0
    ld = _chunks(log_decay[..., None], layout)[..., 0]  # [c, G, m, C]
    reset = ld < floor
    # The sum in float64, as two float32 terms: a difference of neighbours is then exact to its own size, however
    # large the decays before them were.
    total = torch.where(reset, 0.0, ld).double().cumsum(-1)
    g = total.to(ld.dtype)
    rest = (total - g).to(ld.dtype)
    r = reset.cumsum(-1)
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=ld.device).tril()
    same = causal & (r[..., :, None] == r[..., None, :])
    # Mask before exp: above the diagonal g_i - g_j is positive and may overflow.
    between = (g[..., :, None] - g[..., None, :]) + (rest[..., :, None] - rest[..., None, :])
    gamma = torch.where(same, between, -torch.inf).exp()
    carry = torch.where(r == 0, g, -torch.inf).exp()
    tail = torch.where(r == r[..., -1:], (g[..., -1:] - g) + (rest[..., -1:] - rest), -torch.inf).exp()
    return gamma, carry, tail, carry[..., -1]


def _inverse(e: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
    """(I + tril(E K^T, -1))^-1 of every chunk, [c, G, C, C] in ``dtype`` (forward substitution: stable)."""
    L = torch.tril((e @ k.mT).to(dtype), -1)
    eye = torch.eye(CHUNK, dtype=dtype, device=e.device).expand_as(L)
    return torch.linalg.solve_triangular(L + eye, eye, upper=False, unitriangular=True)


def perceive(
    q: Tensor, k: Tensor, e: Tensor, w: Tensor, log_decay: Tensor, state: Tensor, bounds: list[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `llm_mlp.ops.perceive` on checked inputs; ``bounds`` are the packed sequences' ends (or None)."""
    B, T, G, F = q.shape
    m, V = w.shape[-2:]
    if T == 0 or B == 0:
        return w, state, log_decay
    dtype, wide = q.dtype, state.dtype
    layout = pieces(CHUNK, B, T, bounds, q.device)
    q, k, e = (_chunks(x, layout) for x in (q, k, e))  # [c, G, C, F]
    w = _chunks(w, layout).to(wide)  # [c, G, m, C, V]
    gamma, carry, tail, total = _gates(log_decay, layout)
    M = _inverse(e, k, wide)[:, :, None] * gamma  # [c, G, m, C, C]
    total = total.repeat_interleave(V, -1)[:, :, None]  # [c, G, 1, m V]
    tail, carry = tail[..., None], carry[..., None]
    kT = k.mT

    S = state.flatten(3)  # [N, G, F, m V]
    if layout.order is not None:
        S = S.index_select(0, layout.order)
    before, us, finished = [], [], []
    # split, not slices: the backward of a slice fills a whole tensor, once a round, which is quadratic in T.
    for er, kr, wr, Mr, carry_r, tail_r, total_r in zip(
        *(x.split(layout.rounds) for x in (e, kT, w, M, carry, tail, total)), strict=True
    ):
        active = er.shape[0]
        if active < S.shape[0]:
            finished.append(S[active:])
            S = S[:active]
        Sr = S.to(dtype)
        seen = (er @ Sr).unflatten(-1, (m, V)).transpose(2, 3).to(wide)  # [n, G, m, C, V]
        u = Mr @ (wr - carry_r * seen)
        written = (tail_r * u).transpose(2, 3).flatten(3).to(dtype)  # [n, G, C, m V]
        S = total_r * S + (kr @ written).to(wide)
        before.append(Sr)
        us.append(u)
    S = torch.cat([S, *finished[::-1]]) if finished else S
    if layout.rank is not None:
        S = S.index_select(0, layout.rank)
    u = torch.cat(us) if len(us) > 1 else us[0]
    S0 = torch.cat(before) if len(before) > 1 else before[0]

    A = torch.tril((q @ kT).to(wide))[:, :, None] * gamma
    y = carry * (q @ S0).unflatten(-1, (m, V)).transpose(2, 3).to(wide) + A @ u
    return (
        layout.join(y.movedim(-2, 1).to(dtype)),
        S.unflatten(-1, (m, V)),
        layout.join(u.square().sum(-1).movedim(-1, 1)),
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
