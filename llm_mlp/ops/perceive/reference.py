"""The recurrence that defines `perceive`: a loop over tokens, any float dtype, differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def perceive(
    q: Tensor, k: Tensor, e: Tensor, w: Tensor, log_decay: Tensor, state: Tensor, bounds: list[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `llm_mlp.ops.perceive` on checked inputs; ``bounds`` are the packed sequences' ends (or None)."""
    if bounds is None:
        return _run(q, k, e, w, log_decay, state)
    parts = [
        _run(q[:, a:b], k[:, a:b], e[:, a:b], w[:, a:b], log_decay[:, a:b], state[n : n + 1])
        for n, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))
    ]
    if not parts:
        return _run(q, k, e, w, log_decay, state)
    y, states, residual = zip(*parts, strict=True)
    return torch.cat(y, 1), torch.cat(states, 0), torch.cat(residual, 1)


def _run(q: Tensor, k: Tensor, e: Tensor, w: Tensor, log_decay: Tensor, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype, out = S.dtype, w.dtype
    q, k, e, w = (x.to(dtype) for x in (q, k, e, w))
    ys, residuals = [], []
    for t in range(q.shape[1]):
        S = log_decay[:, t].exp()[:, :, None, :, None] * S  # [B, G, F, m, V]
        u = w[:, t] - torch.einsum("bgf,bgfmv->bgmv", e[:, t], S)
        S = S + torch.einsum("bgf,bgmv->bgfmv", k[:, t], u)
        ys.append(torch.einsum("bgf,bgfmv->bgmv", q[:, t], S))
        residuals.append(u.square().sum(-1))
    if not ys:
        return w.to(out), S, log_decay
    return torch.stack(ys, 1).to(out), S, torch.stack(residuals, 1)


def transition(k: Tensor, e: Tensor, dtype: torch.dtype) -> Tensor:
    """P of `perceive_transition` ``[B, G, F, F]``: the product of I - k e^T, last token leftmost."""
    k, e = k.to(dtype), e.to(dtype)
    B, T, G, F = k.shape
    P = torch.eye(F, dtype=dtype, device=k.device).expand(B, G, F, F)
    for t in range(T):
        P = P - k[:, t, :, :, None] * (e[:, t, :, None, :] @ P)
    return P
