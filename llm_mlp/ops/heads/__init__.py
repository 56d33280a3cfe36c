"""What stands between a layer's projections and its ops, in one pass over memory each: `head_inputs`, `head_outputs`.

Before the ops: the short convolution, its activation, the norms of q and k, the gate on what is written.
After them: adding what the memorised units say, the norm of each head, the output gate. The kernels read every tensor
once and write it once, and keep nothing in between: their backward passes compute it again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_mlp.ops import tune
from llm_mlp.ops.backend import choose, expect, sequence_bounds
from llm_mlp.ops.conv import causal_conv, causal_conv_step, last_inputs


class HeadInputs(NamedTuple):
    """What the ops of a layer take: ``[..., G, F]``, w ``[..., G, m, V]``; leading dimensions ``[B, T]`` or ``[B]``."""

    q: Tensor
    k: Tensor
    w: Tensor
    units_q: Tensor | None  # [..., G, R]; None without memorised units
    units_k: Tensor | None


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dimension, without a gain, computed in float32 at least."""
    if x.is_cuda:  # torch's kernel there computes in float32 by itself
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    return F.rms_norm(_wide(x), x.shape[-1:], eps=eps).to(x.dtype)


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, computed in float32 at least."""
    return F.normalize(_wide(x), dim=-1).to(x.dtype)


def activate(x: Tensor, slope: Tensor | None) -> Tensor:
    """``x sigmoid(slope x)``, computed in float32 at least."""
    wide = _wide(x)
    return (wide * torch.sigmoid(wide if slope is None else wide * slope.to(wide.dtype))).to(x.dtype)


def _prepare(
    x: Tensor,
    slope: Tensor | None,
    write: Tensor | None,
    gain: Tensor | None,
    *,
    groups: int,
    heads: tuple[int, int],
    eps: float,
    normalize: bool,
) -> HeadInputs:
    """From the convolved q, k and v ``[..., C]`` to the ops' inputs. The rest as `head_inputs`."""
    values = groups * heads[0] * heads[1]
    qk, v = activate(x, slope).split((x.shape[-1] - values, values), -1)
    # q and k are treated alike: as one.
    qk, w = qk.unflatten(-1, (2, groups, -1)), v.unflatten(-1, (groups, *heads))
    if write is not None:
        w = w * (2 * torch.sigmoid(write)).view_as(w)
    q, k = (unit(qk) if normalize else qk).unbind(-3)
    units_q = units_k = None
    if gain is not None:
        units_q, units_k = (rms_norm(qk, eps) * gain[:, None].to(qk.dtype)).unbind(-3)
    return HeadInputs(q, k, w, units_q, units_k)


def head_inputs(
    x: Tensor,
    conv: Tensor | None,
    slope: Tensor | None,
    write: Tensor | None,
    gain: Tensor | None,
    tail: Tensor | None = None,
    *,
    groups: int,
    heads: tuple[int, int],
    eps: float,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[HeadInputs, Tensor | None]:
    """The ops' inputs of a layer (e aside), and the tail of its convolution.

    Args:
        x: q and k of G groups and the values ``[B, T, C]``, C = 2 G R + G m V; may be a slice of a wider tensor.
        conv: taps of the causal convolution ``[C, K]``; None: there is none. slope: of the activation ``[C]``.
        write: logits of the gate on what is written ``[B, T, G m V]``; None: no gate.
        gain: of the memorised units' reads and keys ``[2, R]``; None: there are none.
        tail: the K - 1 inputs before the first ``[N, K-1, C]``; None is zeros.
        groups: G. heads: (m, V). eps: of the units' norm.
        normalize: make q and k of unit length, as narrow heads (F = R) have them; not where a first layer follows.
        cu_seqlens: as `perceive`. backend: ``auto | chunked | triton`` (chunked: plain torch).

    Returns:
        The inputs in x's dtype, and the last K - 1 rows of each sequence (None without a convolution).

    Raises:
        ValueError: shapes, cu_seqlens or backend that do not fit.
    """
    B, T, C = x.shape
    m, V = heads
    bounds = None if cu_seqlens is None else sequence_bounds(cu_seqlens, B, T, "head_inputs")
    N = B if bounds is None else len(bounds) - 1
    R = (C - groups * m * V) // (2 * groups)
    if R < 1 or 2 * groups * R + groups * m * V != C:
        raise ValueError(
            f"head_inputs: x has {C} channels, which are not q and k of {groups} groups and {m} x {V} values"
        )
    K = 0 if conv is None else conv.shape[1]
    for name, tensor, shape in (
        ("conv", conv, (C, K)),
        ("slope", slope, (C,)),
        ("write", write, (B, T, groups * m * V)),
        ("gain", gain, (2, R)),
        ("tail", tail, (N, max(K - 1, 0), C)),
    ):
        if tensor is not None:
            expect("head_inputs", name, tensor, shape)
    not_served = _not_served(R, V, x.dtype) or (f"{K} taps (up to 4 are)" if K > 4 else None)
    kind = choose("head_inputs", backend, x.device, not_served, lambda: _untrusted(R, V, x))
    if kind != "triton" or not x.numel():
        new = None
        if conv is not None:
            x, new = causal_conv(x, conv, tail, cu_seqlens=cu_seqlens)
        return _prepare(x, slope, write, gain, groups=groups, heads=heads, eps=eps, normalize=normalize), new
    from llm_mlp.ops.heads import kernels  # triton is optional

    q, k, w, units_q, units_k = kernels.inputs(
        x, conv, slope, write, gain, None if conv is None else tail, bounds,
        groups=groups, read_width=R, heads=heads, eps=eps, unit=normalize,
    )  # fmt: skip
    new = None if conv is None else last_inputs(x, tail, K - 1, bounds)
    return HeadInputs(q, k, w, *((None, None) if gain is None else (units_q, units_k))), new


def head_inputs_step(
    x: Tensor,
    conv: Tensor | None,
    slope: Tensor | None,
    write: Tensor | None,
    gain: Tensor | None,
    tails: Tensor | None,
    state_indices: Tensor | None = None,
    *,
    groups: int,
    heads: tuple[int, int],
    eps: float,
    normalize: bool = True,
    backend: str = "auto",
) -> HeadInputs:
    """`head_inputs` of one token of each sequence. Not differentiable.

    Args:
        x: ``[B, C]``. write: ``[B, G m V]``. tails: pool ``[N, K-1, C]``, changed in place; None without a convolution.
        state_indices: as `perceive_step`; what a padding row gets is undefined. The rest as `head_inputs`.
    """
    C, (m, V) = x.shape[-1], heads
    R = (C - groups * m * V) // (2 * groups)
    if (conv is None) != (tails is None):
        raise ValueError("head_inputs_step: a convolution needs tails, and tails a convolution")
    not_served = _not_served(R, V, x.dtype)
    if tails is not None and not tails.is_contiguous():
        not_served = "tails that are not contiguous"
    kind = choose("head_inputs_step", backend, x.device, not_served, lambda: _untrusted(R, V, x, "heads_step"))
    with torch.no_grad():
        if kind == "triton" and x.numel():
            from llm_mlp.ops.heads import kernels  # triton is optional

            *found, units_q, units_k = kernels.inputs_step(
                x, conv, slope, write, gain, tails, state_indices,
                groups=groups, read_width=R, heads=heads, eps=eps, unit=normalize,
            )  # fmt: skip
            return HeadInputs(*found, *((None, None) if gain is None else (units_q, units_k)))
        if conv is not None and tails is not None:
            x = causal_conv_step(x, conv, tails, state_indices)
        return _prepare(x, slope, write, gain, groups=groups, heads=heads, eps=eps, normalize=normalize)


def head_outputs(
    y: Tensor, read: Tensor | None, share: Tensor | None, gate: Tensor | None, *, eps: float, backend: str = "auto"
) -> Tensor:
    """``rms_norm(y + sigmoid(share) read) * sigmoid(gate)``, each head normed on its own.

    Args:
        y, read: what the heads and their memorised units say ``[..., G, m, V]``. share: logits ``[..., G, m]``;
            read and share are None without units. gate: logits ``[..., G m V]``; None: no gate.
        eps: of the norm. backend: as `head_inputs`.
    """
    V = y.shape[-1]
    if read is not None and share is not None:
        expect("head_outputs", "read", read, tuple(y.shape))
        expect("head_outputs", "share", share, tuple(y.shape[:-1]))
    if gate is not None:
        expect("head_outputs", "gate", gate, (*y.shape[:-3], y.shape[-3] * y.shape[-2] * V))
    kind = choose("head_outputs", backend, y.device, _not_served(16, V, y.dtype), lambda: _untrusted(0, V, y))
    if kind == "triton" and y.numel():
        from llm_mlp.ops.heads import kernels  # triton is optional

        return kernels.outputs(y, read, share, gate, eps)
    if read is not None and share is not None:
        y = y + torch.sigmoid(share)[..., None].to(y.dtype) * read
    y = rms_norm(y, eps)
    return y if gate is None else y * torch.sigmoid(gate).view_as(y)


class Gates(NamedTuple):
    """What the heads' scalars come to; ``[..., G, m]`` and ``[..., G]``."""

    log_decay: Tensor  # float32 at least
    share: Tensor | None  # logits of what the memorised units add; None without units
    beta: Tensor | None  # of the erase vectors, float32 at least; None where there is none


def gates(
    like: Tensor,
    heads: Tensor | None,
    log_rate: Tensor | None,
    erase: Tensor | None,
    *,
    shape: tuple[int, int],
    erase_max: float,
) -> Gates:
    """``log_decay = -softplus(a) exp(log_rate)`` and ``beta = erase_max sigmoid(erase)``.

    Args:
        like: any tensor ``[..., X]`` of the same tokens.
        heads: logits ``[..., H]`` or ``[..., 2 H]``: a of the decays if there is a ``log_rate`` (``[H]``), then shares.
        erase: logits, one a group or more. shape: (G, m); G m = H.
    """
    H, wide = shape[0] * shape[1], torch.float64 if like.dtype == torch.float64 else torch.float32
    decays = H if log_rate is not None else 0
    if log_rate is not None and heads is not None:
        rate = F.softplus(heads[..., :H].to(wide)) * log_rate.to(wide).exp()
        log_decay = -rate.unflatten(-1, shape)
    else:
        log_decay = like.new_zeros((*like.shape[:-1], *shape), dtype=wide)
    share = None
    if heads is not None and heads.shape[-1] > decays:
        share = heads[..., decays:].unflatten(-1, shape)
    return Gates(log_decay, share, None if erase is None else erase_max * torch.sigmoid(erase.to(wide)))


def gates_step(
    like: Tensor,
    heads: Tensor | None,
    log_rate: Tensor | None,
    erase: Tensor | None,
    *,
    shape: tuple[int, int],
    erase_max: float,
    backend: str = "auto",
) -> Gates:
    """`gates` of one token of each sequence; tensors ``[B, ...]``. Not differentiable."""
    not_served = None if heads is not None and erase is not None else "a layer without decays, units or erase vectors"
    if like.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        not_served = f"dtype {like.dtype} (bfloat16, float16 and float32 are)"
    kind = choose("gates_step", backend, like.device, not_served, lambda: _untrusted(0, 0, like, "gates_step"))
    with torch.no_grad():
        if kind == "triton" and like.numel() and heads is not None and erase is not None:
            from llm_mlp.ops.heads import kernels  # triton is optional

            return Gates(*kernels.gates_step(heads, log_rate, erase, shape, erase_max))
        return gates(like, heads, log_rate, erase, shape=shape, erase_max=erase_max)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _not_served(R: int, V: int, dtype: torch.dtype) -> str | None:
    """What the kernels do not serve; None if they serve it."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype {dtype} (bfloat16, float16 and float32 are)"
    if R & (R - 1) or not 16 <= R <= 256:
        return f"R = {R} (powers of two from 16 to 256 are)"
    if V & (V - 1) or not 1 <= V <= 256:
        return f"V = {V} (powers of two to 256 are)"
    return None


def _untrusted(R: int, V: int, like: Tensor, op: str = "heads") -> str | None:
    """Why ``auto`` may not choose the kernels."""
    if like.dtype == torch.float32 and op == "heads":
        return "float32 is not what the kernels are tuned for; backend='triton' runs them"
    from llm_mlp.ops.heads import kernels  # triton is optional

    return tune.untrusted(op, kernels.sizes_of(R, V, like.dtype), str(like.device))
