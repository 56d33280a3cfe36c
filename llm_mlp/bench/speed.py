"""Training and decoding speed of a preset beside its transformer twin, in one run on one machine."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from llm_mlp.allocator import keep_freed_memory
from llm_mlp.bench.plot import check_place, plot_decoding
from llm_mlp.bench.record import milliseconds, record
from llm_mlp.config import ConfigError, ModelConfig, build
from llm_mlp.device import pick_device
from llm_mlp.energy import WINDOW, Energy, Spent
from llm_mlp.models import LM, build_model
from llm_mlp.models.capture import CapturedGradients, CapturedStep
from llm_mlp.models.mixer import STATES
from llm_mlp.precision import DTYPES, Precision
from llm_mlp.presets import TWIN
from llm_mlp.weights import FLOATS, WEIGHTS, activations, hold, weight_bytes

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


def time_decoding(
    models: Sequence[LM], context: int, steps: int, batch: int = 1, graph: bool = False
) -> list[dict[str, Any]]:
    """Of each model, which step in turn: median seconds a step after ``context`` random tokens and percentiles of the
    milliseconds, the bytes of a sequence's state there, and `energy_each` of some more steps of it alone (a cache grows
    by as many).

    ``batch``: sequences, which all read the same. ``graph``: the step as a CUDA graph.
    """
    device = next(models[0].parameters()).device
    calls, sizes = zip(*(_decoder(model, context, batch, graph) for model in models), strict=True)
    times: list[list[float]] = [[] for _ in models]
    for round_ in range(steps + 3):
        for call, own in zip(calls, times, strict=True):
            seconds = timed(call, device)
            if round_ >= 3:  # the first are warm-up
                own.append(seconds)
    return [
        {
            "seconds": statistics.median(own),
            "step_ms": milliseconds(own),
            "state_bytes": size,
            **energy_each(call, device),
        }
        for call, own, size in zip(calls, times, sizes, strict=True)
    ]


@torch.no_grad()
def _decoder(model: LM, context: int, batch: int, graph: bool) -> tuple[Callable[[], Any], int]:
    """A step of a model that has read ``context`` random tokens, and the bytes of a sequence's state."""
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
    return call, size


def bench_decoding(
    preset: str,
    contexts: list[int],
    steps: int,
    batches: list[int],
    weights: str,
    kept: str,
    graph: bool,
    results: str | Path | None,
    plot: Path | None,
    threads: int,
    device: str,
) -> Iterator[str]:
    """Preset and twin at each batch and context; yields a line for each, records tokens/s, bytes, energy and the ratio.

    ``weights``, ``kept``: as `llm_mlp.checkpoint.load_model`. Quantised weights and states that are not ``auto``
    run in turn with the same preset without both, in the dtype they compute in, as the twin is. ``graph``: the preset's
    steps as a CUDA graph; the twin's cache grows, so its steps are launched one by one and no ratio is given. A twin
    whose caches do not fit has none.
    """
    for option, value, known in (("--weights", weights, WEIGHTS), ("--state", kept, STATES)):
        if value not in known:
            raise ConfigError(f"{option} {value!r}: expected {', '.join(known)}")
    check_place(plot)
    on = setup(device, threads)
    if graph:
        _need_cuda(on)
    models, dtype = _pair(preset, on), activations(weights)
    for model in models.values():
        model.to(dtype)
    twin, plain = preset + TWIN, f"{preset} {str(dtype).removeprefix('torch.')}"
    if weights not in FLOATS or kept != "auto":
        models[plain] = copy.deepcopy(models[preset])
    hold(models[preset], weights).keep_state(kept)
    held, rows = {name: weight_bytes(model) for name, model in models.items()}, []
    for batch, context in product(batches, contexts):
        too_large, found = "", dict[str, dict[str, Any]]()
        for names in ([name for name in models if name != twin], [twin]):
            own = names != [twin]
            try:
                times = time_decoding([models[name] for name in names], context, steps, batch, graph and own)
                found |= dict(zip(names, times, strict=True))
            except torch.OutOfMemoryError:
                if own:
                    raise
                too_large = f"its caches of {batch} sequences do not fit"
            if on.type == "cuda":
                torch.cuda.empty_cache()
        speed = {name: batch / f["seconds"] for name, f in found.items()}
        size = {name: f["state_bytes"] for name, f in found.items()}
        ratio = None if graph or too_large else speed[preset] / speed[twin]
        energy = {name: None if f["joules"] is None else f["joules"] / batch for name, f in found.items()}
        facts = {"preset": preset, "context": context, "batch": batch, "weights": weights, "state": kept}
        facts |= {"graph": graph, "tokens_per_second": speed, "weight_bytes": held, "state_bytes": size}
        facts |= {"step_ms": {name: f["step_ms"] for name, f in found.items()}}
        facts |= {"joules_per_token": energy, "watts": {name: f["watts"] for name, f in found.items()}, "ratio": ratio}
        rows.append(record(results, "decode-speed", facts, device=on, seed=0))
        beside = too_large or (
            f"{speed[twin]:>8,.1f}"
            + (" (not in a graph)" if ratio is None else f", ratio {ratio:.2f}")
            + f"; its state {size[twin] / 1e6:.1f} MB, {joules_told(energy[twin])}"
        )
        yield (
            f"batch {batch:>3}, context {context:>6}: {speed[preset]:>8,.1f} tokens/s, "
            f"{1e3 * batch / speed[preset]:.2f} ms a step (p95 {found[preset]['step_ms']['p95']:.2f}), "
            f"weights {held[preset] / 1e6:.1f} MB, "
            f"state {size[preset] / 1e6:.1f} MB, {joules_told(energy[preset])}; "
            + (
                f"{plain}: {speed[plain]:,.1f} tokens/s, {held[plain] / 1e6:.1f} MB, {size[plain] / 1e6:.1f} MB, "
                f"{joules_told(energy[plain])}; "
                if plain in speed
                else ""
            )
            + f"twin: {beside}"
        )
    if plot is not None:
        plot_decoding(plot, rows)
