"""`perceive` as Triton kernels: forward and backward, whole and packed sequences.

The mathematics is that of `llm_mlp.ops.perceive.chunked` (docs/perceive.md), in three steps each way:

- ``_prepare``     (chunk, group): M = (I + tril(E K^T, -1))^-1; cumulative decays of every head
- ``_scan``        (sequence, group, head): the state through the chunks; what it was before each, and u
- ``_read``        (chunk, group, head): y
- ``_unread``      (chunk, group): what u owes to y and the residual
- ``_scan_back``   (sequence, group, head): the state's gradient through the chunks, last one first; du, dw
- ``_gradients``   (chunk, group): dq, dk, de and the decays' gradient, summed over the heads of the group

Nothing that flows from a matrix unit is transposed into another one: it is loaded transposed, or computed transposed,
because Triton 3.4 to 3.7 miscompiles the transposition on Hopper (flash-linear-attention issues 640 and 984). No
atomics: two runs give equal bits.

Offsets of tiles are 32-bit numbers from a 64-bit scalar: a tile of pointers takes more registers than the tile.

Precision: products over F take operands in the inputs' dtype; u and everything with Gamma is float32 (TF32 products
where the inputs are of 16 bits, IEEE where they are float32).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm_mlp.ops.perceive.chunked import CHUNK, RESET
from llm_mlp.ops.tiles import narrow, product, product_onto

# How each kernel is launched; benchmarks/tune_kernels.py checks and times others on a device.
LAUNCH: dict[str, dict[str, int]] = {
    "_prepare": {"num_warps": 4},
    "_scan": {"num_warps": 4},
    "_read": {"num_warps": 4},
    "_unread": {"num_warps": 4},
    "_scan_back": {"num_warps": 4},
    "_gradients": {"num_warps": 4},
}


# -- pieces --------------------------------------------------------------------------------------------------------


@triton.jit
def _gamma(hi, lo, hi_t, lo_t, r, r_t, causal):
    """exp(g_i - g_j) where i sees j: ``causal`` [C, C], g as two float32 terms, r the resets counted so far."""
    between = (hi - hi_t) + (lo - lo_t)
    return tl.where(causal & (r == r_t), tl.exp(tl.where(causal, between, 0.0)), 0.0)


@triton.jit
def _edges(high_ptr, low_ptr, resets_ptr, at, high, low, r, C: tl.constexpr):
    """exp(g), exp(g_C - g) and exp(g_C) of the head whose decays are from ``at`` on; 0 across resets."""
    end_high, end_low, end_r = (
        tl.load(high_ptr + at + C - 1), tl.load(low_ptr + at + C - 1), tl.load(resets_ptr + at + C - 1)
    )  # fmt: skip
    carry = tl.where(r == 0, tl.exp(high), 0.0)
    ahead = r == end_r
    tail = tl.where(ahead, tl.exp(tl.where(ahead, (end_high - high) + (end_low - low), 0.0)), 0.0)
    return carry, tail, tl.where(end_r == 0, tl.exp(end_high), 0.0)


@triton.jit
def _prepare(
    k_ptr, e_ptr, decay_ptr, start_ptr, length_ptr,  # chunks: first token and tokens
    inverse_ptr, high_ptr, low_ptr, resets_ptr,
    G, m,
    F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, FLOOR: tl.constexpr,
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
    # Forward substitution, a row at a time: row i of the inverse is e_i - sum_j L_ij row_j.
    X = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for row in range(1, C):
        factors = tl.sum(tl.where(i[:, None] == row, L, 0.0), 0)  # L[row, :]
        change = tl.sum(factors[:, None] * X, 0)
        X = tl.where(i[:, None] == row, X - change[None, :], X)
    tl.store(inverse_ptr + (chunk * G + g) * C * C + (i[:, None] * C + i[None, :]), X)
    for h in range(m):
        d = tl.load(decay_ptr + (start + i) * (G * m) + g * m + h, mask=i < length, other=0.0)
        reset = d < FLOOR
        sums = tl.cumsum(tl.where(reset, 0.0, d).to(tl.float64), 0)
        high = sums.to(tl.float32)
        at = ((chunk * G + g) * m + h) * C + i
        tl.store(high_ptr + at, high)
        tl.store(low_ptr + at, (sums - high.to(tl.float64)).to(tl.float32))
        tl.store(resets_ptr + at, tl.cumsum(reset.to(tl.int32), 0))


@triton.jit
def _scan(
    k_ptr, e_ptr, w_ptr, state_ptr, inverse_ptr, high_ptr, low_ptr, resets_ptr,
    first_ptr, start_ptr, length_ptr,  # sequences: first chunk [N+1]; chunks: first token and tokens
    before_ptr, r_ptr, u_ptr, after_ptr, residual_ptr,
    G, m, V,
    F: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, gh = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, h = gh // m, gh % m
    i, f = tl.arange(0, C), tl.arange(0, F)
    v = tl.arange(0, BV)
    own = v < V
    width = m * V
    columns = h * V + v
    cell = f[:, None] * width + columns[None, :]
    S = tl.load(state_ptr + (n * G + g) * F * width + cell, mask=own[None, :], other=0.0).to(tl.float32)
    first, last = tl.load(first_ptr + n).to(tl.int64), tl.load(first_ptr + n + 1).to(tl.int64)
    causal = i[:, None] >= i[None, :]
    for chunk in range(first, last):
        start, length = tl.load(start_ptr + chunk).to(tl.int64), tl.load(length_ptr + chunk)
        shift, rows = start * (G * F) + g * F, i[:, None] * (G * F) + f[None, :]
        real = (i < length)[:, None]
        e = tl.load(e_ptr + shift + rows, mask=real, other=0.0)
        k = tl.load(k_ptr + shift + rows, mask=real, other=0.0)
        at = ((chunk * G + g) * m + h) * C
        high, low, r = tl.load(high_ptr + at + i), tl.load(low_ptr + at + i), tl.load(resets_ptr + at + i)
        gamma = _gamma(high[:, None], low[:, None], high[None, :], low[None, :], r[:, None], r[None, :], causal)
        carry, tail, total = _edges(high_ptr, low_ptr, resets_ptr, at, high, low, r, C)
        M = tl.load(inverse_ptr + (chunk * G + g) * C * C + (i[:, None] * C + i[None, :]))
        there, tokens = start * (G * width) + g * width, i[:, None] * (G * width) + columns[None, :]
        written = real & own[None, :]
        w = tl.load(w_ptr + there + tokens, mask=written, other=0.0).to(tl.float32)
        Sr = narrow(S, k.dtype)
        tl.store(before_ptr + (chunk * G + g) * F * width + cell, Sr, mask=own[None, :])
        seen = product(e, Sr, PRECISION)
        R = w - carry[:, None] * seen
        u = product(M * gamma, R, PRECISION)
        tl.store(r_ptr + there + tokens, R, mask=written)
        tl.store(u_ptr + there + tokens, u, mask=written)
        tl.store(residual_ptr + (start + i) * (G * m) + gh, tl.sum(u * u, 1), mask=i < length)
        S = total * S + product(tl.trans(k), narrow(tail[:, None] * u, k.dtype), PRECISION)
    tl.store(after_ptr + (n * G + g) * F * width + cell, S, mask=own[None, :])


@triton.jit
def _read(
    q_ptr, k_ptr, u_ptr, before_ptr, high_ptr, low_ptr, resets_ptr, start_ptr, length_ptr, y_ptr,
    G, m, V,
    F: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chunk, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, length = tl.load(start_ptr + chunk).to(tl.int64), tl.load(length_ptr + chunk)
    i, f, v = tl.arange(0, C), tl.arange(0, BF), tl.arange(0, BV)
    real = (i < length)[:, None]
    own = v < V
    width = m * V
    shift, rows = start * (G * F) + g * F, i[:, None] * (G * F)
    causal = i[:, None] >= i[None, :]
    A = tl.zeros((C, C), tl.float32)
    for a in range(0, F, BF):
        q = tl.load(q_ptr + shift + rows + a + f[None, :], mask=real, other=0.0)
        k = tl.load(k_ptr + shift + rows + a + f[None, :], mask=real, other=0.0)
        A = product_onto(A, q, tl.trans(k), PRECISION)
    for h in range(m):
        columns = h * V + v
        at = ((chunk * G + g) * m + h) * C + i
        high, low, r = tl.load(high_ptr + at), tl.load(low_ptr + at), tl.load(resets_ptr + at)
        gamma = _gamma(high[:, None], low[:, None], high[None, :], low[None, :], r[:, None], r[None, :], causal)
        there, tokens = start * (G * width) + g * width, i[:, None] * (G * width) + columns[None, :]
        u = tl.load(u_ptr + there + tokens, mask=real & own[None, :], other=0.0)
        far = tl.zeros((C, BV), tl.float32)
        for a in range(0, F, BF):
            q = tl.load(q_ptr + shift + rows + a + f[None, :], mask=real, other=0.0)
            S = tl.load(
                before_ptr + (chunk * G + g) * F * width + ((a + f)[:, None] * width + columns[None, :]),
                mask=own[None, :],
                other=0.0,
            )
            far = product_onto(far, q, S, PRECISION)
        carry = tl.where(r == 0, tl.exp(high), 0.0)
        y = product_onto(carry[:, None] * far, A * gamma, u, PRECISION)
        tl.store(y_ptr + there + tokens, narrow(y, y_ptr.dtype.element_ty), mask=real & own[None, :])


@triton.jit
def _unread(
    q_ptr, k_ptr, dy_ptr, u_ptr, dresidual_ptr, high_ptr, low_ptr, resets_ptr, start_ptr, length_ptr, du_ptr,
    G, m, V,
    F: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chunk, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, length = tl.load(start_ptr + chunk).to(tl.int64), tl.load(length_ptr + chunk)
    i, f, v = tl.arange(0, C), tl.arange(0, BF), tl.arange(0, BV)
    real = (i < length)[:, None]
    own = v < V
    width = m * V
    shift, rows = start * (G * F) + g * F, i[:, None] * (G * F)
    later = i[:, None] <= i[None, :]  # transposed: row j, column i >= j
    A_t = tl.zeros((C, C), tl.float32)
    for a in range(0, F, BF):
        q = tl.load(q_ptr + shift + rows + a + f[None, :], mask=real, other=0.0)
        k = tl.load(k_ptr + shift + rows + a + f[None, :], mask=real, other=0.0)
        A_t = product_onto(A_t, k, tl.trans(q), PRECISION)
    for h in range(m):
        at = ((chunk * G + g) * m + h) * C + i
        high, low, r = tl.load(high_ptr + at), tl.load(low_ptr + at), tl.load(resets_ptr + at)
        gamma_t = _gamma(high[None, :], low[None, :], high[:, None], low[:, None], r[None, :], r[:, None], later)
        there, tokens = start * (G * width) + g * width, i[:, None] * (G * width) + (h * V + v)[None, :]
        inside = real & own[None, :]
        dy = tl.load(dy_ptr + there + tokens, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + there + tokens, mask=inside, other=0.0)
        dres = tl.load(dresidual_ptr + (start + i) * (G * m) + g * m + h, mask=i < length, other=0.0)
        du = product_onto(2.0 * dres[:, None] * u, A_t * gamma_t, dy, PRECISION)
        tl.store(du_ptr + there + tokens, du, mask=inside)


@triton.jit
def _scan_back(
    q_ptr, k_ptr, e_ptr, dy_ptr, dafter_ptr,
    inverse_ptr, high_ptr, low_ptr, resets_ptr, first_ptr, start_ptr, length_ptr,
    dafters_ptr, du_ptr, dr_ptr, dbefore_ptr,
    G, m, V,
    F: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, gh = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, h = gh // m, gh % m
    i, f = tl.arange(0, C), tl.arange(0, F)
    v = tl.arange(0, BV)
    own = v < V
    width = m * V
    columns = h * V + v
    cell = f[:, None] * width + columns[None, :]
    dS = tl.load(dafter_ptr + (n * G + g) * F * width + cell, mask=own[None, :], other=0.0).to(tl.float32)
    first, last = tl.load(first_ptr + n).to(tl.int64), tl.load(first_ptr + n + 1).to(tl.int64)
    later = i[:, None] <= i[None, :]  # transposed: row j, column i >= j
    for step in range(0, last - first):
        chunk = last - 1 - step
        start, length = tl.load(start_ptr + chunk).to(tl.int64), tl.load(length_ptr + chunk)
        shift, rows = start * (G * F) + g * F, i[:, None] * (G * F) + f[None, :]
        real = (i < length)[:, None]
        at = ((chunk * G + g) * m + h) * C
        high, low, r = tl.load(high_ptr + at + i), tl.load(low_ptr + at + i), tl.load(resets_ptr + at + i)
        carry, tail, total = _edges(high_ptr, low_ptr, resets_ptr, at, high, low, r, C)
        there, tokens = start * (G * width) + g * width, i[:, None] * (G * width) + columns[None, :]
        inside = real & own[None, :]
        dSr = narrow(dS, k_ptr.dtype.element_ty)
        tl.store(dafters_ptr + (chunk * G + g) * F * width + cell, dSr, mask=own[None, :])
        du = tl.load(du_ptr + there + tokens, mask=inside, other=0.0)  # what comes through y and the residual
        k = tl.load(k_ptr + shift + rows, mask=real, other=0.0)
        du += tail[:, None] * product(k, dSr, PRECISION)
        tl.store(du_ptr + there + tokens, du, mask=inside)
        gamma_t = _gamma(high[None, :], low[None, :], high[:, None], low[:, None], r[None, :], r[:, None], later)
        M_t = tl.load(inverse_ptr + (chunk * G + g) * C * C + (i[None, :] * C + i[:, None]))
        dr = product(M_t * gamma_t, du, PRECISION)
        tl.store(dr_ptr + there + tokens, dr, mask=inside)
        dy = tl.load(dy_ptr + there + tokens, mask=inside, other=0.0).to(tl.float32)
        q = tl.load(q_ptr + shift + rows, mask=real, other=0.0)
        dS = product_onto(total * dS, tl.trans(q), narrow(carry[:, None] * dy, q.dtype), PRECISION)
        e = tl.load(e_ptr + shift + rows, mask=real, other=0.0)
        dS = product_onto(dS, tl.trans(e), narrow(-carry[:, None] * dr, e.dtype), PRECISION)
    tl.store(dbefore_ptr + (n * G + g) * F * width + cell, dS, mask=own[None, :])


@triton.jit
def _gradients(
    q_ptr, k_ptr, e_ptr, w_ptr, dy_ptr, r_ptr, u_ptr, du_ptr, dr_ptr,
    residual_ptr, dresidual_ptr, before_ptr, dafters_ptr,
    inverse_ptr, high_ptr, low_ptr, resets_ptr, start_ptr, length_ptr,
    dq_ptr, dk_ptr, de_ptr, ddecay_ptr, scratch_ptr,
    G, m, V,
    F: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chunk, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, length = tl.load(start_ptr + chunk).to(tl.int64), tl.load(length_ptr + chunk)
    i, f, v = tl.arange(0, C), tl.arange(0, BF), tl.arange(0, BV)
    real = (i < length)[:, None]
    own = v < V
    width = m * V
    state = (chunk * G + g) * F * width
    shift, rows = start * (G * F) + g * F, i[:, None] * (G * F)
    causal = i[:, None] >= i[None, :]
    A = tl.zeros((C, C), tl.float32)
    for a in range(0, F, BF):
        q = tl.load(q_ptr + shift + rows + a + f[None, :], mask=real, other=0.0)
        k = tl.load(k_ptr + shift + rows + a + f[None, :], mask=real, other=0.0)
        A = product_onto(A, q, tl.trans(k), PRECISION)
    dM, dA = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    for h in range(m):
        columns = h * V + v
        there, tokens = start * (G * width) + g * width, i[:, None] * (G * width) + columns[None, :]
        inside = real & own[None, :]
        at = ((chunk * G + g) * m + h) * C
        high, low, r = tl.load(high_ptr + at + i), tl.load(low_ptr + at + i), tl.load(resets_ptr + at + i)
        gamma = _gamma(high[:, None], low[:, None], high[None, :], low[None, :], r[:, None], r[None, :], causal)
        carry, tail, total = _edges(high_ptr, low_ptr, resets_ptr, at, high, low, r, C)
        dy = tl.load(dy_ptr + there + tokens, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + there + tokens, mask=inside, other=0.0)
        here = gamma * product(dy, tl.trans(u), PRECISION)
        dA += here
        # dg_i = dO_i . O_i - dW_i . W_i + 2 rho_i drho_i, and <dS', S'> at the end of the chunk.
        dg = tl.sum(here * A, 1)
        R = tl.load(r_ptr + there + tokens, mask=inside, other=0.0)
        du = tl.load(du_ptr + there + tokens, mask=inside, other=0.0)
        dM += gamma * product(du, tl.trans(R), PRECISION)
        far = tl.zeros((C, BV), tl.float32)
        pushed = tl.zeros((C, BV), tl.float32)
        kept = 0.0
        for a in range(0, F, BF):
            cell = (a + f)[:, None] * width + columns[None, :]
            q = tl.load(q_ptr + shift + rows + a + f[None, :], mask=real, other=0.0)
            k = tl.load(k_ptr + shift + rows + a + f[None, :], mask=real, other=0.0)
            S = tl.load(before_ptr + state + cell, mask=own[None, :], other=0.0)
            dS = tl.load(dafters_ptr + state + cell, mask=own[None, :], other=0.0)
            far = product_onto(far, q, S, PRECISION)
            pushed = product_onto(pushed, k, dS, PRECISION)
            kept += tl.sum(tl.sum(S.to(tl.float32) * dS.to(tl.float32), 0), 0)
        w = tl.load(w_ptr + there + tokens, mask=inside, other=0.0).to(tl.float32)
        dr = tl.load(dr_ptr + there + tokens, mask=inside, other=0.0)
        res = tl.load(residual_ptr + (start + i) * (G * m) + g * m + h, mask=i < length, other=0.0)
        dres = tl.load(dresidual_ptr + (start + i) * (G * m) + g * m + h, mask=i < length, other=0.0)
        dg += carry * tl.sum(dy * far, 1) - tl.sum(dr * w, 1) + 2.0 * res * dres
        ended = tl.sum(tail * tl.sum(u * pushed, 1), 0) + total * kept
        dg += tl.where(i == C - 1, ended, 0.0)
        back = tl.sum(dg, 0) - tl.cumsum(dg, 0) + dg  # sum over i >= t
        earlier = tl.load(resets_ptr + at + i - 1, mask=i > 0, other=0)  # a reset raises the count
        tl.store(ddecay_ptr + (start + i) * (G * m) + g * m + h, tl.where(r == earlier, back, 0.0), mask=i < length)
    # dX = -tril(M^T dM M^T, -1). dA and dX are needed transposed too: they pass through memory, 16 KB a program.
    square = i[:, None] * C + i[None, :]
    M_t = tl.load(inverse_ptr + (chunk * G + g) * C * C + (i[None, :] * C + i[:, None]))
    dX = product(product(M_t, dM, PRECISION), M_t, PRECISION)
    dX = narrow(tl.where(i[:, None] > i[None, :], -dX, 0.0), k_ptr.dtype.element_ty)
    dA = narrow(tl.where(causal, dA, 0.0), k_ptr.dtype.element_ty)
    base = scratch_ptr + (chunk * G + g) * 2 * C * C
    tl.store(base + square, dA)
    tl.store(base + C * C + square, dX)
    tl.debug_barrier()
    for a in range(0, F, BF):
        e = tl.load(e_ptr + shift + rows + a + f[None, :], mask=real, other=0.0)
        q = tl.load(q_ptr + shift + rows + a + f[None, :], mask=real, other=0.0)
        k = tl.load(k_ptr + shift + rows + a + f[None, :], mask=real, other=0.0)
        dA = tl.load(base + square)
        dX = tl.load(base + C * C + square)
        dq = product(dA, k, PRECISION)
        de = product(dX, k, PRECISION)
        dA_t = tl.load(base + i[None, :] * C + i[:, None])
        dX_t = tl.load(base + C * C + i[None, :] * C + i[:, None])
        dk = product_onto(product(dX_t, e, PRECISION), dA_t, q, PRECISION)
        for h in range(m):
            columns = h * V + v
            there, tokens = start * (G * width) + g * width, i[:, None] * (G * width) + columns[None, :]
            inside = real & own[None, :]
            at = ((chunk * G + g) * m + h) * C
            high, low, r = tl.load(high_ptr + at + i), tl.load(low_ptr + at + i), tl.load(resets_ptr + at + i)
            carry, tail, _ = _edges(high_ptr, low_ptr, resets_ptr, at, high, low, r, C)
            # [V, F] as they lie in memory, read transposed.
            cell = (a + f)[None, :] * width + columns[:, None]
            S_t = tl.load(before_ptr + state + cell, mask=own[:, None], other=0.0)
            dy = tl.load(dy_ptr + there + tokens, mask=inside, other=0.0).to(tl.float32)
            dq = product_onto(dq, narrow(carry[:, None] * dy, k.dtype), S_t, PRECISION)
            dr = tl.load(dr_ptr + there + tokens, mask=inside, other=0.0)
            de = product_onto(de, narrow(-carry[:, None] * dr, k.dtype), S_t, PRECISION)
            dS_t = tl.load(dafters_ptr + state + cell, mask=own[:, None], other=0.0)
            u = tl.load(u_ptr + there + tokens, mask=inside, other=0.0)
            dk = product_onto(dk, narrow(tail[:, None] * u, k.dtype), dS_t, PRECISION)
        tl.store(dq_ptr + shift + rows + a + f[None, :], narrow(dq, dq_ptr.dtype.element_ty), mask=real)
        tl.store(de_ptr + shift + rows + a + f[None, :], narrow(de, de_ptr.dtype.element_ty), mask=real)
        tl.store(dk_ptr + shift + rows + a + f[None, :], narrow(dk, dk_ptr.dtype.element_ty), mask=real)


# -- host ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Where the chunks of the sequences lie among the B*T tokens, on the device (int32)."""

    first: Tensor  # [N+1] first chunk of each sequence, and the number of chunks
    start: Tensor  # [chunks] first token
    length: Tensor  # [chunks] tokens

    @property
    def chunks(self) -> int:
        return self.start.shape[0]


def _lay_out(starts: list[int], lengths: list[int], device: torch.device) -> _Layout:
    first: list[int] = [0]
    start: list[int] = []
    length: list[int] = []
    for a, n in zip(starts, lengths, strict=True):
        start += range(a, a + n, CHUNK)
        length += [min(CHUNK, n - i) for i in range(0, n, CHUNK)]
        first.append(len(start))
    return _Layout(*(torch.tensor(x, dtype=torch.int32, device=device) for x in (first, start, length)))


@lru_cache(maxsize=64)
def _packed(bounds: tuple[int, ...], device: torch.device) -> _Layout:
    return _lay_out(list(bounds[:-1]), [b - a for a, b in zip(bounds, bounds[1:], strict=False)], device)


@lru_cache(maxsize=64)
def _dense(B: int, T: int, device: torch.device) -> _Layout:
    return _lay_out([b * T for b in range(B)], [T] * B, device)


class _Kernels(torch.autograd.Function):
    """q, k, e ``[B, T, G, F]``, w ``[B, T, G, m, V]``, log_decay ``[B, T, G, m]`` float32, state ``[N, G, F, m, V]``
    float32, all contiguous."""

    @staticmethod
    def forward(ctx, q, k, e, w, log_decay, state, layout):
        _, _, G, F = q.shape
        m, V = w.shape[-2:]
        N, BF, BV = state.shape[0], min(F, 64), max(16, triton.next_power_of_2(V))
        precision = "ieee" if q.dtype == torch.float32 else "tf32"
        chunks = layout.chunks

        def fresh(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=q.device)

        inverse = fresh(chunks, G, CHUNK, CHUNK)
        high, low = fresh(chunks, G, m, CHUNK), fresh(chunks, G, m, CHUNK)
        resets = fresh(chunks, G, m, CHUNK, dtype=torch.int32)
        _prepare[(chunks, G)](
            k, e, log_decay, layout.start, layout.length, inverse, high, low, resets,
            G, m, F=F, BF=BF, C=CHUNK, PRECISION=precision, FLOOR=RESET, **LAUNCH["_prepare"],
        )  # fmt: skip
        before = fresh(chunks, G, F, m, V, dtype=q.dtype)
        r, u = fresh(*w.shape), fresh(*w.shape)
        residual, after = fresh(*log_decay.shape), torch.empty_like(state)
        _scan[(N, G * m)](
            k, e, w, state, inverse, high, low, resets, layout.first, layout.start, layout.length,
            before, r, u, after, residual, G, m, V, F=F, BV=BV, C=CHUNK, PRECISION=precision, **LAUNCH["_scan"],
        )  # fmt: skip
        y = torch.empty_like(w)
        _read[(chunks, G)](
            q, k, u, before, high, low, resets, layout.start, layout.length, y,
            G, m, V, F=F, BF=BF, BV=BV, C=CHUNK, PRECISION=precision, **LAUNCH["_read"],
        )  # fmt: skip
        ctx.save_for_backward(q, k, e, w, before, r, u, residual, inverse, high, low, resets)
        ctx.layout, ctx.sizes, ctx.precision = layout, (BF, BV), precision
        return y, after, residual

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dafter, dresidual):
        q, k, e, w, before, r, u, residual, inverse, high, low, resets = ctx.saved_tensors
        layout, (BF, BV), precision = ctx.layout, ctx.sizes, ctx.precision
        G, F = q.shape[2:]
        m, V = w.shape[-2:]
        dy, dafter, dresidual = dy.contiguous(), dafter.contiguous(), dresidual.contiguous()
        dafters, dbefore = torch.empty_like(before), torch.empty_like(dafter)
        du, dr = torch.empty_like(u), torch.empty_like(u)
        _unread[(layout.chunks, G)](
            q, k, dy, u, dresidual, high, low, resets, layout.start, layout.length, du,
            G, m, V, F=F, BF=BF, BV=BV, C=CHUNK, PRECISION=precision, **LAUNCH["_unread"],
        )  # fmt: skip
        _scan_back[(dafter.shape[0], G * m)](
            q, k, e, dy, dafter, inverse, high, low, resets, layout.first, layout.start, layout.length,
            dafters, du, dr, dbefore, G, m, V, F=F, BV=BV, C=CHUNK, PRECISION=precision, **LAUNCH["_scan_back"],
        )  # fmt: skip
        dq, dk, de, ddecay = (torch.empty_like(x) for x in (q, k, e, dresidual))
        scratch = torch.empty((layout.chunks, G, 2, CHUNK, CHUNK), dtype=q.dtype, device=q.device)
        _gradients[(layout.chunks, G)](
            q, k, e, w, dy, r, u, du, dr, residual, dresidual, before, dafters,
            inverse, high, low, resets, layout.start, layout.length,
            dq, dk, de, ddecay, scratch,
            G, m, V, F=F, BF=BF, BV=BV, C=CHUNK, PRECISION=precision, **LAUNCH["_gradients"],
        )  # fmt: skip
        return dq, dk, de, dr.to(w.dtype), ddecay, dbefore, None


def perceive(
    q: Tensor, k: Tensor, e: Tensor, w: Tensor, log_decay: Tensor, state: Tensor, bounds: list[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `llm_mlp.ops.perceive` on checked inputs; ``bounds`` are the packed sequences' ends (or None)."""
    B, T = q.shape[:2]
    if T == 0 or B == 0:
        return w, state, log_decay
    if bounds is None:
        layout = _dense(B, T, q.device)
    else:
        layout = _packed(tuple(bounds), q.device)
    inputs = (x.contiguous() for x in (q, k, e, w, log_decay, state))
    return _Kernels.apply(*inputs, layout)
