"""`memorise`: a bounded number of hidden units that are tokens, read exactly.

Per group, the rows of the open block and of the ``slots`` earlier tokens with the largest score are read by::

    z_j = q . k_j / sqrt(R)      p_j = relu(z_j)^2 / (sum relu(z)^2 + e^sink)     (relu2)
                                 p   = softmax([sink, z]) without the sink's share (softmax)
    y_h = sum_j p_j w_h[j]

The ReLU^2 form is an MLP whose hidden units are tokens; the softmax form is what the field calls attention over a
bounded set. Neither grows with the context. After arXiv 2607.02303.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm_mlp.ops import tune
from llm_mlp.ops.backend import accumulation_dtype, check_values, choose, debugging, expect, sequence_bounds
from llm_mlp.ops.memorise import chunked, reference, step
from llm_mlp.ops.memorise.units import Units, check_sizes, check_units, units_init
from llm_mlp.ops.perceive import check_indices

ACTIVATIONS = ("relu2", "softmax")


def memorise(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    score: Tensor,
    sink: Tensor,
    units: Units | None = None,
    *,
    block: int = 256,
    slots: int = 64,
    activation: str = "relu2",
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Units]:
    """Read and write the memorised units over T tokens.

    Args:
        q, k: ``[B, T, G, R]``, RMS-normed with gains by the caller.
        w: values ``[B, T, G, m, V]``, same dtype as q and k.
        score: ``[B, T, G]``, how much a token deserves a slot; finite or -inf (-inf: never kept in a slot, still
            read inside its block). No gradient.
        sink: ``[G]``, between -80 and 80.
        units: what was memorised before the first token; None is `units_init`.
        block, slots: tokens of the open block and number of slots; block = 0 requires slots = 0 and gives y = 0.
        activation: ``relu2 | softmax``.
        cu_seqlens: CPU integers ``[N+1]``: N packed sequences (B = 1), units ``[N, ...]``; blocks count from each
            sequence's own carried length.
        backend: ``auto | reference | chunked | triton``.

    Returns:
        y ``[B, T, G, m, V]`` in w's dtype, and the units after the last token.

    Raises:
        ValueError: shapes, dtypes, sizes, cu_seqlens, activation or backend that do not fit.
    """
    dims, bounds = _check("memorise", k, w, score, units, block, slots, cu_seqlens)
    B, T, G, R, m, V = dims
    expect("memorise", "q", q, (B, T, G, R))
    expect("memorise", "sink", sink, (G,))
    if q.dtype != k.dtype:
        raise ValueError(f"memorise: q and k must have one dtype; got {q.dtype} and {k.dtype}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"memorise: unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    check_values("memorise", q=q, k=k, w=w, sink=sink, score=score)
    score = score.detach().to(accumulation_dtype(k, w))
    kind = choose(
        "memorise",
        backend,
        q.device,
        _not_served(R, m, V, q.dtype),
        lambda: _untrusted(R, m, V, activation, q),
    )
    with torch.autocast(q.device.type, enabled=False):
        if kind == "triton":
            from llm_mlp.ops.memorise import kernels  # triton is optional

            own = None if units is None else _carried(units, k, w, bounds, block, slots)
            return kernels.memorise(q, k, w, score, sink, own, block, slots, activation, bounds)
        before = _carried(units, k, w, bounds, block, slots)
        if kind == "reference":
            return reference.memorise(q, k, w, score, sink, before, block, slots, activation, bounds)
        return chunked.memorise(q, k, w, score, sink, before, block, slots, activation, bounds, empty=units is None)


def units_select(
    k: Tensor,
    w: Tensor,
    score: Tensor,
    units: Units | None = None,
    *,
    block: int = 256,
    slots: int = 64,
    cu_seqlens: Tensor | None = None,
) -> Units:
    """The units that `memorise` leaves, without a read; arguments as there."""
    _, bounds = _check("units_select", k, w, score, units, block, slots, cu_seqlens)
    check_values("units_select", k=k, w=w, score=score)
    units = _carried(units, k, w, bounds, block, slots)
    return chunked.units_select(k, w, score.detach().to(units.scores.dtype), units, block, slots, bounds)


def memorise_step(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    score: Tensor,
    sink: Tensor,
    units: Units,
    state_indices: Tensor | None = None,
    *,
    block: int = 256,
    slots: int = 64,
    activation: str = "relu2",
    backend: str = "auto",
) -> Tensor:
    """One token of a batch: writes the token's row, reads, takes a full block into the slots, advances length.

    Args:
        q, k: ``[B, G, R]``. w: ``[B, G, m, V]``. score: ``[B, G]``, or ``[B, G, n]`` to be added up. sink: ``[G]``.
        units: pool of N, changed in place; rows in any float dtype, float8_e4m3fn saturates at 448.
        state_indices: as in `perceive_step`.
        backend: ``auto | chunked | triton`` (chunked: plain torch).

    Returns:
        y ``[B, G, m, V]`` in w's dtype; 0 in padding rows. Not differentiable.
    """
    if k.ndim != 3 or w.ndim != 4:
        raise ValueError(f"memorise_step: k {tuple(k.shape)} and w {tuple(w.shape)} must be [B, G, R] and [B, G, m, V]")
    B, G, R = k.shape
    m, V = w.shape[-2:]
    for name, tensor, shape in (("q", q, (B, G, R)), ("w", w, (B, G, m, V)), ("sink", sink, (G,))):
        expect("memorise_step", name, tensor, shape)
    expect("memorise_step", "score", score, (B, G, *score.shape[2:3]))
    check_sizes("memorise_step", block, slots)
    N = units.length.shape[0] if state_indices is not None else B
    check_units("memorise_step", units, (N, G, R, m, V), block, slots)
    check_indices("memorise_step", state_indices, B, N)
    if activation not in ACTIVATIONS:
        raise ValueError(f"memorise_step: unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    if debugging():
        check_values("memorise_step", q=q, k=k, w=w, sink=sink, score=score)
        check_values("memorise_step", **{"units.keys": units.keys, "units.values": units.values})
    not_served = _step_not_served(q, k, w, units, block)
    sizes = R, m * V, block, slots, activation, q.dtype, units.keys.dtype
    kind = choose("memorise_step", backend, q.device, not_served, lambda: _step_untrusted(q.device, *sizes))
    run = step.memorise_step
    if kind != "triton" and score.ndim == 3:
        score = score.sum(-1)
    if kind == "triton":
        from llm_mlp.ops.memorise import step_kernels  # triton is optional

        run = step_kernels.memorise_step
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        return run(q, k, w, score, sink, units, state_indices, block, slots, activation)


def _not_served(R: int, m: int, V: int, dtype: torch.dtype) -> str | None:
    """What the Triton kernels do not serve of these sizes; None if they serve them."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype {dtype} (bfloat16, float16 and float32 are)"
    if R & (R - 1) or not 16 <= R <= 256:
        return f"R = {R} (powers of two from 16 to 256 are)"
    if not 1 <= m * V <= 256:
        return f"m = {m} heads of V = {V} (m * V up to 256 is)"
    if (2 * R + m * V) * dtype.itemsize > 1536:
        return f"R = {R}, m * V = {m * V} in {dtype} (2 R + m V up to {1536 // dtype.itemsize} is: its tiles on chip)"
    return None


def _step_not_served(q: Tensor, k: Tensor, w: Tensor, units: Units, block: int) -> str | None:
    """What the step's kernel does not serve; None if it serves it."""
    if not q.dtype == k.dtype == w.dtype or q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtypes {q.dtype}, {k.dtype}, {w.dtype} (one of bfloat16, float16 and float32 is)"
    if block == 0 or not all(x.is_contiguous() for x in units) or units.scores.dtype != torch.float32:
        return "no block" if block == 0 else "units that are not contiguous or have scores in float64"
    if units.keys.dtype.itemsize == 1 and q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 9):
        return "8-bit rows on a GPU without their instructions (compute capability 8.9 has them)"
    R, width = q.shape[-1], w.shape[-2] * w.shape[-1]
    if R & (R - 1) or not 16 <= R <= 256 or width > 512:
        return f"R = {R}, m * V = {width} (R a power of two from 16 to 256, m * V up to 512 is)"
    return None


def _step_untrusted(device: torch.device, *sizes: Any) -> str | None:
    """Why ``auto`` may not choose the step's kernel."""
    from llm_mlp.ops.memorise import step_kernels  # triton is optional

    return tune.untrusted("memorise_step", step_kernels.sizes_of(*sizes), str(device))


def _untrusted(R: int, m: int, V: int, activation: str, like: Tensor) -> str | None:
    """Why ``auto`` may not choose the kernels."""
    if like.dtype == torch.float32:
        return "float32 products of the kernels do without matrix units; backend='triton' runs them"
    from llm_mlp.ops.memorise import kernels  # triton is optional

    return tune.untrusted("memorise", kernels.sizes_of(R, m * V, activation, like.dtype), str(like.device))


def _check(op, k, w, score, units, block, slots, cu_seqlens):
    """Checks what `memorise` and `units_select` share; returns (B, T, G, R, m, V) and the sequence bounds."""
    if k.ndim != 4 or w.ndim != 5 or not k.is_floating_point():
        raise ValueError(f"{op}: k {tuple(k.shape)} and w {tuple(w.shape)} must be [B, T, G, R] and [B, T, G, m, V]")
    B, T, G, R = k.shape
    m, V = w.shape[-2:]
    expect(op, "w", w, (B, T, G, m, V))
    expect(op, "score", score, (B, T, G))
    if k.dtype != w.dtype:
        raise ValueError(f"{op}: k and w must have one dtype; got {k.dtype} and {w.dtype}")
    check_sizes(op, block, slots)
    bounds = None if cu_seqlens is None else sequence_bounds(cu_seqlens, B, T, op)
    if units is not None:
        check_units(op, units, (B if bounds is None else len(bounds) - 1, G, R, m, V), block, slots)
        check_values(op, **{"units.keys": units.keys, "units.values": units.values})
    return (B, T, G, R, m, V), bounds


def _carried(units: Units | None, k: Tensor, w: Tensor, bounds: list[int] | None, block: int, slots: int) -> Units:
    """The units before the first token, in the dtypes of the inputs."""
    B, _, G, R = k.shape
    m, V = w.shape[-2:]
    if units is None:
        N = B if bounds is None else len(bounds) - 1
        return units_init(N, G, R, m, V, block=block, slots=slots, dtype=k.dtype, device=k.device)
    return Units(
        units.keys.to(k.dtype), units.values.to(w.dtype), units.scores.to(accumulation_dtype(k, w)), units.length
    )
