"""Wide heads: a learned first layer before the one that the context writes (docs/model.md, "wide first layer").

phi of a group maps a read or key of width R to F > R features of unit length::

    phi(z) = y sigmoid(slope y) / |y sigmoid(slope y)|,   y = rms(z) W

`first_layer` is phi; `perceive_wide` is `perceive` on phi(q) and phi(k), which on a GPU lives for the length of a call
only: its backward pass computes phi again, so that nothing of width F is kept for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_mlp.ops import tune
from llm_mlp.ops.backend import accumulation_dtype, check_values, choose, expect, sequence_bounds
from llm_mlp.ops.heads import activate, rms_norm, unit
from llm_mlp.ops.perceive import _not_served as _perceive_not_served
from llm_mlp.ops.perceive import _untrusted as _perceive_untrusted
from llm_mlp.ops.perceive import perceive


def first_layer(z: Tensor, weight: Tensor, slope: Tensor | None, *, eps: float, backend: str = "auto") -> Tensor:
    """phi of reads or keys.

    Args:
        z: ``[..., G, R]``. weight: W of each group ``[G, R, F]``, multiplied in z's dtype. slope: of the activation
            ``[G, F]``; None is 1.
        eps: of the norm of z. backend: ``auto | chunked | triton`` (chunked: plain torch).

    Returns:
        ``[..., G, F]`` of unit length, in z's dtype. Differentiable, once.

    Raises:
        ValueError: shapes or backend that do not fit.
    """
    _check("first_layer", z, weight, slope)
    kind = choose("first_layer", backend, z.device, _not_served(weight, z), lambda: _untrusted(weight, z))
    with torch.autocast(z.device.type, enabled=False):
        if kind == "triton" and z.numel():
            from llm_mlp.ops.wide import kernels  # triton is optional

            return kernels.first_layer(z, weight, slope, eps)
        y = torch.einsum("...gr,grf->...gf", rms_norm(z, eps), weight.to(z.dtype))
        return unit(activate(y, slope))


def perceive_wide(
    q: Tensor,
    k: Tensor,
    weight: Tensor,
    slope: Tensor | None,
    beta: Tensor,
    w: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    *,
    eps: float,
    cu_seqlens: Tensor | None = None,
    return_residual: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """`perceive` of ``phi(q), phi(k)`` and the erase vectors ``beta phi(k)``.

    Args:
        q, k: reads and keys before the first layer ``[B, T, G, R]``.
        weight, slope, eps: as `first_layer`.
        beta: one number a group ``[B, T, G]``, any float dtype.
        w, log_decay, state, cu_seqlens, return_residual, backend: as `perceive`, state ``[N, G, F, m, V]``.

    Returns:
        As `perceive`.

    Raises:
        ValueError: shapes, dtypes, cu_seqlens or backend that do not fit.
    """
    _check("perceive_wide", q, weight, slope)
    expect("perceive_wide", "k", k, tuple(q.shape))
    F, (m, V) = weight.shape[-1], w.shape[-2:] if w.ndim == 5 else (0, 0)
    not_served = _not_served(weight, q) or _perceive_not_served(F, m, V, q.dtype)
    untrusted = lambda: _untrusted(weight, q) or _perceive_untrusted(F, m, V, q, True)  # noqa: E731
    kind = choose("perceive_wide", backend, q.device, not_served, untrusted)
    if kind != "triton" or not q.numel():
        plain = "chunked" if kind == "reference" else kind
        q, k = (first_layer(z, weight, slope, eps=eps, backend=plain) for z in (q, k))
        return perceive(
            q, k, beta, w, log_decay, state, cu_seqlens=cu_seqlens, return_residual=return_residual, backend=kind
        )
    B, T, G, _ = q.shape
    for name, tensor, shape in (
        ("beta", beta, (B, T, G)),
        ("w", w, (B, T, G, m, V)),
        ("log_decay", log_decay, (B, T, G, m)),
    ):
        expect("perceive_wide", name, tensor, shape)
    bounds = None if cu_seqlens is None else sequence_bounds(cu_seqlens, B, T, "perceive_wide")
    N = B if bounds is None else len(bounds) - 1
    dtype = accumulation_dtype(q, k, w, log_decay)
    if state is None:
        state = q.new_zeros((N, G, F, m, V), dtype=dtype)
    expect("perceive_wide", "state", state, (N, G, F, m, V))
    check_values("perceive_wide", q=q, k=k, beta=beta, w=w, state=state, log_decay=log_decay)
    from llm_mlp.ops.wide import kernels  # triton is optional

    with torch.autocast(q.device.type, enabled=False):
        y, state, residual = kernels.perceive_wide(
            q, k, weight, slope, beta.to(dtype), w, log_decay.to(dtype), state.to(dtype), bounds, eps
        )
    return (y, state, residual) if return_residual else (y, state)


def _check(op: str, z: Tensor, weight: Tensor, slope: Tensor | None) -> None:
    if z.ndim < 2 or weight.ndim != 3:
        raise ValueError(
            f"{op}: expected reads or keys [..., G, R] and a first layer [G, R, F], got {tuple(z.shape)} and "
            f"{tuple(weight.shape)}"
        )
    expect(op, "weight", weight, (*z.shape[-2:], weight.shape[-1]))
    if slope is not None:
        expect(op, "slope", slope, (weight.shape[0], weight.shape[2]))


def _not_served(weight: Tensor, like: Tensor) -> str | None:
    """What the kernels do not serve; None if they serve it."""
    if like.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype {like.dtype} (bfloat16, float16 and float32 are)"
    R, F = weight.shape[1:]
    for name, size, most in (("R", R, 256), ("F", F, 1024)):
        if size & (size - 1) or not 16 <= size <= most:
            return f"{name} = {size} (powers of two from 16 to {most:,} are)"
    return None


def _untrusted(weight: Tensor, like: Tensor) -> str | None:
    """Why ``auto`` may not choose the kernels."""
    if like.dtype == torch.float32:
        return "float32 products of the kernels do without matrix units; backend='triton' runs them"
    from llm_mlp.ops.wide import kernels  # triton is optional

    return tune.untrusted("first_layer", kernels.sizes_of(weight, like.dtype), str(like.device))
