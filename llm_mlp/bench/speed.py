"""Training and decoding speed of a preset beside its transformer twin, in one run on one machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from llm_mlp.allocator import keep_freed_memory
from llm_mlp.bench.plot import plot_decoding
from llm_mlp.bench.record import record
from llm_mlp.config import ConfigError, ModelConfig, build
from llm_mlp.device import pick_device
from llm_mlp.energy import WINDOW, Energy, Spent
from llm_mlp.models import LM, build_model
from llm_mlp.models.capture import CapturedGradients, CapturedStep
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


def energy_each(call: Callable[[], Any], device: torch.device) -> dict[str, float | None]:
    """Joules of one call, and the device's mean power over a second of them; None where unavailable, without a call."""
    energy, count = Energy(device), 0
    if energy.joules() is None:
        return {"joules": None, "watts": None}
    end = time.perf_counter() + WINDOW  # counters move each tens of milliseconds
    with Spent(energy) as spent:
        while time.perf_counter() < end:
            timed(call, device)
            count += 1
    return {"joules": None if spent.joules is None else spent.joules / count, "watts": spent.watts}


def joules_told(joules: float | None) -> str:
    """Of a token, as a line says it."""
    return "energy unavailable" if joules is None else f"{joules:.3g} J a token"


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
    graph: bool,
    checkpointing: bool,
    tokens: int,
    repeats: int,
    results: str | Path | None,
    threads: int,
    device: str,
) -> Iterator[str]:
    """Forward and backward, preset and twin in turn; yields a line a length, records tokens/s and the ratio.

    ``graph``: both as CUDA graphs, one after the other, because each holds its activations as long as it lives.
    """
    if precision not in ("fp32", *DTYPES):
        raise ConfigError(f"--precision {precision!r}: expected fp32, {' or '.join(DTYPES)}")
    on = setup(device, threads)
    if graph:
        _need_cuda(on)
    models = _pair(preset, on)
    mode = Precision(precision, on)  # type: ignore[arg-type]
    for model in models.values():
        model.activation_checkpointing = "full" if checkpointing else "none"
        if compile_:
            for block in model.blocks:
                block.compile(dynamic=False)
    for length in lengths:
        batch = max(1, tokens // length)
        data = torch.randint(next(iter(models.values())).config.vocab_size, (batch, length + 1)).to(on)
        inputs, targets = data[:, :-1].contiguous(), data[:, 1:].contiguous()

        def step(model: LM, inputs: torch.Tensor = inputs, targets: torch.Tensor = targets) -> None:
            with mode.autocast():
                loss = model(inputs, targets=targets).loss
            loss.backward()
            model.zero_grad(set_to_none=True)

        times: dict[str, list[float]] = {name: [] for name in models}
        memory: dict[str, int] = {}

        def measure(name: str, call: Callable[[], Any], round_: int, times=times) -> None:
            seconds = timed(call, on)
            if round_:  # the first is warm-up
                times[name].append(seconds)

        if graph:
            for name, model in models.items():
                torch.cuda.reset_peak_memory_stats(on)
                captured = CapturedGradients(model, batch, length, mode.autocast)
                for round_ in range(repeats + 1):
                    measure(name, partial(captured, inputs, targets), round_)
                memory[name] = torch.cuda.max_memory_allocated(on)
                del captured
                model.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
        else:
            for round_ in range(repeats + 1):
                for name, model in models.items():
                    measure(name, partial(step, model), round_)
        speed = {name: batch * length / statistics.median(t) for name, t in times.items()}
        ratio = speed[preset] / speed[preset + TWIN]
        facts = {"preset": preset, "length": length, "batch": batch, "precision": precision, "compiled": compile_}
        facts |= {"graph": graph, "activation_checkpointing": checkpointing, "peak_memory_bytes": memory or None}
        if results:
            record(results, "train-speed", facts | {"tokens_per_second": speed, "ratio": ratio}, device=on, seed=0)
        yield (
            f"length {length:>6}: {speed[preset]:>10,.0f} tokens/s, twin {speed[preset + TWIN]:>10,.0f}, "
            f"ratio {ratio:.2f}" + "".join(f"; {name} peak {size / 1e9:.1f} GB" for name, size in memory.items())
        )


def _need_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise ConfigError(f"--graph: CUDA graphs need a CUDA device, this one is {device}")


@torch.no_grad()
def time_decoding(
    model: LM, context: int, steps: int, batch: int = 1, graph: bool = False, narrow: torch.dtype | None = None
) -> dict[str, Any]:
    """Median seconds a step after ``context`` random tokens, the bytes of a sequence's state there, and `energy_each`
    of some more steps (a cache grows by as many).

    ``batch``: sequences, which all read the same. ``graph``: the step as a CUDA graph. ``narrow``: dtype that fast
    weights are kept in while decoding; None: that of their sums.
    """
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, context), generator=generator).to(device)
    state = None
    for a in range(0, context, PREFILL):
        state = model(ids[:, a : a + PREFILL], state, logits="none").state
    assert state is not None
    if narrow is not None:
        state = {name: t.to(narrow) if name.endswith("fast_weights") else t for name, t in state.items()}
    size = sum(t.numel() * t.element_size() for t in state.values())
    state = {name: t.repeat(batch, *[1] * (t.ndim - 1)) for name, t in state.items()}
    token = ids[:, -1].repeat(batch)
    call: Callable[[], Any] = partial(model.step, token, state)
    if graph:
        call = partial(CapturedStep(model, state, batch), token)
    for _ in range(3):
        call()
    times = [timed(call, device) for _ in range(steps)]
    return {"seconds": statistics.median(times), "state_bytes": size, **energy_each(call, device)}


def bench_decoding(
    preset: str,
    contexts: list[int],
    steps: int,
    batches: list[int],
    precision: str,
    states: str,
    graph: bool,
    results: str | Path | None,
    plot: Path | None,
    threads: int,
    device: str,
) -> Iterator[str]:
    """Preset and twin at each batch and context; yields a line for each, records tokens/s, state bytes, energy and the
    ratio.

    ``states``: of fast weights, fp32 or a 16-bit format. ``graph``: the preset's steps as a CUDA graph; the twin's
    cache grows, so its steps are launched one by one and no ratio is given. A twin whose caches do not fit has none.
    """
    for option, value in (("--precision", precision), ("--states", states)):
        if value not in ("fp32", *DTYPES):
            raise ConfigError(f"{option} {value!r}: expected fp32, {' or '.join(DTYPES)}")
    on = setup(device, threads)
    if graph:
        _need_cuda(on)
    models = _pair(preset, on)
    for model in models.values():
        model.to(torch.float32 if precision == "fp32" else DTYPES[precision])
    rows = []
    for batch, context in product(batches, contexts):
        found, too_large = {}, ""
        for name, model in models.items():
            own = name == preset
            narrow = None if states == "fp32" or not own else DTYPES[states]
            try:
                found[name] = time_decoding(model, context, steps, batch, graph and own, narrow)
            except torch.OutOfMemoryError:
                if own:
                    raise
                too_large = f"its caches of {batch} sequences do not fit"
            if on.type == "cuda":
                torch.cuda.empty_cache()
        speed = {name: batch / f["seconds"] for name, f in found.items()}
        size = {name: f["state_bytes"] for name, f in found.items()}
        twin = preset + TWIN
        ratio = None if graph or too_large else speed[preset] / speed[twin]
        energy = {name: None if f["joules"] is None else f["joules"] / batch for name, f in found.items()}
        facts = {"preset": preset, "context": context, "batch": batch, "precision": precision, "states": states}
        facts |= {"graph": graph, "tokens_per_second": speed, "state_bytes": size, "ratio": ratio}
        facts |= {"joules_per_token": energy, "watts": {name: f["watts"] for name, f in found.items()}}
        rows.append(record(results, "decode-speed", facts, device=on, seed=0))
        beside = too_large or (
            f"{speed[twin]:>8,.1f}"
            + (" (not in a graph)" if ratio is None else f", ratio {ratio:.2f}")
            + f"; its state {size[twin] / 1e6:.1f} MB, {joules_told(energy[twin])}"
        )
        yield (
            f"batch {batch:>3}, context {context:>6}: {speed[preset]:>8,.1f} tokens/s, "
            f"{1e3 * batch / speed[preset]:.2f} ms a step, "
            f"state {size[preset] / 1e6:.1f} MB, {joules_told(energy[preset])}; twin: {beside}"
        )
    if plot is not None:
        plot_decoding(plot, rows)
