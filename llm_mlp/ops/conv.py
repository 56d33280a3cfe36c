"""Causal depthwise convolution with a carried tail: whole sequences, packed sequences and single steps."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_mlp.ops.backend import expect, sequence_bounds


def causal_conv(
    x: Tensor, weight: Tensor, tail: Tensor | None = None, *, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``y_t = sum_i weight[:, i] x_{t - K + 1 + i}``.

    Args:
        x: ``[B, T, C]``. weight: ``[C, K]``. tail: the K-1 inputs before the first, ``[N, K-1, C]``; None is zeros.
        cu_seqlens: CPU integers ``[N+1]``: packed sequences, B = 1, each with its own tail.

    Returns:
        y ``[B, T, C]`` and the last K-1 inputs of each sequence ``[N, K-1, C]``.
    """
    B, T, C = x.shape
    K = weight.shape[1]
    back = K - 1
    expect("causal_conv", "weight", weight, (C, K))
    bounds = None if cu_seqlens is None else sequence_bounds(cu_seqlens, B, T, "causal_conv")
    N = B if bounds is None else len(bounds) - 1
    if tail is None:
        tail = x.new_zeros((N, back, C))
    else:
        expect("causal_conv", "tail", tail, (N, back, C))
        tail = tail.to(x.dtype)
    weight = weight.to(x.dtype)
    if bounds is None:
        long = torch.cat([tail, x], 1)
        y = long[:, :T] * weight[:, 0]
        for i in range(1, K):
            y = torch.addcmul(y, long[:, i : i + T], weight[:, i])
        return y, long[:, T:]
    # Rows: every sequence's tail, then the tokens; a token's predecessor number i lies in one or the other.
    lengths = torch.tensor(bounds, dtype=torch.long, device=x.device).diff()
    owner = torch.repeat_interleave(torch.arange(N, device=x.device), lengths, output_size=T)
    at = torch.arange(T, device=x.device)
    inside = at - torch.tensor(bounds[:-1], dtype=torch.long, device=x.device)[owner] if N else at
    rows = torch.cat([tail.flatten(0, 1), x[0]])
    y = x[0] * weight[:, back]
    for i in range(back):
        gone = back - i
        index = torch.where(inside >= gone, N * back + at - gone, owner * back + inside + i)
        y = torch.addcmul(y, rows.index_select(0, index), weight[:, i])
    return y[None], last_inputs(x, tail, back, bounds)


def last_inputs(x: Tensor, tail: Tensor | None, back: int, bounds: list[int] | None) -> Tensor:
    """The last ``back`` rows of each sequence of (tail, tokens), ``[N, back, C]``; arguments as `causal_conv`."""
    B, T, C = x.shape
    N = B if bounds is None else len(bounds) - 1
    if tail is None:
        tail = x.new_zeros((N, back, C))
    if bounds is None:
        return x[:, T - back :].clone() if back <= T else torch.cat([tail[:, T:], x], 1)
    if not T:
        return tail.clone()
    first = torch.tensor(bounds, dtype=torch.long, device=x.device)
    want = first.diff()[:, None] - back + torch.arange(back, device=x.device)
    new = x[0].index_select(0, (first[:-1, None] + want).clamp(min=0).flatten()).view(N, back, C)
    old = tail.gather(1, (want + back).clamp(max=max(back - 1, 0))[..., None].expand(N, back, C))
    return torch.where(want[..., None] >= 0, new, old)  # a short sequence still holds old rows


def causal_conv_step(x: Tensor, weight: Tensor, tails: Tensor, state_indices: Tensor | None = None) -> Tensor:
    """One token: x ``[B, C]`` -> y ``[B, C]``; ``tails [N, K-1, C]`` change in place (indices as `perceive_step`)."""
    weight = weight.to(x.dtype)
    tail = tails if state_indices is None else tails[state_indices.clamp(min=0)]
    long = torch.cat([tail.to(x.dtype), x[:, None]], 1)
    y = (long * weight.mT).sum(1)
    new = long[:, 1:].to(tails.dtype)
    if state_indices is None:
        tails.copy_(new)
    else:
        valid = state_indices >= 0
        tails[state_indices[valid]] = new[valid]
        y = torch.where(valid[:, None], y, 0)
    return y
