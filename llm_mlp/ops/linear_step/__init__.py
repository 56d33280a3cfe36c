"""Products of one token of a few sequences with matrices: what decoding spends its time on, the norm before and the
activation or the sum after in the same pass over the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_mlp.ops import tune
from llm_mlp.ops.backend import choose, expect
from llm_mlp.ops.heads import rms_norm
from llm_mlp.ops.linear_step.quantized import Int4, Int8, Matrix

ROWS = 16  # sequences that the kernel serves at most; above, products are the library's work


class Product(NamedTuple):
    """A matrix ``[N, K]``, what is added to its product ``[N]``, and the first of the K columns it is multiplied by."""

    weight: Matrix
    bias: Tensor | None = None
    begin: int = 0


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` of any `Matrix`, with every core for a single row on a CPU, where decoding spends its time.

    One row times a matrix is bound by reading the weights, and torch's product for it runs on one core; as a batch
    of two halves both memory channels work (1.85x faster for 2048 x 512 in float32 on two cores).
    """
    if not isinstance(weight, Tensor):
        y = weight.times(x)
        return y if bias is None else y + bias
    rows, width = weight.shape
    if x.device.type != "cpu" or x.numel() != width or torch.is_grad_enabled() or rows % 2 or weight.numel() < 2**16:
        return F.linear(x, weight, bias)
    y = torch.bmm(x.reshape(1, 1, width).expand(2, 1, width), weight.view(2, rows // 2, width).mT)
    y = y.view(*x.shape[:-1], rows)
    return y if bias is None else y + bias


def linear_step(
    x: Tensor,
    products: Sequence[Product],
    *,
    eps: float | None = None,
    relu2: bool = False,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """``W x + b`` of up to three matrices. Not differentiable.

    Args:
        x: ``[B, D]``, may be a slice of a wider tensor.
        eps: x is divided by its root mean square before (`rms_norm`); None: it is not.
        relu2: ReLU^2 of the products. residual: ``[B, N]``, added to the (only) product.
        backend: ``auto | chunked | triton`` (chunked: plain torch).

    Returns:
        ``[B, N]`` of each matrix in x's dtype.

    Raises:
        ValueError: shapes or a backend that do not fit.
    """
    if x.ndim != 2 or not 1 <= len(products) <= 3:
        raise ValueError(f"linear_step: x {tuple(x.shape)} must be [B, D], products 1 to 3, got {len(products)}")
    B, D = x.shape
    for n, (weight, bias, begin) in enumerate(products):
        if len(weight.shape) != 2 or not 0 <= begin <= D - weight.shape[1]:
            raise ValueError(
                f"linear_step: matrix {n} {tuple(weight.shape)} from column {begin} does not fit x [B, {D}]"
            )
        if bias is not None:
            expect("linear_step", f"bias {n}", bias, (weight.shape[0],))
        if eps is not None and weight.shape[1] != D:
            raise ValueError(f"linear_step: matrix {n} takes {weight.shape[1]} of x's {D} columns; a norm is of all")
    if residual is not None:
        if len(products) > 1:
            raise ValueError("linear_step: a residual is added to one product, not to several")
        expect("linear_step", "residual", residual, (B, products[0].weight.shape[0]))
    kind = choose("linear_step", backend, x.device, _not_served(x, products), lambda: _untrusted(x, products))
    with torch.no_grad():
        if kind == "triton" and B:
            from llm_mlp.ops.linear_step import kernels  # triton is optional

            return kernels.linear_step(x, products, eps, relu2, residual)
        if eps is not None:
            x = rms_norm(x, eps)
        out = [linear(x[:, begin : begin + weight.shape[1]], weight, bias) for weight, bias, begin in products]
        if relu2:
            out = [y.relu().square() for y in out]
        return out if residual is None else [residual + out[0]]


def _not_served(x: Tensor, products: Sequence[Product]) -> str | None:
    """What the kernel does not serve; None if it serves it."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype {x.dtype} (bfloat16, float16 and float32 are)"
    eight = any(isinstance(p.weight, Int8) for p in products)
    if len(x) > ROWS:
        why = "int8 weights are widened for each product" if eight else "matrix products of the library are as fast"
        return f"more than {ROWS} sequences ({why})"
    if x.dtype == torch.float32 and len(x) > 1:
        return "several sequences in float32 (its sums are less exact than the library's)"
    for weight, bias, _ in products:
        if isinstance(weight, Int4):
            return "int4 weights (torch's own kernel does)"
        numbers = weight.numbers if isinstance(weight, Int8) else weight
        if isinstance(weight, Tensor) and weight.dtype != x.dtype:
            return "weights in another dtype than x"
        if not numbers.is_contiguous() or (bias is not None and not bias.is_contiguous()):
            return "weights that are not contiguous"
    return None


def _untrusted(x: Tensor, products: Sequence[Product]) -> str | None:
    """Why ``auto`` may not choose the kernel."""
    from llm_mlp.ops.linear_step import kernels  # triton is optional

    eight = any(isinstance(p.weight, Int8) for p in products)
    return tune.untrusted("linear_step", kernels.sizes_of(x.dtype, eight), str(x.device))
