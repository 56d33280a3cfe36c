"""One token of `memorise`, units changed in place (decoding)."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_mlp.ops.backend import accumulation_dtype, invariant
from llm_mlp.ops.memorise.units import Units, from_rows, own_pool, ranked, raw, take_rows, to_rows


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
    """As `llm_mlp.ops.memorise_step` on checked inputs.

    Rows are read where they lie: with no indices nothing is copied, so a token costs one read of its units.
    """
    if indices is not None:
        valid = indices >= 0
        if invariant():  # every row is computed, in the places of padding whatever row 0 gives
            pool = Units(*(raw(x)[indices.clamp(min=0)].view(x.dtype) for x in units))
            y = memorise_step(q, k, w, score, sink, pool, None, block, slots, activation)
            for whole, part in zip(units, pool, strict=True):
                raw(whole)[indices[valid]] = raw(part)[valid]
            return torch.where(valid[:, None, None, None], y, 0)
        keep = indices[valid]
        pool = Units(*(raw(x)[keep].view(x.dtype) for x in units))
        y = torch.zeros_like(w)
        if keep.numel():
            y[valid] = memorise_step(
                q[valid], k[valid], w[valid], score[valid], sink, pool, None, block, slots, activation
            )
            for whole, part in zip(units, pool, strict=True):
                raw(whole)[keep] = raw(part)
        return y
    B, G, R = q.shape
    m, V = w.shape[-2:]
    if block == 0:
        units.length.add_(1)
        return torch.zeros_like(w)
    dtype = accumulation_dtype(q, k, w)
    filled = units.length % block
    # On a CPU lengths cost nothing to look at: sequences of one length are written by a plain copy, and the rows of the
    # open block that are still empty are not read. Reading the rows is what a token costs.
    whole_block = filled.is_cuda or invariant()
    lengths = [block - 1] if whole_block else filled.tolist()
    even = not whole_block and len(set(lengths)) == 1
    rows = slots + max(lengths, default=0) + 1
    for whole, new in ((units.keys, k), (units.values, w), (units.scores, score)):
        new = to_rows(new, whole.dtype)
        if even:
            whole[:, :, rows - 1] = new
        else:
            raw(whole)[torch.arange(B, device=q.device), :, slots + filled] = raw(new)
    keys, values = (x[:, :, :rows].flatten(0, 1).flatten(2) for x in (units.keys, units.values))
    z = torch.bmm(q.reshape(B * G, 1, R), from_rows(keys, q.dtype).mT).view(B, G, rows).to(dtype) * R**-0.5
    unseen = -torch.inf if activation == "softmax" else 0.0
    z[..., :slots].masked_fill_(units.scores[:, :, :slots] == -torch.inf, unseen)
    if not even:
        place = torch.arange(rows - slots, device=q.device)
        z[..., slots:].masked_fill_((place > filled[:, None])[:, None], unseen)
    s = sink.to(dtype).view(1, G, 1)
    if activation == "softmax":
        p = torch.softmax(torch.cat([s.expand(B, G, 1), z], -1), -1)[..., 1:]
    else:
        r2 = z.relu_().square_()
        p = r2 / (r2.sum(-1, keepdim=True) + s.exp())
    y = torch.bmm(p.to(w.dtype).reshape(B * G, 1, rows), from_rows(values, w.dtype))

    units.length.add_(1)
    full = filled == block - 1
    if block - 1 in lengths and bool(full.any()):
        _take_in(units, full.nonzero()[:, 0], slots)
    return y.view(B, G, m, V)


def _take_in(units: Units, which: Tensor, slots: int) -> None:
    """The slots of sequences ``which`` take in their full block, which becomes empty."""
    pick, top = ranked(units.scores[which], slots)
    used = top > -torch.inf
    rows_k, rows_v = raw(units.keys), raw(units.values)
    keys, values = (take_rows(*own_pool(rows[which], pick), used) for rows in (rows_k, rows_v))
    for whole, kept, empty in ((rows_k, keys, 0), (rows_v, values, 0), (units.scores, top, -torch.inf)):
        rows = torch.full_like(whole[which], empty)
        rows[:, :, :slots] = kept
        whole[which] = rows
