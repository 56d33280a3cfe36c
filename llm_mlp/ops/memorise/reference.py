"""The loop that defines `memorise`: token by token, one sequence at a time, any float dtype, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_mlp.ops.backend import accumulation_dtype
from llm_mlp.ops.memorise.units import Units


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
) -> tuple[Tensor, Units]:
    """As `llm_mlp.ops.memorise` on checked inputs; ``units`` are given."""
    B, T = q.shape[:2]
    spans = [(n, 0, T) for n in range(B)] if bounds is None else [(0, a, b) for a, b in zip(bounds, bounds[1:])]
    ys, kept = [], []
    for n, (row, a, b) in enumerate(spans):
        y, left = _sequence(
            q[row, a:b],
            k[row, a:b],
            w[row, a:b],
            score[row, a:b],
            sink,
            Units(*(x[n] for x in units)),
            block,
            slots,
            activation,
        )
        ys.append(y)
        kept.append(left)
    y = torch.stack(ys) if bounds is None and ys else torch.cat(ys)[None] if ys else w
    return y, Units(*(torch.stack(x) for x in zip(*kept, strict=True))) if kept else units


def _sequence(q, k, w, score, sink, units: Units, block, slots, activation) -> tuple[Tensor, Units]:
    """One sequence: q, k [T, G, R], w [T, G, m, V], score [T, G], units without the leading N."""
    G = q.shape[1]
    dtype = accumulation_dtype(q, k, w)
    length = int(units.length)
    if block == 0:
        return torch.zeros_like(w), units._replace(length=units.length + q.shape[0])
    filled = length % block
    # A row is (score, key [R], value [m, V]) as Python sees it; lists are in order of age where ties matter.
    slot = [
        [
            (units.scores[g, j], units.keys[g, j], units.values[g, j])
            for j in range(slots)
            if units.scores[g, j] > -torch.inf
        ]
        for g in range(G)
    ]
    opened = [
        [(units.scores[g, slots + j], units.keys[g, slots + j], units.values[g, slots + j]) for j in range(filled)]
        for g in range(G)
    ]
    ys = []
    for t in range(q.shape[0]):
        y = []
        for g in range(G):
            opened[g].append((score[t, g], k[t, g], w[t, g]))
            rows = slot[g] + opened[g]
            z = torch.stack([r[1] for r in rows]).to(dtype) @ q[t, g].to(dtype) * q.shape[-1] ** -0.5
            s = sink[g].to(dtype)
            if activation == "softmax":
                p = torch.softmax(torch.cat([s[None], z]), 0)[1:]
            else:
                r2 = torch.relu(z).square()
                p = r2 / (r2.sum() + s.exp())
            y.append(torch.einsum("j,jmv->mv", p, torch.stack([r[2] for r in rows]).to(dtype)))
        ys.append(torch.stack(y).to(w.dtype))
        length += 1
        if length % block == 0:
            for g in range(G):
                kept = [r for r in slot[g] + opened[g] if r[0] > -torch.inf]
                slot[g] = sorted(kept, key=lambda r: -float(r[0]))[:slots]  # stable: ties the earlier token
                opened[g] = []

    def column(i: int, empty: Tensor) -> Tensor:
        lanes = []
        for g in range(G):
            rows = [r[i] for r in slot[g]]
            rows += [empty] * (slots - len(rows)) + [r[i] for r in opened[g]]
            lanes.append(torch.stack(rows + [empty] * (slots + block - len(rows))))
        return torch.stack(lanes)

    left = Units(
        column(1, torch.zeros_like(units.keys[0, 0])),
        column(2, torch.zeros_like(units.values[0, 0])),
        column(0, torch.full_like(units.scores[0, 0], -torch.inf)),
        torch.full_like(units.length, length),
    )
    return (torch.stack(ys) if ys else torch.zeros_like(w)), left
