"""The read of `memorise` as Triton kernels: forward and backward, a tile of scores at a time on chip.

Which rows are read is chosen as in `llm_mlp.ops.memorise.chunked`, with a kernel for its sorts and no host
synchronisation. Queries and rows lie where their tokens lie; a block's slots are read there too, by their places.

- ``_rank``       (block, group): the best of its scores, in order, ties by age
- ``_chain``      (sequence, group, span of blocks): the best before each block, its blocks taken in one by one; spans
                  of a long sequence are taken in apart, then chained, then gone through again from what was before them
- ``_read``       (block, group, tile of queries): y, and the normaliser of each query
- ``_read_back``  (block, group, tile of queries): dq, the sink's gradient, and dy . y for the next
- ``_rows_back``  (block, group, tile of rows): dk and dw of the block's own rows, and what the slots' rows owe
- ``_collect``    (run of equal places): what a row owes in all the blocks it held a slot in, summed in their order
- ``_copy``       (tile of rows): rows from their places

No atomics: two runs give equal bits. Products whose transpose is needed are computed transposed (see
perceive/kernels.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_mlp.ops.layout import Pieces
from llm_mlp.ops.memorise.chunked import choose, is_fresh, lead_rows, only_length, pools
from llm_mlp.ops.memorise.units import Units
from llm_mlp.ops.tiles import exponential, narrow, product, product_onto
from llm_mlp.ops.tune import Sizes, Table, aligned, plan

# How each kernel is launched, and its tiles of queries and rows; benchmarks/tune_kernels.py checks and times others.
LAUNCH: Table = {
    "_read": {"BQ": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    "_read_back": {"BQ": 64, "BK": 64, "num_warps": 4, "num_stages": 2},
    "_rows_back": {"BQ": 32, "BK": 64, "num_warps": 4, "num_stages": 3},
}
CHAIN = 24  # blocks of a sequence that are taken in one by one; more are cut into spans
EMPTY = -1  # a slot without a row; below it, -2 - n is the n-th carried row


@triton.jit
def _slot_tile(
    t, at, g, k_ptr, w_ptr, old_k_ptr, old_w_ptr, slot_ptr, G, slots, width,
    R: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr, CARRIED: tl.constexpr,
):  # fmt: skip
    """Keys and values of the ``t``-th tile of a block's slots, and whether they hold a row."""
    r, c = tl.arange(0, R), tl.arange(0, BW)
    n = t * BK + tl.arange(0, BK)
    place = tl.load(slot_ptr + at * slots + n, mask=n < slots, other=-1)
    row = place.to(tl.int64) * G + g
    own = (place >= 0)[:, None]
    k = tl.load(k_ptr + (row * R)[:, None] + r[None, :], mask=own, other=0.0)
    w = tl.load(w_ptr + (row * width)[:, None] + c[None, :], mask=own & (c < width)[None, :], other=0.0)
    if CARRIED:
        row = (-2 - place).to(tl.int64) * G + g
        old = (place < -1)[:, None]
        old_k = tl.load(old_k_ptr + (row * R)[:, None] + r[None, :], mask=old, other=0.0)
        old_w = tl.load(old_w_ptr + (row * width)[:, None] + c[None, :], mask=old & (c < width)[None, :], other=0.0)
        k, w = tl.where(old, old_k, k), tl.where(old, old_w, w)
    return k, w, place != -1


@triton.jit
def _own_tile(
    t, first, length, k_ptr, w_ptr, G, width, R: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Keys and values of the ``t``-th tile of a block's own rows, and their places in the block."""
    r, c = tl.arange(0, R), tl.arange(0, BW)
    row = t * BK + tl.arange(0, BK)
    held = (row < length)[:, None]
    k = tl.load(k_ptr + first * R + ((row * G)[:, None] * R + r[None, :]), mask=held, other=0.0)
    whole = held & (c < width)[None, :]
    w = tl.load(w_ptr + first * width + ((row * G)[:, None] * width + c[None, :]), mask=whole, other=0.0)
    return k, w, row


@triton.jit
def _take_in(
    q, k, w, seen, top, total, y, scale, SOFTMAX: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The read of one more tile of rows: the highest score, the normaliser and the sum so far."""
    z = product(q, tl.trans(k), PRECISION) * scale
    if SOFTMAX:
        higher = tl.maximum(top, tl.max(tl.where(seen, z, -float("inf")), 1))
        p = tl.where(seen, exponential(z - higher[:, None]), 0.0)
        shrink = exponential(top - higher)
        total = total * shrink + tl.sum(p, 1)
        y = y * shrink[:, None]
        top = higher
    else:
        z = tl.where(seen, tl.maximum(z, 0.0), 0.0)
        p = z * z
        total += tl.sum(p, 1)
    if WIDE:  # float16 cannot hold z^2
        y = product_onto(y, p, w.to(tl.float32), PRECISION)
    else:
        y = product_onto(y, narrow(p, w.dtype), w, PRECISION)
    return top, total, y


@triton.jit(do_not_specialize=["G", "slots"])
def _read(
    q_ptr, k_ptr, w_ptr, old_k_ptr, old_w_ptr, slot_ptr, sink_ptr, start_ptr, length_ptr,
    y_ptr, norm_ptr, G, slots, width, scale,
    R: tl.constexpr, BW: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, CARRIED: tl.constexpr,
    SOFTMAX: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    block, g, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    start, length = tl.load(start_ptr + block).to(tl.int64), tl.load(length_ptr + block)
    if tile * BQ < length:
        i = tile * BQ + tl.arange(0, BQ)
        r, c = tl.arange(0, R), tl.arange(0, BW)
        real, inside = i < length, c < width
        first, tokens = start * G + g, i * G
        q = tl.load(q_ptr + first * R + (tokens[:, None] * R + r[None, :]), mask=real[:, None], other=0.0)
        sink = tl.load(sink_ptr + g).to(tl.float32)
        top = tl.zeros((BQ,), tl.float32) + sink
        total = tl.zeros((BQ,), tl.float32) + (1.0 if SOFTMAX else exponential(sink))
        y = tl.zeros((BQ, BW), tl.float32)
        for t in range(0, (slots + BK - 1) // BK):
            k, w, held = _slot_tile(
                t, block * G + g, g, k_ptr, w_ptr, old_k_ptr, old_w_ptr, slot_ptr, G, slots, width, R, BW, BK, CARRIED
            )
            seen = held[None, :] & real[:, None]
            top, total, y = _take_in(q, k, w, seen, top, total, y, scale, SOFTMAX, PRECISION, WIDE)
        for t in range(0, (tl.minimum(tile * BQ + BQ, length) + BK - 1) // BK):
            k, w, row = _own_tile(t, first, length, k_ptr, w_ptr, G, width, R, BW, BK)
            seen = (row[None, :] <= i[:, None]) & real[:, None]
            top, total, y = _take_in(q, k, w, seen, top, total, y, scale, SOFTMAX, PRECISION, WIDE)
        y = y / total[:, None]
        tl.store(
            y_ptr + first * width + (tokens[:, None] * width + c[None, :]),
            narrow(y, y_ptr.dtype.element_ty),
            mask=real[:, None] & inside[None, :],
        )
        tl.store(norm_ptr + first + tokens, top + tl.log(total) if SOFTMAX else total, mask=real)


@triton.jit
def _owed(
    q, k, w, dy, seen, norm, both, exact, dq, scale, SOFTMAX: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """What queries owe to one more tile of rows: dq so far, and dy . y before rounding."""
    z = product(q, tl.trans(k), PRECISION) * scale
    worth = product(dy, tl.trans(w), PRECISION)
    if SOFTMAX:
        p = tl.where(seen, exponential(tl.where(seen, z - norm[:, None], 0.0)), 0.0)
        dz = p * (worth - both[:, None])
    else:
        z = tl.where(seen, tl.maximum(z, 0.0), 0.0)
        p = z * z / norm[:, None]
        dz = 2.0 * z * (worth - both[:, None]) / norm[:, None]
    return exact + tl.sum(p * worth, 1), product_onto(dq, narrow(dz, k.dtype), k, PRECISION)


@triton.jit(do_not_specialize=["G", "slots"])
def _read_back(
    q_ptr, k_ptr, w_ptr, old_k_ptr, old_w_ptr, slot_ptr, sink_ptr, start_ptr, length_ptr,
    y_ptr, norm_ptr, dy_ptr, dq_ptr, dot_ptr, dsink_ptr, G, slots, width, scale,
    R: tl.constexpr, BW: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, CARRIED: tl.constexpr,
    SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, g, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    start, length = tl.load(start_ptr + block).to(tl.int64), tl.load(length_ptr + block)
    partial = (block * G + g) * tl.num_programs(2) + tile
    if tile * BQ >= length:
        tl.store(dsink_ptr + partial, 0.0)
    else:
        i = tile * BQ + tl.arange(0, BQ)
        r, c = tl.arange(0, R), tl.arange(0, BW)
        real, inside = i < length, c < width
        first, tokens = start * G + g, i * G
        whole = real[:, None] & inside[None, :]
        q = tl.load(q_ptr + first * R + (tokens[:, None] * R + r[None, :]), mask=real[:, None], other=0.0)
        y = tl.load(y_ptr + first * width + (tokens[:, None] * width + c[None, :]), mask=whole, other=0.0)
        dy = tl.load(dy_ptr + first * width + (tokens[:, None] * width + c[None, :]), mask=whole, other=0.0)
        norm = tl.load(norm_ptr + first + tokens, mask=real, other=1.0)
        sink = tl.load(sink_ptr + g).to(tl.float32)
        both = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)  # dy . y, y as rounded
        exact = tl.zeros((BQ,), tl.float32)  # the same before rounding
        dq = tl.zeros((BQ, R), tl.float32)
        for t in range(0, (slots + BK - 1) // BK):
            k, w, held = _slot_tile(
                t, block * G + g, g, k_ptr, w_ptr, old_k_ptr, old_w_ptr, slot_ptr, G, slots, width, R, BW, BK, CARRIED
            )
            seen = held[None, :] & real[:, None]
            exact, dq = _owed(q, k, w, dy, seen, norm, both, exact, dq, scale, SOFTMAX, PRECISION)
        for t in range(0, (tl.minimum(tile * BQ + BQ, length) + BK - 1) // BK):
            k, w, row = _own_tile(t, first, length, k_ptr, w_ptr, G, width, R, BW, BK)
            seen = (row[None, :] <= i[:, None]) & real[:, None]
            exact, dq = _owed(q, k, w, dy, seen, norm, both, exact, dq, scale, SOFTMAX, PRECISION)
        tl.store(dot_ptr + first + tokens, exact, mask=real)
        silent = exponential(sink - norm) if SOFTMAX else exponential(sink) / norm  # the sink's share
        tl.store(dsink_ptr + partial, -tl.sum(tl.where(real, exact * silent, 0.0), 0))
        tl.store(
            dq_ptr + first * R + (tokens[:, None] * R + r[None, :]),
            narrow(dq * scale, dq_ptr.dtype.element_ty),
            mask=real[:, None],
        )


@triton.jit(do_not_specialize=["G", "slots"])
def _rows_back(
    q_ptr, k_ptr, w_ptr, old_k_ptr, old_w_ptr, slot_ptr, start_ptr, length_ptr,
    norm_ptr, dy_ptr, dot_ptr, dk_ptr, dw_ptr, slot_dk_ptr, slot_dw_ptr, G, slots, width, scale,
    R: tl.constexpr, BW: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, CARRIED: tl.constexpr,
    SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, g, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    start, length = tl.load(start_ptr + block).to(tl.int64), tl.load(length_ptr + block)
    slot_tiles = (slots + BK - 1) // BK
    own = tile - slot_tiles
    if (own < 0) | (own * BK < length):
        r, c = tl.arange(0, R), tl.arange(0, BW)
        inside = c < width
        at, first = block * G + g, start * G + g
        if own < 0:  # every query sees a slot's row, or none
            k, w, held = _slot_tile(
                tile, at, g, k_ptr, w_ptr, old_k_ptr, old_w_ptr, slot_ptr, G, slots, width, R, BW, BK, CARRIED
            )
            since = tl.where(held, 0, length)
        else:
            k, w, since = _own_tile(own, first, length, k_ptr, w_ptr, G, width, R, BW, BK)
        dk, dw = tl.zeros((BK, R), tl.float32), tl.zeros((BK, BW), tl.float32)
        for t in range(tl.maximum(own, 0) * BK // BQ, (length + BQ - 1) // BQ):
            i = t * BQ + tl.arange(0, BQ)
            real = i < length
            tokens = i * G
            q = tl.load(q_ptr + first * R + (tokens[:, None] * R + r[None, :]), mask=real[:, None], other=0.0)
            dy = tl.load(
                dy_ptr + first * width + (tokens[:, None] * width + c[None, :]),
                mask=real[:, None] & inside[None, :],
                other=0.0,
            )
            norm = tl.load(norm_ptr + first + tokens, mask=real, other=1.0)
            both = tl.load(dot_ptr + first + tokens, mask=real, other=0.0)
            seen = real[None, :] & (since[:, None] <= i[None, :])
            z = product(k, tl.trans(q), PRECISION) * scale
            change = product(w, tl.trans(dy), PRECISION) - both[None, :]
            if SOFTMAX:
                p = tl.where(seen, exponential(tl.where(seen, z - norm[None, :], 0.0)), 0.0)
                dz = p * change
            else:
                z = tl.where(seen, tl.maximum(z, 0.0), 0.0)
                p = z * z / norm[None, :]
                dz = 2.0 * z * change / norm[None, :]
            dk = product_onto(dk, narrow(dz, q.dtype), q, PRECISION)
            dw = product_onto(dw, narrow(p, dy.dtype), dy, PRECISION)
        dk = dk * scale
        row = tl.arange(0, BK)
        if own < 0:
            row += tile * BK
            there = (row < slots)[:, None]
            tl.store(slot_dk_ptr + at * slots * R + (row[:, None] * R + r[None, :]), dk, mask=there)
            tl.store(
                slot_dw_ptr + at * slots * width + (row[:, None] * width + c[None, :]), dw, mask=there & inside[None, :]
            )
        else:
            row += own * BK
            there = (row < length)[:, None]
            at_k, at_w = (row * G)[:, None] * R + r[None, :], (row * G)[:, None] * width + c[None, :]
            tl.store(dk_ptr + first * R + at_k, narrow(dk, dk_ptr.dtype.element_ty), mask=there)
            tl.store(dw_ptr + first * width + at_w, narrow(dw, dw_ptr.dtype.element_ty), mask=there & inside[None, :])


@triton.jit
def _collect(
    key_ptr, order_ptr, slot_dk_ptr, slot_dw_ptr, dk_ptr, dw_ptr, n, low, high, width,
    R: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """The run of equal keys that begins here, if one does and its key is from ``low`` to below ``high``: its rows
    added, in order, to row ``key - low``."""
    at = tl.program_id(0)
    key = tl.load(key_ptr + at)
    begins = key != tl.load(key_ptr + at - 1, mask=at > 0, other=-1)
    if begins & (key >= low) & (key < high):
        r, c = tl.arange(0, R), tl.arange(0, BW)
        inside = c < width
        to_k, to_w = dk_ptr + (key - low).to(tl.int64) * R + r, dw_ptr + (key - low).to(tl.int64) * width + c
        dk = tl.load(to_k).to(tl.float32)
        dw = tl.load(to_w, mask=inside, other=0.0).to(tl.float32)
        same = key
        while same == key:
            row = tl.load(order_ptr + at).to(tl.int64)
            dk += tl.load(slot_dk_ptr + row * R + r)
            dw += tl.load(slot_dw_ptr + row * width + c, mask=inside, other=0.0)
            at += 1
            same = tl.load(key_ptr + at, mask=at < n, other=-1)
        tl.store(to_k, narrow(dk, dk_ptr.dtype.element_ty))
        tl.store(to_w, narrow(dw, dw_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rank(score_ptr, place_ptr, best_ptr, size, slots, J: tl.constexpr, STEP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, J)
    score = tl.load(score_ptr + row * size + j, mask=j < size, other=-float("inf"))
    rank = tl.zeros((J,), tl.int32)
    for a in range(0, size, STEP):
        i = a + tl.arange(0, STEP)
        other = tl.load(score_ptr + row * size + i, mask=i < size, other=-float("inf"))
        ahead = (other[None, :] > score[:, None]) | ((other[None, :] == score[:, None]) & (i[None, :] < j[:, None]))
        rank += tl.sum(ahead.to(tl.int32), 1)
    kept = (j < size) & (rank < slots)
    tl.store(place_ptr + row * slots + rank, j, mask=kept)
    tl.store(best_ptr + row * slots + rank, score, mask=kept)


@triton.jit
def _merge(top, place, new_top, new_place, J: tl.constexpr):
    """The best J of two lists, each in order, the older first: where a row stands in its own list and how many of the
    other are ahead of it is its rank, so that nothing is sorted."""
    j = tl.arange(0, J)
    old = (j + tl.sum((new_top[None, :] > top[:, None]).to(tl.int32), 1))[None, :] == j[:, None]
    new = (j + tl.sum((top[None, :] >= new_top[:, None]).to(tl.int32), 1))[None, :] == j[:, None]
    nothing = -float("inf")
    tops = tl.maximum(tl.where(old, top[None, :], nothing), tl.where(new, new_top[None, :], nothing))
    places = tl.maximum(tl.where(old, place[None, :], 0), tl.where(new, new_place[None, :], 0))
    return tl.max(tops, 1), tl.max(places, 1)


@triton.jit(do_not_specialize=["N", "G", "slots", "rounds", "span", "base", "block"])
def _chain(
    top_ptr, place_ptr, from_top_ptr, from_place_ptr, start_ptr, full_ptr,
    before_top_ptr, before_place_ptr, last_top_ptr, last_place_ptr, N, G, slots, rounds, span, base, block,
    J: tl.constexpr, FROM: tl.constexpr, BEFORE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Lists are [.., G, slots]. List n of round r is the (start[r] + n)-th of ``top``, and its places count from
    ``base + block * (start[r] + n)``; rounds from full[n] on are not taken in."""
    n, g, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    j = tl.arange(0, J)
    inside = j < slots
    own = ((s * N + n) * G + g).to(tl.int64) * slots + j
    top, place = tl.full((J,), -float("inf"), tl.float32), tl.zeros((J,), tl.int32)
    if FROM:
        top = tl.load(from_top_ptr + own, mask=inside, other=-float("inf"))
        place = tl.load(from_place_ptr + own, mask=inside, other=0)
    full = tl.load(full_ptr + n)
    for r in range(s * span, tl.minimum(s * span + span, rounds)):
        first = tl.load(start_ptr + r)
        if n < tl.load(start_ptr + r + 1) - first:
            at = ((first + n) * G + g).to(tl.int64) * slots + j
            if BEFORE:
                tl.store(before_top_ptr + at, top, mask=inside)
                tl.store(before_place_ptr + at, place, mask=inside)
            if r < full:
                new_top = tl.load(top_ptr + at, mask=inside, other=-float("inf"))
                new_place = tl.load(place_ptr + at, mask=inside, other=0) + base + block * (first + n)
                top, place = _merge(top, place, new_top, new_place, J)
    if LAST:
        tl.store(last_top_ptr + own, top, mask=inside)
        tl.store(last_place_ptr + own, place, mask=inside)


@triton.jit
def _copy(row_ptr, place_ptr, out_ptr, n, G, S, width, BX: tl.constexpr, BN: tl.constexpr):
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.arange(0, BX)
    place = tl.load(place_ptr + at, mask=at < n, other=-1).to(tl.int64)
    row = place * G + (at // S) % G
    x = tl.load(row_ptr + row[:, None] * width + c[None, :], mask=(place >= 0)[:, None] & (c < width)[None, :], other=0)
    tl.store(out_ptr + at.to(tl.int64)[:, None] * width + c[None, :], x, mask=(at < n)[:, None] & (c < width)[None, :])


# -- host ----------------------------------------------------------------------------------------------------------


def candidates() -> tuple[Table, Table]:
    """Launch tables, the fast one first (see perceive/kernels.py)."""
    return LAUNCH, {kernel: {"BQ": 32, "BK": 32, "num_warps": 2, "num_stages": 1} for kernel in LAUNCH}


def sizes_of(R: int, width: int, activation: str, dtype: torch.dtype) -> Sizes:
    """What `tune` knows a launch by; ``width``: m * V."""
    return ("R", R), ("width", width), ("activation", activation), ("dtype", str(dtype).removeprefix("torch."))


@torch.library.custom_op("llm_mlp::memorise_slots", mutates_args=())
def _slots(
    scores: Tensor, carried: Tensor, order: Tensor, start: Tensor, full: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The slots before each block and after the last full one: int32 places and scores ``[b, G, slots]``, places and
    scores ``[N, G, slots]``.

    Args:
        scores: of the blocks' rows ``[b, G, block]``, float32. carried: of the carried slots ``[N, G, slots]``.
        order: the sequences, longest first, ``[N]``. start: as `Pieces.bounds`. full: full blocks, ``[N]``.
    """
    (b, G, block), (N, _, slots) = scores.shape, carried.shape
    rounds = len(start) - 1

    def lists(*shape: int) -> tuple[Tensor, Tensor]:
        return scores.new_empty((*shape, G, slots)), scores.new_empty((*shape, G, slots), dtype=torch.int32)

    before, last = lists(b), lists(N)
    if not slots:
        return before[1], before[0], last[1], last[0]
    best, pick = lists(b)
    best.fill_(-torch.inf), pick.zero_()  # where a block has fewer rows than there are slots
    J = triton.next_power_of_2(block)
    _rank[(b * G,)](
        scores.contiguous(), pick, best, block, slots, J=J, STEP=min(J, 32), num_warps=min(4, max(1, J // 64))
    )
    here = (order[:, None, None] * slots + torch.arange(slots, device=scores.device)).expand(N, G, slots)
    old = carried.contiguous(), here.to(torch.int32).contiguous()
    start, full = start.to(torch.int32), full.to(torch.int32)
    J = max(16, triton.next_power_of_2(slots))

    def chain(new, old, start, full, before, last, rounds, span, base, block):
        _chain[(N, G, triton.cdiv(rounds, span))](
            *new, *(old or new), start, full, *(before or new), *(last or new),
            N, G, slots, rounds, span, base, block, J=J,
            FROM=old is not None, BEFORE=before is not None, LAST=last is not None, num_warps=4,
        )  # fmt: skip

    # A chain of as many steps as there are blocks, or, of n: spans of l blocks, n / l spans, and l blocks again.
    span = max(1, rounds) if rounds <= CHAIN else math.isqrt(rounds // 2)
    if span >= rounds:
        chain((best, pick), old, start, full, before, last, rounds, span, N * slots, block)
        return before[1], before[0], last[1], last[0]
    spans = triton.cdiv(rounds, span)
    whole, ahead = lists(spans * N), lists(spans * N)
    chain((best, pick), None, start, full, None, whole, rounds, span, N * slots, block)
    each = torch.arange(spans + 1, device=scores.device, dtype=torch.int32) * N
    chain(whole, old, each, torch.full_like(full, spans), ahead, last, spans, spans, 0, 0)
    chain((best, pick), ahead, start, full, before, None, rounds, span, N * slots, block)
    return before[1], before[0], last[1], last[0]


@_slots.register_fake
def _(scores, carried, order, start, full):
    (b, G, _), (N, _, slots) = scores.shape, carried.shape
    made = (scores.new_empty((n, G, slots), dtype=kind) for n in (b, N) for kind in (torch.int32, scores.dtype))
    return tuple(made)


def _choose_slots(
    scores: Tensor, carried: Tensor, layout: Pieces, order: Tensor, full: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """As `llm_mlp.ops.memorise.chunked._choose_slots`."""
    place, top, last, last_top = _slots(scores, carried, order, layout.bounds(scores.device), full)
    return place.long(), last.long(), (top, last_top)


@torch.library.custom_op("llm_mlp::memorise_read", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, w: Tensor, old_k: Tensor, old_w: Tensor, slot: Tensor, sink: Tensor,
    start: Tensor, length: Tensor, block: int, softmax: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y ``[P, G, m V]`` by row, and the normalisers ``[P, G]``.

    Args:
        q, k: ``[P, G, R]``, w: ``[P, G, m V]``, by row. old_k, old_w: carried rows ``[C, G, ...]``.
        slot: int32 ``[b, G, slots]``, the row in each of a block's slots (`EMPTY`; below it, carried ones).
        sink: ``[G]``. start, length: each block's first row and number of rows, at most ``block``.
    """
    (P, G, R), width, slots = q.shape, w.shape[-1], slot.shape[-1]
    y, norm = torch.empty_like(w), torch.empty((P, G), dtype=torch.float32, device=q.device)
    way = plan("memorise", sizes_of(R, width, "softmax" if softmax else "relu2", q.dtype))
    launch = way.of(candidates())["_read"]
    with way.compiling():
        _read[(len(start), G, triton.cdiv(block, launch["BQ"]))](
            q, k, w, old_k, old_w, slot, sink, start, length, y, norm, G, slots, width, R**-0.5,
            WIDE=q.dtype == torch.float16 and not softmax, CARRIED=len(old_k) > 0, **_sizes(q, w, softmax), **launch,
        )  # fmt: skip
    return y, norm


@_forward.register_fake
def _(q, k, w, old_k, old_w, slot, sink, start, length, block, softmax):
    return torch.empty_like(w), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)


def _sizes(q: Tensor, w: Tensor, softmax: bool) -> dict[str, Any]:
    return {
        "R": q.shape[-1],
        "BW": max(16, triton.next_power_of_2(w.shape[-1])),
        "SOFTMAX": softmax,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }


@torch.library.custom_op("llm_mlp::memorise_read_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, w: Tensor, old_k: Tensor, old_w: Tensor, slot: Tensor, sink: Tensor,
    start: Tensor, length: Tensor, y: Tensor, norm: Tensor, dy: Tensor, block: int, softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, w, old_k, old_w and sink."""
    (P, G, R), width, slots, sizes = q.shape, w.shape[-1], slot.shape[-1], _sizes(q, w, softmax)
    dy = aligned(dy)
    dq, dk, dw, dot = torch.empty_like(q), torch.empty_like(k), torch.empty_like(w), torch.empty_like(norm)
    way = plan("memorise", sizes_of(R, width, "softmax" if softmax else "relu2", q.dtype))
    launch, launch_rows = (way.of(candidates())[kernel] for kernel in ("_read_back", "_rows_back"))
    tiles = triton.cdiv(block, launch["BQ"])
    dsink = torch.empty((len(start), G, tiles), dtype=torch.float32, device=q.device)
    slot_dk = torch.empty((*slot.shape, R), dtype=torch.float32, device=q.device)
    slot_dw = torch.empty((*slot.shape, width), dtype=torch.float32, device=q.device)
    carried = len(old_k)
    with way.compiling():
        _read_back[(len(start), G, tiles)](
            q, k, w, old_k, old_w, slot, sink, start, length, y, norm, dy, dq, dot, dsink,
            G, slots, width, R**-0.5, CARRIED=carried > 0, **sizes, **launch,
        )  # fmt: skip
        _rows_back[(len(start), G, triton.cdiv(slots, launch_rows["BK"]) + triton.cdiv(block, launch_rows["BK"]))](
            q, k, w, old_k, old_w, slot, start, length, norm, dy, dot, dk, dw, slot_dk, slot_dw,
            G, slots, width, R**-0.5, CARRIED=carried > 0, **sizes, **launch_rows,
        )  # fmt: skip
    dold_k, dold_w = torch.zeros_like(old_k), torch.zeros_like(old_w)
    if slots:
        # Rows in the order of their places (a stable sort keeps the blocks' order): carried ones, others, empty ones.
        group = torch.arange(G, device=q.device, dtype=torch.int32)[:, None]
        place = torch.where(slot < EMPTY, EMPTY - 1 - slot, carried + slot)
        key = torch.where(slot == EMPTY, (carried + P) * G, place * G + group).flatten()
        key, order = torch.sort(key, stable=True)
        for low, high, to_k, to_w in ((0, carried * G, dold_k, dold_w), (carried * G, (carried + P) * G, dk, dw)):
            if high > low:
                _collect[(key.numel(),)](
                    key, order, slot_dk, slot_dw, to_k, to_w, key.numel(), low, high, width,
                    R=R, BW=sizes["BW"], num_warps=1,
                )  # fmt: skip
    return dq, dk, dw, dold_k, dold_w, dsink.sum((0, 2)).to(sink.dtype)


@_backward.register_fake
def _(q, k, w, old_k, old_w, slot, sink, start, length, y, norm, dy, block, softmax):
    return tuple(torch.empty_like(x) for x in (q, k, w, old_k, old_w, sink))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.block, ctx.softmax = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, dy, _):
    *rows, dsink = _backward(*ctx.saved_tensors, dy, ctx.block, ctx.softmax)
    return *rows, None, dsink, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("llm_mlp::take_rows", mutates_args=())
def _gather(rows: Tensor, row: Tensor, used: Tensor) -> Tensor:
    """Rows ``[P, G, X]`` at ``row [b, G, S]`` -> ``[b, G, S, X]``, zero where not ``used``."""
    out = rows.new_empty((*row.shape, rows.shape[-1]))
    place = torch.where(used, row, EMPTY).to(torch.int32).contiguous()
    if place.numel():
        _copy[(triton.cdiv(place.numel(), 16),)](
            rows, place, out, place.numel(), rows.shape[1], row.shape[-1], rows.shape[-1],
            BX=triton.next_power_of_2(rows.shape[-1]), BN=16,
        )  # fmt: skip
    return out


@_gather.register_fake
def _(rows, row, used):
    return rows.new_empty((*row.shape, rows.shape[-1]))


@torch.library.custom_op("llm_mlp::take_rows_backward", mutates_args=())
def _scatter(d: Tensor, row: Tensor, used: Tensor, P: int, dtype: torch.dtype) -> Tensor:
    G = row.shape[1]
    out = torch.zeros((P, G, d.shape[-1]), dtype=torch.float32, device=d.device)
    group = torch.arange(G, device=d.device)[:, None].expand_as(row)
    # Rows that are not used add zero; all of them at one place would be a long queue there.
    row = torch.where(used, row, torch.arange(row.numel(), device=d.device).view_as(row) % P)
    # index_put_ with accumulate sorts by place: deterministic, in order of position.
    out.index_put_((row, group), torch.where(used[..., None], d, 0).float(), accumulate=True)
    return out.to(dtype)


@_scatter.register_fake
def _(d, row, used, P, dtype):
    return d.new_empty((P, row.shape[1], d.shape[-1]), dtype=dtype)


def _save_rows(ctx, inputs, output) -> None:
    rows, row, used = inputs
    ctx.save_for_backward(row, used)
    ctx.rows, ctx.dtype = rows.shape[0], rows.dtype


_gather.register_autograd(
    lambda ctx, d: (_scatter(d, *ctx.saved_tensors, ctx.rows, ctx.dtype), None, None), setup_context=_save_rows
)


def _blocks(layout: Pieces, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First token and tokens of each block, where no rows are carried in (int64 and int32)."""
    if layout.gather is not None and layout.real is not None:
        return layout.gather[:, 0].contiguous(), layout.real.sum(-1, dtype=torch.int32)
    turn = torch.arange(len(layout.rounds), device=device)[:, None] * block
    start = turn + torch.arange(layout.batch, device=device) * layout.tokens
    length = (layout.tokens - turn).clamp(max=block).expand_as(start)
    return start.flatten(), length.flatten().to(torch.int32).contiguous()


def memorise(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    score: Tensor,
    sink: Tensor,
    units: Units,
    block: int,
    slots: int,
    activation: str,
    bounds: list[int] | None,
    empty: bool = False,
) -> tuple[Tensor, Units]:
    """As `llm_mlp.ops.memorise` on checked inputs; ``empty``: ``units`` are those of `units_init`."""
    if block == 0 or q.numel() == 0:
        return torch.zeros_like(w), only_length(units, q.shape[1], bounds)
    fresh = empty or is_fresh(units, block)
    chosen = choose(score, units, block, slots, bounds, fresh, _choose_slots)
    layout, heads = chosen.layout, w.shape[-2:]
    if fresh:
        start, length = _blocks(layout, block, q.device)
    else:  # open blocks are carried in: lay them out with the tokens that follow
        start = torch.arange(layout.count, device=q.device) * block
        length = torch.full_like(start, block, dtype=torch.int32)

    def rows(x: Tensor, carried: Tensor | None = None) -> Tensor:
        if fresh:
            return x.flatten(0, 1).contiguous()
        lead = None if carried is None else lead_rows(carried, slots, fresh)
        return layout.split(x, lead).flatten(0, 1).contiguous()

    keys, values = pools(k, w, units, rows, start, block, slots, empty, _gather)
    none = keys.rows.new_empty((0, *keys.rows.shape[1:])), values.rows.new_empty((0, *values.rows.shape[1:]))
    old = none if keys.carried is None or values.carried is None else (keys.carried, values.carried)
    slot = keys.rows_at(chosen.seen)
    if keys.carried is not None:
        slot = torch.where(chosen.seen < keys.base, EMPTY - 1 - chosen.seen, slot)
    slot = torch.where(chosen.used, slot, EMPTY).to(torch.int32)
    y, _ = _forward(
        rows(q), keys.rows, values.rows, *(x.contiguous() for x in (*old, slot)), sink, start, length,
        block, activation == "softmax",
    )  # fmt: skip
    if fresh:
        y = y.unflatten(0, q.shape[:2])
    else:
        y = layout.join(y.unflatten(0, (layout.count, block)))
    return y.unflatten(-1, heads), chosen.units(keys, values, heads)
