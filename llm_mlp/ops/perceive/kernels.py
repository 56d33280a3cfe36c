"""`perceive` as Triton kernels: forward and backward, whole and packed sequences.

The mathematics is that of `llm_mlp.ops.perceive.chunked` (docs/perceive.md), in the same three steps each way:

- ``_prepare``     (chunk, group): M = (I + tril(E K^T, -1))^-1; cumulative decays of every head
- ``_scan``        (sequence, group, head): the state through the chunks; what it was before each, and u
- ``_read``        (chunk, group, head): y
- ``_scan_back``   (sequence, group, head): the state's gradient through the chunks, last one first; du, dw
- ``_gradients``   (chunk, group): dq, dk, de and the decays' gradient, summed over the heads of the group

Nothing that flows from a matrix unit is transposed into another one: where a transposed product is needed it is
computed as a product of its own, because Triton 3.4 to 3.7 miscompiles the transposition on Hopper (reported as
flash-linear-attention issues 640 and 984). No atomics: two runs give equal bits.

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

from llm_mlp.ops.tiles import narrow, product, product_onto

CHUNK = 64
RESET = -40.0  # decays below this count as resets (as in chunked: the square of float32's eps)


# -- pieces --------------------------------------------------------------------------------------------------------


@triton.jit
def _gamma(hi, lo, hi_t, lo_t, r, r_t, causal):
    """exp(g_i - g_j) where i sees j: ``causal`` [C, C], g as two float32 terms, r the resets counted so far."""
    between = (hi - hi_t) + (lo - lo_t)
    return tl.where(causal & (r == r_t), tl.exp(tl.where(causal, between, 0.0)), 0.0)


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
    rows = (start + i)[:, None] * (G * F) + g * F
    real = (i < length)[:, None]
    L = tl.zeros((C, C), tl.float32)
    for a in range(0, F, BF):
        e = tl.load(e_ptr + rows + a + f[None, :], mask=real, other=0.0)
        k = tl.load(k_ptr + rows + a + f[None, :], mask=real, other=0.0)
        L = product_onto(L, e, tl.trans(k), PRECISION)
    L = tl.where(i[:, None] > i[None, :], L, 0.0)
    # Forward substitution, a row at a time: row i of the inverse is e_i - sum_j L_ij row_j.
    X = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for row in range(1, C):
        factors = tl.sum(tl.where(i[:, None] == row, L, 0.0), 0)  # L[row, :]
        change = tl.sum(factors[:, None] * X, 0)
        X = tl.where(i[:, None] == row, X - change[None, :], X)
    square = (chunk * G + g) * C * C + i[:, None] * C + i[None, :]
    tl.store(inverse_ptr + square, X)
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
        rows = (start + i)[:, None] * (G * F) + g * F + f[None, :]
        real = (i < length)[:, None]
        e = tl.load(e_ptr + rows, mask=real, other=0.0)
        k = tl.load(k_ptr + rows, mask=real, other=0.0)
        at = ((chunk * G + g) * m + h) * C
        high, low, r = tl.load(high_ptr + at + i), tl.load(low_ptr + at + i), tl.load(resets_ptr + at + i)
        end_high, end_low, end_r = (
            tl.load(high_ptr + at + C - 1), tl.load(low_ptr + at + C - 1), tl.load(resets_ptr + at + C - 1)
        )  # fmt: skip
        gamma = _gamma(high[:, None], low[:, None], high[None, :], low[None, :], r[:, None], r[None, :], causal)
        carry = tl.where(r == 0, tl.exp(high), 0.0)
        tail = tl.where(r == end_r, tl.exp(tl.where(r == end_r, (end_high - high) + (end_low - low), 0.0)), 0.0)
        total = tl.where(end_r == 0, tl.exp(end_high), 0.0)
        M = tl.load(inverse_ptr + (chunk * G + g) * C * C + i[:, None] * C + i[None, :])
        tokens = (start + i)[:, None] * (G * width) + g * width + columns[None, :]
        written = real & own[None, :]
        w = tl.load(w_ptr + tokens, mask=written, other=0.0).to(tl.float32)
        Sr = narrow(S, k.dtype)
        tl.store(before_ptr + (chunk * G + g) * F * width + cell, Sr, mask=own[None, :])
        seen = product(e, Sr, PRECISION)
        R = w - carry[:, None] * seen
        u = product(M * gamma, R, PRECISION)
        tl.store(r_ptr + tokens, R, mask=written)
        tl.store(u_ptr + tokens, u, mask=written)
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
    rows = (start + i)[:, None] * (G * F) + g * F
    causal = i[:, None] >= i[None, :]
    A = tl.zeros((C, C), tl.float32)
    for a in range(0, F, BF):
        q = tl.load(q_ptr + rows + a + f[None, :], mask=real, other=0.0)
        k = tl.load(k_ptr + rows + a + f[None, :], mask=real, other=0.0)
        A = product_onto(A, q, tl.trans(k), PRECISION)
    for h in range(m):
        columns = h * V + v
        at = ((chunk * G + g) * m + h) * C + i
        high, low, r = tl.load(high_ptr + at), tl.load(low_ptr + at), tl.load(resets_ptr + at)
        gamma = _gamma(high[:, None], low[:, None], high[None, :], low[None, :], r[:, None], r[None, :], causal)
        tokens = (start + i)[:, None] * (G * width) + g * width + columns[None, :]
        u = tl.load(u_ptr + tokens, mask=real & own[None, :], other=0.0)
        far = tl.zeros((C, BV), tl.float32)
        for a in range(0, F, BF):
            q = tl.load(q_ptr + rows + a + f[None, :], mask=real, other=0.0)
            S = tl.load(
                before_ptr + (chunk * G + g) * F * width + (a + f)[:, None] * width + columns[None, :],
                mask=own[None, :],
                other=0.0,
            )
            far = product_onto(far, q, S, PRECISION)
        carry = tl.where(r == 0, tl.exp(high), 0.0)
        y = product_onto(carry[:, None] * far, A * gamma, u, PRECISION)
        tl.store(y_ptr + tokens, narrow(y, y_ptr.dtype.element_ty), mask=real & own[None, :])


@triton.jit
def _scan_back(
    q_ptr, k_ptr, e_ptr, dy_ptr, u_ptr, dresidual_ptr, dafter_ptr,
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
        rows = (start + i)[:, None] * (G * F) + g * F + f[None, :]
        real = (i < length)[:, None]
        q = tl.load(q_ptr + rows, mask=real, other=0.0)
        k = tl.load(k_ptr + rows, mask=real, other=0.0)
        e = tl.load(e_ptr + rows, mask=real, other=0.0)
        at = ((chunk * G + g) * m + h) * C
        high, low, r = tl.load(high_ptr + at + i), tl.load(low_ptr + at + i), tl.load(resets_ptr + at + i)
        end_high, end_low, end_r = (
            tl.load(high_ptr + at + C - 1), tl.load(low_ptr + at + C - 1), tl.load(resets_ptr + at + C - 1)
        )  # fmt: skip
        gamma_t = _gamma(high[None, :], low[None, :], high[:, None], low[:, None], r[None, :], r[:, None], later)
        carry = tl.where(r == 0, tl.exp(high), 0.0)
        tail = tl.where(r == end_r, tl.exp(tl.where(r == end_r, (end_high - high) + (end_low - low), 0.0)), 0.0)
        total = tl.where(end_r == 0, tl.exp(end_high), 0.0)
        M_t = tl.load(inverse_ptr + (chunk * G + g) * C * C + i[None, :] * C + i[:, None])
        A_t = product(k, tl.trans(q), PRECISION)
        tokens = (start + i)[:, None] * (G * width) + g * width + columns[None, :]
        written = real & own[None, :]
        dy = tl.load(dy_ptr + tokens, mask=written, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + tokens, mask=written, other=0.0)
        dres = tl.load(dresidual_ptr + (start + i) * (G * m) + gh, mask=i < length, other=0.0)
        dSr = narrow(dS, k.dtype)
        tl.store(dafters_ptr + (chunk * G + g) * F * width + cell, dSr, mask=own[None, :])
        du = 2.0 * dres[:, None] * u + tail[:, None] * product(k, dSr, PRECISION)
        du = product_onto(du, A_t * gamma_t, dy, PRECISION)
        dr = product(M_t * gamma_t, du, PRECISION)
        tl.store(du_ptr + tokens, du, mask=written)
        tl.store(dr_ptr + tokens, dr, mask=written)
        dS = total * dS
        dS = product_onto(dS, tl.trans(q), narrow(carry[:, None] * dy, k.dtype), PRECISION)
        dS = product_onto(dS, tl.trans(e), narrow(-carry[:, None] * dr, k.dtype), PRECISION)
    tl.store(dbefore_ptr + (n * G + g) * F * width + cell, dS, mask=own[None, :])


@triton.jit
def _gradients(
    q_ptr, k_ptr, e_ptr, w_ptr, dy_ptr, r_ptr, u_ptr, du_ptr, dr_ptr,
    residual_ptr, dresidual_ptr, before_ptr, dafters_ptr,
    inverse_ptr, high_ptr, low_ptr, resets_ptr, start_ptr, length_ptr,
    dq_ptr, dk_ptr, de_ptr, ddecay_ptr,
    G, m, V,
    F: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chunk, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, length = tl.load(start_ptr + chunk).to(tl.int64), tl.load(length_ptr + chunk)
    i, f, v = tl.arange(0, C), tl.arange(0, BF), tl.arange(0, BV)
    real = (i < length)[:, None]
    own = v < V
    width = m * V
    rows = (start + i)[:, None] * (G * F) + g * F
    causal = i[:, None] >= i[None, :]
    later = i[:, None] <= i[None, :]
    square = i[:, None] * C + i[None, :]
    A = tl.zeros((C, C), tl.float32)
    for a in range(0, F, BF):
        q = tl.load(q_ptr + rows + a + f[None, :], mask=real, other=0.0)
        k = tl.load(k_ptr + rows + a + f[None, :], mask=real, other=0.0)
        A = product_onto(A, q, tl.trans(k), PRECISION)
    dM, dM_t = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    dA, dA_t = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    for h in range(m):
        columns = h * V + v
        tokens = (start + i)[:, None] * (G * width) + g * width + columns[None, :]
        inside = real & own[None, :]
        at = ((chunk * G + g) * m + h) * C
        high, low, r = tl.load(high_ptr + at + i), tl.load(low_ptr + at + i), tl.load(resets_ptr + at + i)
        end_high, end_low, end_r = (
            tl.load(high_ptr + at + C - 1), tl.load(low_ptr + at + C - 1), tl.load(resets_ptr + at + C - 1)
        )  # fmt: skip
        gamma = _gamma(high[:, None], low[:, None], high[None, :], low[None, :], r[:, None], r[None, :], causal)
        gamma_t = _gamma(high[None, :], low[None, :], high[:, None], low[:, None], r[None, :], r[:, None], later)
        carry = tl.where(r == 0, tl.exp(high), 0.0)
        tail = tl.where(r == end_r, tl.exp(tl.where(r == end_r, (end_high - high) + (end_low - low), 0.0)), 0.0)
        total = tl.where(end_r == 0, tl.exp(end_high), 0.0)
        w = tl.load(w_ptr + tokens, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + tokens, mask=inside, other=0.0).to(tl.float32)
        R = tl.load(r_ptr + tokens, mask=inside, other=0.0)
        u = tl.load(u_ptr + tokens, mask=inside, other=0.0)
        du = tl.load(du_ptr + tokens, mask=inside, other=0.0)
        dr = tl.load(dr_ptr + tokens, mask=inside, other=0.0)
        res = tl.load(residual_ptr + (start + i) * (G * m) + g * m + h, mask=i < length, other=0.0)
        dres = tl.load(dresidual_ptr + (start + i) * (G * m) + g * m + h, mask=i < length, other=0.0)
        far = tl.zeros((C, BV), tl.float32)
        pushed = tl.zeros((C, BV), tl.float32)
        kept = 0.0
        for a in range(0, F, BF):
            cell = (chunk * G + g) * F * width + (a + f)[:, None] * width + columns[None, :]
            q = tl.load(q_ptr + rows + a + f[None, :], mask=real, other=0.0)
            k = tl.load(k_ptr + rows + a + f[None, :], mask=real, other=0.0)
            S = tl.load(before_ptr + cell, mask=own[None, :], other=0.0)
            dS = tl.load(dafters_ptr + cell, mask=own[None, :], other=0.0)
            far = product_onto(far, q, S, PRECISION)
            pushed = product_onto(pushed, k, dS, PRECISION)
            kept += tl.sum(tl.sum(S.to(tl.float32) * dS.to(tl.float32), 0), 0)
        dM += gamma * product(du, tl.trans(R), PRECISION)
        dM_t += gamma_t * product(R, tl.trans(du), PRECISION)
        here = gamma * product(dy, tl.trans(u), PRECISION)
        dA += here
        dA_t += gamma_t * product(u, tl.trans(dy), PRECISION)
        # dg_i = dO_i . O_i - dW_i . W_i + 2 rho_i drho_i, and <dS', S'> at the end of the chunk.
        dg = tl.sum(here * A, 1) + carry * tl.sum(dy * far, 1) - tl.sum(dr * w, 1) + 2.0 * res * dres
        ended = tl.sum(tail * tl.sum(u * pushed, 1), 0) + total * kept
        dg += tl.where(i == C - 1, ended, 0.0)
        back = tl.sum(dg, 0) - tl.cumsum(dg, 0) + dg  # sum over i >= t
        d = tl.load(resets_ptr + at + i - 1, mask=i > 0, other=0)  # a reset raises the count
        tl.store(ddecay_ptr + (start + i) * (G * m) + g * m + h, tl.where(r == d, back, 0.0), mask=i < length)
    # dX = -tril(M^T dM M^T, -1) and its transpose, each from loads, not by transposing a product.
    base = (chunk * G + g) * C * C
    M = tl.load(inverse_ptr + base + square)
    M_t = tl.load(inverse_ptr + base + i[None, :] * C + i[:, None])
    dX = product(product(M_t, dM, PRECISION), M_t, PRECISION)
    dX = tl.where(i[:, None] > i[None, :], -dX, 0.0)
    dX_t = product(product(M, dM_t, PRECISION), M, PRECISION)
    dX_t = tl.where(i[:, None] < i[None, :], -dX_t, 0.0)
    dA = tl.where(causal, dA, 0.0)
    dA_t = tl.where(later, dA_t, 0.0)
    for a in range(0, F, BF):
        e = tl.load(e_ptr + rows + a + f[None, :], mask=real, other=0.0)
        q = tl.load(q_ptr + rows + a + f[None, :], mask=real, other=0.0)
        k = tl.load(k_ptr + rows + a + f[None, :], mask=real, other=0.0)
        dq = product(narrow(dA, k.dtype), k, PRECISION)
        de = product(narrow(dX, k.dtype), k, PRECISION)
        dk = product(narrow(dX_t, k.dtype), e, PRECISION)
        dk = product_onto(dk, narrow(dA_t, k.dtype), q, PRECISION)
        for h in range(m):
            columns = h * V + v
            tokens = (start + i)[:, None] * (G * width) + g * width + columns[None, :]
            inside = real & own[None, :]
            at = ((chunk * G + g) * m + h) * C
            high, low, r = tl.load(high_ptr + at + i), tl.load(low_ptr + at + i), tl.load(resets_ptr + at + i)
            end_high, end_low, end_r = (
                tl.load(high_ptr + at + C - 1), tl.load(low_ptr + at + C - 1), tl.load(resets_ptr + at + C - 1)
            )  # fmt: skip
            carry = tl.where(r == 0, tl.exp(high), 0.0)
            tail = tl.where(r == end_r, tl.exp(tl.where(r == end_r, (end_high - high) + (end_low - low), 0.0)), 0.0)
            # [V, F] as they lie in memory, read transposed.
            cell = (chunk * G + g) * F * width + (a + f)[None, :] * width + columns[:, None]
            S_t = tl.load(before_ptr + cell, mask=own[:, None], other=0.0)
            dS_t = tl.load(dafters_ptr + cell, mask=own[:, None], other=0.0)
            dy = tl.load(dy_ptr + tokens, mask=inside, other=0.0).to(tl.float32)
            u = tl.load(u_ptr + tokens, mask=inside, other=0.0)
            dr = tl.load(dr_ptr + tokens, mask=inside, other=0.0)
            dq = product_onto(dq, narrow(carry[:, None] * dy, k.dtype), S_t, PRECISION)
            de = product_onto(de, narrow(-carry[:, None] * dr, k.dtype), S_t, PRECISION)
            dk = product_onto(dk, narrow(tail[:, None] * u, k.dtype), dS_t, PRECISION)
        tl.store(dq_ptr + rows + a + f[None, :], narrow(dq, dq_ptr.dtype.element_ty), mask=real)
        tl.store(de_ptr + rows + a + f[None, :], narrow(de, de_ptr.dtype.element_ty), mask=real)
        tl.store(dk_ptr + rows + a + f[None, :], narrow(dk, dk_ptr.dtype.element_ty), mask=real)


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
            G, m, F=F, BF=BF, C=CHUNK, PRECISION=precision, FLOOR=RESET,
        )  # fmt: skip
        before = fresh(chunks, G, F, m, V, dtype=q.dtype)
        r, u = fresh(*w.shape), fresh(*w.shape)
        residual, after = fresh(*log_decay.shape), torch.empty_like(state)
        _scan[(N, G * m)](
            k, e, w, state, inverse, high, low, resets, layout.first, layout.start, layout.length,
            before, r, u, after, residual, G, m, V, F=F, BV=BV, C=CHUNK, PRECISION=precision,
        )  # fmt: skip
        y = torch.empty_like(w)
        _read[(chunks, G)](
            q, k, u, before, high, low, resets, layout.start, layout.length, y,
            G, m, V, F=F, BF=BF, BV=BV, C=CHUNK, PRECISION=precision,
        )  # fmt: skip
        ctx.save_for_backward(q, k, e, w, before, r, u, residual, inverse, high, low, resets)
        ctx.layout, ctx.sizes, ctx.precision = layout, (BF, BV), precision
        return y, after, residual

    @staticmethod
    def backward(ctx, dy, dafter, dresidual):
        q, k, e, w, before, r, u, residual, inverse, high, low, resets = ctx.saved_tensors
        layout, (BF, BV), precision = ctx.layout, ctx.sizes, ctx.precision
        G, F = q.shape[2:]
        m, V = w.shape[-2:]
        dy, dafter, dresidual = dy.contiguous(), dafter.contiguous(), dresidual.contiguous()
        dafters, dbefore = torch.empty_like(before), torch.empty_like(dafter)
        du, dr = torch.empty_like(u), torch.empty_like(u)
        _scan_back[(dafter.shape[0], G * m)](
            q, k, e, dy, u, dresidual, dafter, inverse, high, low, resets, layout.first, layout.start, layout.length,
            dafters, du, dr, dbefore, G, m, V, F=F, BV=BV, C=CHUNK, PRECISION=precision,
        )  # fmt: skip
        dq, dk, de, ddecay = (torch.empty_like(x) for x in (q, k, e, dresidual))
        _gradients[(layout.chunks, G)](
            q, k, e, w, dy, r, u, du, dr, residual, dresidual, before, dafters,
            inverse, high, low, resets, layout.start, layout.length,
            dq, dk, de, ddecay, G, m, V, F=F, BF=BF, BV=BV, C=CHUNK, PRECISION=precision,
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
        layout = _lay_out(bounds[:-1], [b - a for a, b in zip(bounds, bounds[1:], strict=False)], q.device)
    inputs = (x.contiguous() for x in (q, k, e, w, log_decay, state))
    return _Kernels.apply(*inputs, layout)
