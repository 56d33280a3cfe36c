"""`linear_step` as one Triton kernel: a program reads some rows of one matrix once and multiplies them by all tokens.

One token is multiplied number by number in float32, several by matrix units. A norm's factor is applied to the
products, so x is read as it is: ``W (x / r) = (W x) / r``. So is the scale of each row of an int8 matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_mlp.ops.linear_step import ROWS, Product
from llm_mlp.ops.linear_step.quantized import Int8
from llm_mlp.ops.tiles import after_previous, fetch_ahead, from_int8, narrow, product_onto
from llm_mlp.ops.tune import Sizes, Table, overlap, plan

NUMBERS = 2**12  # of a matrix that a program multiplies at a time, while as many are on their way
FEW = 2048  # rows of a matrix that give every SM a few programs of 16 rows
LAUNCH: Table = {"_linear": {"num_warps": 4, "num_stages": 3}}


@triton.jit
def _rows(
    x_ptr, w_ptr, scale_ptr, bias_ptr, residual_ptr, out_ptr, tile, B, stride, N, K, eps,
    BB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
    RELU2: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BN rows of a matrix by all tokens."""
    n, b = tile * BN + tl.arange(0, BN), tl.arange(0, BB)
    known = n < N
    if BB == 1:
        sums, squares = tl.zeros((BN, BK), tl.float32), tl.zeros((BK,), tl.float32)
        k = tl.arange(0, BK)
        w_tile = w_ptr + (n[:, None] * K + k[None, :])
        w = tl.load(w_tile, mask=known[:, None] & (k < K)[None, :], other=0)  # on its way while x is still made
        if PDL:
            width = tl.constexpr(w_ptr.dtype.element_ty.primitive_bitwidth // 8)
            fetch_ahead(w_ptr + tile * BN * K, tl.minimum(N - tile * BN, BN) * K * width)
        after_previous(PDL)
        for a in range(0, K, BK):
            k = a + tl.arange(0, BK)
            x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            held = w
            if SCALE:
                held = from_int8(w)
            sums += held.to(tl.float32) * x[None, :]
            w = tl.load(w_tile + (a + BK), mask=known[:, None] & (k + BK < K)[None, :], other=0)
            if NORM:
                squares += x * x
        y = tl.sum(sums, 1)[None, :]
        if NORM:
            y *= tl.rsqrt(tl.sum(squares, 0) / K + eps)
    else:
        after_previous(PDL)
        y, square = tl.zeros((BB, BN), tl.float32), tl.zeros((BB,), tl.float32)
        for a in range(0, K, BK):
            k = a + tl.arange(0, BK)
            inside = k < K
            x = tl.load(x_ptr + (b[:, None] * stride + k[None, :]), mask=(b < B)[:, None] & inside[None, :], other=0.0)
            w = tl.load(w_ptr + (n[:, None] * K + k[None, :]), mask=known[:, None] & inside[None, :], other=0)
            if SCALE:  # 8 bits are exact in x's dtype
                w = narrow(from_int8(w), x_ptr.dtype.element_ty)
            y = product_onto(y, x, tl.trans(w), PRECISION)
            if NORM:
                wide = x.to(tl.float32)
                square += tl.sum(wide * wide, 1)
        if NORM:
            y *= tl.rsqrt(square / K + eps)[:, None]
    if SCALE:
        y *= tl.load(scale_ptr + n, mask=known, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + n, mask=known, other=0.0).to(tl.float32)[None, :]
    if RELU2:
        y = tl.maximum(y, 0.0)
        y *= y
    at, real = b[:, None] * N + n[None, :], (b < B)[:, None] & known[None, :]
    if RESIDUAL:
        y += tl.load(residual_ptr + at, mask=real, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, narrow(y, out_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["B", "tiles0", "tiles1"])
def _linear(
    x_ptr, residual_ptr, w0_ptr, scale0_ptr, bias0_ptr, out0_ptr, w1_ptr, scale1_ptr, bias1_ptr, out1_ptr,
    w2_ptr, scale2_ptr, bias2_ptr, out2_ptr, B, stride, N0, N1, N2, K0, K1, K2, begin1, begin2, tiles0, tiles1, eps,
    BB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, SCALE0: tl.constexpr,
    SCALE1: tl.constexpr, SCALE2: tl.constexpr, BIAS0: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr,
    RELU2: tl.constexpr, RESIDUAL: tl.constexpr, MATRICES: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if tile < tiles0:
        _rows(
            x_ptr, w0_ptr, scale0_ptr, bias0_ptr, residual_ptr, out0_ptr, tile, B, stride, N0, K0, eps,
            BB, BN, BK, NORM, SCALE0, BIAS0, RELU2, RESIDUAL, PRECISION, PDL,
        )  # fmt: skip
    if MATRICES > 1:  # noqa: SIM102 (known when it is compiled)
        if (tile >= tiles0) & (tile < tiles0 + tiles1):
            _rows(
                x_ptr + begin1, w1_ptr, scale1_ptr, bias1_ptr, residual_ptr, out1_ptr, tile - tiles0, B, stride,
                N1, K1, eps, BB, BN, BK, NORM, SCALE1, BIAS1, RELU2, False, PRECISION, PDL,
            )  # fmt: skip
    if MATRICES > 2:  # noqa: SIM102
        if tile >= tiles0 + tiles1:
            _rows(
                x_ptr + begin2, w2_ptr, scale2_ptr, bias2_ptr, residual_ptr, out2_ptr, tile - tiles0 - tiles1, B,
                stride, N2, K2, eps, BB, BN, BK, NORM, SCALE2, BIAS2, RELU2, False, PRECISION, PDL,
            )  # fmt: skip


# -- host ----------------------------------------------------------------------------------------------------------


def candidates() -> tuple[Table, Table]:
    """Launch tables, the fast one first (see perceive/kernels.py)."""
    return LAUNCH, {"_linear": {"num_warps": 2, "num_stages": 1}}


def sizes_of(dtype: torch.dtype, eight: bool) -> Sizes:
    """What `tune` knows a launch by; ``eight``: some of the matrices are int8."""
    return ("eight", eight), ("dtype", str(dtype).removeprefix("torch."))


def tiles(batch: int, rows: int, columns: int) -> dict[str, int]:
    """The sizes of a program's tile, for matrices of so many rows (all together) and columns (the most)."""
    if batch == 1:
        BN = 16 if rows >= FEW else 4
        return {"BB": 1, "BN": BN, "BK": min(triton.next_power_of_2(columns), NUMBERS // BN)}
    return {"BB": 16, "BN": 16, "BK": min(max(16, triton.next_power_of_2(columns)), 256)}


@torch.library.custom_op("llm_mlp::linear_step", mutates_args=())
def _linear_step(
    x: Tensor, weights: list[Tensor], scales: list[Tensor | None], biases: list[Tensor | None], begins: list[int],
    eps: float | None, relu2: bool, residual: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    B, count = len(x), len(weights)
    if B > ROWS:
        raise ValueError(f"linear_step: {B} sequences, the kernel serves {ROWS}")
    out = [x.new_empty((B, len(w))) for w in weights]
    N, K = [len(w) for w in weights], [w.shape[1] for w in weights]
    tile = tiles(B, sum(N), max(K))
    grid = [triton.cdiv(n, tile["BN"]) for n in N] + [0] * (3 - count)
    way = plan("linear_step", sizes_of(x.dtype, any(s is not None for s in scales)))

    def three(values: list) -> list:
        return [*values, *[values[0]] * (3 - count)]

    first, (N0, N1, N2), (K0, K1, K2) = begins[0], three(N), three(K)
    begin = [b - first for b in three(begins)]
    matrices = [t for row in zip(*(three(v) for v in (weights, scales, biases, out)), strict=True) for t in row]
    with way.compiling():
        _linear[(sum(grid),)](
            x[:, first:], residual, *matrices, B, x.stride(0), N0, N1, N2, K0, K1, K2, begin[1], begin[2],
            grid[0], grid[1], eps or 0.0, NORM=eps is not None, RELU2=relu2, RESIDUAL=residual is not None,
            MATRICES=count, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            **{f"SCALE{n}": s is not None for n, s in enumerate(three(scales))},
            **{f"BIAS{n}": b is not None for n, b in enumerate(three(biases))}, **tile,
            **overlap(x, B), **way.of(candidates())["_linear"],
        )  # fmt: skip
    return out


@_linear_step.register_fake
def _(x, weights, scales, biases, begins, eps, relu2, residual):
    return [x.new_empty((len(x), len(w))) for w in weights]


def linear_step(
    x: Tensor, products: Sequence[Product], eps: float | None, relu2: bool, residual: Tensor | None
) -> list[Tensor]:
    """As `llm_mlp.ops.linear_step` on checked inputs."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    matrices, biases, begins = (list(column) for column in zip(*products, strict=True))
    weights = [m.numbers if isinstance(m, Int8) else m for m in matrices]
    scales = [m.scale if isinstance(m, Int8) else None for m in matrices]
    residual = None if residual is None else residual.contiguous()
    return _linear_step(x, weights, scales, biases, begins, eps, relu2, residual)
