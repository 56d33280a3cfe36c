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
def exponential(x):
    """exp of a float32 that is not infinite, to a unit or two in the last place: the hardware's exp2, and what rounding
    x log2(e) lost put back. (tl.exp loses |x| units.)"""
    high = x * 1.4426950408889634
    low = tl.fma(x, 1.4426950216293335, -high) + x * 1.9259629911266175e-08  # log2(e) as two float32 terms
    return tl.exp2(high) * (1.0 + 0.6931471805599453 * low)


@triton.jit
def _leading(x):
    """float32 ``x`` cut to the ten bits of mantissa that TF32 has."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def product_split(a, b, PRECISION: tl.constexpr):
    """``a @ b`` of float32 tiles to about 2^-21 where PRECISION is tf32, from three products of the tiles' leading and
    remaining bits. (input_precision="tf32x3" is the same, but Triton 3.7 then spills a blocked operand.)"""
    if PRECISION != "tf32":
        return tl.dot(a, b, input_precision=PRECISION)
    a_high, b_high = _leading(a), _leading(b)
    out = tl.dot(a - a_high, b_high, input_precision=PRECISION)
    out = tl.dot(a_high, b - b_high, acc=out, input_precision=PRECISION)
    return tl.dot(a_high, b_high, acc=out, input_precision=PRECISION)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 ``x`` rounded to ``DTYPE``."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)
