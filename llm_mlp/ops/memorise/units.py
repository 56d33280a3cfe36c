"""What a context keeps exactly: `Units`, how they are chosen and how two of them merge.

Rows 0 .. slots-1 are the slots, by score descending, ties the earlier token first; row slots + (length mod block)
is the next of the open block. The slots take in a block together with its last token. Unused rows are zero with
score -inf. After arXiv 2607.02303.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class Units(NamedTuple):
    """Memorised units of N sequences. keys and values are differentiable, scores and length are not."""

    keys: Tensor  # [N, G, slots+block, R] in k's dtype; those of a step in any, float8_e4m3fn too (`to_rows`)
    values: Tensor  # [N, G, slots+block, m, V] in w's dtype, or as keys
    scores: Tensor  # [N, G, slots+block] float32 (float64 for float64 inputs)
    length: Tensor  # [N] int64, tokens seen


def units_init(
    N: int,
    G: int,
    R: int,
    m: int,
    V: int,
    *,
    block: int = 256,
    slots: int = 64,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Units:
    """Empty units of N sequences; ``dtype`` of keys and values (default: torch's)."""
    check_sizes("units_init", block, slots)
    rows = slots + block
    dtype = dtype or torch.get_default_dtype()
    return Units(
        torch.zeros((N, G, rows, R), dtype=dtype, device=device),
        torch.zeros((N, G, rows, m, V), dtype=dtype, device=device),
        torch.full(
            (N, G, rows), -torch.inf, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device
        ),
        torch.zeros(N, dtype=torch.long, device=device),
    )


def to_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as rows are kept. float8_e4m3fn has no infinity and no scale here: what is beyond 448 becomes 448."""
    if dtype == torch.float8_e4m3fn and x.dtype != dtype:
        x = x.clamp(-448.0, 448.0)
    return x.to(dtype)


@functools.cache
def _eight_bits(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype)


def from_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows as they are computed with. On a CPU 8 bits are looked up, six times faster than torch converts them."""
    if rows.dtype != torch.float8_e4m3fn or rows.device.type != "cpu":
        return rows.to(dtype)
    return _eight_bits(dtype).index_select(0, raw(rows).flatten().int()).view(rows.shape)


def raw(x: Tensor) -> Tensor:
    """``x``, or the bytes of 8-bit floats, to be moved and masked (zero is the byte 0): torch can do little with
    those."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def check_sizes(op: str, block: int, slots: int) -> None:
    """Raise `ValueError` for a block or slots that cannot be."""
    if block < 0 or slots < 0:
        raise ValueError(f"{op}: block = {block} and slots = {slots} must not be negative")
    if block == 0 and slots:
        raise ValueError(f"{op}: block = 0 requires slots = 0 (slots take in whole blocks), got slots = {slots}")


def check_units(op: str, units: Units, shape: tuple[int, int, int, int, int], block: int, slots: int) -> None:
    """Raise `ValueError` unless ``units`` are those of (N, G, R, m, V) with this block and slots."""
    N, G, R, m, V = shape
    rows = slots + block
    expected = ((N, G, rows, R), (N, G, rows, m, V), (N, G, rows), (N,))
    for name, tensor, want in zip(Units._fields, units, expected, strict=True):
        if tuple(tensor.shape) != want:
            raise ValueError(
                f"{op}: units.{name} has shape {tuple(tensor.shape)}, expected {want} "
                f"(block = {block}, slots = {slots})"
            )


def ranked(scores: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The best ``slots`` of rows given in order of age: their places and scores ``[..., slots]``, ties by age.

    Where fewer rows than ``slots`` exist, the rest has place 0 and score -inf.
    """
    top, place = torch.sort(scores, dim=-1, descending=True, stable=True)
    top, place = top[..., :slots], place[..., :slots]
    if top.shape[-1] < slots:
        short = slots - top.shape[-1]
        top = torch.nn.functional.pad(top, (0, short), value=-torch.inf)
        place = torch.nn.functional.pad(place, (0, short))
    return place, top


def take_rows(pool: Tensor, place: Tensor, used: Tensor | None = None) -> Tensor:
    """Rows of ``pool [P, G, ...]`` at ``place [..., G, S]`` -> ``[..., G, S, ...]``, zero where not ``used``."""
    P, G = pool.shape[:2]
    index = place * G + torch.arange(G, device=pool.device)[:, None]
    taken = pool.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, place.shape)
    if used is None:
        return taken
    return torch.where(used.view(*used.shape, *(1,) * (pool.ndim - 2)), taken, 0)


def own_pool(rows: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[N, G, J, ...]`` of sequences as one pool, and ``place [N, G, S]`` (within J) as places in it."""
    N, G, J = rows.shape[:3]
    first = torch.arange(N, device=rows.device)[:, None, None] * J
    return rows.transpose(1, 2).flatten(0, 1), place + first


def open_rows(units: Units, block: int) -> Tensor:
    """Which rows of the open block are filled, ``[N, block]``: the first ``length mod block``."""
    filled = units.length % max(block, 1)
    return torch.arange(block, device=units.length.device) < filled[:, None]


def units_merge(a: Units, b: Units, *, block: int = 256, slots: int = 64) -> Units:
    """Units of text a followed by text b, where b was read alone.

    Slots: the best of a's slots, a's open block, b's slots, in that order. Open block: b's. Length:
    ceil(a.length / block) * block + b.length, so that b keeps its alignment.
    """
    check_sizes("units_merge", block, slots)
    N, G, _, R = a.keys.shape
    m, V = a.values.shape[-2:]
    check_units("units_merge", a, (N, G, R, m, V), block, slots)
    check_units("units_merge", b, (N, G, R, m, V), block, slots)
    if block == 0:
        return Units(b.keys, b.values, b.scores, a.length + b.length)
    open_scores = torch.where(open_rows(a, block)[:, None], a.scores[:, :, slots:], -torch.inf)
    scores = torch.cat([a.scores[:, :, :slots], open_scores, b.scores[:, :, :slots]], -1)
    place, top = ranked(scores, slots)
    used = top > -torch.inf

    def joined(x: Tensor, y: Tensor) -> Tensor:
        kind, x, y = x.dtype, raw(x), raw(y)
        best = take_rows(*own_pool(torch.cat([x, y[:, :, :slots]], 2), place), used)
        both = torch.cat([best, y[:, :, slots:]], 2)
        return both if both.dtype == kind else both.view(kind)  # a view as another dtype has no gradient

    return Units(
        joined(a.keys, b.keys),
        joined(a.values, b.values),
        torch.cat([top, b.scores[:, :, slots:]], -1),
        -(-a.length // block) * block + b.length,
    )
