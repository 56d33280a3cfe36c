"""Tiles in Triton kernels: products, and rounding, the same compiled and interpreted."""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter holds bfloat16 as integers. It would multiply those, so operands are widened first, which is exact;
# and it cuts float32 off where hardware rounds to the nearest, so rounding is done here.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """``a @ b`` in float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def product_onto(base, a, b, PRECISION: tl.constexpr):
    """``base + a @ b``, base float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc=base, input_precision=PRECISION)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 ``x`` rounded to ``DTYPE``."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)
