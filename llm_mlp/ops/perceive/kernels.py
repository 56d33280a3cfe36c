"""`perceive` as Triton kernels: forward and backward, whole and packed sequences.

The mathematics is that of `llm_mlp.ops.perceive.chunked` (docs/perceive.md), for all heads of a group at once:

- ``_prepare``     (chunk, group): M = (I + tril(E K^T, -1))^-1; the decays of every head
- ``_scan``        (sequence, group, part): the state through the chunks; y, the residual, the state before each chunk
- ``_scan_back``   (sequence, group, part): the state's gradient through the chunks, last one first; dw
- ``_gradients``   (chunk, group, block of F): dq, dk, de and the decays' gradient, summed over the heads of the group

A part is as many whole heads as fit a tile; everything a group's heads share (k, e, q, M) is read once for them.

Decays without Gamma. Inside a chunk Gamma[i, j] = exp(g_i - g_j) is the product of down_i = exp(g_i - c) and
up_j = exp(c - g_j), c half of the chunk's log decay: a product with X * Gamma scales what goes in and what comes out,
for all heads together. That holds while the chunk's decay stays within exp(-LIMIT), far inside float32's range. A chunk
that forgets more, or resets, is *wild*: there Gamma is made head by head. The two scans are compiled for both cases; a
(sequence, group) with a wild chunk runs in the second, every other in the first, which has no branch in its loop.

Nothing that flows from a matrix unit is transposed into the first operand of another product: it is computed
transposed, because Triton 3.4 to 3.7 miscompiles such transpositions on Hopper (flash-linear-attention issues 640 and
984). No atomics: two runs give equal bits.

Offsets of tiles are 32-bit numbers from a 64-bit scalar: a tile of pointers takes more registers than the tile.

Precision: products over F take operands in the inputs' dtype; M, u and what decays multiply is float32 (TF32 products
where the inputs are of 16 bits, IEEE where they are float32).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_mlp.ops.perceive.chunked import CHUNK, RESET
from llm_mlp.ops.tiles import exponential, narrow, product, product_onto, product_split

# How each kernel is launched; benchmarks/tune_kernels.py checks and times others on a device.
LAUNCH: dict[str, dict[str, int]] = {
    "_prepare": {"num_warps": 4, "num_stages": 1},
    "_scan": {"num_warps": 4, "num_stages": 1},
    "_scan_back": {"num_warps": 4, "num_stages": 1},
    "_gradients": {"num_warps": 4, "num_stages": 1},
}
LIMIT = 120.0  # of a chunk's log decay: down and up stay within exp(60), and products of values with them finite
BLOCK = 16  # rows of the inverse found one by one; blocks of them by products


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
    X, Z, into, out, decay_ptr, step, length, heads,
    WILD: tl.constexpr, TRANSPOSED: tl.constexpr, BM: tl.constexpr, C: tl.constexpr,
    FLOOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``(X * Gamma) Z`` of each head, X ``[C, C]`` masked to what is seen: into = up and out = down (transposed: the
    other way round)."""
    if not WILD:
        return _scaled(product(X, _scaled(Z, into, BM), PRECISION), out, BM)
    total = tl.zeros(Z.shape, tl.float32)
    head = tl.arange(0, Z.shape[1]) // (Z.shape[1] // BM)
    for h in range(heads):
        gamma = _gamma(decay_ptr, step, length, h, TRANSPOSED, C, FLOOR)
        total = tl.where(head[None, :] == h, product(X * gamma, Z, PRECISION), total)
    return total


@triton.jit
def _outer(
    base, A, B, left, right, decay_ptr, step, length, heads, KIND: tl.constexpr,
    WILD: tl.constexpr, TRANSPOSED: tl.constexpr, BM: tl.constexpr, C: tl.constexpr,
    FLOOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``base`` plus the sum over heads of ``Gamma * (A B^T)``, ``[C, C]``; what is not seen is not yet masked.

    The sum is rounded to the inputs' dtype next and feeds no recurrence: bfloat16 operands, which have float32's range,
    will do."""
    if not WILD:
        A, B = _scaled(A, left, BM), _scaled(B, right, BM)
        if tl.bfloat16 == KIND:
            A, B = narrow(A, KIND), narrow(B, KIND)
        return product_onto(base, A, tl.trans(B), PRECISION)
    head = tl.arange(0, A.shape[1]) // (A.shape[1] // BM)
    for h in range(heads):
        gamma = _gamma(decay_ptr, step, length, h, TRANSPOSED, C, FLOOR)
        base += gamma * product(tl.where(head[None, :] == h, A, 0.0), tl.trans(B), PRECISION)
    return base


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
def _prepare(
    k_ptr, e_ptr, decay_ptr, start_ptr, length_ptr,  # chunks: first token and tokens
    inverse_ptr, down_ptr, up_ptr, edge_ptr, total_ptr, wild_ptr,
    G, m: tl.constexpr,
    F: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, FLOOR: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    chunk, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, length = tl.load(start_ptr + chunk).to(tl.int64), tl.load(length_ptr + chunk)
    i = tl.arange(0, C)
    f = tl.arange(0, BF)
    shift, rows = start * (G * F) + g * F, i[:, None] * (G * F)
    real = (i < length)[:, None]
    L = tl.zeros((C, C), tl.float32)
    for a in range(0, F, BF):
        e = tl.load(e_ptr + shift + rows + a + f[None, :], mask=real, other=0.0)
        k = tl.load(k_ptr + shift + rows + a + f[None, :], mask=real, other=0.0)
        L = product_onto(L, e, tl.trans(k), PRECISION)
    L = tl.where(i[:, None] > i[None, :], L, 0.0)
    # The inverse D of the blocks on the diagonal by forward substitution, row by row in all blocks at once: row i is
    # e_i - sum_j L_ij row_j.
    within = i // BLOCK
    same = within[:, None] == within[None, :]
    D = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for row in range(1, BLOCK):
        here = within * BLOCK + row  # in the block of each column
        factors = tl.sum(tl.where(i[:, None] == here[None, :], L, 0.0), 0)  # L[here(j), j]
        change = tl.sum(factors[:, None] * D, 0)
        D = tl.where((i[:, None] == here[None, :]) & same, D - change[None, :], D)
    # I + L = D^-1 (I + N) with N = D (L outside the blocks), whose fourth power is zero: M = (I - N)(I + N^2) D.
    N = product_split(D, tl.where(same, 0.0, L), PRECISION)
    T = D + product_split(product_split(N, N, PRECISION), D, PRECISION)
    M = T - product_split(N, T, PRECISION)
    tl.store(inverse_ptr + (chunk * G + g) * C * C + (i[:, None] * C + i[None, :]), M)

    h = tl.arange(0, BM)
    inside = (i < length)[:, None] & (h < m)[None, :]
    d = tl.load(decay_ptr + start * (G * m) + g * m + (i[:, None] * (G * m) + h[None, :]), mask=inside, other=0.0)
    reset = d < FLOOR
    sums = tl.cumsum(tl.where(reset, 0.0, d).to(tl.float64), 0)
    last = tl.sum(tl.where(reset, 0.0, d).to(tl.float64), 0)
    resets, all_resets = tl.cumsum(reset.to(tl.int32), 0), tl.sum(reset.to(tl.int32), 0)
    wild = tl.max(tl.where((all_resets > 0) | (last < -LIMIT), 1, 0), 0)
    if wild:  # down and up are exp(g) and exp(g_C - g), 0 across resets
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
        heads = tl.minimum(m - part * BM, BM)
        S = tl.load(state_ptr + (n * G + g) * F * width + cell, mask=own[None, :], other=0.0)
        for c in range(0, last - first):
            start = begin + c * C
            length = tl.minimum(end - start, C).to(tl.int32)
            at = (first + c).to(tl.int64) * G + g
            shift, there = start * (G * F) + g * F, start * (G * width) + g * width
            real = (i < length)[:, None]
            e = tl.load(e_ptr + shift + rows, mask=real, other=0.0)
            k = tl.load(k_ptr + shift + rows, mask=real, other=0.0)
            q = tl.load(q_ptr + shift + rows, mask=real, other=0.0)
            w = tl.load(w_ptr + there + tokens, mask=real & own[None, :], other=0.0).to(tl.float32)
            M = tl.load(inverse_ptr + at * C * C + (i[:, None] * C + i[None, :]))
            scales = at * m * C + (i[:, None] * m + head[None, :])
            down = tl.load(down_ptr + scales, mask=known[None, :], other=0.0)
            up = tl.load(up_ptr + scales, mask=known[None, :], other=0.0)
            edge = tl.load(edge_ptr + at * m + head, mask=known, other=0.0)
            total = tl.load(total_ptr + at * m + head, mask=known, other=0.0)
            carry, tail = down * edge[None, :], up * edge[None, :]
            decays = decay_ptr + start * (G * m) + g * m + part * BM
            Sr = narrow(S, k.dtype)
            if KEEP:
                tl.store(before_ptr + at * F * width + cell, Sr, mask=own[None, :])
            R = w - _scaled(product(e, Sr, PRECISION), carry, BM)
            U = _inner(M, R, up, down, decays, G * m, length, heads, WILD, False, BM, C, FLOOR, PRECISION)
            tl.store(
                residual_ptr + start * (G * m) + g * m + (i[:, None] * (G * m) + head[None, :]),
                _head_sums(U * U, BM),
                mask=real & known[None, :],
            )
            A = tl.where(causal, product(q, tl.trans(k), PRECISION), 0.0)
            y = _scaled(product(q, Sr, PRECISION), carry, BM)
            y += _inner(A, U, up, down, decays, G * m, length, heads, WILD, False, BM, C, FLOOR, PRECISION)
            tl.store(y_ptr + there + tokens, narrow(y, y_ptr.dtype.element_ty), mask=real & own[None, :])
            S = _scaled(S, total[None, :], BM)
            S = product_onto(S, tl.trans(k), narrow(_scaled(U, tail, BM), k.dtype), PRECISION)
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
        heads = tl.minimum(m - part * BM, BM)
        dS = tl.load(dafter_ptr + (n * G + g) * F * width + cell, mask=own[None, :], other=0.0)
        for step in range(0, last - first):
            c = last - first - 1 - step
            start = begin + c * C
            length = tl.minimum(end - start, C).to(tl.int32)
            at = (first + c).to(tl.int64) * G + g
            shift, there = start * (G * F) + g * F, start * (G * width) + g * width
            real = (i < length)[:, None]
            inside = real & own[None, :]
            q = tl.load(q_ptr + shift + rows, mask=real, other=0.0)
            k = tl.load(k_ptr + shift + rows, mask=real, other=0.0)
            e = tl.load(e_ptr + shift + rows, mask=real, other=0.0)
            w = tl.load(w_ptr + there + tokens, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + there + tokens, mask=inside, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + there + tokens, mask=inside, other=0.0).to(tl.float32)
            scales = at * m * C + (i[:, None] * m + head[None, :])
            down = tl.load(down_ptr + scales, mask=known[None, :], other=0.0)
            up = tl.load(up_ptr + scales, mask=known[None, :], other=0.0)
            edge = tl.load(edge_ptr + at * m + head, mask=known, other=0.0)
            total = tl.load(total_ptr + at * m + head, mask=known, other=0.0)
            carry, tail = down * edge[None, :], up * edge[None, :]
            decays = decay_ptr + start * (G * m) + g * m + part * BM
            dSr = narrow(dS, k.dtype)
            tl.store(dafters_ptr + at * F * width + cell, dSr, mask=own[None, :])
            A_t = tl.where(later, product(k, tl.trans(q), PRECISION), 0.0)
            dU = _scaled(product(k, dSr, PRECISION), tail, BM)
            dU += _inner(A_t, dy, down, up, decays, G * m, length, heads, WILD, True, BM, C, FLOOR, PRECISION)
            gate = start * (G * m) + g * m + (i[:, None] * (G * m) + head[None, :])
            dg = _head_sums(dy * y, BM)
            if RESIDUAL:
                S = tl.load(before_ptr + at * F * width + cell, mask=own[None, :], other=0.0)
                M = tl.load(inverse_ptr + at * C * C + (i[:, None] * C + i[None, :]))
                R = w - _scaled(product(e, S, PRECISION), carry, BM)
                U = _inner(M, R, up, down, decays, G * m, length, heads, WILD, False, BM, C, FLOOR, PRECISION)
                residual = tl.load(residual_ptr + gate, mask=real & known[None, :], other=0.0)
                dresidual = 2.0 * tl.load(dresidual_ptr + gate, mask=real & known[None, :], other=0.0)
                dU += _scaled(U, dresidual, BM)
                dg += residual * dresidual
            M_t = tl.load(inverse_ptr + at * C * C + (i[None, :] * C + i[:, None]))
            dR = _inner(M_t, dU, down, up, decays, G * m, length, heads, WILD, True, BM, C, FLOOR, PRECISION)
            tl.store(dw_ptr + there + tokens, narrow(dR, dw_ptr.dtype.element_ty), mask=inside)
            # dg_i = dO_i . O_i - dW_i . W_i + 2 rho_i drho_i; <dS', S'> at the end of the chunk is added later.
            tl.store(dg_ptr + gate, dg - _head_sums(dR * w, BM), mask=real & known[None, :])
            dS = _scaled(dS, total[None, :], BM)
            dS = product_onto(dS, tl.trans(q), narrow(_scaled(dy, carry, BM), q.dtype), PRECISION)
            dS = product_onto(dS, tl.trans(e), narrow(_scaled(dR, -carry, BM), e.dtype), PRECISION)
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
            edge = tl.load(edge_ptr + at * m + head, mask=known, other=0.0)
            total = tl.load(total_ptr + at * m + head, mask=known, other=0.0)
            carry, tail = down * edge[None, :], up * edge[None, :]
            decays = decay_ptr + start * (G * m) + g * m + part * BM
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
            w = tl.load(w_ptr + there + tokens, mask=inside, other=0.0).to(tl.float32)
            M = tl.load(inverse_ptr + at * C * C + (i[:, None] * C + i[None, :]))
            R = w - _scaled(seen, carry, BM)
            U = _inner(M, R, up, down, decays, G * m, length, heads, WILD, False, BM, C, FLOOR, PRECISION)
            if block == 0:
                gate = start * (G * m) + g * m + (i[:, None] * (G * m) + head[None, :])
                dg = tl.load(dg_ptr + gate, mask=real & known[None, :], other=0.0)
                ended = tl.sum(_head_sums(U * pushed, BM) * tail, 0)
                ended += total * tl.sum(tl.reshape(kept, (BM, BV)), 1)
                dg += tl.where((i == C - 1)[:, None], ended[None, :], 0.0)
                back = tl.sum(dg, 0)[None, :] - tl.cumsum(dg, 0) + dg  # sum over i >= t
                d = tl.load(decay_ptr + gate, mask=real & known[None, :], other=0.0)
                tl.store(dg_ptr + gate, tl.where(d < FLOOR, 0.0, back), mask=real & known[None, :])
            # One gradient after the other, the last part's with its store: so that few tiles live at once.
            cell = (block * BF + f)[:, None] * width + columns[None, :]
            S = tl.load(before_ptr + state + cell, mask=own[None, :], other=0.0)
            k = tl.load(k_ptr + places, mask=real, other=0.0)
            dy = tl.load(dy_ptr + there + tokens, mask=inside, other=0.0).to(tl.float32)
            dA = _outer(dA, dy, U, down, up, decays, G * m, length, heads, kind, WILD, False, BM, C, FLOOR, PRECISION)
            dq = product_onto(dq, narrow(_scaled(dy, carry, BM), kind), tl.trans(S), PRECISION)
            if part == PARTS - 1:
                dq = product_onto(dq, narrow(tl.where(i[:, None] >= i[None, :], dA, 0.0), kind), k, PRECISION)
                tl.store(dq_ptr + places, narrow(dq, kind), mask=real)
            dR = tl.load(dw_ptr + there + tokens, mask=inside, other=0.0).to(tl.float32)
            dL = _outer(dL, dR, U, down, up, decays, G * m, length, heads, kind, WILD, False, BM, C, FLOOR, PRECISION)
            de = product_onto(de, narrow(_scaled(dR, -carry, BM), kind), tl.trans(S), PRECISION)
            if part == PARTS - 1:
                de = product_onto(de, narrow(tl.where(i[:, None] > i[None, :], -dL, 0.0), kind), k, PRECISION)
                tl.store(de_ptr + places, narrow(de, kind), mask=real)
            dS = tl.load(dafters_ptr + state + cell, mask=own[None, :], other=0.0)
            dk = product_onto(dk, narrow(_scaled(U, tail, BM), kind), tl.trans(dS), PRECISION)
            dA_t = _outer(
                dA_t, U, dy, up, down, decays, G * m, length, heads, kind, WILD, True, BM, C, FLOOR, PRECISION
            )
            dL_t = _outer(
                dL_t, U, dR, up, down, decays, G * m, length, heads, kind, WILD, True, BM, C, FLOOR, PRECISION
            )
            if part == PARTS - 1:
                q = tl.load(q_ptr + places, mask=real, other=0.0)
                dk = product_onto(dk, narrow(tl.where(i[:, None] <= i[None, :], dA_t, 0.0), kind), q, PRECISION)
                e = tl.load(e_ptr + places, mask=real, other=0.0)
                dk = product_onto(dk, narrow(tl.where(i[:, None] < i[None, :], -dL_t, 0.0), kind), e, PRECISION)
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
        "_prepare": {"F": F, "BF": min(F, 64), "m": m, "BM": triton.next_power_of_2(m), "C": CHUNK, "BLOCK": BLOCK},
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
    _prepare[(layout.chunks, G)](
        k, e, log_decay, layout.start, layout.length, inverse, down, up, edge, total, wild, G,
        FLOOR=RESET, LIMIT=LIMIT, **tile["_prepare"], **_precision(q.dtype), **LAUNCH["_prepare"],
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
        fresh(chunks, G, CHUNK, CHUNK),
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
