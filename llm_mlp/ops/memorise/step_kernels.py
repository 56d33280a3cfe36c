"""`memorise_step` as Triton kernels: a program reads the units of one group of one sequence, and changes them in place.

Rows are read once, those in use only; of few sequences by several programs, whose parts the second kernel adds in their
order. Where the token fills its block, a second kernel chooses the slots (in the first
it would hold registers that every token pays for): it counts the rows ahead of each (by score, ties by age) and moves
rows from the last slot to the first. Slots are sorted, so a row never moves towards the first slot, and no row is
overwritten before it has moved.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_mlp.ops.memorise.units import Units, raw
from llm_mlp.ops.tiles import after_previous, narrow
from llm_mlp.ops.tune import Sizes, Table, aligned, overlap, plan

LAUNCH: Table = {
    "_step": {"BK": 32, "num_warps": 4},
    "_close": {"num_warps": 4},
}
PROGRAMS = 264  # that give every SM work: fewer sequences are read in parts, because the time of one program counts
MOST = 16  # parts


@triton.jit(do_not_specialize=["G"])
def _step(
    q_ptr, k_ptr, w_ptr, score_ptr, sink_ptr, key_ptr, value_ptr, kept_ptr, length_ptr, index_ptr, y_ptr,
    full_ptr, part_ptr, G, width, scale,
    R: tl.constexpr, BW: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, BK: tl.constexpr, M: tl.constexpr,
    BM: tl.constexpr, SOFTMAX: tl.constexpr, INDEXED: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_previous(PDL)
    b, g, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row = b
    if INDEXED:
        row = tl.load(index_ptr + b).to(tl.int64)
    r, c = tl.arange(0, R), tl.arange(0, BW)
    inside = c < width
    at = b * G + g
    if row < 0:
        if part == 0:
            tl.store(y_ptr + at * width + c, tl.zeros((BW,), y_ptr.dtype.element_ty), mask=inside)
            tl.store(full_ptr + at, 0)
    else:
        ROWS: tl.constexpr = SLOTS + BLOCK
        units = (row * G + g) * ROWS
        keys, values, kept = key_ptr + units * R, value_ptr + units * width, kept_ptr + units
        filled = (tl.load(length_ptr + row) % BLOCK).to(tl.int32)
        new = SLOTS + filled
        q = tl.load(q_ptr + at * R + r).to(tl.float32) * scale
        own_k = narrow(tl.load(k_ptr + at * R + r).to(tl.float32), key_ptr.dtype.element_ty)
        own_w = tl.load(w_ptr + at * width + c, mask=inside, other=0.0).to(tl.float32)
        own_w = narrow(own_w, value_ptr.dtype.element_ty)
        if part == 0:
            tl.store(keys + new * R + r, own_k)
            tl.store(values + new * width + c, own_w, mask=inside)
            i = tl.arange(0, BM)
            tl.store(kept + new, tl.sum(tl.load(score_ptr + at * M + i, mask=i < M, other=0.0), 0))
            tl.store(full_ptr + at, (filled == BLOCK - 1).to(tl.int32))
        sink = tl.load(sink_ptr + g).to(tl.float32)
        own_z = tl.sum(q * own_k.to(tl.float32), 0)
        if SOFTMAX:
            best = tl.maximum(own_z, sink)
            own_p = tl.exp(own_z - best)
            total = own_p + tl.exp(sink - best)
        else:
            best = sink
            own_p = tl.maximum(own_z, 0.0) * tl.maximum(own_z, 0.0)
            total = own_p + tl.exp(sink)
        if part > 0:  # the token and the sink are the first part's
            own_p, total = 0.0, 0.0
        y = own_p * own_w.to(tl.float32)
        span = (new + PARTS - 1) // PARTS
        end = tl.minimum(part * span + span, new)
        for a in range(part * span, end, BK):
            j = a + tl.arange(0, BK)
            there = (j < end)[:, None]  # empty slots are read too: their rows need not wait for the scores
            slot = tl.load(kept + j, mask=j < SLOTS, other=0.0)
            seen = (j < end) & (slot > -float("inf"))
            key = tl.load(keys + (j[:, None] * R + r[None, :]), mask=there, other=0.0).to(tl.float32)
            value = tl.load(values + (j[:, None] * width + c[None, :]), mask=there & inside[None, :], other=0.0).to(
                tl.float32
            )
            z = tl.sum(key * q[None, :], 1)
            if SOFTMAX:
                higher = tl.maximum(best, tl.max(tl.where(seen, z, -float("inf")), 0))
                p = tl.where(seen, tl.exp(tl.where(seen, z, higher) - higher), 0.0)
                shrink = tl.exp(best - higher)
                total, y, best = total * shrink, y * shrink, higher
            else:
                z = tl.where(seen, tl.maximum(z, 0.0), 0.0)
                p = z * z
            total += tl.sum(p, 0)
            y += tl.sum(p[:, None] * value, 0)
        if PARTS == 1:
            tl.store(y_ptr + at * width + c, narrow(y / total, y_ptr.dtype.element_ty), mask=inside)
        else:
            mine = part_ptr + (at * PARTS + part) * (BW + 2)
            tl.store(mine + c, y)
            tl.store(mine + BW, total)
            tl.store(mine + BW + 1, best)


@triton.jit(do_not_specialize=["G"])
def _close(
    key_ptr, value_ptr, kept_ptr, length_ptr, index_ptr, full_ptr, part_ptr, y_ptr, G, width,
    R: tl.constexpr, BW: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, J: tl.constexpr, BS: tl.constexpr,
    INDEXED: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One more token in each sequence; where it has filled its block (`_step` says so), the slots are chosen. Parts of
    the read are added."""
    after_previous(PDL)
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = b
    if INDEXED:
        row = tl.load(index_ptr + b).to(tl.int64)
    if row >= 0:
        if PARTS > 1:
            p, d = tl.arange(0, PARTS), tl.arange(0, BW)
            parts = part_ptr + ((b * G + g) * PARTS + p) * (BW + 2)
            total, best = tl.load(parts + BW), tl.load(parts + BW + 1)
            weight = tl.exp(best - tl.max(best, 0))
            y = tl.sum(weight[:, None] * tl.load(parts[:, None] + d[None, :]), 0) / tl.sum(weight * total, 0)
            tl.store(y_ptr + (b * G + g) * width + d, narrow(y, y_ptr.dtype.element_ty), mask=d < width)
        if g == 0:
            tl.store(length_ptr + row, tl.load(length_ptr + row) + 1)
        if tl.load(full_ptr + b * G + g) != 0:
            ROWS: tl.constexpr = SLOTS + BLOCK
            c = tl.arange(0, BW)
            inside = c < width
            r = tl.arange(0, R)
            units = (row * G + g) * ROWS
            keys, values, kept = key_ptr + units * R, value_ptr + units * width, kept_ptr + units
            j = tl.arange(0, J)
            score = tl.load(kept + j, mask=j < ROWS, other=-float("inf"))
            rank = tl.zeros((J,), tl.int32)
            for a in range(0, ROWS, 32):
                i = a + tl.arange(0, 32)
                other = tl.load(kept + i, mask=i < ROWS, other=-float("inf"))
                ahead = (other[None, :] > score[:, None]) | (
                    (other[None, :] == score[:, None]) & (i[None, :] < j[:, None])
                )
                rank += tl.sum(ahead.to(tl.int32), 1)
            STEPS: tl.constexpr = (SLOTS + BS - 1) // BS
            for step in range(STEPS):
                s = (STEPS - 1 - step) * BS + tl.arange(0, BS)
                mine = rank[None, :] == s[:, None]
                place = tl.sum(tl.where(mine, j[None, :], 0), 1)
                top = tl.max(tl.where(mine, score[None, :], -float("inf")), 1)
                there, used = (s < SLOTS)[:, None], (top > -float("inf"))[:, None]
                key = tl.load(keys + (place[:, None] * R + r[None, :]), mask=there & used, other=0)
                value = tl.load(
                    values + (place[:, None] * width + c[None, :]), mask=there & used & inside[None, :], other=0
                )
                tl.debug_barrier()
                tl.store(keys + (s[:, None] * R + r[None, :]), key, mask=there)
                tl.store(values + (s[:, None] * width + c[None, :]), value, mask=there & inside[None, :])
                tl.store(kept + s, top, mask=s < SLOTS)
                tl.debug_barrier()
            for a in range(SLOTS, ROWS, BS):
                o = a + tl.arange(0, BS)
                open_ = (o < ROWS)[:, None]
                tl.store(keys + (o[:, None] * R + r[None, :]), tl.zeros((BS, R), key_ptr.dtype.element_ty), mask=open_)
                tl.store(
                    values + (o[:, None] * width + c[None, :]),
                    tl.zeros((BS, BW), value_ptr.dtype.element_ty),
                    mask=open_ & inside[None, :],
                )
                tl.store(kept + o, tl.full((BS,), -float("inf"), tl.float32), mask=o < ROWS)


def candidates() -> tuple[Table, Table]:
    """Launch tables, the fast one first (see perceive/kernels.py)."""
    safe = {"BK": 16, "num_warps": 2}
    return LAUNCH, {"_step": safe, "_close": {"num_warps": 2}}


def sizes_of(
    R: int, width: int, block: int, slots: int, activation: str, dtype: torch.dtype, rows: torch.dtype
) -> Sizes:
    """What `tune` knows a launch by; ``rows``: dtype of keys and values."""
    kinds = (str(x).removeprefix("torch.") for x in (rows, dtype))
    sizes = (("R", R), ("width", width), ("block", block), ("slots", slots), ("activation", activation))
    return *sizes, *zip(("rows", "dtype"), kinds, strict=True)


@torch.library.custom_op("llm_mlp::memorise_step", mutates_args=("keys", "values", "scores", "length"))
def _memorise_step(
    q: Tensor, k: Tensor, w: Tensor, score: Tensor, sink: Tensor, keys: Tensor, values: Tensor, scores: Tensor,
    length: Tensor, indices: Tensor | None, block: int, slots: int, activation: str,
) -> Tensor:  # fmt: skip
    (B, G, R), width, rows = q.shape, w.shape[-2] * w.shape[-1], keys.shape[2]
    y, full = torch.empty_like(w), torch.empty((B, G), dtype=torch.int32, device=w.device)
    way = plan("memorise_step", sizes_of(R, width, block, slots, activation, q.dtype, keys.dtype))
    launch, M = way.of(candidates()), score[0, 0].numel()
    form: dict[str, Any] = {"R": R, "BW": max(16, triton.next_power_of_2(width)), "BLOCK": block, "SLOTS": slots}
    form |= {"INDEXED": indices is not None, **overlap(q, B)}
    parts, most = 1, MOST if q.is_cuda else 2  # interpreted, one comes after the other
    while parts < most and B * G * parts * 2 <= PROGRAMS:
        parts *= 2
    form["PARTS"] = parts
    partial = y.new_empty((B, G, parts, form["BW"] + 2) if parts > 1 else 0, dtype=torch.float32)
    with way.compiling():
        _step[(B, G, parts)](
            q, k, w, score, sink, keys, values, scores, length, indices, y, full, partial, G, width, R**-0.5, **form,
            M=M, BM=triton.next_power_of_2(M), SOFTMAX=activation == "softmax", **launch["_step"],
        )  # fmt: skip
        _close[(B, G)](
            raw(keys), raw(values), scores, length, indices, full, partial, y, G, width, **form,
            J=triton.next_power_of_2(rows), BS=16, **launch["_close"],
        )  # fmt: skip
    return y


@_memorise_step.register_fake
def _(q, k, w, score, sink, keys, values, scores, length, indices, block, slots, activation):
    return torch.empty_like(w)


def memorise_step(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    score: Tensor,
    sink: Tensor,
    units: Units,
    indices: Tensor | None,
    block: int,
    slots: int,
    activation: str,
) -> Tensor:
    """As `llm_mlp.ops.memorise_step` on checked inputs; units contiguous."""
    if not q.numel():
        return w
    q, k, w, score = (aligned(x) for x in (q, k, w, score.float()))
    return _memorise_step(q, k, w, score, sink.contiguous(), *units, indices, block, slots, activation)
