"""The contract every mixer keeps, and helpers they share.

A mixer's state is a flat dict of tensors, batch first. A new mixer is one file with one `Mixer`, one config class in
`llm_mlp.config`, one row in `llm_mlp.models.lm.MIXERS` and one in the tests' table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm_mlp.config import ModelConfig
from llm_mlp.ops.heads import rms_norm
from llm_mlp.ops.linear_step import Product, linear

__all__ = ["STATES", "Cost", "Linear", "Mixer", "State", "init_linear", "linear", "rms_norm"]

State = dict[str, Tensor]
# What a state is kept in between two calls: dtypes of fast weights and of memorised rows, None the layer's own (that of
# its sums, that of its weights). Sums are float32 whatever is kept.
STATES: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {
    "auto": (None, None),
    "fp32+bf16": (torch.float32, torch.bfloat16),
    "bf16+bf16": (torch.bfloat16, torch.bfloat16),
    "bf16+8bit": (torch.bfloat16, torch.float8_e4m3fn),
}


@dataclass(frozen=True)
class Cost:
    """What a part of the model costs, computed from its config alone."""

    parameters: int
    flops: int  # of matrix products, forward, a token
    state_bytes: int = 0  # a sequence

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.flops + other.flops, self.state_bytes + other.state_bytes)


def vary(*tensors: Tensor) -> None:
    """Say that the next batch's (of other packed sequences) have other sizes, so that compiled blocks serve both."""
    for t in tensors:
        torch._dynamo.maybe_mark_dynamic(t, tuple(range(t.ndim)))


class Mixer(nn.Module):
    """Mixes along the sequence. x is normed by the block; y is added to the residual stream there."""

    def __init__(self) -> None:
        super().__init__()
        # Rows of fused weights that are matrices of their own, for optimizers that treat a matrix as a whole.
        self.fused_rows: dict[str, tuple[int, ...]] = {}
        self.kept = STATES["auto"]  # set by `LM.keep_state`; a cache of keys and values is in the weights' dtype

    def forward(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State]:
        """x ``[B, T, D]`` -> y ``[B, T, D]`` and the state after the last token (``[N, ...]`` when packed)."""
        raise NotImplementedError(f"{type(self).__name__}.forward")  # an abstract method

    def step(self, x: Tensor, state: State, state_indices: Tensor | None = None) -> Tensor:
        """One token: the residual stream x ``[B, D]`` (not normed) -> x + y; the state's tensors (a pool ``[N, ...]``)
        change in place."""
        raise NotImplementedError(f"{type(self).__name__}.step")  # an abstract method

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | str, context: int = 0) -> State:
        """The state before any token; ``context``: tokens a growing cache should have room for."""
        raise NotImplementedError(f"{type(self).__name__}.init_state")  # an abstract method

    def init_weights(self) -> None:
        """Fill the parameters with their initial values (torch's global generator)."""
        raise NotImplementedError(f"{type(self).__name__}.init_weights")  # an abstract method

    @staticmethod
    def cost(config: ModelConfig, *, context: int, dtype_bytes: int) -> Cost:
        """Parameters, FLOPs a token and state bytes a sequence of one layer, without building it."""
        raise NotImplementedError("Mixer.cost")  # an abstract method


class Linear(nn.Linear):
    """`torch.nn.Linear` by `llm_mlp.ops.linear_step.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def product(self, begin: int = 0) -> Product:
        """As `linear_step` takes it."""
        return Product(self.weight, self.bias, begin)


def init_linear(weight: Tensor) -> None:
    """Uniform with standard deviation 1/sqrt(3 fan_in) (torch's own choice for Linear)."""
    bound = 1 / math.sqrt(weight.shape[-1])
    nn.init.uniform_(weight, -bound, bound)
