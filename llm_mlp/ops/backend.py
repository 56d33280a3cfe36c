"""The one dispatcher of the ops: which implementation runs, and why.

``auto`` chooses and says so once per op and device; an explicit choice never falls back to another one.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch

log = logging.getLogger("llm_mlp.ops")

BACKENDS = ("auto", "reference", "chunked", "triton")
_TRITON = find_spec("triton") is not None  # once: torch.compile does not trace find_spec
OVERRIDE = "LLM_MLP_BACKEND"  # what auto chooses on CUDA: chunked or triton
_logged: set[tuple[str, ...]] = set()
_debug = False
_invariant = False
_assumed = ""


def choose(
    op: str,
    backend: str,
    device: torch.device,
    not_served: str | None = None,
    untrusted: Callable[[], str | None] = lambda: None,
) -> str:
    """The implementation that runs: ``"reference"``, ``"chunked"`` or ``"triton"``.

    Args:
        not_served: what the kernels do not serve of this call's shapes and dtypes; None if they serve it.
        untrusted: says why the kernels may not be chosen by ``auto`` (`llm_mlp.ops.tune`); None if they may.

    Raises:
        ValueError: an unknown name, or ``triton`` where it cannot run.
    """
    if backend == "auto":
        kind, why = _best(device, not_served, untrusted)
        key = (op, kind, device.type, why)
        if key not in _logged and not _assumed and not torch.compiler.is_compiling():
            _logged.add(key)
            log.info("%s: backend %s (%s)", op, kind, why)
        return kind
    if backend in ("reference", "chunked"):
        return backend
    if backend == "triton":
        if reason := _no_triton(device) or (f"it does not serve {not_served}" if not_served else None):
            raise ValueError(f"{op}: backend 'triton' cannot run: {reason}; use 'auto' or 'chunked'")
        return "triton"
    raise ValueError(f"{op}: unknown backend {backend!r}; known: {', '.join(BACKENDS)}")


def _best(device: torch.device, not_served: str | None, untrusted: Callable[[], str | None]) -> tuple[str, str]:
    """The fastest implementation on a device, and why it is chosen."""
    if _assumed:
        return ("chunked", f"the kernels do not serve {not_served}") if not_served else (_assumed, "assumed")
    if device.type != "cuda":
        return "chunked", f"the fast path on {device.type}"
    chosen = os.environ.get(OVERRIDE, "")
    if chosen not in ("", "chunked", "triton"):
        raise ValueError(f"{OVERRIDE}={chosen}: expected chunked or triton")
    if chosen == "chunked":
        return chosen, f"{OVERRIDE} says so"
    if reason := _no_triton(device) or (f"the kernels do not serve {not_served}" if not_served else None):
        return "chunked", reason
    if chosen:
        return chosen, f"{OVERRIDE} says so"
    if reason := untrusted():
        return "chunked", reason
    return "triton", "the fast path on cuda, checked against float64"


def _no_triton(device: torch.device) -> str | None:
    """Why kernels cannot run on a device; None if they can."""
    if not _TRITON:
        return "triton is not installed (pip install triton)"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has no matrix units for bfloat16 (compute capability 8.0 has)"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            f"the tensors are on {device.type}, not on a CUDA device (TRITON_INTERPRET=1 runs kernels on a CPU, slowly)"
        )
    return None


@contextlib.contextmanager
def assuming(kind: str) -> Iterator[None]:
    """In the ``with`` block ``auto`` chooses ``kind`` wherever it serves the shapes, whatever device is there: for
    following what a GPU would do on fake tensors, which have no data.

    Raises:
        ValueError: kernels are assumed and triton, whose module registers them, is not installed.
    """
    global _assumed
    if kind == "triton" and not _TRITON:
        raise ValueError("the kernels cannot be followed: triton is not installed (pip install triton)")
    before, _assumed = _assumed, kind
    try:
        yield
    finally:
        _assumed = before


@contextlib.contextmanager
def noticed() -> Iterator[set[tuple[str, ...]]]:
    """What ``auto`` chooses in the ``with`` block: (op, backend, device type, reason); it is also logged again."""
    before = set(_logged)
    _logged.clear()
    found: set[tuple[str, ...]] = set()
    try:
        yield found
    finally:
        found.update(_logged)
        _logged.update(before)


def debugging() -> bool:
    """Whether the value checks are on."""
    return _debug


def set_debug_checks(on: bool) -> None:
    """Switch the value checks (NaN inputs, positive decays) of every op; they read the data, so they cost time."""
    global _debug
    _debug = on


@contextlib.contextmanager
def debug_checks(on: bool = True) -> Iterator[None]:
    """`set_debug_checks` for the length of a ``with`` block."""
    before = _debug
    set_debug_checks(on)
    try:
        yield
    finally:
        set_debug_checks(before)


def invariant() -> bool:
    """Whether steps compute every row of a batch as if it were any other (`invariant_steps`)."""
    return _invariant


@contextlib.contextmanager
def invariant_steps(on: bool = True) -> Iterator[None]:
    """In the ``with`` block a step's row does not depend, to the bit, on the other rows or on its place, as long as the
    batch has one size (on a CPU a multiple of 32). The plain torch steps then read rows that are empty, too."""
    global _invariant
    before, _invariant = _invariant, on
    try:
        yield
    finally:
        _invariant = before


def check_values(op: str, *, log_decay: torch.Tensor | None = None, score: torch.Tensor | None = None, **tensors):
    """Under the debug switch: raise `ValueError` naming the tensor that is NaN, or decays above 0."""
    if not _debug:
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype.itemsize == 1:
            tensor = tensor.float()  # torch does not ask 8-bit floats
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{op}: {name} has NaN or infinite values")
    if log_decay is not None and not bool((log_decay <= 0).all()):
        raise ValueError(f"{op}: log_decay must be <= 0 and not NaN (largest {log_decay.max().item():.4g})")
    if score is not None and not bool((score < torch.inf).all()):
        raise ValueError(f"{op}: score must be finite or -inf, not NaN or +inf")


def accumulation_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """dtype of states and sums: float64 if the inputs are, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def sequence_bounds(cu_seqlens: torch.Tensor, batch: int, length: int, op: str) -> list[int]:
    """``cu_seqlens`` as a list, checked: CPU integers, from 0 to T, non-decreasing, B = 1.

    Raises:
        ValueError: naming what is wrong.
    """
    if cu_seqlens.device.type != "cpu":
        raise ValueError(f"{op}: cu_seqlens must be on the CPU (it decides shapes); it is on {cu_seqlens.device}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"{op}: cu_seqlens must be a vector of N+1 int32 or int64, got {tuple(cu_seqlens.shape)}")
    bounds = cu_seqlens.tolist()
    if batch != 1:
        raise ValueError(f"{op}: with cu_seqlens the batch must be 1 (sequences are packed along T), got B = {batch}")
    if bounds[0] != 0 or bounds[-1] != length:
        raise ValueError(f"{op}: cu_seqlens must go from 0 to T = {length}, got {bounds[0]} to {bounds[-1]}")
    for i, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if b < a:
            raise ValueError(f"{op}: cu_seqlens decreases at {i + 1}: {a} then {b}")
    return bounds


def expect(op: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise `ValueError` unless ``tensor`` has ``shape``."""
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
