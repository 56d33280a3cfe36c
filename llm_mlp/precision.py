"""Mixed precision on one device: autocast for bf16 and fp16, dynamic loss scaling for fp16."""

from __future__ import annotations

import contextlib
from typing import Literal

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """``autocast()`` around the forward pass; ``scaler`` scales the loss from 2^16 in fp16 and is idle otherwise."""

    def __init__(self, name: Literal["fp32", "bf16", "fp16", "fp64"], device: torch.device) -> None:
        self.dtype = DTYPES.get(name)
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16, enabled=name == "fp16")
        if device.type == "cuda":
            # fp32 products inside the ops (the triangular solve, decay ratios) may use TF32; states stay fp32.
            torch.set_float32_matmul_precision("high")

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype is None:
            return contextlib.nullcontext()
        # Every weight is used once a forward pass: autocast's cache would only keep its copies of them all alive.
        return torch.autocast(self.device.type, dtype=self.dtype, cache_enabled=False)
