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
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_mlp.ops.layout import Pieces, pieces
from llm_mlp.ops.memorise.chunked import is_fresh, lead_rows, only_length
from llm_mlp.ops.memorise.units import Units, units_init
from llm_mlp.ops.tiles import exponential, narrow, product, product_onto, where_if
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


@triton.jit(do_not_specialize=["G", "N", "tokens", "slots"])
def _rank(
    score_ptr, start_ptr, length_ptr, top_ptr, place_ptr, G, N, tokens, slots, block,
    J: tl.constexpr, STEP: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """DENSE: blocks of N sequences of as many tokens; where they begin and how long they are is computed here."""
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if DENSE:
        before = b // N * block
        start, length = b % N * tokens + before, tl.minimum(tokens - before, block).to(tl.int32)
        if g == 0:
            tl.store(start_ptr + b, start)
            tl.store(length_ptr + b, length)
    else:
        start, length = tl.load(start_ptr + b).to(tl.int64), tl.load(length_ptr + b)
    scores = score_ptr + start * G + g
    j = tl.arange(0, J)
    score = tl.load(scores + j * G, mask=j < length, other=-float("inf"))
    rank = tl.zeros((J,), tl.int32)
    for a in range(0, J, STEP):
        i = a + tl.arange(0, STEP)
        other = tl.load(scores + i * G, mask=i < length, other=-float("inf"))
        ahead = (other[None, :] > score[:, None]) | ((other[None, :] == score[:, None]) & (i[None, :] < j[:, None]))
        rank += tl.sum(ahead.to(tl.int32), 1)
    at = (b * G + g) * slots + rank
    tl.store(top_ptr + at, score, mask=rank < slots)
    tl.store(place_ptr + at, (start + j).to(tl.int32), mask=rank < slots)


@triton.jit
def _merge(top, place, new_top, new_place, J: tl.constexpr):
    """The best J of two lists, each in order, the older first: where a row stands in its own list and how many of the
    other are ahead of it is its rank, so that nothing is sorted."""
    j = tl.arange(0, J)
    old = (j + tl.sum((new_top[None, :] > top[:, None]).to(tl.int32), 1))[None, :] == j[:, None]
    new = (j + tl.sum((top[None, :] >= new_top[:, None]).to(tl.int32), 1))[None, :] == j[:, None]
    nothing, nowhere = -float("inf"), -(2**31)
    tops = tl.maximum(tl.where(old, top[None, :], nothing), tl.where(new, new_top[None, :], nothing))
    places = tl.maximum(tl.where(old, place[None, :], nowhere), tl.where(new, new_place[None, :], nowhere))
    return tl.max(tops, 1), tl.max(places, 1)


@triton.jit(do_not_specialize=["N", "G", "slots", "rounds", "span", "block"])
def _chain(
    top_ptr, place_ptr, from_top_ptr, from_place_ptr, order_ptr, first_ptr, start_ptr, length_ptr, score_ptr,
    before_top_ptr, before_place_ptr, last_top_ptr, last_place_ptr, N, G, slots, rounds, span, block,
    J: tl.constexpr, JB: tl.constexpr, DENSE: tl.constexpr, ORDER: tl.constexpr, BLOCKS: tl.constexpr,
    FROM: tl.constexpr, BEFORE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Lists of best rows (scores and places, [.., G, slots]) of the ``rounds`` of sequence n, taken in one by one.

    DENSE: round r holds N lists, else those from first[r] on, of the longest sequences. BLOCKS: lists of blocks, of
    which one that is not full is not taken in, but left as it is. FROM: what stands before the first: nothing (0), a
    list for each span (1), the carried slots (2). BEFORE: what stands before each is kept as lists (1), as slots to
    read (2). LAST: what stands behind the last is kept as a list for each span (1), as the slots that are left (2).
    """
    n, g, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    j, i = tl.arange(0, J), tl.arange(0, JB)
    inside = j < slots
    sequence = n
    if ORDER:
        sequence = tl.load(order_ptr + n).to(tl.int32)
    left = (sequence * G + g).to(tl.int64) * (slots + block)
    own = ((s * N + n) * G + g).to(tl.int64) * slots + j
    top, place = tl.full((J,), -float("inf"), tl.float32), tl.full((J,), -1, tl.int32)
    if FROM == 1:
        top = tl.load(from_top_ptr + own, mask=inside, other=-float("inf"))
        place = tl.load(from_place_ptr + own, mask=inside, other=-1)
    if FROM == 2:
        top = tl.load(from_top_ptr + left + j, mask=inside, other=-float("inf"))
        place = -2 - (sequence * slots + j)
    blocks = 0
    for r in range(s * span, tl.minimum(s * span + span, rounds)):
        first, active, follow = r * N, N, tl.where(r + 1 < rounds, N, 0)
        if not DENSE:
            first = tl.load(first_ptr + r)
            behind = tl.load(first_ptr + r + 1)
            active = behind - first
            follow = tl.load(first_ptr + r + 2, mask=r + 1 < rounds, other=behind) - behind
        if n < active:
            blocks += 1
            at = ((first + n) * G + g).to(tl.int64) * slots + j
            if BEFORE == 1:
                tl.store(before_top_ptr + at, top, mask=inside)
                tl.store(before_place_ptr + at, place, mask=inside)
            if BEFORE == 2:
                tl.store(before_place_ptr + at, tl.where(top > -float("inf"), place, -1), mask=inside)
            full = True
            if BLOCKS:
                length = tl.load(length_ptr + first + n)
                full = length == block
                if BEFORE == 2:
                    # The first block that is not full, or that there is none. Empty blocks may follow it.
                    earlier = first - N
                    if not DENSE:
                        earlier = tl.load(first_ptr + r - 1, mask=r > 0, other=0)
                    ahead = tl.load(length_ptr + earlier + n, mask=r > 0, other=block)
                    if ((length < block) & (ahead == block)) | ((length == block) & (n >= follow)):
                        start = tl.load(start_ptr + first + n).to(tl.int64)
                        open_ = where_if(i < length, length < block)
                        score = tl.load(score_ptr + (start + i) * G + g, mask=open_, other=-float("inf"))
                        tl.store(last_top_ptr + left + slots + i, score, mask=i < block)
                        row = tl.where(open_, (start + i).to(tl.int32), -1)
                        tl.store(last_place_ptr + left + slots + i, row, mask=i < block)
            if full:
                new_top = tl.load(top_ptr + at, mask=inside, other=-float("inf"))
                new_place = tl.load(place_ptr + at, mask=inside, other=-1)
                top, place = _merge(top, place, new_top, new_place, J)
    if BEFORE == 2:  # noqa: SIM102
        if (blocks == 0) & (s == 0):  # an empty sequence
            tl.store(last_top_ptr + left + slots + i, tl.full((JB,), -float("inf"), tl.float32), mask=i < block)
            tl.store(last_place_ptr + left + slots + i, tl.full((JB,), -1, tl.int32), mask=i < block)
    if LAST == 1:
        tl.store(last_top_ptr + own, top, mask=inside)
        tl.store(last_place_ptr + own, place, mask=inside)
    if LAST == 2:
        tl.store(last_top_ptr + left + j, top, mask=inside)
        tl.store(last_place_ptr + left + j, tl.where(top > -float("inf"), place, -1), mask=inside)


@triton.jit
def _places(place_ptr, n, G, S, width, BX: tl.constexpr, BN: tl.constexpr):
    """Of a tile of copies: their numbers, their rows and carried rows with masks of those that are, and columns."""
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.arange(0, BX)
    place, g = tl.load(place_ptr + at, mask=at < n, other=-1).to(tl.int64), (at // S) % G
    known = (c < width)[None, :]
    own = (place * G + g)[:, None] * width + c[None, :]
    old = ((-2 - place) * G + g)[:, None] * width + c[None, :]
    copy = at.to(tl.int64)[:, None] * width + c[None, :]
    return copy, (at < n)[:, None] & known, own, (place >= 0)[:, None] & known, old, (place < -1)[:, None] & known


@triton.jit(do_not_specialize=["n", "G", "S"])
def _copy(
    row_ptr, old_ptr, place_ptr, out_ptr, n, G, S, width, BX: tl.constexpr, BN: tl.constexpr, CARRIED: tl.constexpr
):  # fmt: skip
    """Rows from their places, carried or not; zero without one."""
    copy, there, own, is_own, old, is_old = _places(place_ptr, n, G, S, width, BX, BN)
    x = tl.load(row_ptr + own, mask=is_own, other=0.0)
    if CARRIED:
        x = tl.where(is_old, tl.load(old_ptr + old, mask=is_old, other=0.0), x)
    tl.store(out_ptr + copy, x, mask=there)


@triton.jit(do_not_specialize=["n", "G", "S"])
def _copy_back(
    d_ptr, place_ptr, row_ptr, old_ptr, n, G, S, width, BX: tl.constexpr, BN: tl.constexpr, CARRIED: tl.constexpr
):  # fmt: skip
    """The inverse: a row has one place at most."""
    copy, there, own, is_own, old, is_old = _places(place_ptr, n, G, S, width, BX, BN)
    d = tl.load(d_ptr + copy, mask=there, other=0.0)
    tl.store(row_ptr + own, d, mask=is_own)
    if CARRIED:
        tl.store(old_ptr + old, d, mask=is_old)


# -- host ----------------------------------------------------------------------------------------------------------


def candidates() -> tuple[Table, Table]:
    """Launch tables, the fast one first (see perceive/kernels.py)."""
    return LAUNCH, {kernel: {"BQ": 32, "BK": 32, "num_warps": 2, "num_stages": 1} for kernel in LAUNCH}


def sizes_of(R: int, width: int, activation: str, dtype: torch.dtype) -> Sizes:
    """What `tune` knows a launch by; ``width``: m * V."""
    return ("R", R), ("width", width), ("activation", activation), ("dtype", str(dtype).removeprefix("torch."))


@torch.library.custom_op("llm_mlp::memorise_slots", mutates_args=())
def _slots(
    score: Tensor, carried: Tensor | None, start: Tensor | None, length: Tensor | None, first: Tensor | None,
    order: Tensor | None, N: int, block: int, slots: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Which rows every block reads, and which are left.

    Args:
        score: ``[P, G]`` float32, by row. carried: scores of the carried units ``[N, G, slots + block]``.
        start, length, first, order: of the layout (`_laid_out`); None: N sequences of P / N tokens.

    Returns:
        start ``[b]`` int64 and length ``[b]`` int32 of the blocks; the rows in their slots ``[b, G, slots]`` int32
        (`EMPTY`; below it, carried ones); rows and scores of the units that are left, ``[N, G, slots + block]``.
    """
    P, G = score.shape
    dense = start is None or length is None or first is None
    if start is None or length is None or first is None:
        rounds = triton.cdiv(P // N, block)
        start = score.new_empty(N * rounds, dtype=torch.int64)
        length = score.new_empty(N * rounds, dtype=torch.int32)
    else:
        rounds = len(first) - 1
        start, length = start.clone(), length.clone()  # an operator's results are new
    b = len(start)

    def lists(*shape: int) -> tuple[Tensor, Tensor]:
        return score.new_empty(shape), score.new_empty(shape, dtype=torch.int32)

    before, left = score.new_empty((b, G, slots), dtype=torch.int32), lists(N, G, slots + block)
    best = lists(b, G, slots)
    J, JB = max(16, triton.next_power_of_2(slots)), triton.next_power_of_2(block)
    JR = max(J, JB)
    _rank[(b, G)](
        score, start, length, *best, G, N, P // N, slots, block, J=JR, STEP=min(JR, 32), DENSE=dense,
        num_warps=min(4, max(1, JR // 64)),
    )  # fmt: skip

    def chain(new, old, before, last, rounds, span, **form):
        _chain[(N, G, triton.cdiv(rounds, span))](
            *new, *old, order, first, start, length, score, *before, *last, N, G, slots, rounds, span, block,
            J=J, JB=JB, ORDER=order is not None, **{"DENSE": dense, "BLOCKS": True, **form}, num_warps=4,
        )  # fmt: skip

    start_of, none = (0 if carried is None else 2), (None, None)
    ahead, seen = (carried, None), (None, before)
    if rounds > CHAIN:  # of n blocks: spans of l are taken in apart, then n / l spans, then l blocks again
        span = math.isqrt(rounds // 2)
        spans = triton.cdiv(rounds, span)
        whole, between = lists(spans * N, G, slots), lists(spans * N, G, slots)
        chain(best, none, none, whole, rounds, span, FROM=0, BEFORE=0, LAST=1)
        chain(whole, ahead, between, left, spans, spans, FROM=start_of, BEFORE=1, LAST=2, DENSE=True, BLOCKS=False)
        chain(best, between, seen, left, rounds, span, FROM=1, BEFORE=2, LAST=0)
    else:
        chain(best, ahead, seen, left, rounds, max(1, rounds), FROM=start_of, BEFORE=2, LAST=2)
    return start, length, before, left[1], left[0]


@_slots.register_fake
def _(score, carried, start, length, first, order, N, block, slots):
    P, G = score.shape
    b = N * -(-(P // N) // block) if start is None else start.shape[0]
    whole = (N, G, slots + block)
    return (
        score.new_empty(b, dtype=torch.int64),
        score.new_empty(b, dtype=torch.int32),
        score.new_empty((b, G, slots), dtype=torch.int32),
        score.new_empty(whole, dtype=torch.int32),
        score.new_empty(whole),
    )


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
def _take(rows: Tensor, old: Tensor, place: Tensor) -> Tensor:
    """Rows of ``[P, G, X]`` or, below `EMPTY`, of the carried ``[C, G, X]`` at ``place [N, G, S]`` (int32) ->
    ``[N, G, S, X]``, zero at `EMPTY`. No row has two places."""
    out = rows.new_empty((*place.shape, rows.shape[-1]))
    _copy[_tiles_of(place)](rows, old, place, out, **_copied(place, out, old))
    return out


def _tiles_of(place: Tensor) -> tuple[int]:
    return (triton.cdiv(place.numel(), 16),)


def _copied(place: Tensor, out: Tensor, old: Tensor) -> dict[str, Any]:
    (_, G, S), width = place.shape, out.shape[-1]
    sizes = {"n": place.numel(), "G": G, "S": S, "width": width}
    return {**sizes, "BX": triton.next_power_of_2(width), "BN": 16, "CARRIED": len(old) > 0}


@_take.register_fake
def _(rows, old, place):
    return rows.new_empty((*place.shape, rows.shape[-1]))


@torch.library.custom_op("llm_mlp::take_rows_backward", mutates_args=())
def _put(d: Tensor, rows: Tensor, old: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    drows, dold = torch.zeros_like(rows), torch.zeros_like(old)
    _copy_back[_tiles_of(place)](aligned(d), place, drows, dold, **_copied(place, d, old))
    return drows, dold


@_put.register_fake
def _(d, rows, old, place):
    return torch.empty_like(rows), torch.empty_like(old)


_take.register_autograd(
    lambda ctx, d: (*_put(d, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class _Layout(NamedTuple):
    """Where the blocks of packed or carried sequences lie, longest sequence first in each round."""

    start: Tensor | None = None  # [b] int64, first row
    length: Tensor | None = None  # [b] int32
    first: Tensor | None = None  # [rounds + 1] int32, first block of each round
    order: Tensor | None = None  # [N]


def _laid_out(layout: Pieces, block: int, fresh: bool, device: torch.device) -> _Layout:
    assert layout.gather is not None and layout.real is not None
    start = layout.gather[:, 0].contiguous() if fresh else torch.arange(layout.count, device=device) * block
    first = torch.tensor([*layout.starts, layout.count], dtype=torch.int32, device=device)
    return _Layout(start, layout.real.sum(-1, dtype=torch.int32), first, layout.order)


def memorise(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    score: Tensor,
    sink: Tensor,
    units: Units | None,
    block: int,
    slots: int,
    activation: str,
    bounds: list[int] | None,
) -> tuple[Tensor, Units]:
    """As `llm_mlp.ops.memorise` on checked inputs; ``units``: None for those of `units_init`."""
    (B, T, G, R), (m, V), device = q.shape, w.shape[-2:], q.device
    N = B if bounds is None else len(bounds) - 1
    if block == 0 or q.numel() == 0:
        if units is None:
            units = units_init(N, G, R, m, V, block=block, slots=slots, dtype=k.dtype, device=device)
        return torch.zeros_like(w), only_length(units, T, bounds)
    fresh = units is None or is_fresh(units, block)
    layout = None  # of sequences that lie side by side and begin with a block it is known
    if bounds is not None or not fresh:
        lead = None if fresh or units is None else units.length % block
        layout = pieces(block, B, T, bounds, device, lead)

    def rows(x: Tensor, carried: Tensor | None = None) -> Tensor:
        if fresh or layout is None:
            return x.flatten(0, 1).contiguous()
        # Open blocks are carried in: laid out with the tokens that follow.
        lead = None if carried is None else lead_rows(carried, slots, fresh)
        return layout.split(x, lead).flatten(0, 1).contiguous()

    def slots_of(carried: Tensor) -> Tensor:
        return carried[:, :, :slots].transpose(1, 2).flatten(0, 1).contiguous()

    flat = w.flatten(3)
    if units is None:
        keys, values, scores = rows(k), rows(flat), rows(score)
        old_k, old_w = keys.new_empty((0, G, R)), values.new_empty((0, G, m * V))
    else:
        carried = units.values.flatten(3)
        keys, values, scores = rows(k, units.keys), rows(flat, carried), rows(score, units.scores)
        old_k, old_w = slots_of(units.keys), slots_of(carried)
    blocks = _Layout() if layout is None else _laid_out(layout, block, fresh, device)
    start, length, slot, left, left_scores = _slots(
        scores, None if units is None else units.scores.contiguous(), *blocks, N, block, slots
    )
    y, _ = _forward(
        rows(q), keys, values, old_k, old_w, slot, sink, start, length, block, activation == "softmax"
    )  # fmt: skip
    y = y.unflatten(0, (B, T)) if fresh or layout is None else layout.join(y.unflatten(0, (layout.count, block)))
    after = torch.full((N,), T, device=device) if bounds is None else torch.tensor(bounds, device=device).diff()
    return y.unflatten(-1, (m, V)), Units(
        _take(keys, old_k, left),
        _take(values, old_w, left).unflatten(-1, (m, V)),
        left_scores,
        after if units is None else units.length + after,
    )
