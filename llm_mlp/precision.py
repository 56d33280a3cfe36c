"""Mixed precision on one device: autocast for bf16 and fp16, dynamic loss scaling for fp16."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from llm_mlp.config import ModulePrecisionConfig

if TYPE_CHECKING:
    from llm_mlp.models import LM

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """``autocast()`` around the forward pass; ``scaler`` scales the loss from 2^16 in fp16 and is idle otherwise.

    Whatever the precision, weights and what the ops accumulate in (states, triangular solves, losses) are float32.
    """

    def __init__(
        self,
        name: Literal["fp32", "bf16", "fp16", "fp64"],
        device: torch.device,
        modules: ModulePrecisionConfig | None = None,
    ) -> None:
        self.dtype = DTYPES.get(name)
        self.device = device
        self._modules = modules.autocast if modules else {}
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16, enabled=name == "fp16")
        if device.type == "cuda":
            # fp32 products inside the ops (the triangular solve, decay ratios) may use TF32; states stay fp32.
            torch.set_float32_matmul_precision("high")

    def of(self, part: str) -> torch.dtype | None:
        """What the products of a part (mixer, ffn, head) are cast to; None: nothing is cast."""
        return DTYPES.get(self._modules[part]) if part in self._modules else self.dtype

    def autocast(self) -> contextlib.AbstractContextManager:
        return _autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext()

    def apply(self, model: LM) -> None:
        """Let the parts of a model that have a precision of their own compute in it from now on; to be called once.

        They read the residual stream, which is float32, and what they return is added to it.
        """
        kind = self.device.type
        for part in self._modules:
            dtype = self.of(part)
            if part == "head":
                model.head_loss = _within(kind, dtype, model.head_loss)  # type: ignore[method-assign]
                continue
            for block in model.blocks:
                module = getattr(block, part)
                module.forward = _within(kind, dtype, module.forward)


def _autocast(kind: str, dtype: torch.dtype | None) -> torch.autocast:
    # Every weight is used once a forward pass: autocast's cache would only keep its copies of them all alive.
    return torch.autocast(kind, dtype=dtype, enabled=dtype is not None, cache_enabled=False)


def _within(kind: str, dtype: torch.dtype | None, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, in autocast to this dtype (None: in none), whatever is around it."""

    def cast(x: Tensor, *args: Any) -> Any:
        with _autocast(kind, dtype):
            return function(x, *args)

    return cast
