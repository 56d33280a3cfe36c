"""Tokens of many sequences in pieces of one size, so that whole rounds of pieces are one batched product.

Round r holds the r-th piece of every sequence that is long enough, longest sequence first: a recurrence over
pieces walks the rounds, and each round is one slice of the piece tensors. Padding is at most a piece a sequence,
however uneven the lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pieces:
    """Where tokens (and, before a sequence's first token, its carried lead rows) lie."""

    size: int
    batch: int
    tokens: int
    rounds: list[int]  # sequences active in each round, non-increasing
    order: Tensor | None  # [N] the sequences, longest first; None: as they are
    rank: Tensor | None  # [N] its inverse
    gather: Tensor | None  # [pieces, size] row of each place: B*T tokens, N*size lead rows, one zero row; None: dense
    scatter: Tensor | None  # [B*T] place of each token
    real: Tensor | None  # [pieces, size] whether a place holds a row; None: all, but for padding after T

    @property
    def count(self) -> int:
        return sum(self.rounds)

    @property
    def starts(self) -> list[int]:
        """First piece of each round."""
        out, total = [], 0
        for active in self.rounds:
            out.append(total)
            total += active
        return out

    def bounds(self, device: torch.device) -> Tensor:
        """First piece of each round, and the number of pieces, ``[rounds + 1]`` int64."""
        if self.gather is None:  # computed there: a copy of a list would wait for the device
            return torch.arange(len(self.rounds) + 1, device=device) * self.batch
        return torch.tensor([*self.starts, self.count], device=device)

    def slices(self) -> list[slice]:
        """The pieces of each round."""
        return [slice(a, a + n) for a, n in zip(self.starts, self.rounds, strict=True)]

    def split(self, x: Tensor, lead: Tensor | None = None) -> Tensor:
        """``[B, T, ...]`` (and lead rows ``[N, size, ...]``) to ``[pieces, size, ...]``, padding zero."""
        if self.gather is None:
            n = len(self.rounds)
            pad = n * self.size - self.tokens
            if pad:
                x = torch.cat([x, x.new_zeros((self.batch, pad, *x.shape[2:]))], 1)
            return x.unflatten(1, (n, self.size)).transpose(0, 1).flatten(0, 1)
        N = len(self.order) if self.order is not None else self.batch
        rows = [x.flatten(0, 1)]
        rows.append(x.new_zeros((N * self.size, *x.shape[2:])) if lead is None else lead.flatten(0, 1))
        rows.append(x.new_zeros((1, *x.shape[2:])))
        return torch.cat(rows).index_select(0, self.gather.flatten()).unflatten(0, self.gather.shape)

    def join(self, x: Tensor) -> Tensor:
        """The inverse of `split`: ``[pieces, size, ...]`` to ``[B, T, ...]`` (tokens only)."""
        if self.scatter is None:
            x = x.unflatten(0, (len(self.rounds), self.batch)).transpose(0, 1).flatten(1, 2)
            return x[:, : self.tokens]
        return x.flatten(0, 1).index_select(0, self.scatter).unflatten(0, (self.batch, self.tokens))


def _known(lead: Tensor) -> list[int] | None:
    """Its values, unless they lie on a GPU, which would have to be waited for."""
    return None if lead.is_cuda else lead.tolist()


def pieces(
    size: int,
    batch: int,
    tokens: int,
    bounds: list[int] | None,
    device: torch.device,
    lead: Tensor | None = None,
) -> Pieces:
    """Lay out ``[batch, tokens]`` (or the packed sequences of ``bounds``) in pieces of ``size``.

    ``lead``: how many carried rows (below ``size``) stand before each sequence's first token, ``[N]`` int64; where it
    lies on a GPU its values are not read, and every sequence gets room for the most.
    """
    if bounds is None and lead is None:
        return Pieces(size, batch, tokens, [batch] * -(-tokens // size), None, None, None, None, None)
    if bounds is None:
        starts, lengths = [n * tokens for n in range(batch)], [tokens] * batch
    else:
        starts, lengths = bounds[:-1], [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    N = len(lengths)
    ahead = [0] * N if lead is None else _known(lead)
    ahead = [size - 1] * N if ahead is None else ahead
    needed = [-(-(a + n) // size) for a, n in zip(ahead, lengths, strict=True)]
    order = sorted(range(N), key=lambda n: -needed[n])
    rounds = [sum(c > r for c in needed) for r in range(max(needed, default=0))]
    order_t = torch.tensor(order, dtype=torch.long, device=device)
    owner = torch.cat([order_t[:active] for active in rounds] or [order_t[:0]])
    turn = torch.repeat_interleave(
        torch.arange(len(rounds), device=device), torch.tensor(rounds, dtype=torch.long, device=device)
    )
    filled = torch.zeros(N, dtype=torch.long, device=device) if lead is None else lead
    start_t = torch.tensor(starts, dtype=torch.long, device=device)
    end = filled + torch.tensor(lengths, dtype=torch.long, device=device)
    place = turn[:, None] * size + torch.arange(size, device=device)  # position in the sequence, lead rows first
    carried = place < filled[owner][:, None]
    real = place < end[owner][:, None]
    total = batch * tokens
    gather = torch.where(real, start_t[owner][:, None] + place - filled[owner][:, None], total + N * size)
    gather = torch.where(carried, total + owner[:, None] * size + place, gather)
    scatter = torch.empty(total + N * size + 1, dtype=torch.long, device=device)
    scatter[gather.flatten()] = torch.arange(gather.numel(), device=device)
    return Pieces(
        size, batch, tokens, rounds, order_t, torch.argsort(order_t), gather, scatter[:total].contiguous(), real
    )
