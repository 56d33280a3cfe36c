"""What a run uses: memory, the share of the device's peak, power and energy. What cannot be told is None, not zero."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from llm_mlp.config import TrainConfig
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
RAPL = Path("/sys/class/powercap")


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s of a device by its data sheet; None if it is not on the list."""
    for name, (half, single) in PEAK_FLOPS.items():
        if all(part in device_name for part in name.split()):
            return half if precision in ("bf16", "fp16") else single
    return None


class Energy:
    """Joules since some moment, of one GPU (NVML) or of the processor packages (RAPL); None where neither tells."""

    def __init__(self, device: torch.device) -> None:
        self._handle: Any = None
        self._zones: list[Path] = []
        self._last: dict[Path, int] = {}
        self._sum = 0.0
        if device.type == "cuda":
            with contextlib.suppress(Exception):  # the library or the driver's interface is not there
                import pynvml  # type: ignore[import-not-found]

                pynvml.nvmlInit()
                identifier = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(identifier)
                pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
                self._nvml = pynvml
        else:
            for zone in sorted(RAPL.glob("intel-rapl:[0-9]*")):
                with contextlib.suppress(OSError, ValueError):
                    if zone.name.count(":") == 1:
                        self._last[zone] = int((zone / "energy_uj").read_text())
                        self._zones.append(zone)

    def joules(self) -> float | None:
        if self._handle is not None:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3
        if not self._zones:
            return None
        for zone in self._zones:
            now = int((zone / "energy_uj").read_text())
            moved = now - self._last[zone]
            if moved < 0:  # the counter has gone round
                moved += int((zone / "max_energy_range_uj").read_text())
            self._last[zone] = now
            self._sum += moved / 1e6
        return self._sum


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
