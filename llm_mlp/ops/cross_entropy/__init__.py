"""Head and loss together, a slice of tokens at a time: the full logits never exist.

In the forward pass each slice's logits give the loss and, at once, both gradients (the trick of Liger-Kernel,
arXiv 2410.10989), so the backward pass costs nothing more and no logits are kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_mlp.ops import tune
from llm_mlp.ops.backend import choose

# Numbers of logits in a slice. On a CPU a slice should stay near the caches (passes over it are what the loss costs
# there); on a GPU it is large enough to fill the chip, and with its temporaries below a gigabyte.
_SLICE_NUMBERS = {"cpu": 2**22, "cuda": 2**26}
_KERNEL_NUMBERS = 2**28  # with the kernel, which has no temporaries: half a gigabyte


def softcap(logits: Tensor, cap: float) -> Tensor:
    """``cap * tanh(logits / cap)``; the identity for cap = 0."""
    return cap * torch.tanh(logits / cap) if cap else logits


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    cap: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of ``softcap(hidden @ weight^T)`` in nats.

    Args:
        hidden: ``[..., D]``. weight: ``[vocabulary, D]``. targets: ``[...]`` int64, ``ignore_index`` not counted.
        reduction: ``mean`` over the counted targets, ``sum``, or ``none`` (``[...]``, without gradients).
        backend: ``auto | chunked | triton``; chunked is plain torch.

    Returns:
        float32 (float64 for float64 inputs).
    """
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        flat, weight = flat.to(torch.get_autocast_dtype(device)), weight.to(torch.get_autocast_dtype(device))
    not_served = None if flat.dtype != torch.float64 else f"dtype {flat.dtype}"
    kind = choose("linear_cross_entropy", backend, flat.device, not_served, lambda: _untrusted(flat))
    losses = _losses
    if kind == "triton":
        from llm_mlp.ops.cross_entropy import kernels  # triton is optional

        losses = kernels.losses
    rows = max(1, (_KERNEL_NUMBERS if kind == "triton" else _slice_numbers(flat.device)) // weight.shape[0])
    with torch.autocast(device, enabled=False):
        if reduction == "none":
            with torch.no_grad():
                return _per_token(flat, weight, wanted, cap, ignore_index, losses, rows).view(targets.shape)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"linear_cross_entropy: unknown reduction {reduction!r}; known: mean, sum, none")
        total = _SummedLoss.apply(flat, weight, wanted, cap, ignore_index, losses, rows)
    if reduction == "sum":
        return total
    return total / (wanted != ignore_index).sum().clamp(min=1)


def _untrusted(like: Tensor) -> str | None:
    """Why ``auto`` may not choose the kernel."""
    from llm_mlp.ops.cross_entropy import kernels  # triton is optional

    return tune.untrusted("cross_entropy", kernels.sizes_of(like.dtype), str(like.device))


def _slice_numbers(device: torch.device) -> int:
    return _SLICE_NUMBERS.get(device.type, 2**26)


def _losses(logits: Tensor, targets: Tensor, cap: float, ignore: int, gradient: bool) -> tuple[Tensor, Tensor]:
    """As `kernels.losses`, in float64 for float64 logits; the logits stay as they are."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z = softcap(logits.to(wide), cap)
    loss = F.cross_entropy(z, targets, ignore_index=ignore, reduction="none")
    if not gradient:
        return loss, logits
    d = torch.softmax(z, -1)
    d.scatter_add_(1, targets.clamp(0, logits.shape[1] - 1)[:, None], torch.full_like(d[:, :1], -1))
    if cap:  # the derivative of the cap is 1 - (z / cap)^2
        d.addcmul_(d * z, z, value=-1 / cap**2)
    return loss, d.mul_((targets != ignore)[:, None]).to(logits.dtype)


def _per_token(
    hidden: Tensor, weight: Tensor, targets: Tensor, cap: float, ignore: int, losses: Callable, rows: int
) -> Tensor:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    parts = [
        losses(hidden[i : i + rows] @ weight.mT, targets[i : i + rows], cap, ignore, False)[0]
        for i in range(0, len(targets), rows)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=wide)


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, cap, ignore, losses, rows):
        need = any(ctx.needs_input_grad[:2])
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if need else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need else None
        for i in range(0, len(targets), rows):
            h = hidden[i : i + rows]
            loss, d = losses(h @ weight.mT, targets[i : i + rows], cap, ignore, need)
            total += loss.sum()
            if d_hidden is None or d_weight is None:
                continue
            d_hidden[i : i + rows] = d @ weight
            if d.dtype == wide:
                d_weight.addmm_(d.mT, h)
            else:
                d_weight += d.mT @ h
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, upstream):
        d_hidden, d_weight = ctx.saved_tensors
        return (d_hidden * upstream).to(d_hidden.dtype), (d_weight * upstream).to(ctx.dtype), *(None,) * 5
