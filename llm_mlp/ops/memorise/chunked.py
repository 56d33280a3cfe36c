"""`memorise` a block at a time in plain torch: linear in T, differentiable, on any device.

Tokens are laid out in blocks aligned to their sequence's start, the filled rows of the carried open block first.
A prefix scan of small stable sorts decides every block's slots (only scores travel in it); then all blocks read at
once: queries [block] against keys [slots + block], taken from one pool of rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llm_mlp.ops.backend import accumulation_dtype
from llm_mlp.ops.layout import Pieces, pieces
from llm_mlp.ops.memorise.units import Units, ranked, take_rows

# Scores of a batch of blocks are [.., block, slots + block]; more than this many numbers are read in several goes.
_READ_NUMBERS = 2**28


class Pool(NamedTuple):
    """Rows by place: first all carried slots, then the blocks' rows."""

    rows: Tensor  # [P, G, X]; the rows of block b are from start[b] on
    start: Tensor  # [b]
    carried: Tensor | None  # [N*slots, G, X]; None: no slot is carried
    base: int  # N*slots, the first place of the first block
    block: int

    def take(self, place: Tensor, used: Tensor) -> Tensor:
        """The rows at ``place [..., G, S]`` -> ``[..., G, S, X]``, zero where not ``used``."""
        row = self.rows_at(place)
        if self.carried is None:
            return take_rows(self.rows, row, used)
        kept = used & (place < self.base)
        carried = take_rows(self.carried, place.clamp(max=self.base - 1), kept)
        return carried + take_rows(self.rows, row, used & ~kept)  # one of them is zero

    def rows_at(self, place: Tensor) -> Tensor:
        """The row of ``rows`` for each place that is not a carried slot."""
        piece = (place - self.base).clamp(min=0)
        # A place that is not used may lie behind the last row.
        return (self.start[piece // self.block] + piece % self.block).clamp(max=self.rows.shape[0] - 1)


class Chosen(NamedTuple):
    """Which rows are read and which are left, as places in a `Pool`."""

    layout: Pieces
    seen: Tensor  # [b, G, slots] the slots a block sees
    used: Tensor  # [b, G, slots] whether they hold a token
    left: Tensor  # [N, G, slots + block] the rows after the last token
    left_used: Tensor
    left_scores: Tensor  # [N, G, slots + block]
    length: Tensor  # [N]

    def units(self, keys: Pool, values: Pool, heads: tuple[int, ...]) -> Units:
        """What is memorised after the last token; ``heads``: (m, V)."""
        return Units(
            keys.take(self.left, self.left_used),
            values.take(self.left, self.left_used).unflatten(-1, heads),
            self.left_scores,
            self.length,
        )


def _choose(
    score: Tensor,
    units: Units,
    block: int,
    slots: int,
    bounds: list[int] | None,
    fresh: bool,
) -> Chosen:
    """Which rows every block reads, and which are left; ``fresh``: no sequence carries an open block."""
    B, T, G = score.shape
    N = units.length.shape[0]
    device = score.device
    lead = None if fresh else units.length % block
    layout = pieces(block, B, T, bounds, device, lead)
    scores = layout.split(score, lead_rows(units.scores, slots, fresh)).transpose(1, 2)  # [b, G, block]
    real = layout.real
    if real is None:
        n = len(layout.rounds)
        real = (torch.arange(n * block, device=device) < T).view(n, block).repeat_interleave(B, 0)
    scores = torch.where(real[:, None], scores, -torch.inf)

    lengths = torch.full((N,), T, device=device) if bounds is None else _differences(bounds, device)
    filled = torch.zeros_like(lengths) if lead is None else lead
    full = (filled + lengths) // block  # blocks completed
    carried = units.scores[:, :, :slots]
    if layout.order is None or layout.rank is None:
        order = turn = torch.arange(N, device=device)
        ordered = full
    else:
        order, turn = layout.order, layout.rank
        carried, ordered = carried[order], full[order]
    seen, last, tops = _choose_slots(scores, carried, layout, order, ordered)
    top = tops[1][turn]

    # What is left: the last slots, and the rows of the first incomplete block as far as they are real.
    starts = layout.bounds(device)
    piece = (starts[full.clamp(max=len(layout.rounds))] + turn).clamp(max=layout.count - 1)  # [N]
    rows = torch.arange(block, device=device)
    opened = full[:, None] * block + rows < (filled + lengths)[:, None]  # [N, block]
    open_place = (N * slots + piece[:, None] * block + rows)[:, None].expand(N, G, block)
    return Chosen(
        layout,
        seen,
        tops[0] > -torch.inf,
        torch.cat([last[turn], open_place], -1),
        torch.cat([top > -torch.inf, opened[:, None].expand(N, G, block)], -1),
        torch.cat([top, torch.where(opened[:, None], scores[piece], -torch.inf)], -1),
        units.length + lengths,
    )


def lead_rows(carried: Tensor, slots: int, fresh: bool) -> Tensor | None:
    """The open block's rows of ``carried [N, G, slots + block, ...]`` as lead rows ``[N, block, G, ...]``."""
    return None if fresh else carried[:, :, slots:].transpose(1, 2)


def _choose_slots(
    scores: Tensor, carried: Tensor, layout: Pieces, order: Tensor, full: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The slots before each block and after the last full one: places in the pool, and scores.

    Taking in a block keeps the best of what was there and the block, so the slots before block r are the best of the
    carried ones and of blocks 0 .. r-1: a prefix scan with an associative merge, log2(blocks) rounds of small sorts.

    Args:
        scores: of the blocks' rows ``[b, G, block]``. carried: of the carried slots ``[N, G, slots]``, longest
            sequence first. order: the sequences, longest first. full: their full blocks.

    Returns:
        Places ``[b, G, slots]`` and ``[N, G, slots]`` (longest first), and the scores of both.
    """
    b, G, block = scores.shape
    N, _, slots = carried.shape
    device, rounds = scores.device, layout.rounds
    # Elements of the scan, a round at a time: the carried slots, then the best rows of each block.
    sizes = torch.tensor([N, *rounds], device=device)
    starts = sizes.cumsum(0) - sizes
    turn = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes, output_size=N + b)
    row = torch.arange(N + b, device=device) - starts[turn]
    done = turn[N:] <= full[row[N:]]  # an open block is not taken in
    pick, best = ranked(torch.where(done[:, None, None], scores, -torch.inf), slots)
    own = N * slots + torch.arange(b, device=device)[:, None, None] * block + pick
    place = torch.cat([(order[:, None, None] * slots + torch.arange(slots, device=device)).expand(N, G, slots), own])
    top = torch.cat([carried, best])
    step, ends = 1, [N, *(N + sum(rounds[:r]) for r in range(1, len(rounds)))]
    while step <= len(rounds):
        cut = ends[step - 1]  # elements of earlier rounds are complete
        before = starts[turn[cut:] - step] + row[cut:]
        pick, merged = ranked(torch.cat([top[before], top[cut:]], -1), slots)
        both = torch.cat([place[before], place[cut:]], -1).gather(-1, pick)
        place, top = torch.cat([place[:cut], both]), torch.cat([top[:cut], merged])
        step *= 2
    before = starts[turn[N:] - 1] + row[N:]
    last = starts[full] + torch.arange(N, device=device)
    return place[before], place[last], (top[before], top[last])


def _differences(bounds: list[int], device: torch.device) -> Tensor:
    return torch.tensor(bounds, device=device).diff()


def only_length(units: Units, T: int, bounds: list[int] | None) -> Units:
    """Only the length moves on (no block, or no tokens); never the caller's own tensors."""
    return Units(*(x.clone() for x in units))._replace(
        length=units.length + (T if bounds is None else _differences(bounds, units.length.device))
    )


def is_fresh(units: Units, block: int) -> bool:
    """Whether no sequence carries an open block, as far as can be told without waiting for a GPU."""
    return not units.length.is_cuda and not bool((units.length % max(block, 1)).any())


def _pools(
    k: Tensor, w: Tensor, units: Units, layout: Pieces, block: int, slots: int, fresh: bool, empty: bool
) -> tuple[Pool, Pool]:
    """Keys and values, laid out in blocks; ``empty``: no slot is carried."""
    start = torch.arange(layout.count, device=k.device) * block

    def pool(x: Tensor, carried: Tensor) -> Pool:
        held = None if empty or not slots else carried[:, :, :slots].transpose(1, 2).flatten(0, 1)
        rows = layout.split(x, lead_rows(carried, slots, fresh)).flatten(0, 1)
        return Pool(rows, start, held, carried.shape[0] * slots, block)

    return pool(k, units.keys), pool(w.flatten(3), units.values.flatten(3))


def units_select(
    k: Tensor, w: Tensor, score: Tensor, units: Units, block: int, slots: int, bounds: list[int] | None
) -> Units:
    """As `llm_mlp.ops.units_select` on checked inputs."""
    if block == 0 or k.numel() == 0:
        return only_length(units, k.shape[1], bounds)
    fresh = is_fresh(units, block)
    chosen = _choose(score, units, block, slots, bounds, fresh)
    keys, values = _pools(k, w, units, chosen.layout, block, slots, fresh, False)
    return chosen.units(keys, values, w.shape[-2:])


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
    chosen = _choose(score, units, block, slots, bounds, fresh)
    keys, values = _pools(k, w, units, chosen.layout, block, slots, fresh, empty)
    q = chosen.layout.split(q).transpose(1, 2)  # [b, G, block, R]
    sink = sink.to(accumulation_dtype(q, k, w)).view(1, -1, 1, 1)
    b, G = q.shape[:2]
    span = max(1, _READ_NUMBERS // (G * block * (slots + block)))
    ys = [_read(q, keys, values, chosen, sink, slice(a, min(a + span, b)), activation) for a in range(0, b, span)]
    y = ys[0] if len(ys) == 1 else torch.cat(ys)
    y = chosen.layout.join(y.transpose(1, 2)).unflatten(-1, w.shape[-2:])
    return y, chosen.units(keys, values, w.shape[-2:])


def _read(q: Tensor, keys: Pool, values: Pool, chosen: Chosen, sink: Tensor, here: slice, activation: str) -> Tensor:
    """The blocks ``here`` read: queries ``[b, G, block, R]`` -> ``[n, G, block, m V]``."""
    q, place, used = q[here], chosen.seen[here], chosen.used[here]
    n, G, block = q.shape[:3]
    slots = place.shape[-1]

    def seen_rows(pool: Pool) -> Tensor:
        own = pool.rows[here.start * block : here.stop * block].unflatten(0, (n, block)).transpose(1, 2)
        return own if slots == 0 else torch.cat([pool.take(place, used), own], 2)

    z = (q @ seen_rows(keys).mT).to(sink.dtype) * q.shape[-1] ** -0.5  # [n, G, block, slots + block]
    causal = torch.ones(block, block, dtype=torch.bool, device=q.device).tril().expand(n, G, block, block)
    seen = torch.cat([used[:, :, None].expand(n, G, block, slots), causal], -1)
    if activation == "softmax":
        masked = torch.where(seen, z, -torch.inf)
        p = torch.softmax(torch.cat([sink.expand(n, G, block, 1), masked], -1), -1)[..., 1:]
    else:
        r2 = torch.where(seen, z, 0).relu().square()
        p = r2 / (r2.sum(-1, keepdim=True) + sink.exp())
    return p.to(q.dtype) @ seen_rows(values)
