"""Context parallelism: neighbouring processes read consecutive spans of the same sequences.

A perception layer keeps three things of the past, and each crosses in an exchange whose size does not depend on the
length of the text:

- the convolution's last K - 1 inputs;
- the second layers: a span of tokens is the map S -> exp(log_a) P S + Z (docs/perceive.md), so each process makes the
  map of its own span from nothing, all maps are gathered, and each composes those before it. Backward, the gradients of
  the states that came in are gathered and go through the same maps from the right;
- the memorised units, once the residuals are known: blocks are aligned to the start of the document, so a process sends
  the rows that complete the block it starts in the middle of, and the units of the rest.

In packed rows a span may hold many sequences; only its first can continue one of the span before, only its last can
go on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from llm_mlp.config import ConfigError
from llm_mlp.data import Batch
from llm_mlp.models import LM
from llm_mlp.models.perception import PerceptionMixer
from llm_mlp.ops import Units, perceive, perceive_transition, units_init, units_merge, units_select
from llm_mlp.ops.conv import last_inputs


@dataclass(frozen=True)
class Span:
    """One process's part of a batch, known to all of them."""

    begin: int
    end: int
    continues: bool  # whether the first sequence began in an earlier span
    through: bool  # whether that sequence is also the last: the span maps what came in to what goes out
    before: int  # tokens of the last sequence in earlier spans
    length: int  # tokens of the last sequence in this span


def spans_of(length: int, count: int, cu_seqlens: Tensor | None) -> list[Span]:
    """``length`` tokens of a row in ``count`` consecutive parts; sequences as in ``cu_seqlens`` (None: one a row)."""
    starts = [0] if cu_seqlens is None else cu_seqlens[:-1].tolist()
    found = []
    for n in range(count):
        begin, end = length * n // count, length * (n + 1) // count
        last = max(s for s in starts if s < end)
        continues = begin not in starts
        found.append(
            Span(begin, end, continues, continues and last < begin, max(0, begin - last), end - max(begin, last))
        )
    return found


def _nothing(gathered: Tensor) -> Tensor:
    """0, made of what was gathered: a process that uses none of it must still take part in its backward exchange."""
    return gathered[:0].sum()


class _Gather(torch.autograd.Function):
    """Everybody's tensor ``[ranks, ...]``; the gradient of one's own is the sum of what all make of it."""

    @staticmethod
    def forward(ctx, own: Tensor, split: SplitSequence) -> Tensor:  # type: ignore[override]
        ctx.split = split
        return split.gather(own)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        split = ctx.split
        out = torch.empty_like(grad[0])
        split.bytes += grad.nbytes
        dist.reduce_scatter(out, list(grad.contiguous().unbind(0)), group=split.group)
        return out, None


class _Perceive(torch.autograd.Function):
    """`perceive` of this process's span, with the state that the spans before it leave."""

    @staticmethod
    def forward(ctx, split: SplitSequence, cu_seqlens: Tensor | None, *inputs: Tensor):  # type: ignore[override]
        needs = ctx.needs_input_grad[2:]
        own = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
        maps = split.maps(*own)
        state = split.incoming(maps, own[0].shape[0] if cu_seqlens is None else len(cu_seqlens) - 1)
        state.requires_grad_(any(needs))
        # The graph of this span stays inside: its backward pass runs twice, with an exchange in between.
        with torch.set_grad_enabled(any(needs)):
            q, k, e, w, log_decay = own
            out = perceive(q, k, e, w, log_decay, state, cu_seqlens=cu_seqlens, return_residual=True)
        ctx.split, ctx.own, ctx.state, ctx.out, ctx.maps = split, own, state, out, maps
        return tuple(t.detach() for t in out)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):  # type: ignore[override]
        split, out = ctx.split, ctx.out
        grads = tuple(torch.zeros_like(t) if g is None else g for t, g in zip(out, grads, strict=True))
        (local,) = torch.autograd.grad(out, [ctx.state], grads, retain_graph=True)
        outgoing = split.gradient_of_outgoing(ctx.maps, local)
        y, state, residual = grads
        if state is not None:
            state = state.clone()
            split.last(state).add_(outgoing)
        wanted = [x for x in ctx.own if x.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, (y, state, residual)))
        return None, None, *(next(found) if x.requires_grad else None for x in ctx.own)


class SplitSequence:
    """The span of this process, and the exchanges of a perception layer with the processes of its other spans.

    ``bytes``: what this process has sent, exchanges times the processes of the group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.spans: list[Span] = []
        self.packed = False
        self.bytes = self.exchanges = 0

    @contextlib.contextmanager
    def reading(self, model: LM, batch: Batch) -> Iterator[Batch]:
        """This process's part of ``batch``, and ``model`` made to read it, forward and backward, inside.

        Raises:
            ConfigError: a span too short for the convolution's past.
        """
        tokens = batch.tokens
        self.packed = batch.cu_seqlens is not None
        self.spans = spans_of(tokens.shape[1], self.size, batch.cu_seqlens)
        own = self.spans[self.rank]
        shortest = min(s.end - s.begin for s in self.spans)
        cu_seqlens = batch.cu_seqlens
        if cu_seqlens is not None:
            inside = cu_seqlens[(cu_seqlens > own.begin) & (cu_seqlens < own.end)]
            edges = cu_seqlens.new_tensor([own.begin]), inside, cu_seqlens.new_tensor([own.end])
            cu_seqlens = torch.cat(edges) - own.begin
        mixers = [block.mixer for block in model.blocks]
        for mixer in mixers:
            assert isinstance(mixer, PerceptionMixer)
            back = 0 if mixer.conv is None else mixer.conv.shape[1] - 1
            if shortest < back:
                raise ConfigError(
                    f"parallel.context = {self.size}: a span of {shortest} tokens is shorter than the convolution's "
                    f"past of {back}; use fewer processes or a longer data.seq_len"
                )
            mixer.split = self
        part = slice(own.begin, own.end)
        try:
            yield replace(batch, tokens=tokens[:, part], targets=batch.targets[:, part], cu_seqlens=cu_seqlens)
        finally:
            for mixer in mixers:
                mixer.split = None

    # -- what the mixer calls --------------------------------------------------------------------------------------

    def tail(self, x: Tensor, back: int, cu_seqlens: Tensor | None) -> Tensor:
        """The convolution's inputs before the span, ``[N, back, C]``; x ``[B, T, C]`` are those of the span."""
        bounds = None if cu_seqlens is None else cu_seqlens.tolist()
        ends = last_inputs(x, None, back, bounds)
        rows = _Gather.apply(self.last(ends).contiguous(), self)
        first = rows[self.rank - 1] if self.spans[self.rank].continues else None
        return self._among(first, ends) + _nothing(rows)

    def perceive(
        self, q: Tensor, k: Tensor, e: Tensor, w: Tensor, log_decay: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `llm_mlp.ops.perceive` with ``return_residual``."""
        return _Perceive.apply(self, cu_seqlens, q, k, e, w, log_decay)

    def units(self, k: Tensor, w: Tensor, score: Tensor, block: int, slots: int, cu_seqlens: Tensor | None) -> Units:
        """What was memorised before the span, of its N sequences; arguments as `llm_mlp.ops.memorise`."""
        span = self.spans[self.rank]
        begin = k.shape[1] - span.length
        k, w, score = k[:, begin:], w[:, begin:], score[:, begin:]
        head = self._head(span, block)
        rest = units_select(k[:, head:], w[:, head:], score[:, head:], block=block, slots=slots)
        X, _, G, R = k.shape
        m, V = w.shape[-2:]
        # Rows [X, block + slots + block, G, R + m V]: those that complete a block, then the units of the rest.
        flat = torch.cat([k, w.flatten(-2)], -1)
        early = torch.nn.functional.pad(flat[:, :head], (0, 0, 0, 0, 0, block - head))
        late = torch.cat([rest.keys, rest.values.flatten(-2)], -1).transpose(1, 2)
        rows = _Gather.apply(torch.cat([early, late], 1).contiguous(), self)
        early_scores = torch.nn.functional.pad(score[:, :head].to(rest.scores), (0, 0, 0, block - head))
        scores = self.gather(torch.cat([early_scores, rest.scores.transpose(1, 2)], 1))

        def empty(N: int) -> Units:
            return units_init(N, G, R, m, V, block=block, slots=slots, dtype=k.dtype, device=k.device)

        before = empty(X)
        for n in range(self.rank):
            other = self.spans[n]
            keys, values = rows[n].split((R, m * V), -1)
            values = values.unflatten(-1, (m, V))
            if not other.through:
                before = empty(X)
            cut = self._head(other, block)
            if cut:
                early_rows = keys[:, :cut], values[:, :cut], scores[n][:, :cut]
                before = units_select(*early_rows, before, block=block, slots=slots)
            if other.length > cut:
                added = Units(
                    keys[:, block:].transpose(1, 2),
                    values[:, block:].transpose(1, 2),
                    scores[n][:, block:].transpose(1, 2),
                    before.length.new_full((X,), other.length - cut),
                )
                before = units_merge(before, added, block=block, slots=slots)
        if not span.continues:
            before = empty(X)
        before = before._replace(keys=before.keys + _nothing(rows))
        if cu_seqlens is None:
            return before
        others = empty(len(cu_seqlens) - 2)
        return Units(*(torch.cat(pair) for pair in zip(before, others, strict=True)))

    @staticmethod
    def _head(span: Span, block: int) -> int:
        """Rows of a span's last sequence that complete a block which began in an earlier span."""
        return min(span.length, -span.before % block)

    # -- the pieces ------------------------------------------------------------------------------------------------

    def gather(self, own: Tensor) -> Tensor:
        """Everybody's tensor, ``[ranks, ...]``."""
        out = own.new_empty((self.size, *own.shape))
        self.bytes += own.nbytes * self.size
        self.exchanges += 1
        dist.all_gather(list(out.unbind(0)), own.contiguous(), group=self.group)
        return out

    def last(self, states: Tensor) -> Tensor:
        """Of states ``[N, ...]`` those that go on in the next span: of packed sequences the last, else of every row."""
        return states[-1:] if self.packed else states

    def _among(self, first: Tensor | None, pattern: Tensor) -> Tensor:
        """States of all N sequences: ``first`` of those that continue, nothing of the others."""
        if first is None:
            return torch.zeros_like(pattern)
        return torch.cat([first, torch.zeros_like(pattern[1:])]) if self.packed else first

    @torch.no_grad()
    def maps(self, q: Tensor, k: Tensor, e: Tensor, w: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """P ``[ranks, X, G, F, F]``, exp(log_a) ``[ranks, X, G, 1, m, 1]`` and Z ``[ranks, X, G, F, m, V]``."""
        span = self.spans[self.rank]
        own = [t[:, t.shape[1] - span.length :] for t in (q, k, e, w, log_decay)]
        Z = perceive(*own)[1]
        X, G, F, m, V = Z.shape
        if span.through:
            P, log_a = perceive_transition(own[1], own[2], own[4])
            a = log_a.exp()
        else:  # the last sequence begins here: nothing that came in goes out
            P, a = Z.new_zeros((X, G, F, F)), Z.new_zeros((X, G, m))
        parts = [P.flatten(2), a, Z.flatten(2)]
        found = self.gather(torch.cat([t.to(Z) for t in parts], -1)).split([t.shape[-1] for t in parts], -1)
        shapes = (F, F), (1, m, 1), (F, m, V)
        P, a, Z = (t.unflatten(-1, shape) for t, shape in zip(found, shapes, strict=True))
        return P, a, Z

    @torch.no_grad()
    def incoming(self, maps: tuple[Tensor, Tensor, Tensor], N: int) -> Tensor:
        """The states before the span of its N sequences."""
        P, a, Z = maps
        state = torch.zeros_like(Z[0])
        for n in range(self.rank):
            state = a[n] * torch.einsum("xgij,xgjmv->xgimv", P[n], state) + Z[n]
        first = state if self.spans[self.rank].continues else None
        return self._among(first, Z.new_zeros((N, *Z.shape[2:])))

    @torch.no_grad()
    def gradient_of_outgoing(self, maps: tuple[Tensor, Tensor, Tensor], local: Tensor) -> Tensor:
        """Gradient of the states that go on; ``local``: of the states that came in, from this span's outputs alone."""
        P, a, _ = maps
        gathered = self.gather(local[:1] if self.packed else local)
        gradient = torch.zeros_like(gathered[0])
        for n in range(self.size - 1, self.rank, -1):
            through = a[n] * torch.einsum("xgij,xgimv->xgjmv", P[n], gradient)
            gradient = gathered[n] + through if self.spans[n].continues else torch.zeros_like(gradient)
        return gradient
