"""The engine on a GPU against the bare step, within a budget of bytes, for each way to keep states.

    python benchmarks/engine_gpu.py --preset 360m --slots 1,256                       # beside the bare step
    python benchmarks/engine_gpu.py --preset 900m --bytes 12e9 --states fp32+bf16,bf16+bf16,bf16+8bit
    llm-mlp bench decode --preset 900m --batch 16 --contexts 4096                     # the twin with its cache

All requests go on from one text of ``--context`` tokens that has been read, weights are random. Of steps with every
slot taken: tokens/s, milliseconds between a request's tokens, the bare step (the engine's CUDA graph alone), the most
memory reserved, watts and joules a token. Then (``--mix``) requests that read 512 tokens and write 256 each, the next
beginning where one ends. Results: benchmarks/results/engine.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm_mlp.bench.ops import ceilings
from llm_mlp.bench.record import record
from llm_mlp.bench.speed import timed
from llm_mlp.config import ModelConfig, build
from llm_mlp.energy import Energy, Spent
from llm_mlp.infer import Engine
from llm_mlp.infer.engine import Event, Request, slots_within
from llm_mlp.infer.generate import Start
from llm_mlp.models import LM, build_model
from llm_mlp.weights import hold

ASIDE = 1.0e9  # bytes of a budget for what is neither weights nor states: graphs, logits, reading
READ, WRITE = 512, 256  # tokens of a request of the mix


@torch.no_grad()
def start_of(model: LM, context: int) -> Start:
    ids = torch.randint(model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    device, out = next(model.parameters()).device, None
    for part in ids.split(2048, 1):
        out = model(part.to(device), None if out is None else out.state, logits="last")
    assert out is not None and out.state is not None and out.logits is not None
    return Start(ids[0], out.state, out.logits[:, -1])


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def decoding(engine: Engine, start: Start, steps: int) -> dict[str, float | None]:
    """Of ``steps`` steps with every slot taken."""
    for seed in range(engine.slots):
        engine.submit(Request([1], steps + 50, seed=seed, start=start), lambda event: None)
    while engine.load["running"] < engine.slots:
        engine.step()
    for _ in range(5):
        engine.step()
    torch.cuda.synchronize()
    times = []
    with Spent(Energy(engine.device)) as spent:
        for _ in range(steps):
            times.append(timed(engine.step, engine.device))
    tokens, mean = engine.slots * steps, sum(times) / steps
    captured = engine._captured(engine.slots)
    assert captured is not None, "steps are not in a graph"
    bare, place = captured
    place.copy_(torch.arange(engine.slots))
    alone = statistics.median(timed(partial(bare, torch.ones_like(place)), engine.device) for _ in range(50))
    return {
        "tokens_per_second": engine.slots / mean,
        "between_tokens_ms_p50": 1e3 * statistics.median(times),
        "between_tokens_ms_p95": 1e3 * quantile(times, 0.95),
        "bare_step_ms": 1e3 * alone,
        "over_bare": statistics.median(times) / alone - 1,
        "joules_per_token": None if spent.joules is None else spent.joules / tokens,
        "watts": spent.watts,
    }


def mix(engine: Engine, seconds: float) -> dict[str, float | None]:
    """Tokens written a second, and milliseconds between a request's tokens, while others are read."""
    make = torch.Generator().manual_seed(1)
    vocabulary, last = engine.model.config.vocab_size, dict[int, float]()
    gaps: list[float] = []
    turn = iter(range(10**9))
    begin = time.perf_counter()

    def ask() -> None:
        number = next(turn)
        prompt = torch.randint(vocabulary, (READ,), generator=make).tolist()

        def take(event: Event) -> None:
            now = time.perf_counter()
            if event.token is not None:
                if number in last:
                    gaps.append(now - last[number])
                last[number] = now
            if event.finish is not None and now < begin + seconds:
                again.append(1)

        engine.submit(Request(prompt, WRITE, seed=number), take)

    again: deque[int] = deque([1] * engine.slots)
    before = engine.counters.tokens
    with Spent(Energy(engine.device)) as spent:
        while time.perf_counter() < begin + seconds:
            while again:
                again.pop()
                ask()
            engine.step()
        torch.cuda.synchronize()
    written, took = engine.counters.tokens - before, time.perf_counter() - begin
    return {
        "mix_tokens_per_second": written / took,
        "mix_between_tokens_ms_p50": 1e3 * statistics.median(gaps),
        "mix_between_tokens_ms_p95": 1e3 * quantile(gaps, 0.95),
        "mix_joules_per_token": None if spent.joules is None else spent.joules / written,
    }


def measure(args: argparse.Namespace, kept: str, wanted: int, device: torch.device) -> dict[str, Any]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    model = build_model(build(ModelConfig, {"preset": args.preset}), device=device).randomize_().to(torch.bfloat16)
    hold(model, args.weights).keep_state(kept)
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    budget = None if args.bytes is None else int(args.bytes - weights - ASIDE)
    slots, line = slots_within(model, wanted, budget)
    print(f"{args.preset} {args.weights} {kept}: {line}", flush=True)
    start = start_of(model, args.context)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    engine = Engine(model, slots=slots, queue=4096)
    found: dict[str, Any] = {"slots": slots, **decoding(engine, start, args.steps)}
    found["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    del engine
    torch.cuda.empty_cache()
    if args.mix:
        engine = Engine(model, slots=slots, queue=4096, chunk=args.chunk)
        found |= mix(engine, args.mix)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="900m")
    parser.add_argument("--weights", default="bf16", help="bf16, int8 or int4")
    parser.add_argument("--states", default="bf16+bf16", help="comma-separated")
    parser.add_argument("--slots", default="1024", help="requests at a time, comma-separated; --bytes may allow fewer")
    parser.add_argument("--bytes", type=float, help="of memory that may be reserved, about")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--mix", type=float, default=0.0, help="seconds of the mix; 0: none")
    parser.add_argument("--chunk", type=int, default=2048, help="prompt tokens between two steps of the mix")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/engine.jsonl"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    copy, _ = ceilings(device, torch.bfloat16)
    for kept in args.states.split(","):
        for wanted in map(int, args.slots.split(",")):
            about = {"preset": args.preset, "weights": args.weights, "state": kept, "context": args.context}
            line = {**about, "copy_bytes_per_second": copy, **measure(args, kept, wanted, device)}
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}, flush=True)
            record(args.results, "engine", line, device=device, seed=0)


if __name__ == "__main__":
    main()
