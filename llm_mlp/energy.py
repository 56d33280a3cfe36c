"""Joules and watts of what a model runs on. What cannot be told is None, not zero."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger("llm_mlp.energy")

RAPL = Path("/sys/class/powercap")
# Seconds a reading counts as now: counters move each ms (RAPL) or tens of ms (NVML), and asking a driver takes time.
FRESH = 0.002
# Seconds that a mean power is taken over at least.
WINDOW = 1.0


class Energy:
    """Joules since it was made, of one GPU (NVML) or of the processor packages (RAPL); None where neither tells.

    The counters are the device's: whatever else runs on it is in them. Those of processors go round after some tens of
    minutes at full power; read them more often than that. From any thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._handle: Any = None
        self._zones: dict[Path, int] = {}  # each with its counter's last value, in microjoules
        self._lock = threading.Lock()
        self._sum, self._until = 0.0, 0.0
        if device.type == "cuda":
            with contextlib.suppress(Exception):  # the library or the driver's interface is not there
                import pynvml  # type: ignore[import-not-found]

                pynvml.nvmlInit()
                identifier = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
                handle = pynvml.nvmlDeviceGetHandleByUUID(identifier)
                self._begin = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
                self._handle, self._nvml = handle, pynvml
        else:
            for zone in sorted(RAPL.glob("intel-rapl:[0-9]*")):
                with contextlib.suppress(OSError, ValueError):
                    # "psys" has the packages in it; its parts ("core", "dram") have a second colon.
                    if zone.name.count(":") == 1 and (zone / "name").read_text().startswith("package"):
                        self._zones[zone] = int((zone / "energy_uj").read_text())
        self._mark = (time.perf_counter(), 0.0)
        self._watts: float | None = None

    def joules(self) -> float | None:
        """Since it was made. A counter that fails later is unavailable from then on, and the log says so."""
        with self._lock:
            if self._handle is None and not self._zones:
                return None
            if time.perf_counter() < self._until:
                return self._sum
            try:
                self._read()
            except Exception as error:  # NVML's errors have no common ground with the files'
                log.warning("energy is unavailable from here on: %s: %s", type(error).__name__, error)
                self._handle, self._zones = None, {}
                return None
            self._until = time.perf_counter() + FRESH
            return self._sum

    def _read(self) -> None:
        if self._handle is not None:
            self._sum = (self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) - self._begin) / 1e3
        for zone, last in self._zones.items():
            now = int((zone / "energy_uj").read_text())
            around = int((zone / "max_energy_range_uj").read_text()) if now < last else 0
            self._zones[zone] = now
            self._sum += (now - last + around) / 1e6

    def watts(self) -> float | None:
        """Mean power since an earlier call, at least `WINDOW` seconds ago (the first call: since it was made); None
        before that much time has passed."""
        joules, now = self.joules(), time.perf_counter()
        if joules is None:
            return None
        with self._lock:
            at, before = self._mark
            if now - at >= WINDOW:
                self._mark, self._watts = (now, joules), (joules - before) / (now - at)
            return self._watts


class Spent:
    """What a stretch of time takes of a device, as a context manager: ``joules`` and ``watts``, None where unavailable.

    A device's work has to be waited for before its end.
    """

    joules: float | None = None
    watts: float | None = None

    def __init__(self, energy: Energy) -> None:
        self._energy = energy

    def __enter__(self) -> Spent:
        self._at, self._before = time.perf_counter(), self._energy.joules()
        return self

    def __exit__(self, *_: object) -> None:
        now = self._energy.joules()
        if now is not None and self._before is not None:
            self.joules = now - self._before
            self.watts = self.joules / (time.perf_counter() - self._at)


class Shares:
    """Joules of those who use a device together: of every stretch of time all who are active get the same part.

    One number suffices: what somebody active all the time would have got. Who joins and leaves takes the difference.
    """

    def __init__(self, energy: Energy) -> None:
        self._energy, self._last, self._each = energy, energy.joules(), 0.0

    def mark(self, active: int) -> float | None:
        """What one who was always active has got, in joules, ``active`` of them having shared the time since the last
        mark (0: it is nobody's). To be called before their number changes; None where unavailable."""
        now = self._energy.joules()
        if now is not None and self._last is not None and active:
            self._each += (now - self._last) / active
        self._last = now
        return None if now is None else self._each
