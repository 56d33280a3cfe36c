"""Per-token routing of earlier layers' outputs into a later layer (after MUDD, arXiv 2502.12170)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_mlp.config import ModelConfig
from llm_mlp.models.mixer import Cost, Linear, init_linear, rms_norm


class Routing(nn.Module):
    """``x + sum_j c_j(x) h_j`` over the outputs h_j of the embedding and all earlier layers but the last one.

    c starts at zero, which is the plain model.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.down = Linear(config.d_model, config.routing.hidden, bias=False)
        self.up = Linear(config.routing.hidden, layer)

    def init_weights(self) -> None:
        init_linear(self.down.weight)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, earlier: list[Tensor]) -> Tensor:
        """x and each of ``earlier`` ``[..., D]`` -> ``[..., D]``."""
        c = self.up(F.gelu(self.down(rms_norm(x, self.eps))))
        for share, h in zip(c.to(x.dtype).unbind(-1), earlier, strict=True):
            x = torch.addcmul(x, share[..., None], h)
        return x

    @staticmethod
    def routed(config: ModelConfig, layer: int) -> bool:
        return layer > 0 and layer >= config.n_layers - config.routing.last_layers

    @staticmethod
    def cost(config: ModelConfig, layer: int) -> Cost:
        if not Routing.routed(config, layer):
            return Cost(0, 0)
        hidden = config.routing.hidden
        matrices = hidden * (config.d_model + layer)
        return Cost(matrices + layer, 2 * matrices)
