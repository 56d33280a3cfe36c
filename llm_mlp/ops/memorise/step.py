"""One token of `memorise`, units changed in place (decoding)."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_mlp.ops.backend import accumulation_dtype
from llm_mlp.ops.memorise.units import Units, own_pool, ranked, take_rows


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
        keep = indices[valid]
        pool = Units(*(x[keep] for x in units))
        y = torch.zeros_like(w)
        if keep.numel():
            y[valid] = memorise_step(
                q[valid], k[valid], w[valid], score[valid], sink, pool, None, block, slots, activation
            )
            for whole, part in zip(units, pool, strict=True):
                whole[keep] = part
        return y
    B, G, R = q.shape
    m, V = w.shape[-2:]
    if block == 0:
        units.length.add_(1)
        return torch.zeros_like(w)
    dtype = accumulation_dtype(q, k, w)
    at = torch.arange(B, device=q.device)
    filled = units.length % block
    units.keys[at, :, slots + filled] = k.to(units.keys.dtype)
    units.values[at, :, slots + filled] = w.to(units.values.dtype)
    units.scores[at, :, slots + filled] = score.to(units.scores.dtype)

    rows = slots + block
    place = torch.arange(block, device=q.device)
    opened = (place <= filled[:, None])[:, None].expand(B, G, block)
    seen = torch.cat([units.scores[:, :, :slots] > -torch.inf, opened], -1)
    z = (units.keys.to(q.dtype).reshape(B * G, rows, R) @ q.reshape(B * G, R, 1)).view(B, G, rows).to(dtype) * R**-0.5
    s = sink.to(dtype).view(1, G, 1)
    if activation == "softmax":
        masked = torch.where(seen, z, -torch.inf)
        p = torch.softmax(torch.cat([s.expand(B, G, 1), masked], -1), -1)[..., 1:]
    else:
        r2 = torch.where(seen, z, 0).relu().square()
        p = r2 / (r2.sum(-1, keepdim=True) + s.exp())
    y = p.to(w.dtype).reshape(B * G, 1, rows) @ units.values.to(w.dtype).reshape(B * G, rows, m * V)

    units.length.add_(1)
    full = filled == block - 1
    if bool(full.any()):
        _take_in(units, full.nonzero()[:, 0], slots)
    return y.view(B, G, m, V)


def _take_in(units: Units, which: Tensor, slots: int) -> None:
    """The slots of sequences ``which`` take in their full block, which becomes empty."""
    pick, top = ranked(units.scores[which], slots)
    used = top > -torch.inf
    keys = take_rows(*own_pool(units.keys[which], pick), used)
    values = take_rows(*own_pool(units.values[which], pick), used)
    for whole, kept, empty in ((units.keys, keys, 0.0), (units.values, values, 0.0), (units.scores, top, -torch.inf)):
        rows = torch.full_like(whole[which], empty)
        rows[:, :, :slots] = kept
        whole[which] = rows
