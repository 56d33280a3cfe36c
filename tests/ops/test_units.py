"""Choosing and merging units: `units_select` is `memorise` without the read; merging is reading on."""

from __future__ import annotations

import pytest
import torch
from op_cases import carried_units, close, copied, memorise_inputs, naive_memorise, same_units

from llm_mlp.ops import Units, memorise, units_merge, units_select
from llm_mlp.ops.memorise.units import from_rows, to_rows

G, R, m, V = 2, 3, 2, 2
SIZES = [(4, 3), (4, 0), (5, 20), (1, 2), (0, 0)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("scores", ["ties", "distinct"])
def test_select_is_memorise_without_the_read(sizes, scores):
    block, slots = sizes
    for lengths in (None, [0, 4, 7]):
        units = None if lengths is None else carried_units(lengths, G, R, m, V, block=block, slots=slots)
        q, k, w, score, sink = memorise_inputs(3, 13, G, R, m, V, scores=scores)
        chosen = units_select(k, w, score, units, block=block, slots=slots)
        same_units(chosen, memorise(q, k, w, score, sink, units, block=block, slots=slots)[1], 0)
        same_units(chosen, naive_memorise(None, k, w, score, None, units, block=block, slots=slots)[1], 0)
        bounds = torch.tensor([0, 5, 5, 13])
        q, k, w, score, sink = memorise_inputs(1, 13, G, R, m, V, scores=scores)
        packed = units_select(k, w, score, units, block=block, slots=slots, cu_seqlens=bounds)
        same_units(packed, memorise(q, k, w, score, sink, units, block=block, slots=slots, cu_seqlens=bounds)[1], 0)


def naive_merge(a: Units, b: Units, block: int, slots: int) -> Units:
    """The best of a's slots, a's open block, b's slots, in that order; b's open block after them."""
    N, groups = a.scores.shape[:2]
    keys, values, scores = torch.zeros_like(b.keys), torch.zeros_like(b.values), torch.full_like(b.scores, -torch.inf)
    length = []
    for n in range(N):
        opened = int(a.length[n]) % block
        blocks = (int(a.length[n]) + block - 1) // block
        length.append(blocks * block + int(b.length[n]))
        for g in range(groups):
            rows = (
                [(a, j) for j in range(slots)]
                + [(a, slots + j) for j in range(opened)]
                + [(b, j) for j in range(slots)]
            )
            rows = [(u, j) for u, j in rows if u.scores[n, g, j] > -torch.inf]
            best = sorted(enumerate(rows), key=lambda r: (-r[1][0].scores[n, g, r[1][1]].item(), r[0]))[:slots]
            for row, (_, (u, j)) in enumerate(best):
                keys[n, g, row], values[n, g, row], scores[n, g, row] = (
                    u.keys[n, g, j],
                    u.values[n, g, j],
                    u.scores[n, g, j],
                )
            keys[n, g, slots:], values[n, g, slots:] = b.keys[n, g, slots:], b.values[n, g, slots:]
            scores[n, g, slots:] = b.scores[n, g, slots:]
    return Units(keys, values, scores, torch.tensor(length))


@pytest.mark.parametrize("sizes", SIZES[:-1])
@pytest.mark.parametrize("scores", ["ties", "distinct", "lost"])
def test_merge_is_the_specification(sizes, scores):
    block, slots = sizes
    lengths = [0, 1, block, 2 * block + 1, 3 * block, 2 * block - 1]
    for back in (lengths, lengths[::-1]):
        a = carried_units(lengths, G, R, m, V, block=block, slots=slots, scores=scores, seed=1)
        b = carried_units(back, G, R, m, V, block=block, slots=slots, seed=70)
        before = copied(a), copied(b)
        same_units(units_merge(a, b, block=block, slots=slots), naive_merge(a, b, block, slots), 0)
        same_units(a, before[0], 0)
        same_units(b, before[1], 0)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("blocks", [0, 1, 3])
@pytest.mark.parametrize("T", [0, 3, 4, 11])
def test_merge_is_reading_the_concatenation(sizes, blocks, T):
    """Where a ends with a block and the scores are given, reading b after a chooses the same rows."""
    block, slots = sizes
    L = blocks * block
    _, k, w, score, _ = memorise_inputs(2, L + T, G, R, m, V)
    size = dict(block=block, slots=slots)
    a = units_select(k[:, :L], w[:, :L], score[:, :L], **size)
    b = units_select(k[:, L:], w[:, L:], score[:, L:], **size)
    same_units(units_merge(a, b, **size), units_select(k, w, score, **size), 0)


@pytest.mark.parametrize("sizes", SIZES)
def test_merge_is_associative(sizes):
    block, slots = sizes
    size = dict(block=block, slots=slots)
    a, b, c = (
        carried_units([n * block for n in lengths], G, R, m, V, **size, seed=10 * i)
        for i, lengths in enumerate(([0, 1, 3], [2, 0, 1], [1, 4, 2]))
    )
    left = units_merge(units_merge(a, b, **size), c, **size)
    right = units_merge(a, units_merge(b, c, **size), **size)
    same_units(left, right, 0)


def test_merge_keeps_the_alignment_of_b():
    """A cut block of a counts as a whole one, so b's blocks end where they did; reading goes on from there."""
    size = dict(block=4, slots=3)
    a = carried_units([6], G, R, m, V, **size, seed=1)
    b = carried_units([5], G, R, m, V, **size, seed=2)
    merged = units_merge(a, b, **size)
    assert merged.length.tolist() == [8 + 5]
    close(merged.keys[:, :, 3:], b.keys[:, :, 3:], 0)
    _, k, w, score, _ = memorise_inputs(1, 3, G, R, m, V, seed=5)
    after = units_select(k, w, score, merged, **size)
    assert after.length.tolist() == [16] and (after.scores[:, :, 3:] == -torch.inf).all()
    same_units(
        after._replace(length=b.length),
        naive_merge(a, units_select(k, w, score, b, **size), 4, 3)._replace(length=b.length),
        0,
    )


def test_merge_is_differentiable():
    size = dict(block=4, slots=3)
    a = carried_units([6, 8], G, R, m, V, **size, seed=1)
    b = carried_units([5, 9], G, R, m, V, **size, seed=2)
    leaves = [x.clone().requires_grad_() for x in (a.keys, a.values, b.keys, b.values)]

    def run(ak, av, bk, bv):
        merged = units_merge(a._replace(keys=ak, values=av), b._replace(keys=bk, values=bv), **size)
        return merged.keys, merged.values

    assert torch.autograd.gradcheck(run, leaves)
    merged = units_merge(a._replace(keys=leaves[0]), b, **size)
    assert not merged.scores.requires_grad


def test_units_are_checked():
    a = carried_units([6], G, R, m, V, block=4, slots=3)
    other = carried_units([6], G, R, m, V, block=4, slots=2)
    with pytest.raises(ValueError, match=r"units_merge: units.keys has shape .* expected .*block = 4, slots = 3"):
        units_merge(a, other, block=4, slots=3)
    with pytest.raises(ValueError, match="block = 0 requires slots = 0"):
        units_merge(a, a, block=0, slots=3)
    with pytest.raises(ValueError, match="must not be negative"):
        units_merge(a, a, block=-1, slots=0)
    _, k, w, score, _ = memorise_inputs(1, 3, G, R, m, V)
    with pytest.raises(ValueError, match="units_select: units.keys"):
        units_select(k, w, score, other, block=4, slots=3)
    with pytest.raises(ValueError, match=r"units_select: score has shape"):
        units_select(k, w, score[..., 0], block=4, slots=3)


def test_8_bits_are_looked_up_as_torch_converts_them():
    rows = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        found = from_rows(rows, dtype)
        assert found.dtype == dtype and torch.equal(found.nan_to_num(nan=999), rows.to(dtype).nan_to_num(nan=999))
    wide = torch.tensor([1e9, -449.0, 447.0, 0.0625, -torch.inf])
    assert to_rows(wide, torch.float8_e4m3fn).tolist() == [448.0, -448.0, 448.0, 0.0625, -448.0]
    assert to_rows(torch.tensor([torch.nan]), torch.float8_e4m3fn).isnan().all()  # never hidden
