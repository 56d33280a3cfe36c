"""What a perception layer does with one token of a few sequences between its two large matrices, in three launches.

Convolution, activation and norms; gates; the update and the read of the fast weights and, beside it, the read of the
memorised units; their sum, normed and gated. One by one these are eight launches, and of few sequences it is launches
that decoding waits for. The parts are those of `head_inputs_step`, `gates_step`, `perceive_step`, `memorise_step` and
`head_outputs`, which is also what ``chunked`` runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llm_mlp.ops import tune
from llm_mlp.ops.backend import choose
from llm_mlp.ops.heads import gates_step, head_inputs_step, head_outputs
from llm_mlp.ops.linear_step import ROWS
from llm_mlp.ops.memorise import memorise_step
from llm_mlp.ops.memorise.units import Units
from llm_mlp.ops.perceive import perceive_step

__all__ = ["Gate", "Layer", "State", "perception_step", "serves"]


class Gate(NamedTuple):
    """The second matrix of a gate's logits ``[N, r]``, its bias ``[N]``, and where the first's products begin."""

    weight: Tensor
    bias: Tensor
    begin: int


@dataclass(frozen=True)
class Layer:
    """What a layer is made of; G groups of m heads of V, and H = G m."""

    groups: int
    heads: tuple[int, int]  # (m, V)
    write: Gate  # N = H V
    erase: Gate  # N = G
    output: Gate  # N = H V
    conv: Tensor  # [C, K]
    slope: Tensor | None  # [C]
    gain: Tensor  # [2, R]
    log_rate: Tensor  # [H]
    sink: Tensor  # [G]
    erase_max: float
    eps: float
    block: int
    slots: int
    activation: str


class State(NamedTuple):
    """A pool, changed in place: ``[N, K-1, C]``, ``[N, G, R, m, V]``, and units of N."""

    tails: Tensor
    fast_weights: Tensor
    units: Units


def serves(x: Tensor, layer: Layer, state: State, backend: str = "auto") -> bool:
    """Whether the kernels run for tokens ``x [B, ...]`` (the reason is logged once)."""
    kind = choose(
        "perception_step",
        backend,
        x.device,
        _not_served(x, layer, state),
        lambda: tune.untrusted("perception_step", _sizes(x, layer, state), str(x.device)),
    )
    return kind == "triton"


@torch.no_grad()
def perception_step(
    projected: Tensor,
    logits: Tensor,
    layer: Layer,
    state: State,
    state_indices: Tensor | None = None,
    backend: str = "triton",
) -> Tensor:
    """From what the first matrices make of a token to what the last one takes. Not differentiable.

    Args:
        projected: ``[B, C + ...]``: q, k and values before the convolution, and the gates' first products.
        logits: ``[B, 2 H]``, of the decays and of the units' shares.
        state_indices: as `llm_mlp.ops.perceive_step`; what a padding row gets is undefined.
        backend: ``triton``, where `serves` says so, or ``chunked``.

    Returns:
        ``[B, H V]``.
    """
    if backend == "triton":
        from llm_mlp.ops.perception_step import kernels  # triton is optional

        return kernels.run(projected, logits, layer, state, state_indices)
    G, (m, V) = layer.groups, layer.heads
    write, erase, output = (
        projected[:, g.begin : g.begin + g.weight.shape[1]] @ g.weight.mT + g.bias
        for g in (layer.write, layer.erase, layer.output)
    )
    scalars = gates_step(
        projected, logits, layer.log_rate, erase, shape=(G, m), erase_max=layer.erase_max, backend=backend
    )
    assert scalars.beta is not None
    channels = layer.conv.shape[0]
    i = head_inputs_step(
        projected[:, :channels], layer.conv, layer.slope, write, layer.gain, state.tails, state_indices,
        groups=G, heads=(m, V), eps=layer.eps, backend=backend,
    )  # fmt: skip
    y, residual = perceive_step(
        i.q, i.k, scalars.beta, i.w, scalars.log_decay, state.fast_weights, state_indices, return_residual=True,
        backend=backend,
    )  # fmt: skip
    assert i.units_q is not None and i.units_k is not None
    read = memorise_step(
        i.units_q, i.units_k, i.w, residual, layer.sink, state.units, state_indices, block=layer.block,
        slots=layer.slots, activation=layer.activation, backend=backend,
    )  # fmt: skip
    return head_outputs(y, read, scalars.share, output, eps=layer.eps, backend=backend).flatten(1)


def _sizes(x: Tensor, layer: Layer, state: State) -> tune.Sizes:
    """What `tune` knows a launch by."""
    (m, V), rank = layer.heads, layer.write.weight.shape[1]
    numbers = {"R": state.fast_weights.shape[2], "m": m, "V": V, "taps": layer.conv.shape[1], "rank": rank}
    numbers |= {"block": layer.block, "slots": layer.slots}
    kinds = {"dtype": x.dtype, "states": state.fast_weights.dtype, "rows": state.units.keys.dtype}
    names = {name: str(kind).removeprefix("torch.") for name, kind in kinds.items()}
    return *numbers.items(), ("activation", layer.activation), *names.items()


def _not_served(x: Tensor, layer: Layer, state: State) -> str | None:
    """What the kernels do not serve; None if they serve it."""
    (m, V), R, rank = layer.heads, state.fast_weights.shape[2], layer.write.weight.shape[1]
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype {x.dtype} (bfloat16, float16 and float32 are)"
    if len(x) > ROWS:
        return f"more than {ROWS} sequences (then single launches keep a GPU busy)"
    for name, n, low, high in (("R", R, 16, 256), ("V", V, 1, 256), ("m * V", m * V, 16, 256), ("rank", rank, 1, 128)):
        if n & (n - 1) or not low <= n <= high:
            return f"{name} = {n} (powers of two from {low} to {high} are)"
    gates = (layer.write, layer.erase, layer.output)
    tensors = [t for g in gates for t in (g.weight, g.bias)]
    if any(g.weight.shape[1] != rank for g in gates) or any(t.dtype != x.dtype for t in tensors):
        return "gates of different ranks, or weights in another dtype than x"
    tensors += [layer.conv, state.tails, state.fast_weights, *state.units]
    if not all(t.is_contiguous() for t in tensors) or state.units.scores.dtype != torch.float32:
        return "weights or states that are not contiguous, or scores that are not float32"
    if state.units.keys.dtype.itemsize == 1 and x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        return "8-bit rows on a GPU without their instructions (compute capability 8.9 has them)"
    return None
