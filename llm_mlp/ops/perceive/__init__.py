"""`perceive`: the online-written second layer of perception heads (a gated delta rule with shared keys).

For every head (letters in docs/notation.md; architecture: a group's heads share q, k and e)::

    u_t = w_t - e_t^T exp(log_decay_t) S_{t-1}
    S_t = exp(log_decay_t) S_{t-1} + k_t u_t^T
    y_t = S_t^T q_t

With F = R, m = 1, e = beta k and w = beta v this is Gated DeltaNet (arXiv 2412.06464).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llm_mlp.ops import tune
from llm_mlp.ops.backend import accumulation_dtype, check_values, choose, expect, sequence_bounds
from llm_mlp.ops.perceive import chunked, reference, step


def perceive(
    q: Tensor,
    k: Tensor,
    e: Tensor,
    w: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    return_residual: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Read and write the second layers over T tokens.

    Args:
        q, k, e: read, key and erase vectors ``[B, T, G, F]``. e may be one number a group, ``[B, T, G]`` in any dtype:
            then the erase vector is that times k, and no tensor of its size is made.
        w: what is written ``[B, T, G, m, V]``; same dtype as q, k, e.
        log_decay: ``[B, T, G, m]``, at most 0; ``-inf`` forgets everything before the token.
        state: second layers before the first token ``[B, G, F, m, V]``; None is zeros.
        cu_seqlens: CPU integers ``[N+1]``: N sequences are packed along T (B = 1); state is ``[N, G, F, m, V]``.
        return_residual: also return ``|u_t|^2``.
        backend: ``auto | reference | chunked | triton``.

    Returns:
        ``(y, state)`` or ``(y, state, residual)``: y ``[B, T, G, m, V]`` in w's dtype; the state after the last
        token and the residual ``[B, T, G, m]`` in float64 if the inputs are, else float32. All differentiable, once.

    Raises:
        ValueError: shapes, dtypes, cu_seqlens or backend that do not fit.
    """
    B, T, G, F = _shape("perceive", q, 4)
    m, V = w.shape[-2:] if w.ndim == 5 else (0, 0)
    for name, tensor, shape in (("k", k, (B, T, G, F)), ("w", w, (B, T, G, m, V))):
        expect("perceive", name, tensor, shape)
    expect("perceive", "log_decay", log_decay, (B, T, G, m))
    scalar = _erase("perceive", k, e)
    _same_dtype("perceive", q=q, k=k, w=w, **({} if scalar else {"e": e}))
    bounds = None if cu_seqlens is None else sequence_bounds(cu_seqlens, B, T, "perceive")
    N = B if bounds is None else len(bounds) - 1
    dtype = accumulation_dtype(q, k, e, w, log_decay)
    if state is None:
        state = q.new_zeros((N, G, F, m, V), dtype=dtype)
    else:
        expect("perceive", "state", state, (N, G, F, m, V))
        state = state.to(dtype) if T else state.to(dtype, copy=True)  # never the caller's own tensor
    check_values("perceive", q=q, k=k, e=e, w=w, state=state, log_decay=log_decay)
    not_served = _not_served(F, m, V, q.dtype)
    kind = choose("perceive", backend, q.device, not_served, lambda: _untrusted(F, m, V, q, scalar))
    e = _erase_of(kind, k, e, dtype)
    run: Callable = reference.perceive if kind == "reference" else chunked.perceive
    if kind == "triton":
        from llm_mlp.ops.perceive import kernels  # triton is optional

        run = kernels.perceive
    # Under autocast the products below would be cast behind our back; the ops choose their own precision.
    with torch.autocast(q.device.type, enabled=False):
        y, state, residual = run(q, k, e, w, log_decay.to(dtype), state, bounds)
    return (y, state, residual) if return_residual else (y, state)


def perceive_transition(k: Tensor, e: Tensor, log_decay: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """A span of tokens as the map ``S -> exp(log_a) P S + Z`` (Z is the state the span leaves from zero).

    Args:
        k, e: ``[B, T, G, F]``, e as `perceive`. log_decay: ``[B, T, G, m]``, at most 0, ``-inf`` allowed.
        backend: ``auto | chunked | triton``; the kernels have no gradients, auto then chooses ``chunked``.

    Returns:
        P ``[B, G, F, F]``, the product of ``I - k e^T`` from the last token to the first, shared by the group, and
        log_a ``[B, G, m]``; float64 if the inputs are, else float32. T = 0 gives the identity and 0.
    """
    B, T, G, F = _shape("perceive_transition", k, 4)
    scalar = _erase("perceive_transition", k, e)
    if log_decay.ndim != 4:
        raise ValueError(f"perceive_transition: log_decay has shape {tuple(log_decay.shape)}, expected [B, T, G, m]")
    expect("perceive_transition", "log_decay", log_decay, (B, T, G, log_decay.shape[-1]))
    if not scalar:
        _same_dtype("perceive_transition", k=k, e=e)
    check_values("perceive_transition", k=k, e=e, log_decay=log_decay)
    dtype = accumulation_dtype(k, e, log_decay)
    not_served = _not_served(F, 1, 1, k.dtype)
    if torch.is_grad_enabled() and (k.requires_grad or e.requires_grad):
        not_served = "gradients of a transition"
    kind = choose("perceive_transition", backend, k.device, not_served, lambda: _untrusted(F, *_TRANSITION, k, scalar))
    e = _erase_of(kind, k, e, dtype)
    if kind == "reference":
        raise ValueError("perceive_transition: backend 'reference' is `perceive` from the identity; use 'chunked'")
    with torch.autocast(k.device.type, enabled=False):
        log_a = log_decay.to(dtype).sum(1)
        if kind == "triton":
            from llm_mlp.ops.perceive import kernels  # triton is optional

            return kernels.transition(k, e, *_TRANSITION), log_a
        return chunked.transition(k, e, dtype), log_a


def perceive_step(
    q: Tensor,
    k: Tensor,
    e: Tensor,
    w: Tensor,
    log_decay: Tensor,
    states: Tensor,
    state_indices: Tensor | None = None,
    *,
    return_residual: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """One token of a batch; ``states`` change in place. Not differentiable.

    Args:
        q, k, e: ``[B, G, F]``, e as `perceive`. w: ``[B, G, m, V]``. log_decay: ``[B, G, m]``.
        states: pool of second layers ``[N, G, F, m, V]``, any float dtype (arithmetic in float32 or float64).
        state_indices: distinct integers ``[B]``: row b uses ``states[state_indices[b]]``; -1 is a padding row
            (y = 0, nothing written). None: row b uses ``states[b]`` and N = B.
        return_residual: also return ``|u|^2`` ``[B, G, m]``.
        backend: ``auto | chunked | triton`` (chunked: plain torch).

    Returns:
        y ``[B, G, m, V]`` in w's dtype, or ``(y, residual)``.
    """
    B, G, F = _shape("perceive_step", q, 3)
    m, V = w.shape[-2:] if w.ndim == 4 else (0, 0)
    for name, tensor, shape in (("k", k, (B, G, F)), ("w", w, (B, G, m, V))):
        expect("perceive_step", name, tensor, shape)
    _erase("perceive_step", k, e)
    expect("perceive_step", "log_decay", log_decay, (B, G, m))
    N = states.shape[0] if state_indices is not None else B
    expect("perceive_step", "states", states, (N, G, F, m, V))
    check_indices("perceive_step", state_indices, B, N)
    check_values("perceive_step", q=q, k=k, e=e, w=w, states=states, log_decay=log_decay)
    kinds = {t.dtype for t in (q, k, w)}
    not_served = _step_not_served(F, m, V, q.dtype if len(kinds) == 1 else None, states)
    kind = choose("perceive_step", backend, q.device, not_served, lambda: _step_untrusted(F, m, V, q, e, states))
    e = _erase_of(kind, k, e, torch.float32)
    run: Callable = step.perceive_step
    if kind == "triton":
        from llm_mlp.ops.perceive import step_kernels  # triton is optional

        run = step_kernels.run
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        y, residual = run(q, k, e, w, log_decay, states, state_indices)
    return (y, residual) if return_residual else y


def check_indices(op: str, indices: Tensor | None, batch: int, pool: int) -> None:
    """``state_indices`` of a step: integers [B]; on the CPU also in range and distinct (-1 may repeat)."""
    if indices is None:
        return
    expect(op, "state_indices", indices, (batch,))
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: state_indices must be int32 or int64, got {indices.dtype}")
    if indices.device.type == "cpu":
        used = [i for i in indices.tolist() if i != -1]
        if any(not 0 <= i < pool for i in used):
            raise ValueError(f"{op}: state_indices {used} outside 0 .. {pool - 1}")
        if len(set(used)) != len(used):
            raise ValueError(f"{op}: state_indices {used} are not distinct")


def _not_served(F: int, m: int, V: int, dtype: torch.dtype) -> str | None:
    """What the Triton kernels do not serve of these sizes; None if they serve them."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype {dtype} (bfloat16, float16 and float32 are)"
    if F & (F - 1) or not 16 <= F <= (128 if dtype == torch.float32 else 512):
        return f"F = {F} in {dtype} (powers of two from 16 to 512 are, to 128 in float32: three tiles on chip)"
    if not 1 <= m * V <= 256:
        return f"m = {m} heads of V = {V} (m * V up to 256 is)"
    if F * V > 2**14:
        return f"F = {F} with V = {V} (F * V up to {2**14:,} is: a head's state in registers)"
    return None


_TRANSITION = 1, 16  # m and V at which a transition's kernels, which have neither, are checked


def _step_not_served(F: int, m: int, V: int, dtype: torch.dtype | None, states: Tensor) -> str | None:
    """What the step's kernel does not serve; None if it serves it."""
    if dtype is None or states.dtype == torch.float64:
        return "inputs of several dtypes" if dtype is None else f"states in {states.dtype}"
    if not states.is_contiguous():
        return "states that are not contiguous"
    if F & (F - 1) or not 16 <= F <= 1024:
        return f"F = {F} (powers of two from 16 to 1,024 are)"
    if V > 128:
        return f"V = {V} (up to 128 is)"
    return None if dtype in (torch.bfloat16, torch.float16, torch.float32) else f"dtype {dtype}"


def _step_untrusted(F: int, m: int, V: int, like: Tensor, e: Tensor, states: Tensor) -> str | None:
    """Why ``auto`` may not choose the step's kernel."""
    from llm_mlp.ops.perceive import step_kernels  # triton is optional

    sizes = step_kernels.sizes_of(F, m, V, e.ndim == 2, like.dtype, states.dtype)
    return tune.untrusted("perceive_step", sizes, str(like.device))


def _erase(op: str, k: Tensor, e: Tensor) -> bool:
    """Whether e is one number a group; it is checked."""
    scalar = e.ndim == k.ndim - 1
    expect(op, "e", e, tuple(k.shape[:-1] if scalar else k.shape))
    return scalar


def _erase_of(kind: str, k: Tensor, e: Tensor, wide: torch.dtype) -> Tensor:
    """e as an implementation takes it: only the kernels know one number a group."""
    if e.ndim == k.ndim:
        return e
    return e.to(wide) if kind == "triton" else k * e[..., None].to(k.dtype)


def _untrusted(F: int, m: int, V: int, like: Tensor, scalar: bool) -> str | None:
    """Why ``auto`` may not choose the kernels."""
    if like.dtype == torch.float32:
        return "float32 products of the kernels do without matrix units; backend='triton' runs them"
    from llm_mlp.ops.perceive import kernels  # triton is optional

    return tune.untrusted("perceive", kernels.sizes_of(F, m, V, like.dtype, scalar), str(like.device))


def _shape(op: str, q: Tensor, ndim: int) -> torch.Size:
    if q.ndim != ndim or not q.is_floating_point():
        raise ValueError(f"{op}: expected float tensors of {ndim} dimensions, got {tuple(q.shape)} {q.dtype}")
    return q.shape


def _same_dtype(op: str, **tensors: Tensor) -> None:
    if len({t.dtype for t in tensors.values()}) > 1:
        kinds = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
        raise ValueError(f"{op}: {', '.join(tensors)} must have one dtype; got {kinds}")
