"""`perceive` as Triton kernels: forward and backward, whole and packed sequences.

The mathematics is that of `llm_mlp.ops.perceive.chunked` (docs/perceive.md), for all heads of a group at once:

- ``_decays``      (chunk, group): what the decays of every head come to
- ``_inverse``     (chunk, group): M = (I + tril(E K^T, -1))^-1
- ``_scan``        (sequence, group, part): the state through the chunks; y, the residual, the state before each chunk
- ``_scan_back``   (sequence, group, part): the state's gradient through the chunks, last one first; dw
- ``_gradients``   (chunk, group, block of F): dq, dk, de and the decays' gradient, summed over the heads of the group

A part is as many whole heads as fit a tile; everything a group's heads share (k, e, q, M) is read once for them.

Decays without Gamma. Inside a chunk Gamma[i, j] = exp(g_i - g_j) is down_i up_j, with down_i = exp(g_i - c) and
up_j = exp(c - g_j), c half of the chunk's log decay, edge = exp(c). So a chunk is computed in a frame that does not
decay, for all heads together (a bar marks what is in the frame)::

    S' = edge S        R' = up W - E S'      U' = M R'      O = down (Q S' + A U')      S <- edge (S' + K^T U')
    dO' = down dO      dS' = edge dS         dU' = A^T dO' + K dS'      dR' = M^T dU'     dW = up dR'
    dA = dO' U'^T      dL = -dR' U'^T        dS <- edge (dS' + Q^T dO' - E^T dR')

That holds while the frame stays inside the range of the inputs' dtype (`limit`). A chunk that forgets more, or resets,
is *wild*: there Gamma is made head by head, down is exp(g), up exp(g_C - g), edge 1. The two scans are compiled for
both cases; a (sequence, group) with a wild chunk runs in the second, every other in the first, which has no branch in
its loop.

Nothing that flows from a matrix unit is transposed into the first operand of another product: it is computed
transposed, because Triton 3.4 to 3.7 miscompiles such transpositions on Hopper (flash-linear-attention issues 640 and
984). No atomics: two runs give equal bits.

Offsets of tiles are 32-bit numbers from a 64-bit scalar: a tile of pointers takes more registers than the tile.

Precision: M and what it multiplies, the one place where an erase near 2 amplifies rounding, are float32 as pairs of
bfloat16; other operands are rounded to the inputs' dtype, sums and states are float32. float32 inputs: IEEE products.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_mlp.ops.perceive.chunked import CHUNK, RESET
from llm_mlp.ops.tiles import exponential, halves, narrow, product, product_halves, product_onto, product_split

# How each kernel is launched; benchmarks/tune_kernels.py checks and times others on a device.
LAUNCH: dict[str, dict[str, int]] = {
    "_decays": {"num_warps": 1, "num_stages": 1},
    "_inverse": {"num_warps": 4, "num_stages": 1},
    "_scan": {"num_warps": 4, "num_stages": 1},
    "_scan_back": {"num_warps": 4, "num_stages": 1},
    "_gradients": {"num_warps": 4, "num_stages": 1},
}


def limit(dtype: torch.dtype) -> float:
    """Of a chunk's log decay, beyond which it is wild: down and up stay within the square root of exp(limit), which
    float32 and bfloat16 hold with room for values and their products, and float16 with full precision."""
    return 8.0 if dtype == torch.float16 else 120.0


# -- pieces --------------------------------------------------------------------------------------------------------


@triton.jit
def _scaled(Z, x, BM: tl.constexpr):
    """``Z [rows, BM * BV]`` times ``x [rows, BM]`` (or ``[1, BM]``), head by head."""
    if BM == 1:
        return Z * x
    return tl.reshape(tl.reshape(Z, (Z.shape[0], BM, Z.shape[1] // BM)) * x[:, :, None], Z.shape)


@triton.jit
def _head_sums(Z, BM: tl.constexpr):
    """``Z [rows, BM * BV]`` summed over each head: ``[rows, BM]``."""
    return tl.sum(tl.reshape(Z, (Z.shape[0], BM, Z.shape[1] // BM)), 2)


@triton.jit
def _columns(part, m: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr):
    """A part's columns among the group's m * V, and which of them exist."""
    j = tl.arange(0, BM * BV)
    if V == BV:  # contiguous, and seen to be
        columns = part * (BM * BV) + j
        own = columns < m * V
    else:
        columns = (part * BM + j // BV) * V + j % BV
        own = (part * BM + j // BV < m) & (j % BV < V)
    return columns, own


@triton.jit
def _gamma(decay_ptr, step, length, h, TRANSPOSED: tl.constexpr, C: tl.constexpr, FLOOR: tl.constexpr):
    """exp(g_i - g_j) of the ``h``-th head where i sees j: ``[i, j]``, or ``[j, i]`` transposed. ``decay_ptr`` is at the
    chunk's first token and the part's first head, ``step`` from token to token."""
    i = tl.arange(0, C)
    d = tl.load(decay_ptr + i * step + h, mask=i < length, other=0.0)
    reset = d < FLOOR
    g = tl.cumsum(tl.where(reset, 0.0, d).to(tl.float64), 0)
    r = tl.cumsum(reset.to(tl.int32), 0)
    if TRANSPOSED:
        seen = (i[:, None] <= i[None, :]) & (r[:, None] == r[None, :])
        between = g[None, :] - g[:, None]
    else:
        seen = (i[:, None] >= i[None, :]) & (r[:, None] == r[None, :])
        between = g[:, None] - g[None, :]
    return tl.where(seen, exponential(tl.where(seen, between, 0.0).to(tl.float32)), 0.0)


@triton.jit
def _inner(
    X, Z, decay_ptr, step, length, heads, TRANSPOSED: tl.constexpr, BM: tl.constexpr, C: tl.constexpr,
    FLOOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``(X * Gamma) Z`` of each head, X ``[C, C]`` masked to what is seen."""
    total = tl.zeros(Z.shape, tl.float32)
    head = tl.arange(0, Z.shape[1]) // (Z.shape[1] // BM)
    for h in range(heads):
        gamma = _gamma(decay_ptr, step, length, h, TRANSPOSED, C, FLOOR)
        total = tl.where(head[None, :] == h, product(X * gamma, Z, PRECISION), total)
    return total


@triton.jit
def _outer(
    base, A, B, decay_ptr, step, length, heads, TRANSPOSED: tl.constexpr, BM: tl.constexpr, C: tl.constexpr,
    FLOOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``base`` plus the sum over heads of ``Gamma * (A B^T)``, ``[C, C]``."""
    head = tl.arange(0, A.shape[1]) // (A.shape[1] // BM)
    for h in range(heads):
        gamma = _gamma(decay_ptr, step, length, h, TRANSPOSED, C, FLOOR)
        base += gamma * product(tl.where(head[None, :] == h, A, 0.0), tl.trans(B), PRECISION)
    return base


@triton.jit
def _load_inverse(inverse_ptr, at, C: tl.constexpr, PRECISION: tl.constexpr):
    """M as `tiles.halves`; where products are IEEE, M itself (twice)."""
    i = tl.arange(0, C)
    square = i[:, None] * C + i[None, :]
    if PRECISION != "tf32":
        M = tl.load(inverse_ptr + at * C * C + square)
        return M, M
    return tl.load(inverse_ptr + at * 2 * C * C + square), tl.load(inverse_ptr + (at * 2 + 1) * C * C + square)


@triton.jit
def _whole(high, low, PRECISION: tl.constexpr):
    """M in float32."""
    if PRECISION != "tf32":
        return high
    return high.to(tl.float32) + low.to(tl.float32)


@triton.jit
def _any_wild(wild_ptr, first, last, G):
    """Whether a chunk from ``first`` to ``last`` is wild; ``wild_ptr`` is at the group."""
    found = 0
    for at in range(first, last, 256):
        c = at + tl.arange(0, 256)
        found += tl.sum(tl.load(wild_ptr + c * G, mask=c < last, other=0), 0)
    return found > 0


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def _decays(
    decay_ptr, start_ptr, length_ptr,  # chunks: first token and tokens
    down_ptr, up_ptr, edge_ptr, total_ptr, wild_ptr,
    G, m: tl.constexpr,
    BM: tl.constexpr, C: tl.constexpr, FLOOR: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    chunk, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, length = tl.load(start_ptr + chunk).to(tl.int64), tl.load(length_ptr + chunk)
    i, h = tl.arange(0, C), tl.arange(0, BM)
    inside = (i < length)[:, None] & (h < m)[None, :]
    d = tl.load(decay_ptr + start * (G * m) + g * m + (i[:, None] * (G * m) + h[None, :]), mask=inside, other=0.0)
    reset = d < FLOOR
    sums = tl.cumsum(tl.where(reset, 0.0, d).to(tl.float64), 0)
    last = tl.sum(tl.where(reset, 0.0, d).to(tl.float64), 0)
    resets, all_resets = tl.cumsum(reset.to(tl.int32), 0), tl.sum(reset.to(tl.int32), 0)
    wild = tl.max(tl.where((all_resets > 0) | (last < -LIMIT), 1, 0), 0)
    if wild:  # 0 across resets
        down = tl.where(resets == 0, tl.exp(sums), 0.0)
        up = tl.where(resets == all_resets[None, :], tl.exp(last[None, :] - sums), 0.0)
        edge = tl.exp(last * 0.0)
        total = tl.where(all_resets == 0, tl.exp(last), 0.0)
    else:
        down, up = tl.exp(sums - 0.5 * last[None, :]), tl.exp(0.5 * last[None, :] - sums)
        edge = tl.exp(0.5 * last)
        total = tl.exp(last)
    group = (chunk * G + g) * m
    tl.store(down_ptr + group * C + (i[:, None] * m + h[None, :]), down.to(tl.float32), mask=(h < m)[None, :])
    tl.store(up_ptr + group * C + (i[:, None] * m + h[None, :]), up.to(tl.float32), mask=(h < m)[None, :])
    tl.store(edge_ptr + group + h, edge.to(tl.float32), mask=h < m)
    tl.store(total_ptr + group + h, total.to(tl.float32), mask=h < m)
    tl.store(wild_ptr + chunk * G + g, wild)


@triton.jit
def _inverse(
    k_ptr, e_ptr, start_ptr, length_ptr, inverse_ptr,
    G,
    F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chunk, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, length = tl.load(start_ptr + chunk).to(tl.int64), tl.load(length_ptr + chunk)
    i, f = tl.arange(0, C), tl.arange(0, BF)
    shift, rows = start * (G * F) + g * F, i[:, None] * (G * F)
    real = (i < length)[:, None]
    L = tl.zeros((C, C), tl.float32)
    for a in tl.static_range(0, F, BF):
        e = tl.load(e_ptr + shift + rows + a + f[None, :], mask=real, other=0.0)
        k = tl.load(k_ptr + shift + rows + a + f[None, :], mask=real, other=0.0)
        L = product_onto(L, e, tl.trans(k), PRECISION)
    # The inverses of the blocks on the diagonal, doubled in size: [[A, 0], [B, D]]^-1 = [[A', 0], [-D' B A', D']].
    # Powers of L would be shorter, but grow without bound where an erase is near 2; inverses do not.
    pair = i // 2
    M = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    M -= tl.where((pair[:, None] == pair[None, :]) & (i[:, None] > i[None, :]), L, 0.0)
    for level in tl.static_range(1, 6):
        row, column = (i >> level)[:, None], (i >> level)[None, :]
        below = tl.where((row == column + 1) & (row % 2 == 1), L, 0.0)
        M -= product_split(product_split(M, below, PRECISION), M, PRECISION)
    square = i[:, None] * C + i[None, :]
    at = chunk * G + g
    if PRECISION != "tf32":
        tl.store(inverse_ptr + at * C * C + square, M)
    else:
        high, low = halves(M)
        tl.store(inverse_ptr + at * 2 * C * C + square, high)
        tl.store(inverse_ptr + (at * 2 + 1) * C * C + square, low)


@triton.jit
def _scan(
    q_ptr, k_ptr, e_ptr, w_ptr, decay_ptr, state_ptr, inverse_ptr, down_ptr, up_ptr, edge_ptr, total_ptr, wild_ptr,
    bounds_ptr, first_ptr,  # sequences: first token [N+1], first chunk [N+1]
    y_ptr, after_ptr, residual_ptr, before_ptr,
    G, m: tl.constexpr, V: tl.constexpr,
    F: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr, C: tl.constexpr,
    KEEP: tl.constexpr, WILD: tl.constexpr, PRECISION: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    n, part = (tl.program_id(0) // PARTS).to(tl.int64), tl.program_id(0) % PARTS
    g = tl.program_id(1)
    first, last = tl.load(first_ptr + n), tl.load(first_ptr + n + 1)
    if _any_wild(wild_ptr + g, first, last, G) == WILD:
        begin, end = tl.load(bounds_ptr + n).to(tl.int64), tl.load(bounds_ptr + n + 1).to(tl.int64)
        i, f = tl.arange(0, C), tl.arange(0, F)
        width = m * V
        columns, own = _columns(part, m, V, BM, BV)
        head = part * BM + tl.arange(0, BM)
        known = head < m
        cell = f[:, None] * width + columns[None, :]
        rows, tokens = i[:, None] * (G * F) + f[None, :], i[:, None] * (G * width) + columns[None, :]
        causal = i[:, None] >= i[None, :]
        kind = k_ptr.dtype.element_ty
        S = tl.load(state_ptr + (n * G + g) * F * width + cell, mask=own[None, :], other=0.0)
        for c in range(0, last - first):
            start = begin + c * C
            length = tl.minimum(end - start, C).to(tl.int32)
            at = (first + c).to(tl.int64) * G + g
            shift, there = start * (G * F) + g * F, start * (G * width) + g * width
            real = (i < length)[:, None]
            # The large loads first, in one flight; the small ones' ways to their places wait for each other.
            e = tl.load(e_ptr + shift + rows, mask=real, other=0.0)
            k = tl.load(k_ptr + shift + rows, mask=real, other=0.0)
            q = tl.load(q_ptr + shift + rows, mask=real, other=0.0)
            M_high, M_low = _load_inverse(inverse_ptr, at, C, PRECISION)
            w = tl.load(w_ptr + there + tokens, mask=real & own[None, :], other=0.0)
            scales = at * m * C + (i[:, None] * m + head[None, :])
            up = tl.load(up_ptr + scales, mask=known[None, :], other=0.0)
            down = tl.load(down_ptr + scales, mask=known[None, :], other=0.0)
            edge = tl.load(edge_ptr + at * m + head, mask=known, other=0.0)[None, :]
            S = _scaled(S, edge, BM)
            Sr = narrow(S, kind)
            if KEEP:
                tl.store(before_ptr + at * F * width + cell, Sr, mask=own[None, :])
            seen = product(e, Sr, PRECISION)
            A = tl.where(causal, product(q, tl.trans(k), PRECISION), 0.0)
            if WILD:
                total = tl.load(total_ptr + at * m + head, mask=known, other=0.0)[None, :]
                decays = decay_ptr + start * (G * m) + g * m + part * BM
                heads = tl.minimum(m - part * BM, BM)
                R = w.to(tl.float32) - _scaled(seen, down, BM)
                M = _whole(M_high, M_low, PRECISION)
                U = _inner(M, R, decays, G * m, length, heads, False, BM, C, FLOOR, PRECISION)
                y = _scaled(product(q, Sr, PRECISION), down, BM)
                y += _inner(A, U, decays, G * m, length, heads, False, BM, C, FLOOR, PRECISION)
                S = _scaled(S, total / edge, BM)
                S = product_onto(S, tl.trans(k), narrow(_scaled(U, up * edge, BM), kind), PRECISION)
            else:
                R = _scaled(w.to(tl.float32), up, BM) - seen
                U = product_halves(M_high, M_low, R, PRECISION)
                Ur = narrow(U, kind)
                y = product_onto(product(q, Sr, PRECISION), narrow(A, kind), Ur, PRECISION)
                y = _scaled(y, down, BM)
                S = _scaled(product_onto(S, tl.trans(k), Ur, PRECISION), edge, BM)
                U = _scaled(U, down, BM)
            tl.store(
                residual_ptr + start * (G * m) + g * m + (i[:, None] * (G * m) + head[None, :]),
                _head_sums(U * U, BM),
                mask=real & known[None, :],
            )
            tl.store(y_ptr + there + tokens, narrow(y, y_ptr.dtype.element_ty), mask=real & own[None, :])
        tl.store(after_ptr + (n * G + g) * F * width + cell, S, mask=own[None, :])


@triton.jit
def _scan_back(
    q_ptr, k_ptr, e_ptr, w_ptr, y_ptr, dy_ptr, decay_ptr, dafter_ptr, residual_ptr, dresidual_ptr, before_ptr,
    inverse_ptr, down_ptr, up_ptr, edge_ptr, total_ptr, wild_ptr, bounds_ptr, first_ptr,
    dw_ptr, dg_ptr, dafters_ptr, dbefore_ptr,
    G, m: tl.constexpr, V: tl.constexpr,
    F: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr, C: tl.constexpr,
    RESIDUAL: tl.constexpr, WILD: tl.constexpr, PRECISION: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    n, part = (tl.program_id(0) // PARTS).to(tl.int64), tl.program_id(0) % PARTS
    g = tl.program_id(1)
    first, last = tl.load(first_ptr + n), tl.load(first_ptr + n + 1)
    if _any_wild(wild_ptr + g, first, last, G) == WILD:
        begin, end = tl.load(bounds_ptr + n).to(tl.int64), tl.load(bounds_ptr + n + 1).to(tl.int64)
        i, f = tl.arange(0, C), tl.arange(0, F)
        width = m * V
        columns, own = _columns(part, m, V, BM, BV)
        head = part * BM + tl.arange(0, BM)
        known = head < m
        cell = f[:, None] * width + columns[None, :]
        rows, tokens = i[:, None] * (G * F) + f[None, :], i[:, None] * (G * width) + columns[None, :]
        later = i[:, None] <= i[None, :]  # transposed: row j, column i >= j
        kind = k_ptr.dtype.element_ty
        dS = tl.load(dafter_ptr + (n * G + g) * F * width + cell, mask=own[None, :], other=0.0)
        for step in range(0, last - first):
            c = last - first - 1 - step
            start = begin + c * C
            length = tl.minimum(end - start, C).to(tl.int32)
            at = (first + c).to(tl.int64) * G + g
            shift, there = start * (G * F) + g * F, start * (G * width) + g * width
            real = (i < length)[:, None]
            inside = real & own[None, :]
            k = tl.load(k_ptr + shift + rows, mask=real, other=0.0)
            q = tl.load(q_ptr + shift + rows, mask=real, other=0.0)
            e = tl.load(e_ptr + shift + rows, mask=real, other=0.0)
            M_high, M_low = _load_inverse(inverse_ptr, at, C, PRECISION)
            dy = tl.load(dy_ptr + there + tokens, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + there + tokens, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(w_ptr + there + tokens, mask=inside, other=0.0).to(tl.float32)
            scales = at * m * C + (i[:, None] * m + head[None, :])
            up = tl.load(up_ptr + scales, mask=known[None, :], other=0.0)
            down = tl.load(down_ptr + scales, mask=known[None, :], other=0.0)
            edge = tl.load(edge_ptr + at * m + head, mask=known, other=0.0)[None, :]
            gate = start * (G * m) + g * m + (i[:, None] * (G * m) + head[None, :])
            decays = decay_ptr + start * (G * m) + g * m + part * BM
            heads = tl.minimum(m - part * BM, BM)
            dg = _head_sums(dy * y, BM)
            if WILD:
                dS = _scaled(dS, edge, BM)
            else:
                dS, dy = _scaled(dS, edge, BM), _scaled(dy, down, BM)
            dSr = narrow(dS, kind)
            tl.store(dafters_ptr + at * F * width + cell, dSr, mask=own[None, :])
            A_t = tl.where(later, product(k, tl.trans(q), PRECISION), 0.0)
            dU = product(k, dSr, PRECISION)
            if WILD:
                dU = _scaled(dU, up, BM)
                dU += _inner(A_t, dy, decays, G * m, length, heads, True, BM, C, FLOOR, PRECISION)
                dyr = narrow(_scaled(dy, down, BM), kind)
            else:
                dyr = narrow(dy, kind)
                dU = product_onto(dU, narrow(A_t, kind), dyr, PRECISION)
            if RESIDUAL:
                S = tl.load(before_ptr + at * F * width + cell, mask=own[None, :], other=0.0)
                residual = tl.load(residual_ptr + gate, mask=real & known[None, :], other=0.0)
                dresidual = 2.0 * tl.load(dresidual_ptr + gate, mask=real & known[None, :], other=0.0)
                dg += residual * dresidual
                seen = product(e, S, PRECISION)
                if WILD:
                    R = w - _scaled(seen, down, BM)
                    M = _whole(M_high, M_low, PRECISION)
                    U = _inner(M, R, decays, G * m, length, heads, False, BM, C, FLOOR, PRECISION)
                    dU += _scaled(U, dresidual, BM)
                else:
                    U = product_halves(M_high, M_low, _scaled(w, up, BM) - seen, PRECISION)
                    dU += _scaled(_scaled(U, down, BM), down * dresidual, BM)
            if WILD:
                total = tl.load(total_ptr + at * m + head, mask=known, other=0.0)[None, :]
                M_t = tl.trans(_whole(M_high, M_low, PRECISION))
                dW = _inner(M_t, dU, decays, G * m, length, heads, True, BM, C, FLOOR, PRECISION)
                dS = _scaled(dS, total / edge, BM)
                inner = product(tl.trans(q), dyr, PRECISION)
                inner = product_onto(inner, tl.trans(e), narrow(_scaled(dW, -down, BM), kind), PRECISION)
                dS += _scaled(inner, edge, BM)
            else:
                dR = product_halves(tl.trans(M_high), tl.trans(M_low), dU, PRECISION)
                dW = _scaled(dR, up, BM)
                dS = product_onto(dS, tl.trans(q), dyr, PRECISION)
                dS = _scaled(product_onto(dS, tl.trans(e), narrow(-dR, kind), PRECISION), edge, BM)
            tl.store(dw_ptr + there + tokens, narrow(dW, dw_ptr.dtype.element_ty), mask=inside)
            # dg_i = dO_i . O_i - dW_i . W_i + 2 rho_i drho_i; <dS', S'> at the end of the chunk is added later.
            tl.store(dg_ptr + gate, dg - _head_sums(dW * w, BM), mask=real & known[None, :])
        tl.store(dbefore_ptr + (n * G + g) * F * width + cell, dS, mask=own[None, :])


@triton.jit
def _gradients(
    q_ptr, k_ptr, e_ptr, w_ptr, dy_ptr, dw_ptr, decay_ptr, before_ptr, dafters_ptr,
    inverse_ptr, down_ptr, up_ptr, edge_ptr, total_ptr, wild_ptr, start_ptr, length_ptr,
    dq_ptr, dk_ptr, de_ptr, dg_ptr,
    G, m: tl.constexpr, V: tl.constexpr,
    F: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr, C: tl.constexpr,
    WILD: tl.constexpr, PRECISION: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    chunk, g, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    at = chunk * G + g
    if (tl.load(wild_ptr + at) != 0) == WILD:
        start, length = tl.load(start_ptr + chunk).to(tl.int64), tl.load(length_ptr + chunk)
        i, f = tl.arange(0, C), tl.arange(0, BF)
        width = m * V
        real = (i < length)[:, None]
        shift, rows = start * (G * F) + g * F, i[:, None] * (G * F)
        there, state = start * (G * width) + g * width, at * F * width
        places = shift + rows + block * BF + f[None, :]
        kind = q_ptr.dtype.element_ty
        dA, dA_t = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
        dL, dL_t = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
        dq, dk, de = tl.zeros((C, BF), tl.float32), tl.zeros((C, BF), tl.float32), tl.zeros((C, BF), tl.float32)
        for part in tl.static_range(PARTS):
            columns, own = _columns(part, m, V, BM, BV)
            head = part * BM + tl.arange(0, BM)
            known = head < m
            tokens = i[:, None] * (G * width) + columns[None, :]
            inside = real & own[None, :]
            heads = tl.minimum(m - part * BM, BM)
            scales = at * m * C + (i[:, None] * m + head[None, :])
            down = tl.load(down_ptr + scales, mask=known[None, :], other=0.0)
            up = tl.load(up_ptr + scales, mask=known[None, :], other=0.0)
            decays = decay_ptr + start * (G * m) + g * m + part * BM
            M_high, M_low = _load_inverse(inverse_ptr, at, C, PRECISION)
            w = tl.load(w_ptr + there + tokens, mask=inside, other=0.0).to(tl.float32)
            seen, pushed = tl.zeros((C, BM * BV), tl.float32), tl.zeros((C, BM * BV), tl.float32)
            kept = tl.zeros((BM * BV,), tl.float32)
            for a in tl.static_range(0, F, BF):
                cell = (a + f)[:, None] * width + columns[None, :]
                e = tl.load(e_ptr + shift + rows + a + f[None, :], mask=real, other=0.0)
                S = tl.load(before_ptr + state + cell, mask=own[None, :], other=0.0)
                seen = product_onto(seen, e, S, PRECISION)
                k = tl.load(k_ptr + shift + rows + a + f[None, :], mask=real, other=0.0)
                dS = tl.load(dafters_ptr + state + cell, mask=own[None, :], other=0.0)
                pushed = product_onto(pushed, k, dS, PRECISION)
                kept += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 0)
            ended = tl.sum(tl.reshape(kept, (BM, BV)), 1)  # <dS', S'> at the end of the chunk
            if WILD:
                M = _whole(M_high, M_low, PRECISION)
                R = w - _scaled(seen, down, BM)
                U = _inner(M, R, decays, G * m, length, heads, False, BM, C, FLOOR, PRECISION)
                late = _scaled(U, up, BM)
                ended *= tl.load(total_ptr + at * m + head, mask=known, other=0.0)
            else:
                U = product_halves(M_high, M_low, _scaled(w, up, BM) - seen, PRECISION)
                late = U
            if block == 0:
                gate = start * (G * m) + g * m + (i[:, None] * (G * m) + head[None, :])
                dg = tl.load(dg_ptr + gate, mask=real & known[None, :], other=0.0)
                ended += tl.sum(_head_sums(late * pushed, BM), 0)
                dg += tl.where((i == C - 1)[:, None], ended[None, :], 0.0)
                back = tl.sum(dg, 0)[None, :] - tl.cumsum(dg, 0) + dg  # sum over i >= t
                d = tl.load(decay_ptr + gate, mask=real & known[None, :], other=0.0)
                tl.store(dg_ptr + gate, tl.where(d < FLOOR, 0.0, back), mask=real & known[None, :])
            # One gradient after the other, the last part's with its store: so that few tiles live at once.
            cell = (block * BF + f)[:, None] * width + columns[None, :]
            Ur = narrow(late, kind)
            S = tl.load(before_ptr + state + cell, mask=own[None, :], other=0.0)
            k = tl.load(k_ptr + places, mask=real, other=0.0)
            dy = tl.load(dy_ptr + there + tokens, mask=inside, other=0.0).to(tl.float32)
            dyr = narrow(_scaled(dy, down, BM), kind)
            if WILD:
                dA = _outer(dA, dy, U, decays, G * m, length, heads, False, BM, C, FLOOR, PRECISION)
            else:
                dA = product_onto(dA, dyr, tl.trans(Ur), PRECISION)
            dq = product_onto(dq, dyr, tl.trans(S), PRECISION)
            if part == PARTS - 1:
                dq = product_onto(dq, narrow(tl.where(i[:, None] >= i[None, :], dA, 0.0), kind), k, PRECISION)
                tl.store(dq_ptr + places, narrow(dq, kind), mask=real)
            dR = -tl.load(dw_ptr + there + tokens, mask=inside, other=0.0).to(tl.float32)
            dRr = narrow(_scaled(dR, down, BM), kind)
            if WILD:
                dL = _outer(dL, dR, U, decays, G * m, length, heads, False, BM, C, FLOOR, PRECISION)
            else:
                dL = product_onto(dL, dRr, tl.trans(Ur), PRECISION)
            de = product_onto(de, dRr, tl.trans(S), PRECISION)
            if part == PARTS - 1:
                de = product_onto(de, narrow(tl.where(i[:, None] > i[None, :], dL, 0.0), kind), k, PRECISION)
                tl.store(de_ptr + places, narrow(de, kind), mask=real)
            dS = tl.load(dafters_ptr + state + cell, mask=own[None, :], other=0.0)
            dk = product_onto(dk, Ur, tl.trans(dS), PRECISION)
            if WILD:
                dA_t = _outer(dA_t, U, dy, decays, G * m, length, heads, True, BM, C, FLOOR, PRECISION)
                dL_t = _outer(dL_t, U, dR, decays, G * m, length, heads, True, BM, C, FLOOR, PRECISION)
            else:
                dA_t = product_onto(dA_t, Ur, tl.trans(dyr), PRECISION)
                dL_t = product_onto(dL_t, Ur, tl.trans(dRr), PRECISION)
            if part == PARTS - 1:
                q = tl.load(q_ptr + places, mask=real, other=0.0)
                dk = product_onto(dk, narrow(tl.where(i[:, None] <= i[None, :], dA_t, 0.0), kind), q, PRECISION)
                e = tl.load(e_ptr + places, mask=real, other=0.0)
                dk = product_onto(dk, narrow(tl.where(i[:, None] < i[None, :], dL_t, 0.0), kind), e, PRECISION)
                tl.store(dk_ptr + places, narrow(dk, kind), mask=real)


# -- host ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Where sequences and their chunks lie among the B*T tokens, on the device (int32)."""

    bounds: Tensor  # [N+1] first token of each sequence, and the number of tokens
    first: Tensor  # [N+1] first chunk of each sequence, and the number of chunks
    start: Tensor  # [chunks] first token
    length: Tensor  # [chunks] tokens

    @property
    def chunks(self) -> int:
        return self.start.shape[0]


@lru_cache(maxsize=64)
def _layout(bounds: tuple[int, ...], device: torch.device) -> _Layout:
    first: list[int] = [0]
    start: list[int] = []
    length: list[int] = []
    for a, b in zip(bounds, bounds[1:], strict=False):
        start += range(a, b, CHUNK)
        length += [min(CHUNK, b - i) for i in range(a, b, CHUNK)]
        first.append(len(start))
    return _Layout(*(torch.tensor(x, dtype=torch.int32, device=device) for x in (bounds, first, start, length)))


@dataclass(frozen=True)
class _Sizes:
    """Tiles: a part of a group's columns is BM heads of BV."""

    BM: int
    BV: int
    parts: int

    @classmethod
    def of(cls, m: int, V: int, columns: int) -> _Sizes:
        """Parts of as many whole heads as have at most ``columns`` columns, at least one."""
        BV = max(16, triton.next_power_of_2(V))
        BM = max(1, min(triton.next_power_of_2(m), columns // BV))
        return cls(BM, BV, triton.cdiv(m, BM))

    def constants(self, m: int, V: int) -> dict[str, int]:
        """As the kernels take them."""
        return {"m": m, "V": V, "BM": self.BM, "BV": self.BV, "PARTS": self.parts}


STATE_NUMBERS = 2**13  # of a state's tile in a scan: 64 registers of each of 128 threads
FEATURES, COLUMNS = 128, 128  # of a tile of the gradients


def tiles(F: int, m: int, V: int, dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """The constants of each kernel that depend on sizes."""
    less = 4 if dtype == torch.float32 else 1
    scan = _Sizes.of(m, V, STATE_NUMBERS // less // F).constants(m, V)
    BF = min(F, FEATURES // less)
    return {
        "_decays": {"m": m, "BM": triton.next_power_of_2(m), "C": CHUNK},
        "_inverse": {"F": F, "BF": min(F, 128), "C": CHUNK},
        "_scan": {"F": F, "C": CHUNK, **scan},
        "_scan_back": {"F": F, "C": CHUNK, **scan},
        "_gradients": {"F": F, "BF": BF, "C": CHUNK, **_Sizes.of(m, V, COLUMNS // less).constants(m, V)},
    }


def _launch(kernel: str, F: int) -> dict[str, int]:
    """`LAUNCH`, and twice the warps where a state takes twice the registers."""
    launch = LAUNCH[kernel]
    return launch if F <= 128 else {**launch, "num_warps": max(8, launch["num_warps"])}


def _precision(dtype: torch.dtype) -> dict[str, str]:
    return {"PRECISION": "ieee" if dtype == torch.float32 else "tf32"}


_Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("llm_mlp::perceive", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, e: Tensor, w: Tensor, log_decay: Tensor, state: Tensor, bounds: list[int], keep: bool
) -> _Tensors:
    """y, state, residual; and if ``keep`` what the backward pass reads: the states before each chunk (in q's dtype),
    the inverses, and the decays of each chunk (down, up, edge, total, wild)."""
    (_, _, G, F), (m, V) = q.shape, w.shape[-2:]
    tile, layout = tiles(F, m, V, q.dtype), _layout(tuple(bounds), q.device)
    y, after, residual, before, inverse, down, up, edge, total, wild = _outputs(q, w, log_decay, state, layout, keep)
    _decays[(layout.chunks, G)](
        log_decay, layout.start, layout.length, down, up, edge, total, wild, G,
        FLOOR=RESET, LIMIT=limit(q.dtype), **tile["_decays"], **LAUNCH["_decays"],
    )  # fmt: skip
    _inverse[(layout.chunks, G)](
        k, e, layout.start, layout.length, inverse, G,
        **tile["_inverse"], **_precision(q.dtype), **_launch("_inverse", F),
    )  # fmt: skip
    for is_wild in (False, True):
        _scan[(state.shape[0] * tile["_scan"]["PARTS"], G)](
            q, k, e, w, log_decay, state, inverse, down, up, edge, total, wild, layout.bounds, layout.first,
            y, after, residual, before, G, KEEP=keep, WILD=is_wild, FLOOR=RESET,
            **tile["_scan"], **_precision(q.dtype), **_launch("_scan", F),
        )  # fmt: skip
    return y, after, residual, before, inverse, down, up, edge, total, wild


def _outputs(q: Tensor, w: Tensor, log_decay: Tensor, state: Tensor, layout: _Layout, keep: bool) -> _Tensors:
    G, F, (m, V), chunks = q.shape[2], q.shape[3], w.shape[-2:], layout.chunks

    def fresh(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    return (
        torch.empty_like(w),
        torch.empty_like(state),
        torch.empty_like(log_decay),
        fresh(chunks if keep else 0, G, F, m, V, dtype=q.dtype),
        fresh(chunks, G, 1, CHUNK, CHUNK)
        if q.dtype == torch.float32
        else fresh(chunks, G, 2, CHUNK, CHUNK, dtype=torch.bfloat16),
        fresh(chunks, G, CHUNK, m),
        fresh(chunks, G, CHUNK, m),
        fresh(chunks, G, m),
        fresh(chunks, G, m),
        fresh(chunks, G, dtype=torch.int32),
    )


@_forward.register_fake
def _(q, k, e, w, log_decay, state, bounds, keep):
    chunks = sum(-(-(b - a) // CHUNK) for a, b in zip(bounds, bounds[1:], strict=False))
    nothing = torch.empty(0)
    return _outputs(q, w, log_decay, state, _Layout(nothing, nothing, nothing.new_empty(chunks), nothing), keep)


@torch.library.custom_op("llm_mlp::perceive_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, e: Tensor, w: Tensor, log_decay: Tensor, y: Tensor, residual: Tensor, before: Tensor,
    inverse: Tensor, down: Tensor, up: Tensor, edge: Tensor, total: Tensor, wild: Tensor,
    dy: Tensor, dafter: Tensor, dresidual: Tensor | None, bounds: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, e, w, log_decay and state."""
    (_, _, G, F), (m, V) = q.shape, w.shape[-2:]
    tile, layout = tiles(F, m, V, q.dtype), _layout(tuple(bounds), q.device)
    dq, dk, de, dw, dg = (torch.empty_like(x) for x in (q, k, e, w, log_decay))
    dafters, dbefore = torch.empty_like(before), torch.empty_like(dafter)
    dy, dafter = dy.contiguous(), dafter.contiguous()
    slopes = residual if dresidual is None else dresidual.contiguous()
    kind = {"FLOOR": RESET, **_precision(q.dtype)}
    for is_wild in (False, True):
        _scan_back[(dafter.shape[0] * tile["_scan_back"]["PARTS"], G)](
            q, k, e, w, y, dy, log_decay, dafter, residual, slopes, before,
            inverse, down, up, edge, total, wild, layout.bounds, layout.first, dw, dg, dafters, dbefore, G,
            RESIDUAL=dresidual is not None, WILD=is_wild, **tile["_scan_back"], **kind, **_launch("_scan_back", F),
        )  # fmt: skip
    for is_wild in (False, True):
        _gradients[(layout.chunks, G, F // tile["_gradients"]["BF"])](
            q, k, e, w, dy, dw, log_decay, before, dafters,
            inverse, down, up, edge, total, wild, layout.start, layout.length, dq, dk, de, dg, G,
            WILD=is_wild, **tile["_gradients"], **kind, **_launch("_gradients", F),
        )  # fmt: skip
    return dq, dk, de, dw, dg, dbefore


@_backward.register_fake
def _(q, k, e, w, log_decay, y, residual, before, inverse, down, up, edge, total, wild, dy, dafter, dresidual, bounds):
    return tuple(torch.empty_like(x) for x in (q, k, e, w, log_decay, dafter))


def _save(ctx, inputs, output) -> None:
    q, k, e, w, log_decay, _, bounds, _ = inputs
    y, _, residual, *kept = output
    ctx.save_for_backward(q, k, e, w, log_decay, y, residual, *kept)
    ctx.bounds = bounds
    ctx.shapes = output[0].shape, output[1].shape
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, dafter, dresidual, *_):
    y, state = ctx.saved_tensors[5], ctx.shapes[1]
    if dy is None:
        dy = torch.zeros_like(y)
    if dafter is None:
        dafter = torch.zeros(state, dtype=torch.float32, device=y.device)
    return *_backward(*ctx.saved_tensors, dy, dafter, dresidual, ctx.bounds), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def perceive(
    q: Tensor, k: Tensor, e: Tensor, w: Tensor, log_decay: Tensor, state: Tensor, bounds: list[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `llm_mlp.ops.perceive` on checked inputs; ``bounds`` are the packed sequences' ends (or None)."""
    B, T = q.shape[:2]
    if T == 0 or B == 0:
        return w, state, log_decay
    inputs = [x.contiguous() for x in (q, k, e, w, log_decay, state)]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    ends = list(range(0, B * T + 1, T)) if bounds is None else bounds
    return _forward(*inputs, ends, keep)[:3]
