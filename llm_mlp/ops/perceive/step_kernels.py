"""`perceive_step` as one Triton kernel: states are read and written once, in place, where the indices say.

A program holds some whole heads of one group's state; all arithmetic is float32 without matrix units.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_mlp.ops.perceive.kernels import _columns, _head_sums, _scaled, _Sizes
from llm_mlp.ops.tiles import after_previous, narrow, where_if
from llm_mlp.ops.tune import Sizes, Table, aligned, overlap, plan

LAUNCH: Table = {"_step": {"columns": 64, "num_warps": 4}}
FEW = 264  # programs that leave a GPU half empty: then states are cut into single heads


@triton.jit
def place_of(index_ptr, b, INDEXED: tl.constexpr):
    """The ``b``-th sequence's row of a pool of states; below 0: none."""
    row = b
    if INDEXED:
        row = tl.load(index_ptr + b).to(tl.int64)
    return row


@triton.jit
def decay_of(a, log_rate):
    """``-softplus(a) exp(log_rate)``."""
    small = tl.exp(-tl.abs(a))
    # log1p by its series where adding to 1 would lose it.
    log1p = tl.where(small < 1e-3, small - 0.5 * small * small, tl.log(1.0 + small))
    return -(tl.maximum(a, 0.0) + log1p) * tl.exp(log_rate)


@triton.jit
def update(
    b, g, part, row, q_ptr, k_ptr, e_ptr, w_ptr, decay_ptr, rate_ptr, beta, state_ptr, y_ptr, residual_ptr, G,
    m: tl.constexpr, V: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, SCALAR: tl.constexpr,
    LOGITS: tl.constexpr,
):  # fmt: skip
    """A part of a group's heads take in the token and are read. LOGITS: ``decay`` are the heads' logits, rows of
    which begin at ``decay_ptr``, and ``beta`` is known; else e or beta stand at ``e_ptr``."""
    f, width, at = tl.arange(0, F), m * V, b * G + g
    columns, own = _columns(part, m, V, BM, BV)
    head = part * BM + tl.arange(0, BM)
    known = where_if(head < m, row >= 0)
    own = where_if(own, row >= 0)
    cell = (row * G + g) * F * width + (f[:, None] * width + columns[None, :])
    S = tl.load(state_ptr + cell, mask=own[None, :], other=0.0).to(tl.float32)
    if LOGITS:
        a = tl.load(decay_ptr + g * m + head, mask=known, other=0.0).to(tl.float32)
        decay = decay_of(a, tl.load(rate_ptr + g * m + head, mask=known, other=0.0).to(tl.float32))
    else:
        decay = tl.load(decay_ptr + at * m + head, mask=known, other=0.0)
    here = where_if(f < F, row >= 0)
    q = tl.load(q_ptr + at * F + f, mask=here, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + at * F + f, mask=here, other=0.0).to(tl.float32)
    e = k
    if not SCALAR:
        e = tl.load(e_ptr + at * F + f, mask=here, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + at * width + columns, mask=own, other=0.0).to(tl.float32)
    S = _scaled(S, tl.exp(decay)[None, :], BM)
    seen = tl.sum(e[:, None] * S, 0)
    if LOGITS:
        seen *= beta
    elif SCALAR:
        seen *= tl.load(e_ptr + at, mask=row >= 0, other=0.0)
    u = (w - seen)[None, :]
    S += k[:, None] * u
    tl.store(state_ptr + cell, narrow(S, state_ptr.dtype.element_ty), mask=own[None, :])
    y = tl.sum(q[:, None] * S, 0)
    columns, there = _columns(part, m, V, BM, BV)
    tl.store(y_ptr + at * width + columns, narrow(y, y_ptr.dtype.element_ty), mask=there)
    residual = tl.reshape(_head_sums(u * u, BM), (BM,))
    tl.store(residual_ptr + at * m + head, residual, mask=head < m)


@triton.jit(do_not_specialize=["G"])
def _step(
    q_ptr, k_ptr, e_ptr, w_ptr, decay_ptr, state_ptr, index_ptr, y_ptr, residual_ptr,
    G, m: tl.constexpr, V: tl.constexpr,
    F: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr, SCALAR: tl.constexpr,
    INDEXED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    after_previous(PDL)
    b, part, g = (tl.program_id(0) // PARTS).to(tl.int64), tl.program_id(0) % PARTS, tl.program_id(1)
    row = place_of(index_ptr, b, INDEXED)
    update(
        b, g, part, row, q_ptr, k_ptr, e_ptr, w_ptr, decay_ptr, decay_ptr, 0.0, state_ptr, y_ptr, residual_ptr, G,
        m, V, F, BM, BV, SCALAR, False,
    )  # fmt: skip


def candidates() -> tuple[Table, Table]:
    """Launch tables, the fast one first (see kernels.py)."""
    return LAUNCH, {"_step": {"columns": 32, "num_warps": 2}}


def sizes_of(F: int, m: int, V: int, scalar: bool, dtype: torch.dtype, state: torch.dtype) -> Sizes:
    """What `tune` knows a launch by; ``state``: dtype of the states."""
    kinds = (str(x).removeprefix("torch.") for x in (state, dtype))
    return ("F", F), ("m", m), ("V", V), ("scalar", scalar), *zip(("state", "dtype"), kinds, strict=True)


def tile_of(B: int, G: int, F: int, m: int, V: int, columns: int) -> _Sizes:
    """Heads of a program: some, or one where there would be few programs."""
    tile = _Sizes.of(m, V, min(columns, 2**14 // F))
    return _Sizes.of(m, V, 1) if B * G * tile.parts < FEW else tile


@torch.library.custom_op("llm_mlp::perceive_step", mutates_args=("states",))
def perceive_step(
    q: Tensor, k: Tensor, e: Tensor, w: Tensor, log_decay: Tensor, states: Tensor, indices: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `llm_mlp.ops.perceive_step` on checked inputs: y in w's dtype, residual float32."""
    (B, G, F), (m, V) = q.shape, w.shape[-2:]
    y, residual = torch.empty_like(w), torch.empty((B, G, m), dtype=torch.float32, device=q.device)
    scalar = e.ndim == 2
    way = plan("perceive_step", sizes_of(F, m, V, scalar, q.dtype, states.dtype))
    launch = dict(way.of(candidates())["_step"])
    tile = tile_of(B, G, F, m, V, launch.pop("columns"))
    with way.compiling():
        _step[(B * tile.parts, G)](
            q, k, e, w, log_decay, states, indices, y, residual, G, F=F, **tile.constants(m, V), SCALAR=scalar,
            INDEXED=indices is not None, **overlap(q, B), **launch,
        )  # fmt: skip
    return y, residual


@perceive_step.register_fake
def _(q, k, e, w, log_decay, states, indices):
    return torch.empty_like(w), torch.empty(log_decay.shape, dtype=torch.float32, device=q.device)


def run(
    q: Tensor, k: Tensor, e: Tensor, w: Tensor, log_decay: Tensor, states: Tensor, indices: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`perceive_step` of tensors that may lie anyhow; ``states`` contiguous."""
    if not q.numel():
        return w, log_decay.float()
    q, k, e, w, log_decay = (aligned(x) for x in (q, k, e, w, log_decay.float()))
    return perceive_step(q, k, e, w, log_decay, states, indices)
