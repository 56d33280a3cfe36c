"""Dense feed-forward layer, expanded, with a ReLU^2 or an adaptive activation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llm_mlp.config import ModelConfig
from llm_mlp.models.mixer import Cost, Linear, init_linear, rms_norm
from llm_mlp.ops.linear_step import linear_step


def _squared(x: Tensor) -> Tensor:
    """A product, which stays bf16 under autocast: powers become float32 on CUDA, twice the memory."""
    return x * x


class FFN(nn.Module):
    """``W2 psi(W1 x)``; psi(u) = relu(u)^2 + tanh(c(x)) relu(-u)^2, c one value per token and group of channels.

    Without the adaptive part psi is ReLU^2; with it the layer starts there (c = 0).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.ffn
        self.up = Linear(config.d_model, c.hidden, bias=False)
        self.down = Linear(c.hidden, config.d_model, bias=False)
        self.shape = Linear(config.d_model, c.adaptive_groups) if c.activation == "adaptive" else None

    def init_weights(self) -> None:
        init_linear(self.up.weight)
        nn.init.zeros_(self.down.weight)
        if self.shape is not None:
            nn.init.zeros_(self.shape.weight)
            nn.init.zeros_(self.shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` -> ``[..., D]``."""
        u = self.up(x)
        h = _squared(u.relu())
        if self.shape is not None:
            c = torch.tanh(self.shape(x))[..., None]  # [..., groups, 1]
            h = h + (c * _squared((-u).relu()).unflatten(-1, (c.shape[-2], -1))).flatten(-2)
        return self.down(h)

    def step(self, x: Tensor, eps: float) -> Tensor:
        """One token: the residual stream ``[B, D]`` (not normed) -> x + y."""
        if self.shape is not None:
            return x + self(rms_norm(x, eps))
        h = linear_step(x, [self.up.product()], eps=eps, relu2=True)[0]
        return linear_step(h, [self.down.product()], residual=x)[0]

    @staticmethod
    def cost(config: ModelConfig) -> Cost:
        D, c = config.d_model, config.ffn
        shape = c.adaptive_groups if c.activation == "adaptive" else 0
        matrices = 2 * D * c.hidden + D * shape
        return Cost(matrices + shape, 2 * matrices)
