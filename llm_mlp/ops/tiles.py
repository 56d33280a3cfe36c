"""Tiles in Triton kernels: products, and rounding, the same compiled and interpreted.

One return a function: Triton 3.6 goes on compiling behind one that a compile-time condition has taken.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# The interpreter holds bfloat16 as integers. It would multiply those, so operands are widened first, which is exact;
# and it cuts float32 off where hardware rounds to the nearest, so rounding is done here.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def after_previous(PDL: tl.constexpr):
    """Waits for the kernel launched before this one, whose results are read or overwritten behind this line; what
    stands before it overlaps with that kernel, and the next kernel may do the same with this one (programmatic
    dependent launch: ``PDL`` as `llm_mlp.ops.tune.overlap` says)."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def fetch_ahead(ptr, bytes):
    """Has ``bytes`` from ``ptr`` on (both in multiples of 16; else nothing happens) brought into the L2 cache, by 128
    threads' requests of a part each (compute capability 9.0). For weights, before `after_previous`."""
    part = (bytes + 2047) // 2048 * 16
    begin = tl.arange(0, 128) * part
    address = ptr.to(tl.int64) + begin
    size = tl.minimum(tl.maximum(bytes - begin, 0), part)
    size = tl.where((bytes % 16 == 0) & (address % 16 == 0), size, 0)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [address, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


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
def _keep_bits(x, DROP: tl.constexpr):
    """float32 ``x`` rounded to even without its last DROP bits."""
    bits = x.to(tl.uint32, bitcast=True)
    half: tl.constexpr = (1 << (DROP - 1)) - 1
    bits = ((bits + half + ((bits >> DROP) & 1)) >> DROP) << DROP
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 ``x`` rounded to ``DTYPE``; float8e4nv (float8_e4m3fn), which has no infinity, saturates at 448."""
    if tl.float8e4nv == DTYPE:
        x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        if INTERPRETED:  # it rounds small numbers down, and loses a power of two where rounding reaches the next one
            rounded = _keep_bits(x, 20)
            x = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, rounded)  # below 2^-6: multiples of 2^-9
    if INTERPRETED and tl.bfloat16 == DTYPE:
        x = _keep_bits(x, 16)
    return x.to(DTYPE)


@triton.jit
def from_int8(x):
    """int8 ``x`` as float32: 1.5 * 2^23 + x is an integer's addition to its bits, 8 times as fast as converting."""
    return (x.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
def halves(x):
    """float32 ``x`` as the sum of two bfloat16, to 2^-17 of it."""
    high = narrow(x, tl.bfloat16)
    return high, narrow(x - high.to(tl.float32), tl.bfloat16)


@triton.jit
def product_halves(high, low, b, PRECISION: tl.constexpr):
    """``a @ b`` of float32 tiles to about 2^-16: a as `halves` (ieee: high is a itself). Three bfloat16 products cost
    less than one TF32 product and its second operand's way through shared memory."""
    if PRECISION == "tf32":
        b_high, b_low = halves(b)
        out = product(low, b_high, PRECISION)
        out = product_onto(out, high, b_low, PRECISION)
        out = product_onto(out, high, b_high, PRECISION)
    else:
        out = tl.dot(high, b, input_precision=PRECISION)
    return out


@triton.jit
def product_wide(a, b, PRECISION: tl.constexpr):
    """``a @ b`` of a tile in the inputs' dtype and a float32 tile, to about 2^-17 (ieee: as float32)."""
    if PRECISION != "tf32":
        out = tl.dot(a, b, input_precision=PRECISION)
    elif a.dtype == tl.float16:  # no bfloat16 holds it
        out = tl.dot(a.to(tl.float32), b, input_precision=PRECISION)
    else:
        high, low = halves(b)
        out = product_onto(product(a, low, PRECISION), a, high, PRECISION)
    return out


@triton.jit
def product_split(a, b, PRECISION: tl.constexpr):
    """`product_halves` of two float32 tiles."""
    if PRECISION == "tf32":
        high, low = halves(a)
        out = product_halves(high, low, b, PRECISION)
    else:
        out = tl.dot(a, b, input_precision=PRECISION)
    return out


@triton.jit
def where_if(mask, flag):
    """``mask`` where the scalar ``flag`` holds, else nowhere. (Triton 3.9's interpreter refuses the mask that
    ``mask & flag`` makes: a scalar condition becomes a tensor of integers there.)"""
    return mask & (tl.zeros(mask.shape, tl.int32) + tl.where(flag, 1, 0) > 0)
