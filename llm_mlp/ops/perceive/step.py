"""One token of `perceive`, states changed in place (decoding)."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_mlp.ops.backend import accumulation_dtype


def perceive_step(
    q: Tensor, k: Tensor, e: Tensor, w: Tensor, log_decay: Tensor, states: Tensor, indices: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `llm_mlp.ops.perceive_step` on checked inputs; returns y ``[B, G, m, V]`` and the residual ``[B, G, m]``.

    A step reads and writes each state once: at B = 1 that is the time it takes. With float32 states and no
    indices everything happens in the pool's own memory.
    """
    dtype = accumulation_dtype(q, w, states)
    out = w.dtype
    q, k, e, w = (x.to(dtype) for x in (q, k, e, w))
    B, G, F = q.shape
    m, V = w.shape[-2:]
    valid = None
    if indices is None:
        S = states
    else:
        valid = indices >= 0
        S = states[indices.clamp(min=0)]
    S = S.to(dtype)
    flat = S.reshape(B * G, F, m * V)  # a view unless `states` is strided
    decay = log_decay.to(dtype).exp().repeat_interleave(V, -1).view(B * G, 1, m * V)
    flat.mul_(decay)
    u = w.reshape(B * G, 1, m * V) - e.reshape(B * G, 1, F) @ flat
    flat.baddbmm_(k.reshape(B * G, F, 1), u)
    y = (q.reshape(B * G, 1, F) @ flat).view(B, G, m, V)
    residual = u.view(B, G, m, V).square().sum(-1)
    S = flat.view(B, G, F, m, V)
    if valid is None:
        if S.data_ptr() != states.data_ptr():
            states.copy_(S)
    else:
        # Only real rows are written: a padding row must not race with the owner of row 0.
        states[indices[valid]] = S[valid].to(states.dtype)  # type: ignore[index]
        y = torch.where(valid[:, None, None, None], y, 0)
        residual = torch.where(valid[:, None, None], residual, 0)
    return y.to(out), residual
