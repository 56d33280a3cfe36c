"""Results as JSON lines that say where they come from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import llm_mlp


def device_name(device: torch.device | str) -> str:
    """``NVIDIA H200`` or the processor's model."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or platform.machine()} ({torch.get_num_threads()} threads)"


def commit() -> str:
    """LLM_MLP_COMMIT if set (a copy without its history), else the checkout's, ``+`` behind it if files differ."""
    if "LLM_MLP_COMMIT" in os.environ:
        return os.environ["LLM_MLP_COMMIT"]
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--", "*.py"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        return head + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def milliseconds(seconds: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Percentiles of some times, p50, p95 and p99; nothing of none."""
    if not len(seconds):
        return {}
    return {f"p{p}": round(1e3 * float(np.percentile(seconds, p)), 3) for p in (50, 95, 99)}


def record(
    path: str | Path | None, kind: str, values: dict[str, Any], *, device: torch.device | str, seed: int
) -> dict:
    """One result with where it comes from; appended to a JSON lines file, if there is to be one."""
    line = {
        "kind": kind,
        **values,
        "seed": seed,
        "device": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "llm_mlp": llm_mlp.__version__,
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if path is None:
        return line
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf8") as file:
        file.write(json.dumps(line) + "\n")
    return line
