"""Triton kernels of `llm_mlp.ops.heads`: forward and backward, whole, packed and carried sequences.

A program of `_inputs` computes a tile of tokens by one block of channels: a group's q or k (so that its norm is at
hand), or as many values.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_mlp.ops.perceive.step_kernels import decay_of, place_of
from llm_mlp.ops.tiles import after_previous, narrow, where_if
from llm_mlp.ops.tune import Sizes, Table, aligned, overlap, plan

LAUNCH: Table = {
    "_inputs": {"BT": 32, "num_warps": 4},
    "_inputs_back": {"RUN": 128, "num_warps": 1},
    "_inputs_step": {"num_warps": 1},
    "_gates_step": {"num_warps": 1},
    "_outputs": {"BT": 32, "num_warps": 4},
    "_outputs_back": {"BT": 32, "num_warps": 4},
}
TAPS = 4  # the widest convolution
TINY = tl.constexpr(1e-12)  # as torch.nn.functional.normalize


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _before(
    x_ptr, tail_ptr, i, c, since, sequence, inside, j: tl.constexpr, stride, C, K: tl.constexpr, CARRIED: tl.constexpr,
):  # fmt: skip
    """The input ``j`` tokens before each row ``i`` of the tile at ``x_ptr``: of its sequence, of its tail, or 0."""
    own = inside & (since >= j)[:, None]
    x = tl.load(x_ptr + ((i - j)[:, None] * stride + c[None, :]), mask=own, other=0.0).to(tl.float32)
    if CARRIED:
        row = sequence * (K - 1) + (K - 1) + since - j
        old = tl.load(
            tail_ptr + row.to(tl.int64)[:, None] * C + c[None, :], mask=inside & (since < j)[:, None], other=0.0
        )
        x += old.to(tl.float32)
    return x


@triton.jit
def _activated(
    x_ptr, tail_ptr, conv_ptr, slope_ptr, i, c, since, sequence, inside, known, stride, C,
    K: tl.constexpr, SLOPE: tl.constexpr, CARRIED: tl.constexpr,
):  # fmt: skip
    """What the convolution gives, the slope, and sigmoid(slope y)."""
    if K == 0:
        y = _before(x_ptr, tail_ptr, i, c, since, sequence, inside, 0, stride, C, 1, False)
    else:
        y = tl.zeros(inside.shape, tl.float32)
        for j in tl.static_range(K):
            tap = tl.load(conv_ptr + c * K + (K - 1 - j), mask=known, other=0.0).to(tl.float32)
            y += tap[None, :] * _before(x_ptr, tail_ptr, i, c, since, sequence, inside, j, stride, C, K, CARRIED)
    slope = tl.full(c.shape, 1.0, tl.float32)
    if SLOPE:
        slope = tl.load(slope_ptr + c, mask=known, other=0.0).to(tl.float32)
    return y, slope, _sigmoid(y * slope[None, :])


@triton.jit(do_not_specialize=["P"])
def _inputs(
    x_ptr, tail_ptr, conv_ptr, slope_ptr, write_ptr, gain_ptr, since_ptr, sequence_ptr,
    q_ptr, k_ptr, w_ptr, read_ptr, key_ptr,
    P, stride, G, C, width, eps,
    R: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, SLOPE: tl.constexpr, WRITE: tl.constexpr,
    UNITS: tl.constexpr, UNIT: tl.constexpr, CARRIED: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    begin = tl.program_id(0).to(tl.int64) * BT
    i, f = tl.arange(0, BT), tl.arange(0, R)
    c = block * R + f
    known = c < C
    there = begin + i < P
    inside = there[:, None] & known[None, :]
    since = tl.load(since_ptr + begin + i, mask=there, other=0)
    sequence = tl.load(sequence_ptr + begin + i, mask=there, other=0)
    x_ptr += begin * stride
    y, slope, s = _activated(
        x_ptr, tail_ptr, conv_ptr, slope_ptr, i, c, since, sequence, inside, known, stride, C, K, SLOPE, CARRIED
    )
    a = y * s
    if block < 2 * G:
        key = block >= G
        base = begin * (G * R) + (block - G if key else block) * R
        at = i[:, None] * (G * R) + f[None, :]
        squares = tl.sum(a * a, 1)
        z = a / tl.maximum(tl.sqrt(squares), TINY)[:, None] if UNIT else a
        tl.store((k_ptr if key else q_ptr) + base + at, narrow(z, q_ptr.dtype.element_ty), mask=inside)
        if UNITS:
            gain = tl.load(gain_ptr + (R if key else 0) + f).to(tl.float32)
            unit = a * tl.rsqrt(squares / R + eps)[:, None] * gain[None, :]
            tl.store((key_ptr if key else read_ptr) + base + at, narrow(unit, q_ptr.dtype.element_ty), mask=inside)
    else:
        base = begin * width
        at = i[:, None] * width + (c - 2 * G * R)[None, :]
        if WRITE:
            a *= 2.0 * _sigmoid(tl.load(write_ptr + base + at, mask=inside, other=0.0).to(tl.float32))
        tl.store(w_ptr + base + at, narrow(a, w_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _row(x_ptr, t, c, known, stride):
    """Row ``t`` of x, zero before the first."""
    return tl.load(x_ptr + t * stride + c, mask=where_if(known, t >= 0), other=0.0).to(tl.float32)


@triton.jit
def _seen(x, j: tl.constexpr, tail_ptr, c, known, since, sequence, C, K: tl.constexpr, CARRIED: tl.constexpr):
    """``x``, the row ``j`` before a token, where it is of the token's sequence; else that of its tail, or 0."""
    x = tl.where(since >= j, x, 0.0)
    if CARRIED:
        row = sequence * (K - 1) + (K - 1) + since - j
        x += tl.load(tail_ptr + row.to(tl.int64) * C + c, mask=where_if(known, since < j), other=0.0).to(tl.float32)
    return x


@triton.jit
def _tap(conv_ptr, c, known, j: tl.constexpr, K: tl.constexpr):
    """What the input ``j`` tokens before is weighted with; without a convolution 1 of the token itself."""
    tap = tl.full(c.shape, 1.0 if j == 0 else 0.0, tl.float32)
    if K > 0:
        tap = tl.load(conv_ptr + c * K + (K - 1 - j), mask=where_if(known, j < K), other=0.0).to(tl.float32)
    return tap


@triton.jit(do_not_specialize=["P"])
def _inputs_back(
    x_ptr, tail_ptr, conv_ptr, slope_ptr, write_ptr, gain_ptr, since_ptr, sequence_ptr,
    dq_ptr, dk_ptr, dw_ptr, dread_ptr, dkey_ptr,
    dx_ptr, dhead_ptr, dwrite_ptr, part_ptr,
    P, stride, G, C, width, eps,
    R: tl.constexpr, K: tl.constexpr, RUN: tl.constexpr, SLOPE: tl.constexpr, WRITE: tl.constexpr,
    UNITS: tl.constexpr, UNIT: tl.constexpr, CARRIED: tl.constexpr,
):  # fmt: skip
    """One warp walks a run of tokens from the last to the first, so that the convolution's neighbours on both sides and
    the sums over tokens stay in registers: nothing but the norms crosses threads. The K - 1 tokens after the run are
    walked too, for what they owe to it. ``part_ptr [programs, C, 6]``: sums of the gradients of taps (4), slope, gain.
    """
    block = tl.program_id(1)
    f = tl.arange(0, R)
    c = block * R + f
    known = c < C
    kind = dx_ptr.dtype.element_ty
    BACK: tl.constexpr = K - 1 if K > 0 else 0
    first = tl.program_id(0).to(tl.int64) * RUN
    last = tl.minimum(first + RUN, P)
    top = tl.minimum(last + BACK, P)
    group, key = block % G, block >= G  # where the block is a group's q or k
    slope, gain = tl.full((R,), 1.0, tl.float32), tl.full((R,), 1.0, tl.float32)
    if SLOPE:
        slope = tl.load(slope_ptr + c, mask=known, other=0.0).to(tl.float32)
    # A row's gradient, and beside it the unit's gradient (q, k) or the gate's logits (values).
    if block < 2 * G:
        grad_ptr = (dk_ptr if key else dq_ptr) + group * R + f
        other_ptr = (dkey_ptr if key else dread_ptr) + group * R + f
        pace, other_known = G * R, where_if(known, UNITS)
        if UNITS:
            gain = tl.load(gain_ptr + (R if key else 0) + f).to(tl.float32)
    else:
        grad_ptr = dw_ptr + (c - 2 * G * R)
        other_ptr = (write_ptr if WRITE else dw_ptr) + (c - 2 * G * R)
        pace, other_known = width, where_if(known, WRITE)
    tap0, tap1 = _tap(conv_ptr, c, known, 0, K), _tap(conv_ptr, c, known, 1, K)
    tap2, tap3 = _tap(conv_ptr, c, known, 2, K), _tap(conv_ptr, c, known, 3, K)
    zero = tl.zeros((R,), tl.float32)
    d1, d2, d3 = zero, zero, zero  # dy of the later tokens of the sequence
    dtap0, dtap1, dtap2, dtap3, dslope, dgain = zero, zero, zero, zero, zero, zero
    x0, x1, x2, x3 = _row(x_ptr, top - 1, c, known, stride), zero, zero, zero
    if K > 1:
        x1 = _row(x_ptr, top - 2, c, known, stride)
    if K > 2:
        x2 = _row(x_ptr, top - 3, c, known, stride)
    if K > 3:
        x3 = _row(x_ptr, top - 4, c, known, stride)
    grad = tl.load(grad_ptr + (top - 1) * pace, mask=known, other=0.0)
    other = tl.load(other_ptr + (top - 1) * pace, mask=other_known, other=0.0)
    for n in range(0, (top - first).to(tl.int32)):
        t = top - 1 - n
        own = t < last
        da, with_it = grad.to(tl.float32), other.to(tl.float32)
        # The next token's rows are on their way while this one is computed.
        more = t > first
        grad = tl.load(grad_ptr + (t - 1) * pace, mask=where_if(known, more), other=0.0)
        other = tl.load(other_ptr + (t - 1) * pace, mask=where_if(other_known, more), other=0.0)
        before = _row(x_ptr, t - (K if K > 0 else 1), c, where_if(known, more), stride)
        since = tl.load(since_ptr + t)
        sequence = tl.load(sequence_ptr + t)
        y = tap0 * x0
        s1, s2, s3 = zero, zero, zero
        if K > 1:
            s1 = _seen(x1, 1, tail_ptr, c, known, since, sequence, C, K, CARRIED)
            y += tap1 * s1
        if K > 2:
            s2 = _seen(x2, 2, tail_ptr, c, known, since, sequence, C, K, CARRIED)
            y += tap2 * s2
        if K > 3:
            s3 = _seen(x3, 3, tail_ptr, c, known, since, sequence, C, K, CARRIED)
            y += tap3 * s3
        s = _sigmoid(y * slope)
        a = y * s
        if block < 2 * G:
            squares = tl.sum(a * a, 0)
            if UNIT:
                r = 1.0 / tl.maximum(tl.sqrt(squares), TINY)
                z = a * r
                da = (da - z * tl.sum(da * z, 0)) * r
            if UNITS:
                r = tl.rsqrt(squares / R + eps)
                unit = a * r
                dgain += tl.where(own, with_it * unit, 0.0)
                with_it *= gain
                da += (with_it - unit * (tl.sum(with_it * unit, 0) / R)) * r
        elif WRITE:
            g = _sigmoid(with_it)
            tl.store(
                dwrite_ptr + t * width + (c - 2 * G * R),
                narrow(2.0 * da * a * g * (1.0 - g), dwrite_ptr.dtype.element_ty),
                mask=where_if(known, own),
            )
            da *= 2.0 * g
        bent = y * s * (1.0 - s)
        dslope += tl.where(own, da * y * bent, 0.0)
        dy = tl.where(known, da * (s + slope * bent), 0.0)
        if CARRIED:  # what reaches back into the tails is added up elsewhere
            to = dhead_ptr + (sequence * BACK + since).to(tl.int64) * C + c
            tl.store(to, dy, mask=where_if(known, own & (since < BACK)))
        dx = tap0 * dy + tap1 * d1 + tap2 * d2 + tap3 * d3
        tl.store(dx_ptr + t * C + c, narrow(dx, kind), mask=where_if(known, own))
        mine = tl.where(own, dy, 0.0)
        dtap0 += mine * x0
        dtap1 += mine * s1
        dtap2 += mine * s2
        dtap3 += mine * s3
        # Where a sequence begins, nothing after it reaches back.
        d3 = tl.where(since > 0, d2, 0.0)
        d2 = tl.where(since > 0, d1, 0.0)
        d1 = tl.where(since > 0, dy, 0.0)
        x0 = x1 if K > 1 else before
        if K > 1:
            x1 = x2 if K > 2 else before
        if K > 2:
            x2 = x3 if K > 3 else before
        if K > 3:
            x3 = before
    part = part_ptr + (tl.program_id(0).to(tl.int64) * C + c) * 6
    tl.store(part, dtap0, mask=known)
    tl.store(part + 1, dtap1, mask=known)
    tl.store(part + 2, dtap2, mask=known)
    tl.store(part + 3, dtap3, mask=known)
    tl.store(part + 4, dslope, mask=known)
    tl.store(part + 5, dgain, mask=known)


@triton.jit
def gate_rows(row, known, up_ptr, RANK: tl.constexpr):
    """Rows of a gate's second matrix; weights, which may be read before what they are multiplied by is there."""
    j = tl.arange(0, RANK)
    return tl.load(up_ptr + (row[:, None] * RANK + j[None, :]), mask=known[:, None], other=0.0)


@triton.jit
def gate_logits(up, row, known, low_ptr, bias_ptr, RANK: tl.constexpr):
    """``up low + bias``: the logits of those rows, the gate's first product at ``low_ptr``."""
    low = tl.load(low_ptr + tl.arange(0, RANK)).to(tl.float32)
    bias = tl.load(bias_ptr + row, mask=known, other=0.0).to(tl.float32)
    return tl.sum(up.to(tl.float32) * low[None, :], 1) + bias


@triton.jit
def _inputs_step(
    x_ptr, tail_ptr, conv_ptr, slope_ptr, write_ptr, bias_ptr, gain_ptr, index_ptr, q_ptr, k_ptr, w_ptr, read_ptr,
    key_ptr, stride, low, G, C, width, eps,
    R: tl.constexpr, K: tl.constexpr, SLOPE: tl.constexpr, WRITE: tl.constexpr, UNITS: tl.constexpr,
    UNIT: tl.constexpr, RANK: tl.constexpr, INDEXED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`_inputs` of one token; the tails (a pool) move on in place. Rows without a place in the pool give zeros.
    RANK: ``write`` is the second matrix of the gate's logits, whose first product stands in x from ``low`` on."""
    b, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    f = tl.arange(0, R)
    c = block * R + f
    if RANK > 0:
        gate, gated = c - 2 * G * R, (c >= 2 * G * R) & (c < C)
        up = gate_rows(gate, gated, write_ptr, RANK)
    after_previous(PDL)
    row = place_of(index_ptr, b, INDEXED)
    here = where_if(c < C, row >= 0)
    x = tl.load(x_ptr + b * stride + c, mask=here, other=0.0)
    y = x.to(tl.float32)
    if K > 0:
        tail = tail_ptr + row * (K - 1) * C + c
        y *= tl.load(conv_ptr + c * K + (K - 1), mask=here, other=0.0).to(tl.float32)
        for j in tl.static_range(K - 1):
            tap = tl.load(conv_ptr + c * K + j, mask=here, other=0.0).to(tl.float32)
            y += tap * tl.load(tail + j * C, mask=here, other=0.0).to(tl.float32)
        for j in tl.static_range(K - 1):
            new = x.to(tail_ptr.dtype.element_ty)
            if j < K - 2:
                new = tl.load(tail + (j + 1) * C, mask=here, other=0.0)
            tl.debug_barrier()  # read before it is overwritten, by whichever thread
            tl.store(tail + j * C, new, mask=here)
    slope = tl.full((R,), 1.0, tl.float32)
    if SLOPE:
        slope = tl.load(slope_ptr + c, mask=here, other=0.0).to(tl.float32)
    a = y * _sigmoid(y * slope)
    if block < 2 * G:
        key = block >= G
        at = b * (G * R) + (block - G if key else block) * R + f
        squares = tl.sum(a * a, 0)
        z = a / tl.maximum(tl.sqrt(squares), TINY) if UNIT else a
        tl.store((k_ptr if key else q_ptr) + at, narrow(z, q_ptr.dtype.element_ty), mask=c < C)
        if UNITS:
            gain = tl.load(gain_ptr + (R if key else 0) + f).to(tl.float32)
            unit = a * tl.rsqrt(squares / R + eps) * gain
            tl.store((key_ptr if key else read_ptr) + at, narrow(unit, q_ptr.dtype.element_ty), mask=c < C)
    else:
        at = b * width + c - 2 * G * R
        if RANK > 0:
            a *= 2.0 * _sigmoid(gate_logits(up, gate, gated, x_ptr + b * stride + low, bias_ptr, RANK))
        elif WRITE:
            a *= 2.0 * _sigmoid(tl.load(write_ptr + at, mask=here, other=0.0).to(tl.float32))
        tl.store(w_ptr + at, narrow(a, w_ptr.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=["rows"])
def _outputs(
    y_ptr, read_ptr, share_ptr, gate_ptr, out_ptr, rows, eps,
    V: tl.constexpr, BT: tl.constexpr, READ: tl.constexpr, GATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_previous(PDL)
    begin = tl.program_id(0).to(tl.int64) * BT
    t = begin + tl.arange(0, BT)
    there = t < rows
    at = begin * V + (tl.arange(0, BT)[:, None] * V + tl.arange(0, V)[None, :])
    inside = there[:, None]
    z = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if READ:
        share = _sigmoid(tl.load(share_ptr + t, mask=there, other=0.0).to(tl.float32))
        z += share[:, None] * tl.load(read_ptr + at, mask=inside, other=0.0).to(tl.float32)
    z *= tl.rsqrt(tl.sum(z * z, 1) / V + eps)[:, None]
    if GATE:
        z *= _sigmoid(tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32))
    tl.store(out_ptr + at, narrow(z, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _outputs_back(
    y_ptr, read_ptr, share_ptr, gate_ptr, dout_ptr, dy_ptr, dread_ptr, dshare_ptr, dgate_ptr, rows, eps,
    V: tl.constexpr, BT: tl.constexpr, READ: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0).to(tl.int64) * BT
    t = begin + tl.arange(0, BT)
    there = t < rows
    at = begin * V + (tl.arange(0, BT)[:, None] * V + tl.arange(0, V)[None, :])
    inside = there[:, None]
    kind = dy_ptr.dtype.element_ty
    z = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if READ:
        share = _sigmoid(tl.load(share_ptr + t, mask=there, other=0.0).to(tl.float32))
        read = tl.load(read_ptr + at, mask=inside, other=0.0).to(tl.float32)
        z += share[:, None] * read
    r = tl.rsqrt(tl.sum(z * z, 1) / V + eps)[:, None]
    z *= r
    dz = tl.load(dout_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if GATE:
        g = _sigmoid(tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32))
        tl.store(dgate_ptr + at, narrow(dz * z * g * (1.0 - g), kind), mask=inside)
        dz *= g
    dz = (dz - z * (tl.sum(dz * z, 1) / V)[:, None]) * r
    tl.store(dy_ptr + at, narrow(dz, kind), mask=inside)
    if READ:
        tl.store(dread_ptr + at, narrow(dz * share[:, None], kind), mask=inside)
        dshare = tl.sum(dz * read, 1) * share * (1.0 - share)
        tl.store(dshare_ptr + t, narrow(dshare, dshare_ptr.dtype.element_ty), mask=there)


@triton.jit
def _gates_step(
    heads_ptr, rate_ptr, erase_ptr, decay_ptr, share_ptr, beta_ptr, heads_stride, erase_stride, H, E, erase_max,
    BH: tl.constexpr, BE: tl.constexpr, DECAY: tl.constexpr, SHARE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The heads' scalars of one token."""
    after_previous(PDL)
    b = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BH)
    if DECAY:
        a = tl.load(heads_ptr + b * heads_stride + h, mask=h < H, other=0.0).to(tl.float32)
        rate = tl.load(rate_ptr + h, mask=h < H, other=0.0).to(tl.float32)
        tl.store(decay_ptr + b * H + h, decay_of(a, rate), mask=h < H)
    if SHARE:
        at = b * heads_stride + (H if DECAY else 0) + h
        tl.store(share_ptr + b * H + h, tl.load(heads_ptr + at, mask=h < H, other=0.0), mask=h < H)
    e = tl.arange(0, BE)
    erase = tl.load(erase_ptr + b * erase_stride + e, mask=e < E, other=0.0).to(tl.float32)
    tl.store(beta_ptr + b * E + e, erase_max * _sigmoid(erase), mask=e < E)


# -- host ----------------------------------------------------------------------------------------------------------


def candidates() -> tuple[Table, Table]:
    """Launch tables, the fast one first (see perceive/kernels.py)."""
    safe = {kernel: {"num_warps": 2} if "BT" not in LAUNCH[kernel] else {"BT": 32, "num_warps": 2} for kernel in LAUNCH}
    return LAUNCH, {**safe, "_inputs_back": {"RUN": 64, "num_warps": 2}}


def sizes_of(R: int, V: int, dtype: torch.dtype) -> Sizes:
    """What `tune` knows a launch by."""
    return ("R", R), ("V", V), ("dtype", str(dtype).removeprefix("torch."))


@lru_cache(maxsize=64)
def _places(bounds: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each token: how many of its sequence are before it, and the number of the sequence (int32)."""
    ends = torch.tensor(bounds, dtype=torch.int32)
    sequence = torch.repeat_interleave(torch.arange(len(bounds) - 1, dtype=torch.int32), ends.diff())
    since = torch.arange(bounds[-1], dtype=torch.int32) - ends[:-1][sequence.long()]
    return since.to(device), sequence.to(device)


def _constants(conv: Tensor | None, slope, write, gain, tail) -> dict[str, Any]:
    return {
        "K": 0 if conv is None else conv.shape[1],
        "SLOPE": slope is not None,
        "WRITE": write is not None,
        "UNITS": gain is not None,
        "CARRIED": tail is not None,
    }


def _like(x: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    """Room for a gradient of each; empty where there is none."""
    return tuple(x.new_empty(0) if y is None else torch.empty_like(y) for y in others)


_Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _fresh_inputs(x: Tensor, gain: Tensor | None, G: int, R: int, heads: list[int]) -> _Five:
    P = x.shape[0]
    q, k = x.new_empty((P, G, R)), x.new_empty((P, G, R))
    read, key = (x.new_empty((P if gain is not None else 0, G, R)) for _ in range(2))
    return q, k, x.new_empty((P, G, *heads)), read, key


@torch.library.custom_op("llm_mlp::head_inputs", mutates_args=())
def _forward(
    x: Tensor, conv: Tensor | None, slope: Tensor | None, write: Tensor | None,
    gain: Tensor | None, tail: Tensor | None, bounds: list[int], G: int, R: int, heads: list[int],
    eps: float, unit: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k ``[P, G, R]``, w ``[P, G, m, V]`` and the units' reads and keys ``[P, G, R]`` (empty without a gain)."""
    out = _fresh_inputs(x, gain, G, R, heads)
    (P, C), width = x.shape, out[2][0].numel()
    way = plan("heads", sizes_of(R, heads[1], x.dtype))
    launch = way.of(candidates())["_inputs"]
    since, sequence = _places(tuple(bounds), x.device)
    with way.compiling():
        _inputs[(triton.cdiv(P, launch["BT"]), triton.cdiv(C, R))](
            x, tail, conv, slope, write, gain, since, sequence, *out, P, x.stride(0), G, C, width, eps,
            R=R, UNIT=unit, **_constants(conv, slope, write, gain, tail), **launch,
        )  # fmt: skip
    return out


@_forward.register_fake
def _(x, conv, slope, write, gain, tail, bounds, G, R, heads, eps, unit):
    return _fresh_inputs(x, gain, G, R, heads)


@torch.library.custom_op("llm_mlp::head_inputs_backward", mutates_args=())
def _backward(
    x: Tensor, conv: Tensor | None, slope: Tensor | None, write: Tensor | None,
    gain: Tensor | None, tail: Tensor | None, dq: Tensor, dk: Tensor, dw: Tensor, dread: Tensor,
    dkey: Tensor, bounds: list[int], R: int, eps: float, unit: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, conv, slope, write, gain and tail (empty where there is none)."""
    (P, C), G, (m, V) = x.shape, dq.shape[1], dw.shape[2:]
    constants = _constants(conv, slope, write, gain, tail)
    K, width, N = constants["K"], G * m * V, len(bounds) - 1
    back = max(K - 1, 0)
    way = plan("heads", sizes_of(R, V, x.dtype))
    launch = way.of(candidates())["_inputs_back"]
    programs = triton.cdiv(P, launch["RUN"])
    dx = x.new_empty((P, C))
    (dwrite,) = _like(x, write)
    dhead = torch.zeros((N if tail is not None else 0, back, C), dtype=torch.float32, device=x.device)
    part = torch.empty((programs, C, TAPS + 2), dtype=torch.float32, device=x.device)
    since, sequence = _places(tuple(bounds), x.device)
    with way.compiling():
        _inputs_back[(programs, triton.cdiv(C, R))](
            x, tail, conv, slope, write, gain, since, sequence,
            *(aligned(d) for d in (dq, dk, dw, dread, dkey)), dx, dhead, dwrite, part,
            P, x.stride(0), G, C, width, eps, R=R, UNIT=unit, **constants, **launch,
        )  # fmt: skip
    sums = part.sum(0)
    dtail = x.new_empty(0)
    if tail is not None and conv is not None:
        # Token s of a sequence reads row K - 1 + s - j of (tail, tokens) at j tokens before it: a tail's row if s < j.
        dtail = torch.zeros_like(tail, dtype=torch.float32)
        for s in range(back):
            for j in range(s + 1, K):
                dtail[:, back + s - j] += dhead[:, s] * conv[:, back - j].float()
        dtail = dtail.to(tail.dtype)
    return (
        dx,
        x.new_empty(0) if conv is None else sums[:, :K].flip(1).to(conv.dtype, copy=True),
        x.new_empty(0) if slope is None else sums[:, TAPS].to(slope.dtype, copy=True),
        dwrite,
        x.new_empty(0) if gain is None else sums[: 2 * G * R, TAPS + 1].view(2, G, R).sum(1).to(gain.dtype),
        dtail,
    )


@_backward.register_fake
def _(x, conv, slope, write, gain, tail, dq, dk, dw, dread, dkey, bounds, R, eps, unit):
    return x.new_empty(x.shape), *_like(x, conv, slope, write, gain, tail)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.bounds, _, ctx.R, _, ctx.eps, ctx.unit = inputs
    ctx.save_for_backward(*tensors)
    ctx.given = [t is not None for t in tensors]


def _differentiate(ctx, *gradients):
    rest = (ctx.bounds, ctx.R, ctx.eps, ctx.unit)
    found = _backward(*ctx.saved_tensors, *gradients, *rest)
    return *(d if given else None for d, given in zip(found, ctx.given, strict=True)), *(None,) * 6


_forward.register_autograd(_differentiate, setup_context=_save)


def inputs(
    x: Tensor,
    conv: Tensor | None,
    slope: Tensor | None,
    write: Tensor | None,
    gain: Tensor | None,
    tail: Tensor | None,
    bounds: list[int] | None,
    *,
    groups: int,
    read_width: int,
    heads: tuple[int, int],
    eps: float,
    unit: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the ops take, from the projections of a layer.

    Args:
        x: ``[B, T, C]``, q, k ``[G R]`` each and the values; a slice along C of a wider tensor will do.
        conv: taps ``[C, K]``. slope: of the activation ``[C]``. gain: of the units' reads and keys ``[2, R]``.
        write: logits of the gate on what is written ``[B, T, G m V]``.
        tail: the K - 1 inputs before the first ``[N, K-1, C]``; None is zeros. bounds: ends of packed sequences.
        heads: m and V of a group. eps: of the units' norm. unit: whether q and k are made of unit length.

    Returns:
        q, k ``[B, T, G, R]``, w ``[B, T, G, m, V]``, and reads and keys of the units ``[B, T, G, R]`` (``[0, ...]``
        without a gain), in x's dtype.
    """
    B, T, C = x.shape
    ends = list(range(0, B * T + 1, T)) if bounds is None else bounds

    def flat(y: Tensor | None) -> Tensor | None:
        return None if y is None else aligned(y.flatten(0, 1))

    rows = x.flatten(0, 1)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    out = _forward(
        rows, conv, slope, flat(write), gain, None if tail is None else tail.contiguous(), ends,
        groups, read_width, list(heads), eps, unit,
    )  # fmt: skip
    *rows_of, read, key = out
    shaped = [y.unflatten(0, (B, T)) for y in rows_of]
    return *shaped, *((y.unflatten(0, (B, T)) if gain is not None else y) for y in (read, key))


@torch.library.custom_op("llm_mlp::head_inputs_step", mutates_args=("tails",))
def _step(
    x: Tensor, conv: Tensor | None, slope: Tensor | None, write: Tensor | None, gain: Tensor | None,
    tails: Tensor | None, indices: Tensor | None, G: int, R: int, heads: list[int], eps: float, unit: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    out = _fresh_inputs(x, gain, G, R, heads)
    B, C = x.shape
    constants = _constants(conv, slope, write, gain, None)
    constants.pop("CARRIED")
    way = plan("heads_step", sizes_of(R, heads[1], x.dtype))
    with way.compiling():
        _inputs_step[(B, triton.cdiv(C, R))](
            x, tails, conv, slope, write, None, gain, indices, *out, x.stride(0), 0, G, C, out[2][0].numel(), eps,
            R=R, UNIT=unit, **constants, RANK=0, INDEXED=indices is not None, **overlap(x, B),
            **way.of(candidates())["_inputs_step"],
        )  # fmt: skip
    return out


@_step.register_fake
def _(x, conv, slope, write, gain, tails, indices, G, R, heads, eps, unit):
    return _fresh_inputs(x, gain, G, R, heads)


def inputs_step(
    x: Tensor,
    conv: Tensor | None,
    slope: Tensor | None,
    write: Tensor | None,
    gain: Tensor | None,
    tails: Tensor | None,
    indices: Tensor | None,
    *,
    groups: int,
    read_width: int,
    heads: tuple[int, int],
    eps: float,
    unit: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`inputs` of one token of each sequence: x ``[B, C]``; ``tails [N, K-1, C]``, contiguous, change in place."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    write = None if write is None else aligned(write)
    return _step(x, conv, slope, write, gain, tails, indices, groups, read_width, list(heads), eps, unit)


@torch.library.custom_op("llm_mlp::gates_step", mutates_args=())
def _gates(
    heads: Tensor, log_rate: Tensor | None, erase: Tensor, shape: list[int], erase_max: float
) -> tuple[Tensor, Tensor, Tensor]:
    (B, width), H, E = heads.shape, shape[0] * shape[1], erase.shape[-1]
    decays = H if log_rate is not None else 0
    out = _fresh_gates(heads, log_rate, erase, shape)
    way = plan("gates_step", sizes_of(0, 0, heads.dtype))
    with way.compiling():
        _gates_step[(B,)](
            heads, log_rate, erase, *out, heads.stride(0), erase.stride(0), H, E, erase_max,
            BH=triton.next_power_of_2(H), BE=triton.next_power_of_2(E), DECAY=decays > 0, SHARE=width > decays,
            **overlap(heads, B), **way.of(candidates())["_gates_step"],
        )  # fmt: skip
    return out


def _fresh_gates(
    heads: Tensor, log_rate: Tensor | None, erase: Tensor, shape: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    B, H = len(heads), shape[0] * shape[1]
    decay = heads.new_empty((B, *shape), dtype=torch.float32)
    if log_rate is None:
        decay.zero_()
    shares = heads.shape[1] > (H if log_rate is not None else 0)
    return decay, heads.new_empty((B if shares else 0, *shape)), heads.new_empty(erase.shape, dtype=torch.float32)


@_gates.register_fake
def _(heads, log_rate, erase, shape, erase_max):
    return _fresh_gates(heads, log_rate, erase, shape)


def gates_step(
    heads: Tensor, log_rate: Tensor | None, erase: Tensor, shape: tuple[int, int], erase_max: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As `llm_mlp.ops.heads.gates_step`: logits ``[B, H or 2 H]`` and ``[B, E]``."""
    heads, erase = (x if x.stride(-1) == 1 else x.contiguous() for x in (heads, erase))
    decay, share, beta = _gates(heads, log_rate, erase, list(shape), erase_max)
    return decay, share if len(share) else None, beta


@torch.library.custom_op("llm_mlp::head_outputs", mutates_args=())
def _outputs_forward(y: Tensor, read: Tensor | None, share: Tensor | None, gate: Tensor | None, eps: float) -> Tensor:
    out, V = torch.empty_like(y), y.shape[-1]
    way = plan("heads", sizes_of(0, V, y.dtype))
    launch, rows = way.of(candidates())["_outputs"], y.numel() // V
    BT = launch["BT"] * max(1, 128 // V)
    with way.compiling():
        _outputs[(triton.cdiv(rows, BT),)](
            y, read, share, gate, out, rows, eps, V=V, READ=read is not None, GATE=gate is not None,
            **overlap(y, rows // 32), **{**launch, "BT": BT},
        )  # fmt: skip
    return out


@_outputs_forward.register_fake
def _(y, read, share, gate, eps):
    return torch.empty_like(y)


@torch.library.custom_op("llm_mlp::head_outputs_backward", mutates_args=())
def _outputs_backward(
    y: Tensor, read: Tensor | None, share: Tensor | None, gate: Tensor | None, dout: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of y, read, share and gate (empty where there is none)."""
    V = y.shape[-1]
    dy, dread, dshare, dgate = _like(y, y, read, share, gate)
    way = plan("heads", sizes_of(0, V, y.dtype))
    launch, rows = way.of(candidates())["_outputs_back"], y.numel() // V
    BT = launch["BT"] * max(1, 128 // V)
    with way.compiling():
        _outputs_back[(triton.cdiv(rows, BT),)](
            y, read, share, gate, aligned(dout), dy, dread, dshare, dgate, rows, eps, V=V, READ=read is not None,
            GATE=gate is not None, **{**launch, "BT": BT},
        )  # fmt: skip
    return dy, dread, dshare, dgate


@_outputs_backward.register_fake
def _(y, read, share, gate, dout, eps):
    return _like(y, y, read, share, gate)


def _save_outputs(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)
    ctx.given = [t is not None for t in tensors]


def _differentiate_outputs(ctx, dout):
    found = _outputs_backward(*ctx.saved_tensors, dout, ctx.eps)
    return *(d if given else None for d, given in zip(found, ctx.given, strict=True)), None


_outputs_forward.register_autograd(_differentiate_outputs, setup_context=_save_outputs)


def outputs(y: Tensor, read: Tensor | None, share: Tensor | None, gate: Tensor | None, eps: float) -> Tensor:
    """``rms_norm(y + sigmoid(share) read) * sigmoid(gate)``, the norm over each head.

    Args:
        y, read: ``[..., V]`` in one dtype. share: logits ``[...]``. gate: logits, as many as y has numbers.
    """
    given = [None if x is None else aligned(x) for x in (y, read, share, gate)]
    return _outputs_forward(*given, eps)  # type: ignore[arg-type]
