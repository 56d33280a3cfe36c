"""Training and decoding speed of a preset beside its transformer twin, in one run on one machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm_mlp.allocator import keep_freed_memory
from llm_mlp.bench.record import record
from llm_mlp.config import ConfigError, ModelConfig, build
from llm_mlp.device import pick_device
from llm_mlp.models import LM, build_model
from llm_mlp.models.capture import CapturedStep
from llm_mlp.precision import DTYPES, Precision
from llm_mlp.presets import TWIN

PREFILL = 2048  # tokens read at once before decoding is timed


def setup(device: str, threads: int) -> torch.device:
    """The device a benchmark runs on, with this many CPU threads (0: torch's choice)."""
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    return pick_device(device)


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _pair(preset: str, device: torch.device) -> dict[str, LM]:
    """The preset and its twin, weights filled at random (zeros would flatter some paths)."""
    if preset.endswith(TWIN):
        raise ConfigError(f"--preset {preset}: name {preset.removesuffix(TWIN)}; its twin runs beside it")
    return {
        name: build_model(build(ModelConfig, {"preset": name}), device=device).randomize_()
        for name in (preset, preset + TWIN)
    }


def bench_training(
    preset: str,
    lengths: list[int],
    precision: str,
    compile_: bool,
    tokens: int,
    repeats: int,
    results: str | Path | None,
    threads: int,
    device: str,
) -> Iterator[str]:
    """Forward and backward, preset and twin in turn; yields a line a length, records tokens/s and the ratio."""
    if precision not in ("fp32", *DTYPES):
        raise ConfigError(f"--precision {precision!r}: expected fp32, {' or '.join(DTYPES)}")
    on = setup(device, threads)
    models = _pair(preset, on)
    mode = Precision(precision, on)  # type: ignore[arg-type]
    for length in lengths:
        batch = max(1, tokens // length)
        times: dict[str, list[float]] = {name: [] for name in models}
        data = torch.randint(next(iter(models.values())).config.vocab_size, (batch, length + 1)).to(on)
        for model in models.values():
            if compile_:
                for block in model.blocks:
                    block.compile(dynamic=False)

        def step(model: LM, data: torch.Tensor = data) -> None:
            with mode.autocast():
                loss = model(data[:, :-1], targets=data[:, 1:]).loss
            loss.backward()
            model.zero_grad(set_to_none=True)

        for round_ in range(repeats + 1):  # the first is warm-up
            for name, model in models.items():
                seconds = timed(partial(step, model), on)
                if round_:
                    times[name].append(seconds)
        speed = {name: batch * length / statistics.median(t) for name, t in times.items()}
        ratio = speed[preset] / speed[preset + TWIN]
        facts = {"preset": preset, "length": length, "batch": batch, "precision": precision, "compiled": compile_}
        if results:
            record(results, "train-speed", facts | {"tokens_per_second": speed, "ratio": ratio}, device=on, seed=0)
        yield (
            f"length {length:>6}: {speed[preset]:>10,.0f} tokens/s, twin {speed[preset + TWIN]:>10,.0f}, "
            f"ratio {ratio:.2f}"
        )


@torch.no_grad()
def time_decoding(model: LM, context: int, steps: int, batch: int = 1, graph: bool = False) -> dict[str, float]:
    """Median seconds a step after ``context`` random tokens, and the bytes of a sequence's state there.

    ``batch``: sequences, which all read the same. ``graph``: the step as a CUDA graph.
    """
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, context), generator=generator).to(device)
    state = None
    for a in range(0, context, PREFILL):
        state = model(ids[:, a : a + PREFILL], state, logits="none").state
    assert state is not None
    size = sum(t.numel() * t.element_size() for t in state.values())
    state = {name: t.repeat(batch, *[1] * (t.ndim - 1)) for name, t in state.items()}
    token = ids[:, -1].repeat(batch)
    call: Callable[[], Any] = partial(model.step, token, state)
    if graph:
        call = partial(CapturedStep(model, state, batch), token)
    for _ in range(3):
        call()
    times = [timed(call, device) for _ in range(steps)]
    return {"seconds": statistics.median(times), "state_bytes": size}


def bench_decoding(
    preset: str,
    contexts: list[int],
    steps: int,
    batch: int,
    precision: str,
    graph: bool,
    results: str | Path | None,
    threads: int,
    device: str,
) -> Iterator[str]:
    """Preset and twin at each context; yields a line a context, records tokens/s, state bytes and the ratio.

    ``graph``: the preset's steps as a CUDA graph; the twin's cache grows, so its steps are launched one by one and
    no ratio is given.
    """
    if precision not in ("fp32", *DTYPES):
        raise ConfigError(f"--precision {precision!r}: expected fp32, {' or '.join(DTYPES)}")
    on = setup(device, threads)
    if graph and on.type != "cuda":
        raise ConfigError(f"--graph: CUDA graphs need a CUDA device, this one is {on}")
    models = _pair(preset, on)
    for model in models.values():
        model.to(torch.float32 if precision == "fp32" else DTYPES[precision])
    for context in contexts:
        found = {
            name: time_decoding(model, context, steps, batch, graph and name == preset)
            for name, model in models.items()
        }
        speed = {name: batch / f["seconds"] for name, f in found.items()}
        size = {name: f["state_bytes"] for name, f in found.items()}
        ratio = None if graph else speed[preset] / speed[preset + TWIN]
        if results:
            facts = {"preset": preset, "context": context, "batch": batch, "precision": precision, "graph": graph}
            facts |= {"tokens_per_second": speed, "state_bytes": size, "ratio": ratio}
            record(results, "decode-speed", facts, device=on, seed=0)
        how = " (not in a graph)" if graph else f", ratio {ratio:.2f}"
        yield (
            f"context {context:>6}: {speed[preset]:>8,.1f} tokens/s, twin {speed[preset + TWIN]:>8,.1f}{how}; "
            f"state {size[preset] / 1e6:.1f} MB, twin {size[preset + TWIN] / 1e6:.1f} MB"
        )
