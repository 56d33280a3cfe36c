"""The ops beside their peers at given shapes, in one run: milliseconds, bytes, FLOPs, share of the roofline.

The roofline is this device's own: a large copy and a large matrix product, measured in the same run. An op's floor is
the larger of its bytes over the one and its FLOPs over the other, every input read once and every output written once.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm_mlp.bench.record import device_name, record
from llm_mlp.bench.speed import setup, timed
from llm_mlp.config import ConfigError
from llm_mlp.ops import memorise, perceive, perceive_wide
from llm_mlp.ops.perceive.chunked import CHUNK
from llm_mlp.precision import DTYPES

IMPLEMENTATIONS = ("triton", "chunked", "reference", "sdpa-cudnn", "sdpa-flash", "sdpa-math", "fla")


@dataclass(frozen=True)
class Shape:
    """Sizes of an op's inputs."""

    batch: int
    length: int
    groups: int
    features: int
    read_width: int  # perceive_wide: R
    heads: int  # of a group
    value_width: int
    block: int
    slots: int
    activation: str
    erase: str = "scalar"  # perceive: e is beta k, beta [B, T, G]; or "vector": e [B, T, G, F]

    @property
    def values(self) -> int:
        """Value channels of a group."""
        return self.heads * self.value_width

    @property
    def tokens(self) -> int:
        return self.batch * self.length


@dataclass(frozen=True)
class Work:
    """What an implementation has to do at least."""

    bytes: float
    flops: float


def work(op: str, s: Shape, size: int, backward: bool) -> Work:
    """``size``: bytes of a number. The backward pass reads all inputs and dy and writes all gradients."""
    G, Fe, mV, m = s.groups, s.features, s.values, s.heads
    if op == "gated delta rule":  # perceive of one head a group, 128 x 128
        return work(
            "perceive", replace(s, groups=_peer_heads(s), features=128, heads=1, value_width=128), size, backward
        )
    if op in ("perceive", "perceive_wide"):
        e = Fe * size if op == "perceive" and s.erase == "vector" else 4
        width = s.read_width if op == "perceive_wide" else Fe
        inputs, outputs = G * ((2 * width + mV) * size + e + 4 * m), G * (mV * size + 4 * m)
        flops = G * (4 * CHUNK * Fe + 6 * Fe * mV + 4 * CHUNK * mV)
        flops += G * 4 * width * Fe if op == "perceive_wide" else 0
        more = 3.0
    elif op == "memorise":
        rows = s.slots + s.block // 2  # a query sees half of its block on average
        inputs, outputs = G * (2 * Fe + mV) * size + 4 * G, G * mV * size
        flops = G * 2 * rows * (Fe + mV)
        more = 3.5
    else:  # attention over the same value channels, heads of 128
        channels = G * mV
        inputs, outputs = 3 * channels * size, channels * size
        flops = 4 * channels * s.length // 2
        more = 3.5
    if not backward:
        return Work(s.tokens * (inputs + outputs), s.tokens * flops)
    return Work(s.tokens * (3 * inputs + 2 * outputs), s.tokens * flops * more)


def _normal(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def perceive_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k of unit length, beta below 1.98 (or e = beta k), w, decays of half-lives from 8 to 4,096 tokens."""
    B, T, G, m = s.batch, s.length, s.groups, s.heads
    q, k = (F.normalize(_normal(B, T, G, s.features, dtype=torch.float32, device=device), dim=-1) for _ in range(2))
    beta = 1.98 * torch.rand((B, T, G), device=device)
    e = beta if s.erase == "scalar" else (k * beta[..., None]).to(dtype)
    w = _normal(B, T, G, m, s.value_width, dtype=dtype, device=device)
    half = torch.logspace(3, 12, m, base=2, device=device)
    decay = -torch.rand((B, T, G, m), device=device) / half
    return [q.to(dtype), k.to(dtype), e, w, decay]


def wide_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """`perceive_inputs` with reads and keys before the first layer, and that layer with its slope."""
    _, _, beta, w, decay = perceive_inputs(s, dtype, device)
    q, k = (_normal(s.batch, s.length, s.groups, s.read_width, dtype=dtype, device=device) for _ in range(2))
    weight = _normal(s.groups, s.read_width, s.features, dtype=dtype, device=device) * 1.5 / s.read_width**0.5
    return [q, k, weight, torch.ones((s.groups, s.features), device=device), beta, w, decay]


def memorise_inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k of unit root mean square, w, random scores, sink 0."""
    q, k = (_normal(s.batch, s.length, s.groups, s.features, dtype=dtype, device=device) for _ in range(2))
    w = _normal(s.batch, s.length, s.groups, s.heads, s.value_width, dtype=dtype, device=device)
    score = torch.rand((s.batch, s.length, s.groups), device=device)
    return [q, k, w, score, torch.zeros(s.groups, device=device)]


def _peer_heads(s: Shape) -> int:
    """Heads of 128 with as many value channels."""
    heads = s.groups * s.values // 128
    if not heads or heads * 128 != s.groups * s.values:
        raise ConfigError("the peers need groups * heads * value width to be a multiple of 128")
    return heads


def _attention(
    s: Shape, backend: SDPBackend, dtype: torch.dtype, device: torch.device
) -> tuple[Callable, list[Tensor]]:
    heads = _peer_heads(s)
    inputs = [_normal(s.batch, heads, s.length, 128, dtype=dtype, device=device) for _ in range(3)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return run, inputs


def _gated_delta_rule(s: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Callable, list[Tensor]]:
    """flash-linear-attention's gated delta rule: as many heads of 128x128 as there are value channels for."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # type: ignore[import-not-found]

    heads = _peer_heads(s)
    shape = (s.batch, s.length, heads)
    q, k = (F.normalize(_normal(*shape, 128, dtype=torch.float32, device=device), dim=-1).to(dtype) for _ in range(2))
    v = _normal(*shape, 128, dtype=dtype, device=device)
    g, beta = -torch.rand(shape, device=device) / 64, torch.rand(shape, device=device).to(dtype)
    return (lambda *x: chunk_gated_delta_rule(*x)[0]), [q, k, v, g, beta]


def _implementations(op: str, s: Shape, names: list[str], dtype: torch.dtype, device: torch.device) -> Iterator[Any]:
    """(name, what it computes, function, inputs) of each implementation."""
    for name in names:
        if name in ("triton", "chunked", "reference"):
            if op == "perceive":
                yield name, op, partial(perceive, backend=name), perceive_inputs(s, dtype, device)
            elif op == "perceive_wide":
                yield name, op, partial(perceive_wide, eps=1e-6, backend=name), wide_inputs(s, dtype, device)
            else:
                size: dict[str, Any] = {"block": s.block, "slots": s.slots, "activation": s.activation}
                yield name, op, partial(memorise, backend=name, **size), memorise_inputs(s, dtype, device)
        elif name in ("sdpa-cudnn", "sdpa-flash", "sdpa-math"):
            kind = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "math": "MATH"}[name.removeprefix("sdpa-")]
            yield name, "attention", *_attention(s, getattr(SDPBackend, kind), dtype, device)
        else:
            yield name, "gated delta rule", *_gated_delta_rule(s, dtype, device)


def default_implementations(op: str, device: torch.device) -> list[str]:
    """What can run here: on a GPU also the peers."""
    if device.type == "cpu":
        return ["chunked"]
    peers = ["triton", "chunked", "sdpa-cudnn", "sdpa-flash"]
    return peers + (["fla"] if op != "memorise" and find_spec("fla") else [])


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _seconds(run: Callable, inputs: list[Tensor], backward: bool, repeats: int, device: torch.device) -> float:
    """Median of ``repeats`` timings after two calls that warm up. On a GPU each is of four calls back to back, as in
    training, where launching one hides behind the work of another."""
    leaves = [x.detach().requires_grad_(backward and x.is_floating_point()) for x in inputs]
    with torch.no_grad():
        upstream = torch.randn_like(_first(run(*inputs)))

    def call() -> None:
        if not backward:
            with torch.no_grad():
                run(*leaves)
            return
        _first(run(*leaves)).backward(upstream)
        for x in leaves:
            x.grad = None

    call()
    call()
    if device.type != "cuda":
        return statistics.median(timed(call, device) for _ in range(repeats))

    def calls() -> None:
        for _ in range(4):
            call()

    return statistics.median(timed(calls, device) / 4 for _ in range(repeats))


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a large copy (read and written), FLOPs a second of a large matrix product in ``dtype``."""
    cuda = device.type == "cuda"
    n, side = (2**31, 8192) if cuda else (2**26, 1024)
    a = torch.empty(n, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    x = torch.randn((side, side), device=device).to(dtype)
    results = []
    for call, amount in ((lambda: b.copy_(a), 2.0 * n), (lambda: x @ x, 2.0 * side**3)):
        call()
        results.append(amount / statistics.median(timed(call, device) for _ in range(5)))
    return results[0], results[1]


def bench_ops(
    op: str,
    lengths: list[int],
    tokens: int,
    sizes: dict[str, Any],
    dtype: str,
    names: list[str],
    repeats: int,
    results: str | Path | None,
    threads: int,
    device: str,
) -> Iterator[dict[str, Any]]:
    """A row for each implementation, length and direction; first one with the ceilings.

    Raises:
        ConfigError: an unknown op, dtype or implementation.
    """
    if op not in ("perceive", "perceive_wide", "memorise"):
        raise ConfigError(f"unknown op {op!r}; known: perceive, perceive_wide, memorise")
    kinds = {"fp32": torch.float32, **DTYPES}
    if dtype not in kinds:
        raise ConfigError(f"--dtype {dtype!r}: expected one of {', '.join(kinds)}")
    if (erase := sizes.get("erase", "scalar")) not in ("scalar", "vector"):
        raise ConfigError(f"--erase {erase!r}: expected scalar or vector")
    if op == "perceive_wide" and erase == "vector":
        raise ConfigError("--erase vector: perceive_wide has one number a group")
    on = setup(device, threads)
    names = names or default_implementations(op, on)
    if unknown := [name for name in names if name not in IMPLEMENTATIONS]:
        raise ConfigError(f"unknown implementation {unknown[0]!r}; known: {', '.join(IMPLEMENTATIONS)}")
    copy, product = ceilings(on, kinds[dtype])
    facts: dict[str, Any] = {"op": op, "dtype": dtype, "copy_bytes_per_second": copy, "flops_per_second": product}
    yield {"implementation": "ceilings", "device": device_name(on), **facts}
    for length in lengths:
        s = Shape(batch=max(1, tokens // length), length=length, **sizes)
        for name, kind, run, inputs in _implementations(op, s, names, kinds[dtype], on):
            for backward in (False, True):
                row = {**facts, "implementation": name, **vars(s), "backward": backward}
                need = work(kind, s, kinds[dtype].itemsize, backward)
                floor = max(need.bytes / copy, need.flops / product)
                try:
                    seconds = _seconds(run, inputs, backward, repeats, on)
                except Exception as error:  # a peer refuses a shape, memory runs out, a kernel does not fit: go on
                    row |= {"seconds": None, "error": (str(error).splitlines() or [type(error).__name__])[0][:200]}
                    if "illegal memory access" in str(error):
                        raise  # the device is lost to this process: every later row would fail too
                else:
                    row |= {"seconds": seconds, "bytes": need.bytes, "flops": need.flops, "floor_seconds": floor}
                    row |= {"share_of_roofline": floor / seconds}
                if results:
                    record(results, "op-speed", row, device=on, seed=0)
                yield row
