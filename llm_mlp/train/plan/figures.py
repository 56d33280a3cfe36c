"""Numbers with their unit and origin, and the table of what is known about GPUs and of the rates measured on them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from llm_mlp.config import ModelConfig, build
from llm_mlp.models import model_cost

Leaf = dict[str, Any]
ORIGINS = ("computed", "measured", "assumed")


class PlanError(ValueError):
    """What is asked for cannot be planned; the message names the flag and says what to do."""


def leaf(value: Any, unit: str, source: str) -> Leaf:
    """A number of a plan. ``source`` begins with where it comes from: computed, measured or assumed."""
    assert source.startswith(ORIGINS), source
    return {"value": value, "unit": unit, "source": source}


@dataclass(frozen=True)
class GPU:
    """A device: bytes, FLOP/s (dense bf16), bytes/s of one direction of each link, watts, dollars an hour."""

    name: str
    memory: float
    peak: float
    nvlink: float
    network: float
    watts: float
    price: float
    node: int = 8  # GPUs that NVLink joins


# The maker states memory, peak, NVLink (half of the sum of both directions), the network of its own eight-GPU machine
# (an adapter a GPU: 400 Gb/s, A100 200 Gb/s) and the board's power. Prices are an order of magnitude for rented ones.
STATED = "stated by the maker (data sheets of the GPU and of its eight-GPU machine)"
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a100", 80e9, 312e12, 300e9, 25e9, 400, 1.5),
        GPU("h100", 80e9, 989e12, 450e9, 50e9, 700, 2.5),
        GPU("h200", 141e9, 989e12, 450e9, 50e9, 700, 3.5),
        GPU("b200", 180e9, 2250e12, 900e9, 50e9, 1000, 4.5),
        # Two cores of a server: what the CPU figures were measured on. Nothing of it is stated by anybody.
        GPU("cpu", 16e9, 0.15e12, 10e9, 1e9, 30, 0.1, node=1),
    )
}
LINK_SHARE = 0.8  # of a link's stated rate that large exchanges reach
USABLE = 0.92  # of the memory: the rest is the CUDA context's, NCCL's buffers' and lost between blocks
WORKSPACE = 32 * 2**20  # cuBLAS's, on Hopper


def find_gpu(name: str) -> GPU:
    """Raises `PlanError` for an unknown name, with the nearest."""
    if name not in GPUS:
        near = difflib.get_close_matches(name.lower(), GPUS, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise PlanError(f"--gpu {name!r} is not in the table; {hint}known: {', '.join(GPUS)}")
    return GPUS[name]


# Tokens a second, forward and backward, of one device: benchmarks/results/speed.jsonl, kind train-speed.
# "h100": one H100 80GB HBM3, bf16, compiled, a CUDA graph, 32,768 tokens a step, commit 250827c (as in the README).
# "cpu": two threads of an AMD EPYC, fp32, eager, 8,192 tokens a step, commit d42917a6281c.
_MEASURED: dict[str, tuple[str, str, dict[str, dict[int, float]]]] = {
    "h100": (
        "360m",
        "one H100, bf16, compiled, CUDA graph, benchmarks/results/speed.jsonl at commit 250827c",
        {
            "perception": {2048: 135_817, 8192: 129_644, 32768: 127_476},
            "attention": {2048: 137_819, 8192: 101_611, 32768: 50_487},
        },
    ),
    "cpu": (
        "30m",
        "two CPU threads, fp32, eager, benchmarks/results/speed.jsonl at commit d42917a6281c",
        {"perception": {1024: 477.1, 8192: 484.7}, "attention": {1024: 689.7, 8192: 349.8}},
    ),
}
# A large bf16 product and a copy on the H100 that `bench op` ran on: benchmarks/results/speed.jsonl at commit 74127f9.
PRODUCT, COPY = 723e12, 2.96e12
H100_PEAK = GPUS["h100"].peak


def rate(gpu: GPU, config: ModelConfig, length: int) -> tuple[float, str]:
    """FLOP/s that one device reaches in training a model of these mixers at a length, and where the figure is from.

    The measured model's FLOPs (`model_cost`, three times forward) by its seconds, at the longest measured length that
    is not above ``length``; layers of several kinds share the time by their number. Other GPUs than the measured one
    are assumed to reach the same share of their stated peak.
    """
    of = "cpu" if gpu.name == "cpu" else "h100"
    preset, where, table = _MEASURED[of]
    seconds, used = [], set()
    for mixer in config.mixers:
        at = max((n for n in table[mixer] if n <= length), default=min(table[mixer]))
        twin = "-transformer" if mixer == "attention" else ""
        flops = 3 * model_cost(build(ModelConfig, {"preset": preset + twin}), context=at).flops
        seconds.append(1 / (table[mixer][at] * flops))
        used.add(f"{preset + twin} at {at:,} tokens")
    found = len(seconds) / sum(seconds)
    source = f"{' and '.join(sorted(used))}, {where}"
    if gpu.name == of:
        return found, f"measured: {source}"
    ratio = gpu.peak / H100_PEAK
    return found * ratio, f"assumed: measured on an H100 ({source}), times the ratio of stated peaks, {ratio:.2f}"
