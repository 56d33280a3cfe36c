"""What a run uses: memory, the share of the device's peak, power and energy. What cannot be told is None, not zero."""

from __future__ import annotations

import torch

from llm_mlp.config import TrainConfig
from llm_mlp.energy import Energy
from llm_mlp.models import model_cost

# Dense matrix products a second without sparsity, from NVIDIA's data sheets: (bf16 and fp16, tf32).
PEAK_FLOPS = {
    "H200": (989e12, 494.5e12),
    "H100 PCIe": (756e12, 378e12),
    "H100": (989e12, 494.5e12),
    "A100": (312e12, 156e12),
    "L40S": (362e12, 183e12),
    "RTX 4090": (165.2e12, 82.6e12),
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s of a device by its data sheet; None if it is not on the list."""
    for name, (half, single) in PEAK_FLOPS.items():
        if all(part in device_name for part in name.split()):
            return half if precision in ("bf16", "fp16") else single
    return None


class Meter:
    """Of this process's device. ``read`` after a step gives what the step took."""

    def __init__(self, config: TrainConfig, device: torch.device, readers: int) -> None:
        self.device, self.readers = device, readers
        # Forward, and twice that backward; recomputation does not count.
        self.flops = 3 * model_cost(config.model, context=config.data.seq_len).flops
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = peak_flops(name, config.precision)

    def __enter__(self) -> Meter:
        self._energy = Energy(self.device)
        self._start = self._last = self._energy.joules()
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def joules(self) -> float | None:
        """Since the run began."""
        now = self._energy.joules()
        return None if now is None or self._start is None else now - self._start

    def read(self, seconds: float, tokens: int) -> dict[str, float | None]:
        """``mfu``, ``memory_bytes``, ``watts``, ``joules_per_token`` of this process's share of ``tokens``."""
        own = tokens / self.readers
        now = self._energy.joules()
        used = None if now is None or self._last is None else now - self._last
        self._last = now
        memory = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        return {
            "mfu": None if self.peak is None else own * self.flops / seconds / self.peak,
            "memory_bytes": memory,
            "watts": None if used is None else used / seconds,
            "joules_per_token": None if used is None else used / own,
        }
