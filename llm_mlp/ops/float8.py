"""``x W^T`` with float8 products, for training on devices that have matrix units for them.

The product itself and the gradient of x are float8, each row of both factors scaled anew by its own largest magnitude;
the gradient of W, a sum over all tokens that the optimizer averages for long, stays bfloat16. That is torchao's recipe
``rowwise_with_gw_hp``, and these are its reasons:

- Scales by row, not by tensor: one token with large activations (ReLU^2 makes them) takes no digits from the others,
  and a row's largest magnitude is known as soon as the row is, so the compiler casts in the pass that made it; a
  tensor's takes one more pass over it.
- e4m3 for gradients too: e5m2's range is for tensors with one scale; within a row, three bits of fraction are worth
  more (Transformer Engine's MXFP8 and block recipes likewise are e4m3 throughout).
- float8 for the gradient of W would need both factors quantised once more along the tokens and transposed, which at
  widths of a few thousand costs about what the faster product saves.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
SMALLEST = 1e-30  # of a row's largest magnitude: a row of zeros has a scale too, and two scales' product is no zero
MULTIPLE = 16  # what both sides of W have to be multiples of


def quantise(t: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``t [M, K]`` as e4m3 ``[M, K]`` and their scales ``[M, 1]`` (float32): t is about their product.

    A number errs by at most 2^-4 of itself, or by 2^-10 scales near zero. NaN and infinity make their row NaN.
    """
    wide = t.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / LARGEST
    return (wide / scale).to(E4M3).contiguous(), scale


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a b^T`` of ``[M, K]`` and ``[N, K]``: ``[M, N]``, bfloat16 (the only dtype of products with scales by row)."""
    (a, scale_a), (b, scale_b) = quantise(a), quantise(b)
    # Autocast would round the scales. Without fast accumulation Hopper's products with scales by row are slow.
    with torch.autocast(a.device.type, enabled=False):
        return torch._scaled_mm(a, b.t(), scale_a, scale_b.t(), out_dtype=torch.bfloat16, use_fast_accum=True)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return _product(grad, weight.t()), (grad.t() @ x).to(weight.dtype)


def linear_float8(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` of x ``[..., K]`` and W ``[N, K]``: ``[..., N]`` in bfloat16, differentiable in both.

    x is rounded to bfloat16 first; the gradients have the dtypes of x and W.

    Raises:
        ValueError: K or N is not a multiple of 16.
        RuntimeError: torch's, on a device without float8 products.
    """
    rows, width = weight.shape
    if rows % MULTIPLE or width % MULTIPLE:
        raise ValueError(f"linear_float8: both sides of W {tuple(weight.shape)} must be multiples of {MULTIPLE}")
    y = _Linear.apply(x.to(torch.bfloat16).reshape(-1, width), weight)
    return y.view(*x.shape[:-1], rows)
