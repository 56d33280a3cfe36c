"""Triton kernels of `llm_mlp.ops.wide`: phi forward and backward, and `perceive` between them.

- ``_first``       (tokens, group): phi(z), and the length it was divided by
- ``_first_back``  (tokens, group): the gradient of y = rms(z) W, of z, and tokens' sums of the slope's

Both walk the features in blocks: a token's F numbers are more than registers hold. ``_first`` multiplies twice, once
for the length and once for what is divided by it; ``_first_back`` has the length, and finds <phi, dphi> in what is in
memory. W's gradient is a plain product of the two, left to torch.

phi is made once for all heads of a group and travels through memory to the kernels of `perceive`, which read it several
times (a part of the heads, the inverse). Making it again in each of them would cost more (docs/perceive.md).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_mlp.ops.heads.kernels import TINY, _sigmoid
from llm_mlp.ops.perceive import kernels as perceive
from llm_mlp.ops.tiles import narrow, product, product_onto
from llm_mlp.ops.tune import Sizes, Table, aligned, plan

LAUNCH: Table = {
    "_first": {"BT": 64, "BF": 64, "num_warps": 4, "num_stages": 2},
    "_first_back": {"BT": 64, "BF": 64, "num_warps": 4, "num_stages": 1},
}


@triton.jit
def _weights(weight_ptr, g, a, R: tl.constexpr, F: tl.constexpr, BF: tl.constexpr):
    """Columns from ``a`` on of a group's W: ``[R, BF]``."""
    r, f = tl.arange(0, R), a + tl.arange(0, BF)
    return tl.load(weight_ptr + g.to(tl.int64) * (R * F) + (r[:, None] * F + f[None, :]))


@triton.jit
def _slopes(slope_ptr, g, a, F: tl.constexpr, BF: tl.constexpr, SLOPE: tl.constexpr):
    """The activation's slope of those features: ``[1, BF]``."""
    slope = tl.full((1, BF), 1.0, tl.float32)
    if SLOPE:
        slope = tl.load(slope_ptr + g * F + a + tl.arange(0, BF)).to(tl.float32)[None, :]
    return slope


@triton.jit(do_not_specialize=["P", "G"])
def _first(
    z_ptr, weight_ptr, slope_ptr, phi_ptr, length_ptr, P, G, eps,
    R: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, BT: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    begin, g = tl.program_id(0).to(tl.int64) * BT, tl.program_id(1)
    i, f = tl.arange(0, BT), tl.arange(0, BF)
    there = begin + i < P
    kind = phi_ptr.dtype.element_ty
    at = i[:, None] * (G * R) + tl.arange(0, R)[None, :]
    z = tl.load(z_ptr + (begin * G + g) * R + at, mask=there[:, None], other=0.0).to(tl.float32)
    x = narrow(z * tl.rsqrt(tl.sum(z * z, 1) / R + eps)[:, None], kind)
    squares = tl.zeros((BT,), tl.float32)
    for a in range(0, F, BF):
        y = product(x, _weights(weight_ptr, g, a, R, F, BF), PRECISION)
        y *= _sigmoid(y * _slopes(slope_ptr, g, a, F, BF, SLOPE))
        squares += tl.sum(y * y, 1)
    length = tl.maximum(tl.sqrt(squares), TINY)
    tl.store(length_ptr + (begin * G + g) + i * G, length, mask=there)
    for a in range(0, F, BF):
        y = product(x, _weights(weight_ptr, g, a, R, F, BF), PRECISION)
        y *= _sigmoid(y * _slopes(slope_ptr, g, a, F, BF, SLOPE)) / length[:, None]
        to = phi_ptr + (begin * G + g) * F + (i[:, None] * (G * F) + a + f[None, :])
        tl.store(to, narrow(y, kind), mask=there[:, None])


@triton.jit(do_not_specialize=["P", "G"])
def _first_back(
    z_ptr, weight_ptr, slope_ptr, phi_ptr, length_ptr, dphi_ptr, x_ptr, dy_ptr, dz_ptr, dslope_ptr, P, G, eps,
    R: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, BT: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dy may be where dphi is: a block of it is read before it is written. ``dslope_ptr``: ``[programs, G, F]``."""
    begin, g = tl.program_id(0).to(tl.int64) * BT, tl.program_id(1)
    i, f = tl.arange(0, BT), tl.arange(0, BF)
    there = (begin + i < P)[:, None]
    kind = dz_ptr.dtype.element_ty
    narrow_at = (begin * G + g) * R + (i[:, None] * (G * R) + tl.arange(0, R)[None, :])
    wide_at = (begin * G + g) * F + (i[:, None] * (G * F) + f[None, :])
    length = tl.load(length_ptr + (begin * G + g) + i * G, mask=begin + i < P, other=1.0)[:, None]
    along = tl.zeros((BT,), tl.float32)  # <phi, dphi>
    for a in range(0, F, BF):
        phi = tl.load(phi_ptr + wide_at + a, mask=there, other=0.0).to(tl.float32)
        along += tl.sum(phi * tl.load(dphi_ptr + wide_at + a, mask=there, other=0.0).to(tl.float32), 1)
    z = tl.load(z_ptr + narrow_at, mask=there, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(z * z, 1) / R + eps)[:, None]
    x = narrow(z * r, kind)
    tl.store(x_ptr + narrow_at, x, mask=there)
    dx = tl.zeros((BT, R), tl.float32)
    for a in range(0, F, BF):
        weight, slope = _weights(weight_ptr, g, a, R, F, BF), _slopes(slope_ptr, g, a, F, BF, SLOPE)
        y = product(x, weight, PRECISION)
        s = _sigmoid(y * slope)
        d = tl.load(dphi_ptr + wide_at + a, mask=there, other=0.0).to(tl.float32)
        d = (d - y * s / length * along[:, None]) / length
        bent = y * s * (1.0 - s)
        if SLOPE:
            to = dslope_ptr + (tl.program_id(0).to(tl.int64) * G + g) * F + a + f
            tl.store(to, tl.sum(d * y * bent, 0))
        dy = narrow(d * (s + slope * bent), kind)
        tl.store(dy_ptr + wide_at + a, dy, mask=there)
        dx = product_onto(dx, dy, tl.trans(weight), PRECISION)
    z *= r
    dz = (dx - z * (tl.sum(dx * z, 1) / R)[:, None]) * r
    tl.store(dz_ptr + narrow_at, narrow(dz, kind), mask=there)


# -- host ----------------------------------------------------------------------------------------------------------


def candidates() -> tuple[Table, Table]:
    """Launch tables, the fast one first (see perceive/kernels.py)."""
    return LAUNCH, {kernel: {"BT": 32, "BF": 64, "num_warps": 2, "num_stages": 1} for kernel in LAUNCH}


def sizes_of(weight: Tensor, dtype: torch.dtype) -> Sizes:
    """What `tune` knows a launch by."""
    _, R, F = weight.shape
    return ("R", R), ("F", F), ("dtype", str(dtype).removeprefix("torch."))


def _run(kernel: Any, z: Tensor, weight: Tensor, slope: Tensor | None, eps: float, *more: Tensor) -> None:
    """A kernel over the tokens of ``z [P, G, R]``."""
    (P, G, R), F = z.shape, weight.shape[-1]
    way = plan("first_layer", sizes_of(weight, z.dtype))
    launch = way.of(candidates())[kernel.fn.__name__]
    launch = {**launch, "BF": min(F, launch["BF"])}
    with way.compiling():
        kernel[(triton.cdiv(P, launch["BT"]), G)](
            z, weight, slope, *more, P, G, eps, R=R, F=F, SLOPE=slope is not None,
            PRECISION="ieee" if z.dtype == torch.float32 else "tf32", **launch,
        )  # fmt: skip


def _phi(z: Tensor, weight: Tensor, slope: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """phi ``[P, G, F]`` and the lengths it was divided by ``[P, G]``."""
    phi, length = z.new_empty((*z.shape[:2], weight.shape[-1])), z.new_empty(z.shape[:2], dtype=torch.float32)
    _run(_first, z, weight, slope, eps, phi, length)
    return phi, length


def _phi_back(
    z: Tensor, weight: Tensor, slope: Tensor | None, phi: Tensor, length: Tensor, dphi: Tensor, dy: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z, weight and slope; ``dy`` is room for that of rms(z) W, and may be ``dphi``."""
    P, G, _ = z.shape
    tile = plan("first_layer", sizes_of(weight, z.dtype)).of(candidates())["_first_back"]["BT"]
    x, dz = torch.empty_like(z), torch.empty_like(z)
    dslope = z.new_empty((triton.cdiv(P, tile) if slope is not None else 0, G, phi.shape[-1]), dtype=torch.float32)
    _run(_first_back, z, weight, slope, eps, phi, length, dphi, x, dy, dz, dslope)
    return dz, torch.bmm(x.permute(1, 2, 0), dy.transpose(0, 1)), dslope.sum(0)


@torch.library.custom_op("llm_mlp::first_layer", mutates_args=())
def _forward(z: Tensor, weight: Tensor, slope: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return _phi(z, weight, slope, eps)


@_forward.register_fake
def _(z, weight, slope, eps):
    return z.new_empty((*z.shape[:2], weight.shape[-1])), z.new_empty(z.shape[:2], dtype=torch.float32)


@torch.library.custom_op("llm_mlp::first_layer_backward", mutates_args=())
def _backward(
    z: Tensor, weight: Tensor, slope: Tensor | None, phi: Tensor, length: Tensor, dphi: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dphi = aligned(dphi)
    return _phi_back(z, weight, slope, phi, length, dphi, torch.empty_like(dphi), eps)


@_backward.register_fake
def _(z, weight, slope, phi, length, dphi, eps):
    return _empty_like(z, weight, slope)


def _empty_like(z: Tensor, weight: Tensor, slope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients."""
    return torch.empty_like(z), torch.empty_like(weight), z.new_empty(weight.shape[::2], dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    z, weight, slope, ctx.eps = inputs
    ctx.save_for_backward(z, weight, slope, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dphi, _):
    if dphi is None:
        return None, None, None, None
    z, weight, slope, phi, length = ctx.saved_tensors
    dz, dweight, dslope = _backward(z, weight, slope, phi, length, dphi, ctx.eps)
    return dz, dweight, dslope.to(slope.dtype) if slope is not None else None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def first_layer(z: Tensor, weight: Tensor, slope: Tensor | None, eps: float) -> Tensor:
    """As `llm_mlp.ops.wide.first_layer` on checked inputs."""
    flat = aligned(z.flatten(0, -3) if z.ndim > 2 else z[None])
    phi = _forward(flat, aligned(weight.to(z.dtype)), slope, eps)[0]
    return phi.view(*z.shape[:-1], weight.shape[-1])


# -- with `perceive` -----------------------------------------------------------------------------------------------


@torch.library.custom_op("llm_mlp::perceive_wide", mutates_args=())
def _perceive(
    q: Tensor, k: Tensor, weight: Tensor, slope: Tensor | None, beta: Tensor, w: Tensor, log_decay: Tensor,
    state: Tensor, bounds: list[int], eps: float, keep: bool,
) -> perceive._Tensors:  # fmt: skip
    """As `perceive._forward`."""
    phi_q, phi_k = (_shaped(_phi(z.flatten(0, 1), weight, slope, eps)[0], z) for z in (q, k))
    return perceive._forward(phi_q, phi_k, beta, w, log_decay, state, bounds, keep)


def _shaped(phi: Tensor, z: Tensor) -> Tensor:
    return phi.view(*z.shape[:-1], phi.shape[-1])


@_perceive.register_fake
def _(q, k, weight, slope, beta, w, log_decay, state, bounds, eps, keep):
    phi = q.new_empty((*q.shape[:-1], weight.shape[-1]))
    return perceive._outputs(phi, w, log_decay, state, perceive._Call.of(phi, beta, w, bounds), keep)


@torch.library.custom_op("llm_mlp::perceive_wide_backward", mutates_args=())
def _perceive_backward(
    q: Tensor, k: Tensor, weight: Tensor, slope: Tensor | None, beta: Tensor, w: Tensor, log_decay: Tensor, y: Tensor,
    residual: Tensor, before: Tensor, rest: Tensor, inverse: Tensor, down: Tensor, up: Tensor, edge: Tensor,
    sums: Tensor, wild: Tensor, hop: Tensor, dy: Tensor, dafter: Tensor, dresidual: Tensor | None, bounds: list[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, weight, slope, beta, w, log_decay and state."""
    flat = [z.flatten(0, 1) for z in (q, k)]
    made = [_phi(z, weight, slope, eps) for z in flat]
    *dphi, dbeta, dw, dg, dbefore = perceive._backward(
        *(_shaped(phi, q) for phi, _ in made), beta, w, log_decay, y, residual, before, rest, inverse, down, up, edge,
        sums, wild, hop, dy, dafter, dresidual, bounds,
    )  # fmt: skip
    found = []
    for z, (phi, length), d in zip(flat, made, dphi, strict=True):
        d = d.flatten(0, 1)
        found.append(_phi_back(z, weight, slope, phi, length, d, d, eps))
    (dq, first, first_slope), (dk, second, second_slope) = found
    return dq.view_as(q), dk.view_as(k), first + second, first_slope + second_slope, dbeta, dw, dg, dbefore


@_perceive_backward.register_fake
def _(
    q, k, weight, slope, beta, w, log_decay, y, residual, before, rest, inverse, down, up, edge, sums, wild, hop, dy,
    dafter, dresidual, bounds, eps,
):  # fmt: skip
    return torch.empty_like(q), *_empty_like(k, weight, slope), *map(torch.empty_like, (beta, w, log_decay, dafter))


def _save_perceive(ctx, inputs, output) -> None:
    *tensors, _, ctx.bounds, ctx.eps, _ = inputs
    y, state, residual, *kept = output
    ctx.save_for_backward(*tensors, y, residual, *kept)
    ctx.shape = state.shape
    ctx.set_materialize_grads(False)


def _differentiate_perceive(ctx, dy, dafter, dresidual, *_):
    saved = ctx.saved_tensors
    slope, y = saved[3], saved[7]
    if dy is None:
        dy = torch.zeros_like(y)
    if dafter is None:
        dafter = torch.zeros(ctx.shape, dtype=torch.float32, device=y.device)
    dq, dk, dweight, dslope, *more = _perceive_backward(*saved, dy, dafter, dresidual, ctx.bounds, ctx.eps)
    return dq, dk, dweight, None if slope is None else dslope.to(slope.dtype), *more, None, None, None


_perceive.register_autograd(_differentiate_perceive, setup_context=_save_perceive)


def perceive_wide(
    q: Tensor, k: Tensor, weight: Tensor, slope: Tensor | None, beta: Tensor, w: Tensor, log_decay: Tensor,
    state: Tensor, bounds: list[int] | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `llm_mlp.ops.wide.perceive_wide` on checked inputs; ``bounds``: the packed sequences' ends (or None)."""
    B, T = q.shape[:2]
    q, k, weight, beta, w, log_decay, state = (
        aligned(x) for x in (q, k, weight.to(q.dtype), beta, w, log_decay, state)
    )
    given = [q, k, weight, slope, beta, w, log_decay, state]
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    ends = list(range(0, B * T + 1, T)) if bounds is None else bounds
    return _perceive(*given, ends, eps, keep)[:3]
