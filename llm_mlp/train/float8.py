"""float8 products in a model's FFNs while it trains (``module_precision.ffn: fp8``)."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from llm_mlp.config import ConfigError
from llm_mlp.models import LM
from llm_mlp.models.mixer import Linear
from llm_mlp.ops.float8 import linear_float8

log = logging.getLogger("llm_mlp.train")

FIELD = "module_precision.ffn"


class Float8Linear(Linear):
    """In training mode `linear_float8`; else what it was, so that the model that is evaluated is the one exported."""

    def forward(self, x: Tensor) -> Tensor:
        return linear_float8(x, self.weight) if self.training else super().forward(x)


def use_float8(model: LM) -> None:
    """Exchange the two matrices' modules of every FFN, which keep their names and parameters."""
    for block in model.blocks:
        for name in ("up", "down"):
            linear = getattr(block.ffn, name)
            with torch.device("meta"):
                other = Float8Linear(linear.in_features, linear.out_features, bias=False)
            other.weight = linear.weight
            setattr(block.ffn, name, other.train(linear.training))


def check_float8(device: torch.device) -> None:
    """Try a product.

    Raises:
        ConfigError: the device has none.
    """
    one = torch.ones((32, 32), device=device)
    try:
        found = linear_float8(one, one)
    except (RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"{FIELD} = fp8 needs a GPU with float8 matrix units (compute capability 8.9 or above); {device} has "
            f"none that torch {torch.__version__} can use ({str(error).splitlines()[0]}). Set {FIELD}: same"
        ) from None
    if not bool((found == 32).all()):
        raise ConfigError(f"{FIELD} = fp8: float8 products on {device} are wrong; set {FIELD}: same")
    if device.type == "cpu":
        log.warning(f"{FIELD} = fp8 on a CPU: the same numbers as on a GPU, for tests; it is slower than bf16")
