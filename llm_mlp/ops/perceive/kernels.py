"""`perceive` as Triton kernels: forward and backward, whole and packed sequences.

The mathematics is that of `llm_mlp.ops.perceive.chunked` (docs/perceive.md), for all heads of a group at once:

- ``_decays``      (chunk, group): what the decays of every head come to
- ``_inverse``     (chunk, group): M = (I + tril(E K^T, -1))^-1
- ``_scan``        (sequence, group, part): the state through the chunks; y, the residual, the state before each chunk
- ``_scan_back``   (sequence, group, part): the state's gradient through the chunks, last one first; dw
- ``_hop``         (span, group, part): what a span does to a state, where sequences are cut into spans
- ``_compose``     (sequence, group, part): the states that spans begin with, or the gradients they end with
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

Few long sequences would leave most of the chip idle: they are cut into spans (`spans_of`). A first scan of all spans at
once, from zero states and without reads, gives Z of S -> exp(decay) P S + Z, ``_hop`` gives P, ``_compose`` the states
between; then the spans are sequences like others. The same backwards.

Nothing that flows from a matrix unit is transposed into the first operand of another product: it is computed
transposed, because Triton 3.4 to 3.7 miscompiles such transpositions on Hopper (flash-linear-attention issues 640 and
984). No atomics: two runs give equal bits.

Kernels are not specialised to G, and see aligned tensors: what `tune` has checked is the binary that runs.

Offsets of tiles are 32-bit numbers from a 64-bit scalar: a tile of pointers takes more registers than the tile.

Precision: M and what it multiplies, the one place where an erase near 2 amplifies rounding, are float32 as pairs of
bfloat16; other operands are rounded to the inputs' dtype, sums and states are float32. float32 inputs: IEEE products.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_mlp.ops.perceive.chunked import CHUNK, RESET
from llm_mlp.ops.tiles import (
    exponential,
    halves,
    narrow,
    product,
    product_halves,
    product_onto,
    product_split,
    product_wide,
)
from llm_mlp.ops.tune import Plan, Sizes, Table, aligned, plan

# How each kernel is launched, and how many columns a part has; benchmarks/tune_kernels.py checks and times others.
LAUNCH: Table = {
    "_decays": {"num_warps": 1, "num_stages": 1},
    "_inverse": {"num_warps": 4, "num_stages": 1},
    "_scan": {"columns": 64, "num_warps": 4, "num_stages": 1},
    "_scan_back": {"columns": 64, "num_warps": 4, "num_stages": 1},
    "_hop": {"num_warps": 4, "num_stages": 1},
    "_compose": {"num_warps": 8, "num_stages": 1},
    "_gradients": {"num_warps": 4, "num_stages": 1},
}
# Sequences are cut into spans of at least SPAN tokens where scans have less than half of FULL programs (two for each of
# an H100's multiprocessors), and into as many as give FULL.
FULL, SPAN = 264, 512
REST = tl.constexpr(256.0)  # scale of what rounding y left out, kept in 8 bits


def limit(dtype: torch.dtype) -> float:
    """Of a chunk's log decay, beyond which it is wild: down and up stay within the square root of exp(limit), which
    float32 and bfloat16 hold with room for values and their products, and float16 with full precision."""
    return 8.0 if dtype == torch.float16 else 120.0


# -- pieces --------------------------------------------------------------------------------------------------------


@triton.jit
def _scaled(Z, x, BM: tl.constexpr):
    """``Z [rows, BM * BV]`` times ``x [rows, BM]`` (or ``[1, BM]``), head by head."""
    if BM == 1:
        out = Z * x
    else:
        out = tl.reshape(tl.reshape(Z, (Z.shape[0], BM, Z.shape[1] // BM)) * x[:, :, None], Z.shape)
    return out


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
        total = tl.where(head[None, :] == h, product_split(X * gamma, Z, PRECISION), total)
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
        base += gamma * product_split(tl.where(head[None, :] == h, A, 0.0), tl.trans(B), PRECISION)
    return base


@triton.jit
def _load_inverse(inverse_ptr, at, C: tl.constexpr, PRECISION: tl.constexpr):
    """M as `tiles.halves`; where products are IEEE, M itself (twice)."""
    i = tl.arange(0, C)
    square = i[:, None] * C + i[None, :]
    if PRECISION == "tf32":
        high = tl.load(inverse_ptr + at * 2 * C * C + square)
        low = tl.load(inverse_ptr + (at * 2 + 1) * C * C + square)
    else:
        high = tl.load(inverse_ptr + at * C * C + square)
        low = high
    return high, low


@triton.jit
def _whole(high, low, PRECISION: tl.constexpr):
    """M in float32."""
    if PRECISION == "tf32":
        high = high.to(tl.float32) + low.to(tl.float32)
    return high


@triton.jit
def _betas(e_ptr, start, g, G, length, C: tl.constexpr):
    """Scalar erase: beta of a chunk's tokens ``[C, 1]``, where e is beta k."""
    i = tl.arange(0, C)
    return tl.load(e_ptr + (start * G + g) + i * G, mask=i < length, other=0.0)[:, None]


@triton.jit
def _any_wild(wild_ptr, first, last, G):
    """Whether a chunk from ``first`` to ``last`` is wild; ``wild_ptr`` is at the group."""
    found = 0
    for at in range(first, last, 256):
        c = at + tl.arange(0, 256)
        found += tl.sum(tl.load(wild_ptr + c * G, mask=c < last, other=0), 0)
    return found > 0


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["G"])
def _decays(
    decay_ptr, start_ptr, length_ptr,  # chunks: first token and tokens
    down_ptr, up_ptr, edge_ptr, sum_ptr, wild_ptr,
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
        last = tl.where(all_resets == 0, last, -float("inf"))
    else:
        down, up = tl.exp(sums - 0.5 * last[None, :]), tl.exp(0.5 * last[None, :] - sums)
        edge = tl.exp(0.5 * last)
    group = (chunk * G + g) * m
    tl.store(down_ptr + group * C + (i[:, None] * m + h[None, :]), down.to(tl.float32), mask=(h < m)[None, :])
    tl.store(up_ptr + group * C + (i[:, None] * m + h[None, :]), up.to(tl.float32), mask=(h < m)[None, :])
    tl.store(edge_ptr + group + h, edge.to(tl.float32), mask=h < m)
    tl.store(sum_ptr + group + h, last.to(tl.float32), mask=h < m)
    tl.store(wild_ptr + chunk * G + g, wild)


@triton.jit(do_not_specialize=["G"])
def _inverse(
    k_ptr, e_ptr, start_ptr, length_ptr, inverse_ptr,
    G,
    F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, SCALAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chunk, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, length = tl.load(start_ptr + chunk).to(tl.int64), tl.load(length_ptr + chunk)
    i, f = tl.arange(0, C), tl.arange(0, BF)
    shift, rows = start * (G * F) + g * F, i[:, None] * (G * F)
    real = (i < length)[:, None]
    L = tl.zeros((C, C), tl.float32)
    for a in tl.static_range(0, F, BF):
        k = tl.load(k_ptr + shift + rows + a + f[None, :], mask=real, other=0.0)
        e = k if SCALAR else tl.load(e_ptr + shift + rows + a + f[None, :], mask=real, other=0.0)
        L = product_onto(L, e, tl.trans(k), PRECISION)
    if SCALAR:
        L *= _betas(e_ptr, start, g, G, length, C)
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


@triton.jit(do_not_specialize=["G"])
def _scan(
    q_ptr, k_ptr, e_ptr, w_ptr, decay_ptr, state_ptr, inverse_ptr, down_ptr, up_ptr, edge_ptr, sum_ptr, wild_ptr,
    bounds_ptr, first_ptr,  # sequences: first token [N+1], first chunk [N+1]
    y_ptr, rest_ptr, after_ptr, residual_ptr, before_ptr,
    G, m: tl.constexpr, V: tl.constexpr,
    F: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr, C: tl.constexpr,
    KEEP: tl.constexpr, ENDS: tl.constexpr, WILD: tl.constexpr, SCALAR: tl.constexpr, PRECISION: tl.constexpr,
    FLOOR: tl.constexpr,
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
            k = tl.load(k_ptr + shift + rows, mask=real, other=0.0)
            e = k if SCALAR else tl.load(e_ptr + shift + rows, mask=real, other=0.0)
            if not ENDS and F <= 256:
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
            if SCALAR:
                seen *= _betas(e_ptr, start, g, G, length, C)
            if not ENDS:
                if F > 256:  # in the shared memory that e had
                    q = tl.load(q_ptr + shift + rows, mask=real, other=0.0)
                A = tl.where(causal, product(q, tl.trans(k), PRECISION), 0.0)
            if WILD:
                total = tl.exp(tl.load(sum_ptr + at * m + head, mask=known, other=0.0))[None, :]
                decays = decay_ptr + start * (G * m) + g * m + part * BM
                heads = tl.minimum(m - part * BM, BM)
                R = w.to(tl.float32) - _scaled(seen, down, BM)
                M = _whole(M_high, M_low, PRECISION)
                U = _inner(M, R, decays, G * m, length, heads, False, BM, C, FLOOR, PRECISION)
                if not ENDS:
                    y = _scaled(product(q, Sr, PRECISION), down, BM)
                    y += _inner(A, U, decays, G * m, length, heads, False, BM, C, FLOOR, PRECISION)
                S = _scaled(S, total / edge, BM)
                S = product_onto(S, tl.trans(k), narrow(_scaled(U, up * edge, BM), kind), PRECISION)
            else:
                R = _scaled(w.to(tl.float32), up, BM) - seen
                U = product_halves(M_high, M_low, R, PRECISION)
                Ur = narrow(U, kind)
                if not ENDS:
                    y = product_onto(product(q, Sr, PRECISION), narrow(A, kind), Ur, PRECISION)
                    y = _scaled(y, down, BM)
                S = _scaled(product_onto(S, tl.trans(k), Ur, PRECISION), edge, BM)
                U = _scaled(U, down, BM)
            if not ENDS:
                tl.store(
                    residual_ptr + start * (G * m) + g * m + (i[:, None] * (G * m) + head[None, :]),
                    _head_sums(U * U, BM),
                    mask=real & known[None, :],
                )
                rounded = narrow(y, y_ptr.dtype.element_ty)
                tl.store(y_ptr + there + tokens, rounded, mask=real & own[None, :])
                if KEEP and PRECISION == "tf32":  # what a 16-bit y leaves out: see `_scan_back`
                    rest = tl.minimum(tl.maximum((y - rounded.to(tl.float32)) * REST, -57344.0), 57344.0)
                    tl.store(rest_ptr + there + tokens, rest.to(tl.float8e5), mask=real & own[None, :])
        tl.store(after_ptr + (n * G + g) * F * width + cell, S, mask=own[None, :])


@triton.jit(do_not_specialize=["G"])
def _scan_back(
    q_ptr, k_ptr, e_ptr, w_ptr, y_ptr, rest_ptr, dy_ptr, decay_ptr, dafter_ptr, residual_ptr, dresidual_ptr, before_ptr,
    inverse_ptr, down_ptr, up_ptr, edge_ptr, sum_ptr, wild_ptr, bounds_ptr, first_ptr,
    dw_ptr, dg_ptr, dafters_ptr, dbefore_ptr,
    G, m: tl.constexpr, V: tl.constexpr,
    F: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr, C: tl.constexpr,
    RESIDUAL: tl.constexpr, ENDS: tl.constexpr, WILD: tl.constexpr, SCALAR: tl.constexpr, PRECISION: tl.constexpr,
    FLOOR: tl.constexpr,
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
            if SCALAR:
                e, beta = k, _betas(e_ptr, start, g, G, length, C)
            elif F <= 256:
                e = tl.load(e_ptr + shift + rows, mask=real, other=0.0)
            M_high, M_low = _load_inverse(inverse_ptr, at, C, PRECISION)
            dy = tl.load(dy_ptr + there + tokens, mask=inside, other=0.0).to(tl.float32)
            if RESIDUAL or not ENDS:
                w = tl.load(w_ptr + there + tokens, mask=inside, other=0.0).to(tl.float32)
            if not ENDS:
                # The decays' gradient is a sum over a chunk of dy . y, where the rounding of y would add up.
                y = tl.load(y_ptr + there + tokens, mask=inside, other=0.0).to(tl.float32)
                if PRECISION == "tf32":
                    y += tl.load(rest_ptr + there + tokens, mask=inside, other=0.0).to(tl.float32) / REST
            scales = at * m * C + (i[:, None] * m + head[None, :])
            up = tl.load(up_ptr + scales, mask=known[None, :], other=0.0)
            down = tl.load(down_ptr + scales, mask=known[None, :], other=0.0)
            edge = tl.load(edge_ptr + at * m + head, mask=known, other=0.0)[None, :]
            gate = start * (G * m) + g * m + (i[:, None] * (G * m) + head[None, :])
            decays = decay_ptr + start * (G * m) + g * m + part * BM
            heads = tl.minimum(m - part * BM, BM)
            if not ENDS:
                dg = _head_sums(dy * y, BM)
            if WILD:
                dS = _scaled(dS, edge, BM)
            else:
                dS, dy = _scaled(dS, edge, BM), _scaled(dy, down, BM)
            dSr = narrow(dS, kind)
            if not ENDS:
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
                dresidual = 2.0 * tl.load(dresidual_ptr + gate, mask=real & known[None, :], other=0.0)
                if not ENDS:
                    dg += dresidual * tl.load(residual_ptr + gate, mask=real & known[None, :], other=0.0)
                if F > 256 and not SCALAR:  # in the shared memory that k had
                    e = tl.load(e_ptr + shift + rows, mask=real, other=0.0)
                seen = product(e, S, PRECISION)
                if SCALAR:
                    seen *= beta
                if WILD:
                    R = w - _scaled(seen, down, BM)
                    M = _whole(M_high, M_low, PRECISION)
                    U = _inner(M, R, decays, G * m, length, heads, False, BM, C, FLOOR, PRECISION)
                    dU += _scaled(U, dresidual, BM)
                else:
                    U = product_halves(M_high, M_low, _scaled(w, up, BM) - seen, PRECISION)
                    dU += _scaled(_scaled(U, down, BM), down * dresidual, BM)
            if WILD:
                total = tl.exp(tl.load(sum_ptr + at * m + head, mask=known, other=0.0))[None, :]
                M_t = tl.trans(_whole(M_high, M_low, PRECISION))
                dW = _inner(M_t, dU, decays, G * m, length, heads, True, BM, C, FLOOR, PRECISION)
                dS = _scaled(dS, total / edge, BM)
                inner = product(tl.trans(q), dyr, PRECISION)
                if not RESIDUAL and F > 256 and not SCALAR:
                    e = tl.load(e_ptr + shift + rows, mask=real, other=0.0)
                dR = _scaled(dW, -down, BM)
                if SCALAR:
                    dR *= beta
                inner = product_onto(inner, tl.trans(e), narrow(dR, kind), PRECISION)
                dS += _scaled(inner, edge, BM)
            else:
                dR = product_halves(tl.trans(M_high), tl.trans(M_low), dU, PRECISION)
                dW = _scaled(dR, up, BM)
                dS = product_onto(dS, tl.trans(q), dyr, PRECISION)
                if not RESIDUAL and F > 256 and not SCALAR:
                    e = tl.load(e_ptr + shift + rows, mask=real, other=0.0)
                if SCALAR:
                    dR *= beta
                dS = _scaled(product_onto(dS, tl.trans(e), narrow(-dR, kind), PRECISION), edge, BM)
            if not ENDS:
                tl.store(dw_ptr + there + tokens, narrow(dW, dw_ptr.dtype.element_ty), mask=inside)
                # dg_i = dO_i . O_i - dW_i . W_i + 2 rho_i drho_i; <dS', S'> at the end of the chunk is added later.
                tl.store(dg_ptr + gate, dg - _head_sums(dW * w, BM), mask=real & known[None, :])
        tl.store(dbefore_ptr + (n * G + g) * F * width + cell, dS, mask=own[None, :])


@triton.jit(do_not_specialize=["G"])
def _hop(
    k_ptr, e_ptr, inverse_ptr, bounds_ptr, first_ptr, hop_ptr,
    G,
    F: tl.constexpr, BP: tl.constexpr, C: tl.constexpr, SCALAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a span does to a state that does not decay: the product of its I - K^T M E, some columns of it."""
    n, part = (tl.program_id(0) // (F // BP)).to(tl.int64), tl.program_id(0) % (F // BP)
    g = tl.program_id(1)
    first, last = tl.load(first_ptr + n), tl.load(first_ptr + n + 1)
    begin, end = tl.load(bounds_ptr + n).to(tl.int64), tl.load(bounds_ptr + n + 1).to(tl.int64)
    i, f, j = tl.arange(0, C), tl.arange(0, F), part * BP + tl.arange(0, BP)
    rows = i[:, None] * (G * F) + f[None, :]
    P = tl.where(f[:, None] == j[None, :], 1.0, 0.0)
    for c in range(0, last - first):
        start = begin + c * C
        length = tl.minimum(end - start, C).to(tl.int32)
        real = (i < length)[:, None]
        shift = start * (G * F) + g * F
        k = tl.load(k_ptr + shift + rows, mask=real, other=0.0)
        e = k if SCALAR else tl.load(e_ptr + shift + rows, mask=real, other=0.0)
        M_high, M_low = _load_inverse(inverse_ptr, (first + c).to(tl.int64) * G + g, C, PRECISION)
        # Over a span of many chunks rounding adds up: float32 throughout, which k and e are not.
        seen = product_wide(e, P, PRECISION)
        if SCALAR:
            seen *= _betas(e_ptr, start, g, G, length, C)
        U = product_halves(M_high, M_low, seen, PRECISION)
        P -= product_wide(tl.trans(k), U, PRECISION)
    tl.store(hop_ptr + (n * G + g) * F * F + (f[:, None] * F + j[None, :]), P)


@triton.jit(do_not_specialize=["G"])
def _compose(
    hop_ptr, sum_ptr, first_ptr, span_ptr, own_ptr, given_ptr, ends_ptr,
    G, m: tl.constexpr, V: tl.constexpr,
    F: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr,
    BACK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state a sequence's spans begin with, S <- exp(decay) P S + Z, or from the last span the gradient they end
    with. ``span_ptr``: first span of each sequence; ``first_ptr``: first chunk of each span."""
    n, part = (tl.program_id(0) // PARTS).to(tl.int64), tl.program_id(0) % PARTS
    g = tl.program_id(1)
    f, width = tl.arange(0, F), m * V
    columns, own = _columns(part, m, V, BM, BV)
    head = part * BM + tl.arange(0, BM)
    cell = f[:, None] * width + columns[None, :]
    S = tl.load(given_ptr + (n * G + g) * F * width + cell, mask=own[None, :], other=0.0)
    begin, end = tl.load(span_ptr + n), tl.load(span_ptr + n + 1)
    for step in range(0, end - begin):
        s = (end - 1 - step if BACK else begin + step).to(tl.int64)
        at = (s * G + g) * F
        tl.store(ends_ptr + at * width + cell, S, mask=own[None, :])
        first, last = tl.load(first_ptr + s), tl.load(first_ptr + s + 1)
        decay = tl.zeros((BM,), tl.float32)
        for a in range(first, last, STEP):
            c = a + tl.arange(0, STEP)
            some = (c < last)[:, None] & (head < m)[None, :]
            decay += tl.sum(tl.load(sum_ptr + (c[:, None] * G + g) * m + head[None, :], mask=some, other=0.0), 0)
        P = tl.load(hop_ptr + at * F + (f[:, None] * F + f[None, :]))
        if BACK:
            P = tl.trans(P)
        Z = tl.load(own_ptr + at * width + cell, mask=own[None, :], other=0.0)
        S = _scaled(product_split(P, S, PRECISION), tl.exp(decay)[None, :], BM) + Z


@triton.jit(do_not_specialize=["G", "total"])
def _gradients(
    q_ptr, k_ptr, e_ptr, w_ptr, dy_ptr, dw_ptr, decay_ptr, before_ptr, dafters_ptr,
    inverse_ptr, down_ptr, up_ptr, edge_ptr, sum_ptr, wild_ptr, start_ptr, length_ptr,
    dq_ptr, dk_ptr, de_ptr, dg_ptr,
    total, G, m: tl.constexpr, V: tl.constexpr,
    F: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr, C: tl.constexpr,
    WILD: tl.constexpr, SCALAR: tl.constexpr, PRECISION: tl.constexpr, FLOOR: tl.constexpr,
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
        if SCALAR:
            beta = _betas(e_ptr, start, g, G, length, C)
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
                k = tl.load(k_ptr + shift + rows + a + f[None, :], mask=real, other=0.0)
                e = k if SCALAR else tl.load(e_ptr + shift + rows + a + f[None, :], mask=real, other=0.0)
                S = tl.load(before_ptr + state + cell, mask=own[None, :], other=0.0)
                seen = product_onto(seen, e, S, PRECISION)
                dS = tl.load(dafters_ptr + state + cell, mask=own[None, :], other=0.0)
                pushed = product_onto(pushed, k, dS, PRECISION)
                kept += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 0)
            if SCALAR:
                seen *= beta
            ended = tl.sum(tl.reshape(kept, (BM, BV)), 1)  # <dS', S'> at the end of the chunk
            if WILD:
                M = _whole(M_high, M_low, PRECISION)
                R = w - _scaled(seen, down, BM)
                U = _inner(M, R, decays, G * m, length, heads, False, BM, C, FLOOR, PRECISION)
                late = _scaled(U, up, BM)
                ended *= tl.exp(tl.load(sum_ptr + at * m + head, mask=known, other=0.0))
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
                if SCALAR:
                    dk += de * beta
                    to = de_ptr + (block * total + start) * G + g + i * G
                    tl.store(to, tl.sum(de * k.to(tl.float32), 1), mask=i < length)
                else:
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
                if SCALAR:
                    dL_t *= tl.trans(beta)
                e = k if SCALAR else tl.load(e_ptr + places, mask=real, other=0.0)
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
    for a, b in pairwise(bounds):
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


def candidates(F: int) -> tuple[Table, Table]:
    """Launch tables, the fast one first: `tune` finds which a device gets right. Two warps of a program do without
    Hopper's wide matrix instructions, which is where Triton's miscompilations there are."""
    fast = LAUNCH
    if F > 128:  # twice the registers
        fast = {kernel: {**launch, "num_warps": max(8, launch["num_warps"])} for kernel, launch in LAUNCH.items()}
    safe = {kernel: {**launch, "num_warps": min(2, launch["num_warps"])} for kernel, launch in LAUNCH.items()}
    for kernel in ("_scan", "_scan_back"):
        safe[kernel]["columns"] = 32
    return fast, safe


def sizes_of(F: int, m: int, V: int, dtype: torch.dtype, scalar: bool) -> Sizes:
    """What `tune` knows a launch by; ``scalar``: e is beta k."""
    return ("F", F), ("m", m), ("V", V), ("scalar", scalar), ("dtype", str(dtype).removeprefix("torch."))


def tiles(F: int, m: int, V: int, dtype: torch.dtype, launch: Table) -> Table:
    """The constants of each kernel that depend on sizes."""
    less = 4 if dtype == torch.float32 else 1
    fits = STATE_NUMBERS // less // F
    parts = {name: _Sizes.of(m, V, min(fits, launch[name]["columns"])) for name in ("_scan", "_scan_back")}
    return {
        "_decays": {"m": m, "BM": triton.next_power_of_2(m), "C": CHUNK},
        "_inverse": {"F": F, "BF": min(F, 128), "C": CHUNK},
        **{name: {"F": F, "C": CHUNK, **sizes.constants(m, V)} for name, sizes in parts.items()},
        "_hop": {"F": F, "BP": min(F, fits), "C": CHUNK},
        "_compose": {"F": F, **_Sizes.of(m, V, fits).constants(m, V)},
        "_gradients": {
            "F": F,
            "BF": min(F, FEATURES // less),
            "C": CHUNK,
            **_Sizes.of(m, V, COLUMNS // less).constants(m, V),
        },
    }


def _how(launch: dict[str, Any]) -> dict[str, Any]:
    """What of a launch Triton takes."""
    return {name: n for name, n in launch.items() if name != "columns"}


def _precision(dtype: torch.dtype) -> dict[str, str]:
    return {"PRECISION": "ieee" if dtype == torch.float32 else "tf32"}


def spans_of(bounds: list[int], programs: int) -> list[int]:
    """The ends of the spans that sequences are cut into, at multiples of a chunk from their starts; ``bounds`` itself
    if they are not. ``programs``: of a scan over one sequence."""
    sequences, longest = list(pairwise(bounds)), max(b - a for a, b in pairwise(bounds))
    wanted = FULL // (programs * len(sequences))  # spans a sequence
    if wanted < 2:
        return bounds
    length = max(SPAN, triton.cdiv(triton.cdiv(bounds[-1], wanted * len(sequences)), CHUNK) * CHUNK)
    if longest < 4 * length:
        return bounds
    return [*(x for a, b in sequences for x in range(a, b, length)), bounds[-1]]


@lru_cache(maxsize=64)
def _first_spans(bounds: tuple[int, ...], spans: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """First span of each sequence and the number of spans ``[N+1]``; the last span of each, -1 if it is empty."""
    first = [bisect_left(spans[:-1], b) for b in bounds[:-1]] + [len(spans) - 1]
    last = [b - 1 if b > a else -1 for a, b in pairwise(first)]
    return torch.tensor(first, dtype=torch.int32, device=device), torch.tensor(last, device=device)


@dataclass(frozen=True)
class _Call:
    """Sizes and layouts of one call, the same forward and backward."""

    G: int
    F: int
    scalar: bool
    way: Plan
    launch: Table
    tile: Table
    precision: dict[str, str]
    bounds: tuple[int, ...]
    spans: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, q: Tensor, e: Tensor, w: Tensor, bounds: list[int]) -> _Call:
        (_, _, G, F), (m, V), scalar = q.shape, w.shape[-2:], e.ndim == 3
        way = plan("perceive", sizes_of(F, m, V, q.dtype, scalar))
        launch = way.of(candidates(F))
        tile = tiles(F, m, V, q.dtype, launch)
        # A hop of F x F has to fit on chip.
        spans = tuple(spans_of(bounds, G * tile["_scan"]["PARTS"]) if F <= 256 else bounds)
        return cls(G, F, scalar, way, launch, tile, _precision(q.dtype), tuple(bounds), spans, q.device)

    @property
    def layout(self) -> _Layout:
        """Of the spans; its chunks are those of the sequences. (Not to be asked where tensors are fake: it is kept.)"""
        return _layout(self.spans, self.device)

    @property
    def chunks(self) -> int:
        return sum(triton.cdiv(b - a, CHUNK) for a, b in pairwise(self.bounds))

    @property
    def cut(self) -> bool:
        return self.spans != self.bounds

    def sequences(self, kernel: str) -> tuple[int, int]:
        """The grid of a kernel over sequences (spans, if they are cut)."""
        return (len(self.spans) - 1) * self.tile[kernel]["PARTS"], self.G

    def constants(self, kernel: str, **more: Any) -> dict[str, Any]:
        """What a kernel of `tiles` takes besides tensors."""
        kinds = {**self.precision, "SCALAR": self.scalar}
        if kernel not in ("_inverse", "_hop"):
            kinds["FLOOR"] = RESET
        return {**self.tile[kernel], **kinds, **more, **_how(self.launch[kernel])}

    def compose(
        self, hop: Tensor, sums: Tensor, own: Tensor, given: Tensor, back: bool
    ) -> Tensor:  # fmt: skip
        """What each span begins with (``back``: ends with), from what each sequence does."""
        ends = torch.empty_like(own)
        first, _ = _first_spans(self.bounds, self.spans, self.device)
        _compose[((len(self.bounds) - 1) * self.tile["_compose"]["PARTS"], self.G)](
            hop, sums, self.layout.first, first, own, given, ends, self.G,
            STEP=64, BACK=back, **self.precision, **self.tile["_compose"], **_how(self.launch["_compose"]),
        )  # fmt: skip
        return ends

    def of_sequences(self, edges: Tensor, given: Tensor, back: bool) -> Tensor:
        """What sequences end with (``back``: begin with), of what their spans do; empty ones keep what they got."""
        if not self.cut:
            return edges
        first, last = _first_spans(self.bounds, self.spans, self.device)
        at = first[:-1].clamp(max=len(edges) - 1) if back else last.clamp(min=0)
        return torch.where((last >= 0)[:, None, None, None, None], edges[at], given)


_Tensors = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]  # fmt: skip


@torch.library.custom_op("llm_mlp::perceive", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, e: Tensor, w: Tensor, log_decay: Tensor, state: Tensor, bounds: list[int], keep: bool
) -> _Tensors:
    """y, state, residual; and if ``keep`` what the backward pass reads: the states before each chunk (in q's dtype, in
    the chunk's frame), what rounding y left out, the inverses, the decays of each chunk (down, up, edge, their sums,
    wild), the spans' hops."""
    call = _Call.of(q, e, w, bounds)
    kept = _outputs(q, w, log_decay, state, call, keep)
    with call.way.compiling():
        after = _run_forward(call, q, k, e, w, log_decay, state, kept, keep)
    return kept[0], after, *kept[2:]


def _run_forward(
    call: _Call,
    q: Tensor,
    k: Tensor,
    e: Tensor,
    w: Tensor,
    log_decay: Tensor,
    state: Tensor,
    kept: _Tensors,
    keep: bool,
) -> Tensor:
    """Fills what is kept; the state after the last token."""
    G, F, layout = call.G, call.F, call.layout
    y, after, residual, before, rest, inverse, down, up, edge, sums, wild, hop = kept
    _decays[(layout.chunks, G)](
        log_decay, layout.start, layout.length, down, up, edge, sums, wild, G,
        FLOOR=RESET, LIMIT=limit(q.dtype), **call.tile["_decays"], **_how(call.launch["_decays"]),
    )  # fmt: skip
    _inverse[(layout.chunks, G)](k, e, layout.start, layout.length, inverse, G, **call.constants("_inverse"))

    def scan(state: Tensor, after: Tensor, keep: bool, ends: bool) -> None:
        for is_wild in (False, True):
            _scan[call.sequences("_scan")](
                q, k, e, w, log_decay, state, inverse, down, up, edge, sums, wild, layout.bounds, layout.first,
                y, rest, after, residual, before, G, **call.constants("_scan", KEEP=keep, ENDS=ends, WILD=is_wild),
            )  # fmt: skip

    if not call.cut:
        scan(state, after, keep, False)
        return after
    parts = call.tile["_hop"]
    _hop[(len(hop) * (F // parts["BP"]), G)](
        k, e, inverse, layout.bounds, layout.first, hop, G, **call.constants("_hop")
    )
    ends = state.new_empty((len(hop), *state.shape[1:]))
    scan(torch.zeros_like(ends), ends, False, True)
    begins = call.compose(hop, sums, ends, state, False)
    scan(begins, ends, keep, False)
    return call.of_sequences(ends, state, False)


def _empty_inverse(like: Tensor, chunks: int) -> Tensor:
    """For M of each chunk and group: pairs of bfloat16, or float32."""
    halves, dtype = (1, torch.float32) if like.dtype == torch.float32 else (2, torch.bfloat16)
    return torch.empty((chunks, like.shape[2], halves, CHUNK, CHUNK), dtype=dtype, device=like.device)


def _outputs(q: Tensor, w: Tensor, log_decay: Tensor, state: Tensor, call: _Call, keep: bool) -> _Tensors:
    G, F, (m, V), chunks = call.G, call.F, w.shape[-2:], call.chunks

    def fresh(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    return (
        torch.empty_like(w),
        torch.empty_like(state),
        torch.empty_like(log_decay),
        fresh(chunks if keep else 0, G, F, m, V, dtype=q.dtype),
        torch.empty_like(w, dtype=torch.float8_e5m2) if keep and w.dtype != torch.float32 else fresh(0),
        _empty_inverse(q, chunks),
        fresh(chunks, G, CHUNK, m),
        fresh(chunks, G, CHUNK, m),
        fresh(chunks, G, m),
        fresh(chunks, G, m),
        fresh(chunks, G, dtype=torch.int32),
        fresh(len(call.spans) - 1 if call.cut else 0, G, F, F),
    )


@_forward.register_fake
def _(q, k, e, w, log_decay, state, bounds, keep):
    return _outputs(q, w, log_decay, state, _Call.of(q, e, w, bounds), keep)


@torch.library.custom_op("llm_mlp::perceive_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, e: Tensor, w: Tensor, log_decay: Tensor, y: Tensor, residual: Tensor, before: Tensor,
    rest: Tensor, inverse: Tensor, down: Tensor, up: Tensor, edge: Tensor, sums: Tensor, wild: Tensor, hop: Tensor,
    dy: Tensor, dafter: Tensor, dresidual: Tensor | None, bounds: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, e, w, log_decay and state."""
    call = _Call.of(q, e, w, bounds)
    G, F, layout = call.G, call.F, call.layout
    dq, dk, dw, dg = (torch.empty_like(x) for x in (q, k, w, log_decay))
    blocks = F // call.tile["_gradients"]["BF"]
    # Scalar erase: each block of features has a share of beta's gradient.
    de = e.new_empty((blocks, *e.shape)) if call.scalar else torch.empty_like(e)
    dafters = torch.empty_like(before)
    dy, dafter = aligned(dy), aligned(dafter)
    slopes = residual if dresidual is None else aligned(dresidual)

    def scan_back(dafter: Tensor, dbefore: Tensor, ends: bool) -> None:
        for is_wild in (False, True):
            _scan_back[call.sequences("_scan_back")](
                q, k, e, w, y, rest, dy, log_decay, dafter, residual, slopes, before, inverse, down, up, edge, sums,
                wild, layout.bounds, layout.first, dw, dg, dafters, dbefore, G,
                **call.constants("_scan_back", RESIDUAL=dresidual is not None, ENDS=ends, WILD=is_wild),
            )  # fmt: skip

    with call.way.compiling():
        if call.cut:
            begins = dafter.new_empty((len(hop), *dafter.shape[1:]))
            scan_back(torch.zeros_like(begins), begins, True)
            scan_back(call.compose(hop, sums, begins, dafter, True), begins, False)
            dbefore = call.of_sequences(begins, dafter, True)
        else:
            dbefore = torch.empty_like(dafter)
            scan_back(dafter, dbefore, False)
        for is_wild in (False, True):
            _gradients[(layout.chunks, G, blocks)](
                q, k, e, w, dy, dw, log_decay, before, dafters, inverse, down, up, edge, sums, wild,
                layout.start, layout.length, dq, dk, de, dg, q.shape[0] * q.shape[1], G,
                **call.constants("_gradients", WILD=is_wild),
            )  # fmt: skip
    if call.scalar:
        de = de[0] if blocks == 1 else de.sum(0)
    return dq, dk, de, dw, dg, dbefore


@_backward.register_fake
def _(
    q, k, e, w, log_decay, y, residual, before, rest, inverse, down, up, edge, sums, wild, hop, dy, dafter, dresidual,
    bounds,
):  # fmt: skip
    return tuple(torch.empty_like(x) for x in (q, k, e, w, log_decay, dafter))


def _save(ctx, inputs, output) -> None:
    q, k, e, w, log_decay, _, bounds, _ = inputs
    y, _, residual, *kept = output
    ctx.save_for_backward(q, k, e, w, log_decay, y, residual, *kept)
    ctx.bounds = bounds
    ctx.shapes = output[0].shape, output[1].shape
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, dafter, dresidual, *_):
    saved = ctx.saved_tensors  # once: activation checkpointing does not give them twice
    y, state = saved[5], ctx.shapes[1]
    if dy is None:
        dy = torch.zeros_like(y)
    if dafter is None:
        dafter = torch.zeros(state, dtype=torch.float32, device=y.device)
    return *_backward(*saved, dy, dafter, dresidual, ctx.bounds), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def perceive(
    q: Tensor, k: Tensor, e: Tensor, w: Tensor, log_decay: Tensor, state: Tensor, bounds: list[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `llm_mlp.ops.perceive` on checked inputs; ``bounds`` are the packed sequences' ends (or None)."""
    B, T = q.shape[:2]
    if T == 0 or B == 0:
        return w, state, log_decay
    inputs = [aligned(x) for x in (q, k, e, w, log_decay, state)]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    ends = list(range(0, B * T + 1, T)) if bounds is None else bounds
    return _forward(*inputs, ends, keep)[:3]


def transition(k: Tensor, e: Tensor, m: int, V: int) -> Tensor:
    """The product of ``I - k e^T`` over the tokens ``[B, T, G, F]``, the last one first: ``[B, G, F, F]`` float32. Not
    differentiable. ``m``, ``V``: the sizes of which `tune` knows the launch."""
    B, T, G, F = k.shape
    if T == 0 or B == 0:
        return torch.eye(F, device=k.device).expand(B, G, F, F).clone()
    k, e = aligned(k), aligned(e)
    way = plan("perceive", sizes_of(F, m, V, k.dtype, e.ndim == 3))
    launch = way.of(candidates(F))
    tile, kinds = tiles(F, m, V, k.dtype, launch), {**_precision(k.dtype), "SCALAR": e.ndim == 3}
    layout = _layout(tuple(range(0, B * T + 1, T)), k.device)
    inverse, hop = _empty_inverse(k, layout.chunks), torch.empty((B, G, F, F), device=k.device)
    with way.compiling():
        _inverse[(layout.chunks, G)](
            k, e, layout.start, layout.length, inverse, G, **tile["_inverse"], **kinds, **_how(launch["_inverse"])
        )
        _hop[(B * (F // tile["_hop"]["BP"]), G)](
            k, e, inverse, layout.bounds, layout.first, hop, G, **tile["_hop"], **kinds, **_how(launch["_hop"])
        )
    return hop
