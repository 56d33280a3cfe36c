"""Head and loss together, a slice of tokens at a time: the full logits never exist.

In the forward pass each slice's logits give the loss and, at once, both gradients (the trick of Liger-Kernel,
arXiv 2410.10989), so the backward pass costs nothing more and no logits are kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers of logits in a slice. On a CPU a slice should stay near the caches (passes over it are what the loss costs
# there); on a GPU it is large enough to fill the chip, and with its temporaries below a gigabyte.
_SLICE_NUMBERS = {"cpu": 2**22, "cuda": 2**26}


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
) -> Tensor:
    """Cross-entropy of ``softcap(hidden @ weight^T)`` in nats.

    Args:
        hidden: ``[..., D]``. weight: ``[vocabulary, D]``. targets: ``[...]`` int64, ``ignore_index`` not counted.
        reduction: ``mean`` over the counted targets, ``sum``, or ``none`` (``[...]``, without gradients).

    Returns:
        float32 (float64 for float64 inputs).
    """
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        flat, weight = flat.to(torch.get_autocast_dtype(device)), weight.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        if reduction == "none":
            with torch.no_grad():
                return _per_token(flat, weight, wanted, cap, ignore_index).view(targets.shape)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"linear_cross_entropy: unknown reduction {reduction!r}; known: mean, sum, none")
        total = _SummedLoss.apply(flat, weight, wanted, cap, ignore_index)
    if reduction == "sum":
        return total
    return total / (wanted != ignore_index).sum().clamp(min=1)


def _rows(weight: Tensor) -> int:
    return max(1, _SLICE_NUMBERS.get(weight.device.type, 2**26) // weight.shape[0])


def _slice_loss(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float, ignore: int) -> tuple[Tensor, ...]:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = softcap((hidden @ weight.mT).to(wide), cap)
    return logits, F.cross_entropy(logits, targets, ignore_index=ignore, reduction="none")


def _per_token(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float, ignore: int) -> Tensor:
    n = _rows(weight)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    parts = [
        _slice_loss(hidden[i : i + n], weight, targets[i : i + n], cap, ignore)[1] for i in range(0, len(targets), n)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=wide)


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, cap, ignore):
        need = any(ctx.needs_input_grad[:2])
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if need else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need else None
        n = _rows(weight)
        for i in range(0, len(targets), n):
            h, y = hidden[i : i + n], targets[i : i + n]
            logits, loss = _slice_loss(h, weight, y, cap, ignore)
            total += loss.sum()
            if d_hidden is None or d_weight is None:
                continue
            counted = (y != ignore)[:, None]
            grad = torch.softmax(logits, -1)
            grad.scatter_add_(1, y.clamp(0, weight.shape[0] - 1)[:, None], torch.full_like(grad[:, :1], -1))
            if cap:  # the derivative of the cap is 1 - (logits / cap)^2
                grad.addcmul_(grad * logits, logits, value=-1 / cap**2)
            grad = grad.mul_(counted).to(hidden.dtype)
            d_hidden[i : i + n] = grad @ weight
            if grad.dtype == wide:
                d_weight.addmm_(grad.mT, h)
            else:
                d_weight += grad.mT @ h
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, upstream):
        d_hidden, d_weight = ctx.saved_tensors
        return (d_hidden * upstream).to(d_hidden.dtype), (d_weight * upstream).to(ctx.dtype), None, None, None
