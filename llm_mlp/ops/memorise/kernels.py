"""The read of `memorise` as Triton kernels: forward and backward, a tile of scores at a time on chip.

Which rows are read is chosen as in `llm_mlp.ops.memorise.chunked` (sorts of scores, no host synchronisation). Queries
lie where their tokens lie; the slots of each block are gathered into a buffer of their own.

- ``_read``       (block, group, tile of queries): y, and the normaliser of each query
- ``_read_back``  (block, group, tile of queries): dq, the sink's gradient, and dy . y for the next
- ``_rows_back``  (block, group, tile of rows): dk and dw of the slots and of the block's own rows

A token's row collects the gradients of the blocks in which it held a slot through a sorted accumulation: no atomics,
two runs give equal bits. Products whose transpose is needed are computed transposed (see perceive/kernels.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_mlp.ops.layout import Pieces
from llm_mlp.ops.memorise.chunked import choose, is_fresh, lead_rows, only_length, pools
from llm_mlp.ops.memorise.units import Units
from llm_mlp.ops.tiles import exponential, narrow, product, product_onto

QUERIES = 64  # a tile
ROWS = 64
# How each kernel is launched; benchmarks/tune_kernels.py checks and times others on a device.
LAUNCH: dict[str, dict[str, int]] = {
    "_read": {"num_warps": 4},
    "_read_back": {"num_warps": 4},
    "_rows_back": {"num_warps": 4},
}


@triton.jit
def _tile(
    t, slot_tiles, block, g, start, length, k_ptr, w_ptr, slot_k_ptr, slot_w_ptr, used_ptr,
    G, slots, width, R: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Keys and values of the ``t``-th tile of rows (the slots' tiles, then the block's own), their places in the slots
    or in the block, and whether they hold a token."""
    j, r, c = tl.arange(0, BK), tl.arange(0, R), tl.arange(0, BW)
    if t < slot_tiles:
        row = t * BK + j
        base = (block * G + g) * slots
        held = (row < slots) & (tl.load(used_ptr + base + row, mask=row < slots, other=0) != 0)
        whole = held[:, None] & (c < width)[None, :]
        k = tl.load(slot_k_ptr + base * R + (row[:, None] * R + r[None, :]), mask=held[:, None], other=0.0)
        w = tl.load(slot_w_ptr + base * width + (row[:, None] * width + c[None, :]), mask=whole, other=0.0)
    else:
        row = (t - slot_tiles) * BK + j
        base = start * G + g
        held = row < length
        whole = held[:, None] & (c < width)[None, :]
        k = tl.load(k_ptr + base * R + ((row * G)[:, None] * R + r[None, :]), mask=held[:, None], other=0.0)
        w = tl.load(w_ptr + base * width + ((row * G)[:, None] * width + c[None, :]), mask=whole, other=0.0)
    return k, w, row, held


@triton.jit
def _read(
    q_ptr, k_ptr, w_ptr, slot_k_ptr, slot_w_ptr, used_ptr, sink_ptr, start_ptr, length_ptr,
    y_ptr, norm_ptr, G, slots, width, scale,
    R: tl.constexpr, BW: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
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
        own_tiles = (tl.minimum(tile * BQ + BQ, length) + BK - 1) // BK
        slot_tiles = (slots + BK - 1) // BK
        for t in range(0, slot_tiles + own_tiles):
            k, w, row, held = _tile(
                t, slot_tiles, block, g, start, length, k_ptr, w_ptr, slot_k_ptr, slot_w_ptr, used_ptr,
                G, slots, width, R, BW, BK,
            )  # fmt: skip
            seen = held[None, :] & real[:, None] & ((t < slot_tiles) | (row[None, :] <= i[:, None]))
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
        y = y / total[:, None]
        tl.store(
            y_ptr + first * width + (tokens[:, None] * width + c[None, :]),
            narrow(y, y_ptr.dtype.element_ty),
            mask=real[:, None] & inside[None, :],
        )
        tl.store(norm_ptr + first + tokens, top + tl.log(total) if SOFTMAX else total, mask=real)


@triton.jit
def _read_back(
    q_ptr, k_ptr, w_ptr, slot_k_ptr, slot_w_ptr, used_ptr, sink_ptr, start_ptr, length_ptr,
    y_ptr, norm_ptr, dy_ptr, dq_ptr, dot_ptr, dsink_ptr, G, slots, width, scale,
    R: tl.constexpr, BW: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
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
        y = tl.load(y_ptr + first * width + (tokens[:, None] * width + c[None, :]), mask=whole, other=0.0).to(
            tl.float32
        )
        dy = tl.load(dy_ptr + first * width + (tokens[:, None] * width + c[None, :]), mask=whole, other=0.0)
        norm = tl.load(norm_ptr + first + tokens, mask=real, other=1.0)
        sink = tl.load(sink_ptr + g).to(tl.float32)
        both = tl.sum(dy.to(tl.float32) * y, 1)  # dy . y, y as rounded
        exact = tl.zeros((BQ,), tl.float32)  # the same before rounding
        dq = tl.zeros((BQ, R), tl.float32)
        own_tiles = (tl.minimum(tile * BQ + BQ, length) + BK - 1) // BK
        slot_tiles = (slots + BK - 1) // BK
        for t in range(0, slot_tiles + own_tiles):
            k, w, row, held = _tile(
                t, slot_tiles, block, g, start, length, k_ptr, w_ptr, slot_k_ptr, slot_w_ptr, used_ptr,
                G, slots, width, R, BW, BK,
            )  # fmt: skip
            seen = held[None, :] & real[:, None] & ((t < slot_tiles) | (row[None, :] <= i[:, None]))
            z = product(q, tl.trans(k), PRECISION) * scale
            worth = product(dy, tl.trans(w), PRECISION)
            if SOFTMAX:
                p = tl.where(seen, exponential(tl.where(seen, z - norm[:, None], 0.0)), 0.0)
                dz = p * (worth - both[:, None])
            else:
                z = tl.where(seen, tl.maximum(z, 0.0), 0.0)
                p = z * z / norm[:, None]
                dz = 2.0 * z * (worth - both[:, None]) / norm[:, None]
            exact += tl.sum(p * worth, 1)
            dq = product_onto(dq, narrow(dz, k.dtype), k, PRECISION)
        tl.store(dot_ptr + first + tokens, exact, mask=real)
        silent = exponential(sink - norm) if SOFTMAX else exponential(sink) / norm  # the sink's share
        tl.store(dsink_ptr + partial, -tl.sum(tl.where(real, exact * silent, 0.0), 0))
        tl.store(
            dq_ptr + first * R + (tokens[:, None] * R + r[None, :]),
            narrow(dq * scale, dq_ptr.dtype.element_ty),
            mask=real[:, None],
        )


@triton.jit
def _rows_back(
    q_ptr, k_ptr, w_ptr, slot_k_ptr, slot_w_ptr, used_ptr, start_ptr, length_ptr,
    norm_ptr, dy_ptr, dot_ptr, dk_ptr, dw_ptr, slot_dk_ptr, slot_dw_ptr, G, slots, width, scale,
    R: tl.constexpr, BW: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, g, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    start, length = tl.load(start_ptr + block).to(tl.int64), tl.load(length_ptr + block)
    slot_tiles = (slots + BK - 1) // BK
    r, c = tl.arange(0, R), tl.arange(0, BW)
    inside = c < width
    is_slot = tile < slot_tiles
    k, w, row, held = _tile(
        tile, slot_tiles, block, g, start, length, k_ptr, w_ptr, slot_k_ptr, slot_w_ptr, used_ptr,
        G, slots, width, R, BW, BK,
    )  # fmt: skip
    begin = 0 if is_slot else (tile - slot_tiles) * BK // BQ
    dk, dw = tl.zeros((BK, R), tl.float32), tl.zeros((BK, BW), tl.float32)
    for t in range(begin, (length + BQ - 1) // BQ):
        i = t * BQ + tl.arange(0, BQ)
        real = i < length
        first, tokens = start * G + g, i * G
        q = tl.load(q_ptr + first * R + (tokens[:, None] * R + r[None, :]), mask=real[:, None], other=0.0)
        dy = tl.load(
            dy_ptr + first * width + (tokens[:, None] * width + c[None, :]),
            mask=real[:, None] & inside[None, :],
            other=0.0,
        )
        norm = tl.load(norm_ptr + first + tokens, mask=real, other=1.0)
        both = tl.load(dot_ptr + first + tokens, mask=real, other=0.0)
        seen = held[:, None] & real[None, :] & (is_slot | (row[:, None] <= i[None, :]))
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
    if is_slot:  # rows that are not used get zeros
        there, base = row < slots, (block * G + g) * slots
        tl.store(slot_dk_ptr + base * R + (row[:, None] * R + r[None, :]), dk, mask=there[:, None])
        tl.store(
            slot_dw_ptr + base * width + (row[:, None] * width + c[None, :]), dw, mask=there[:, None] & inside[None, :]
        )
    else:
        base, at = start * G + g, row * G
        tl.store(
            dk_ptr + base * R + (at[:, None] * R + r[None, :]), narrow(dk, dk_ptr.dtype.element_ty), mask=held[:, None]
        )
        tl.store(
            dw_ptr + base * width + (at[:, None] * width + c[None, :]),
            narrow(dw, dw_ptr.dtype.element_ty),
            mask=held[:, None] & inside[None, :],
        )


# -- host ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("llm_mlp::memorise_read", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, w: Tensor, slot_k: Tensor, slot_w: Tensor, used: Tensor, sink: Tensor,
    start: Tensor, length: Tensor, block: int, softmax: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q, k ``[P, G, R]`` and w ``[P, G, m V]`` by row; the slots' keys and values ``[b, G, slots, ...]``, whether they
    are used (int8), sink ``[G]``, and each block's first row and number of rows: y by row and the normalisers."""
    (P, G, R), width, slots = q.shape, w.shape[-1], slot_k.shape[2]
    y, norm = torch.empty_like(w), torch.empty((P, G), dtype=torch.float32, device=q.device)
    _read[(len(start), G, triton.cdiv(block, QUERIES))](
        q, k, w, slot_k, slot_w, used, sink, start, length, y, norm, G, slots, width, R**-0.5,
        WIDE=q.dtype == torch.float16 and not softmax, **_sizes(q, w, softmax), **LAUNCH["_read"],
    )  # fmt: skip
    return y, norm


@_forward.register_fake
def _(q, k, w, slot_k, slot_w, used, sink, start, length, block, softmax):
    return torch.empty_like(w), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)


def _sizes(q: Tensor, w: Tensor, softmax: bool) -> dict[str, Any]:
    return {
        "R": q.shape[-1],
        "BW": max(16, triton.next_power_of_2(w.shape[-1])),
        "BQ": QUERIES,
        "BK": ROWS,
        "SOFTMAX": softmax,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }


@torch.library.custom_op("llm_mlp::memorise_read_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, w: Tensor, slot_k: Tensor, slot_w: Tensor, used: Tensor, sink: Tensor,
    start: Tensor, length: Tensor, y: Tensor, norm: Tensor, dy: Tensor, block: int, softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, w, the slots' keys and values (float32) and sink."""
    (_, G, R), width, slots, sizes = q.shape, w.shape[-1], slot_k.shape[2], _sizes(q, w, softmax)
    dy = dy.contiguous()
    tiles = triton.cdiv(block, QUERIES)
    dq, dk, dw, dot = torch.empty_like(q), torch.empty_like(k), torch.empty_like(w), torch.empty_like(norm)
    dsink = torch.empty((len(start), G, tiles), dtype=torch.float32, device=q.device)
    _read_back[(len(start), G, tiles)](
        q, k, w, slot_k, slot_w, used, sink, start, length, y, norm, dy, dq, dot, dsink,
        G, slots, width, R**-0.5, **sizes, **LAUNCH["_read_back"],
    )  # fmt: skip
    slot_dk = torch.empty(slot_k.shape, dtype=torch.float32, device=q.device)
    slot_dw = torch.empty(slot_w.shape, dtype=torch.float32, device=q.device)
    _rows_back[(len(start), G, triton.cdiv(slots, ROWS) + triton.cdiv(block, ROWS))](
        q, k, w, slot_k, slot_w, used, start, length, norm, dy, dot, dk, dw, slot_dk, slot_dw,
        G, slots, width, R**-0.5, **sizes, **LAUNCH["_rows_back"],
    )  # fmt: skip
    return dq, dk, dw, slot_dk, slot_dw, dsink.sum((0, 2)).to(sink.dtype)


@_backward.register_fake
def _(q, k, w, slot_k, slot_w, used, sink, start, length, y, norm, dy, block, softmax):
    slots = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (slot_k, slot_w))
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(w), *slots, torch.empty_like(sink)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.block, ctx.softmax = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, dy, _):
    dq, dk, dw, slot_dk, slot_dw, dsink = _backward(*ctx.saved_tensors, dy, ctx.block, ctx.softmax)
    return dq, dk, dw, slot_dk, slot_dw, None, dsink, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("llm_mlp::take_rows", mutates_args=())
def _gather(rows: Tensor, row: Tensor, used: Tensor) -> Tensor:
    """Rows ``[P, G, X]`` at ``row [b, G, S]`` -> ``[b, G, S, X]``, zero where not ``used``.

    Backward: a row's gradients are summed in the order of the blocks (a stable sort), in float32.
    """
    group = torch.arange(rows.shape[1], device=rows.device)[:, None]
    return torch.where(used[..., None], rows[row, group], 0)


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
    chosen = choose(score, units, block, slots, bounds, fresh)
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
    y, _ = _forward(
        rows(q),
        keys.rows,
        values.rows,
        keys.take(chosen.seen, chosen.used).contiguous(),
        values.take(chosen.seen, chosen.used).contiguous(),
        chosen.used.to(torch.int8),
        sink,
        start,
        length,
        block,
        activation == "softmax",
    )
    if fresh:
        y = y.unflatten(0, q.shape[:2])
    else:
        y = layout.join(y.unflatten(0, (layout.count, block)))
    return y.unflatten(-1, heads), chosen.units(keys, values, heads)
