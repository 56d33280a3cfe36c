"""The Triton kernel of `llm_mlp.ops.cross_entropy`: a row of logits becomes its loss and, in place, its gradient.

Two passes over a row, the second out of the caches: the floor is one read and one write of the logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from llm_mlp.ops.tiles import narrow
from llm_mlp.ops.tune import Sizes, Table, plan

NOTHING = tl.constexpr(-3.0e38)  # below every logit; -inf would give -inf - -inf
LAUNCH: Table = {"_loss": {"BLOCK": 4096, "num_warps": 8}}


@triton.jit
def _capped(x, cap, CAP: tl.constexpr):
    """``cap tanh(x / cap)``."""
    if CAP:
        x = cap - 2.0 * cap / (1.0 + tl.exp(2.0 * x / cap))
    return x


@triton.jit
def _loss(
    logit_ptr, target_ptr, loss_ptr, columns, stride, cap, ignore,
    BLOCK: tl.constexpr, CAP: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits = logit_ptr + row * stride
    target = tl.load(target_ptr + row)
    lane = tl.arange(0, BLOCK)
    best, total = tl.full((BLOCK,), NOTHING, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for a in range(0, columns, BLOCK):
        inside = a + lane < columns
        x = tl.load(logits + a + lane, mask=inside, other=0.0).to(tl.float32)
        z = tl.where(inside, _capped(x, cap, CAP), NOTHING)
        higher = tl.maximum(best, z)
        total = total * tl.exp(best - higher) + tl.where(inside, tl.exp(z - higher), 0.0)
        best = higher
    top = tl.max(best, 0)
    norm = top + tl.log(tl.sum(total * tl.exp(best - top), 0))
    counted = target != ignore
    known = (target >= 0) & (target < columns)
    wanted = _capped(tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32), cap, CAP)
    tl.store(loss_ptr + row, tl.where(counted, norm - wanted, 0.0))
    if GRADIENT:
        for a in range(0, columns, BLOCK):
            inside = a + lane < columns
            z = _capped(tl.load(logits + a + lane, mask=inside, other=0.0).to(tl.float32), cap, CAP)
            d = tl.exp(z - norm) - tl.where(a + lane == target, 1.0, 0.0)
            if CAP:
                d *= 1.0 - (z / cap) * (z / cap)
            d = tl.where(counted, d, 0.0)
            tl.store(logits + a + lane, narrow(d, logit_ptr.dtype.element_ty), mask=inside)


def candidates() -> tuple[Table, Table]:
    """Launch tables, the fast one first (see perceive/kernels.py)."""
    return LAUNCH, {"_loss": {"BLOCK": 1024, "num_warps": 2}}


def sizes_of(dtype: torch.dtype) -> Sizes:
    """What `tune` knows a launch by."""
    return (("dtype", str(dtype).removeprefix("torch.")),)


def losses(logits: Tensor, targets: Tensor, cap: float, ignore: int, gradient: bool) -> tuple[Tensor, Tensor]:
    """Loss of each row of ``logits [n, vocabulary]`` (float32 ``[n]``, NaN for a target outside the vocabulary, 0 where
    it is ``ignore``), and the logits: with ``gradient`` they have become the losses' gradients."""
    loss = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if is_fake(logits):  # shapes alone: there is nothing to launch
        return loss, logits
    way = plan("cross_entropy", sizes_of(logits.dtype))
    with way.compiling():
        _loss[(len(logits),)](
            logits, targets.contiguous(), loss, logits.shape[1], logits.stride(0), cap or 1.0, ignore,
            CAP=bool(cap), GRADIENT=gradient, **way.of(candidates())["_loss"],
        )  # fmt: skip
    return loss, logits
