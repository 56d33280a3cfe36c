"""What float8 FFNs and optimizer state in 8 bits gain and cost, on one GPU.

    python benchmarks/fp8_ffn.py --prepared data/FOLDER                       # everything
    python benchmarks/fp8_ffn.py --only products,ffn,optimizer                # what needs no data
    python benchmarks/fp8_ffn.py --only train --prepared data/FOLDER --model 125m --steps 300

products   the matrix products of an FFN alone: bf16, float8 with scales by row (ours) and with one scale
ffn        norm, FFN and residual sum, compiled, forward and forward + backward: bf16 and fp8, and how they differ
optimizer  a step of Muon and of AdamW, state in full and in 8 bits: ms, ms until Python is done, bytes
train      runs of equal data: bf16 (two seeds: what difference means nothing), fp8, 8-bit state, both

Every case appends a line to benchmarks/results/fp8_ffn.jsonl, also one that fails (``error``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_mlp.bench.record import record
from llm_mlp.bench.speed import timed
from llm_mlp.config import ModelConfig, OptimizerConfig, TrainConfig, build, load
from llm_mlp.models import build_model
from llm_mlp.models.ffn import FFN
from llm_mlp.models.mixer import rms_norm
from llm_mlp.ops.float8 import quantise
from llm_mlp.precision import Precision
from llm_mlp.recipes import find
from llm_mlp.train import train
from llm_mlp.train.float8 import check_float8, use_float8
from llm_mlp.train.optim import make_optimizers, optimizer_tensors

SECTIONS = ("products", "ffn", "optimizer", "train")


def milliseconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    for _ in range(3):
        call()
    return 1e3 * statistics.median(timed(call, device) for _ in range(repeats))


def products(preset: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Of both matrices of an FFN, forward."""
    config, found = build(ModelConfig, {"preset": preset}), {}
    one = torch.ones((), device=device)
    scaled = partial(torch._scaled_mm, out_dtype=torch.bfloat16, use_fast_accum=True)
    for name, (n, k) in {
        "up": (config.ffn.hidden, config.d_model),
        "down": (config.d_model, config.ffn.hidden),
    }.items():
        x, w = (torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (args.tokens, n))
        (a, s), (b, r) = quantise(x), quantise(w)
        calls = {
            "bf16": lambda x=x, w=w: x @ w.t(),
            "fp8": lambda a=a, b=b, s=s, r=r: scaled(a, b.t(), s, r.t()),
            "fp8_one_scale": lambda a=a, b=b: scaled(a, b.t(), one, one),
        }
        for kind, call in calls.items():
            ms = milliseconds(call, device, args.repeats)
            found[f"{name}_{kind}_ms"], found[f"{name}_{kind}_tflops"] = ms, 2e-9 * args.tokens * n * k / ms
    return {"tokens": args.tokens, **found}


def half_block(preset: str, fp8: bool, device: torch.device) -> tuple[FFN, Callable[[Tensor], Tensor]]:
    """An FFN with random weights, and the half of a block that it makes, compiled."""
    config = build(ModelConfig, {"preset": preset, "n_layers": 1})
    model = build_model(config, device=device).randomize_()
    if fp8:
        use_float8(model)
    ffn = model.blocks[0].ffn

    def run(x: Tensor) -> Tensor:
        return x + ffn(rms_norm(x, config.norm_eps))

    return ffn, torch.compile(run, fullgraph=True, dynamic=False)


def ffn(preset: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Milliseconds, peak bytes; and relative differences between the two kinds, of the branch and of gradients."""
    width, tokens = build(ModelConfig, {"preset": preset}).d_model, args.tokens
    while True:
        try:
            return {"tokens": tokens, **_ffn(preset, width, tokens, args.repeats, device)}
        except torch.OutOfMemoryError:
            tokens //= 2
            if tokens < 4096:
                raise
            torch.cuda.empty_cache()


def _ffn(preset: str, width: int, tokens: int, repeats: int, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    start, grad = (torch.randn(1, tokens, width, device=device) for _ in range(2))
    mode, found, results = Precision("bf16", device), {}, {}
    for kind in ("bf16", "fp8"):
        torch._dynamo.reset()
        module, run = half_block(preset, kind == "fp8", device)
        x = start.clone().requires_grad_()

        def forward(run: Callable = run, x: Tensor = x) -> Tensor:
            with mode.autocast():
                return run(x)

        def both(forward: Callable = forward, x: Tensor = x, module: FFN = module) -> list[Tensor]:
            return list(torch.autograd.grad(forward(), [x, module.up.weight, module.down.weight], grad))

        torch.cuda.reset_peak_memory_stats(device)
        found[f"{kind}_forward_ms"] = milliseconds(forward, device, repeats)
        found[f"{kind}_ms"] = milliseconds(both, device, repeats)
        found[f"{kind}_peak_bytes"] = torch.cuda.max_memory_allocated(device)
        with torch.no_grad():
            results[kind] = [forward() - start]
        dx, *dw = both()
        results[kind] += [dx - grad, *dw]
    for name, a, b in zip(("y", "dx", "dup", "ddown"), results["bf16"], results["fp8"], strict=True):
        found[f"difference_{name}"] = float((a - b).norm() / a.norm())
    return {**found, "speedup": found["bf16_ms"] / found["fp8_ms"]}


def optimizer(name: str, state: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """A step of the 360m preset, gradients at hand."""
    model = build_model(build(ModelConfig, {"preset": "360m"}), device=device).randomize_()
    optimizers = make_optimizers(model, build(OptimizerConfig, {"name": name, "state": state}))
    for p in model.parameters():
        p.grad = 1e-3 * torch.randn_like(p)

    def step() -> None:
        for o in optimizers:
            o.step()

    step()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    ms = milliseconds(step, device, args.repeats)
    begin = time.perf_counter()
    step()
    host = 1e3 * (time.perf_counter() - begin)
    torch.cuda.synchronize(device)
    return {
        "ms": ms,
        "host_ms": host,  # of Python and launches; near ms: the GPU waits for them
        "working_bytes": torch.cuda.max_memory_allocated(device) - before,
        "state_bytes": sum(t.nbytes for t in optimizer_tensors(model, optimizers).values()),
    }


def training(overrides: list[str], args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"model={args.model}", f"data.prepared={args.prepared}", f"steps={args.steps}", f"out={folder}/run"]
        fixed += [f"device={device}", "precision=bf16", "compile=true", "evaluation.every=0"]
        result = train(load(TrainConfig, find("30m"), [*fixed, *args.override, *overrides]), quiet=True)
    return {
        "steps": result.steps,
        "tokens": result.tokens,
        "tokens_per_second": result.tokens_per_second,
        "loss": statistics.mean(loss for _, loss in result.curve[-20:]),
        "held_out_loss": result.evaluations[-1][1] if result.evaluations else None,
        "memory_bytes": result.memory,
        "curve": [(step, round(loss, 4)) for step, loss in result.curve if step % 20 == 0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma-separated")
    parser.add_argument("--prepared", default="", help="folder that `llm-mlp prepare` wrote (train)")
    parser.add_argument("--presets", default="360m,900m", help="of products and ffn")
    parser.add_argument("--tokens", type=int, default=131_072, help="of products and ffn")
    parser.add_argument("--model", default="30m", help="of train")
    parser.add_argument("--steps", type=int, default=300, help="of train")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/fp8_ffn.jsonl"))
    parser.add_argument("override", nargs="*", help="config overrides of train, NAME=VALUE")
    args = parser.parse_intermixed_args()
    sections = args.only.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; known: {', '.join(SECTIONS)}")
    if "train" in sections and not args.prepared:
        parser.error("train needs --prepared")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    check_float8(device)

    def case(kind: str, about: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
        try:
            values = work()
        except Exception as error:  # the other cases still run; the line says what happened
            traceback.print_exc()
            values = {"error": f"{type(error).__name__}: {error}"[:1000]}
        torch.cuda.empty_cache()
        line = record(args.results, kind, {**about, **values}, device=device, seed=0)
        print(json.dumps({k: v for k, v in line.items() if k != "curve"}), flush=True)

    for preset in args.presets.split(","):
        for section, work in (("products", products), ("ffn", ffn)):
            if section in sections:
                case(section, {"preset": preset}, lambda work=work, preset=preset: work(preset, args, device))
    if "optimizer" in sections:
        for name in ("muon", "adamw"):
            for state in ("same", "8bit"):
                about = {"preset": "360m", "optimizer": name, "state": state}
                case("optimizer", about, lambda name=name, state=state: optimizer(name, state, args, device))
    if "train" in sections:
        kinds = {
            "bf16": [],
            "fp8": ["module_precision.ffn=fp8"],
            "8bit": ["optimizer.state=8bit"],
            "fp8 and 8bit": ["module_precision.ffn=fp8", "optimizer.state=8bit"],
            "bf16, another seed": ["seed=1"],
        }
        for kind, overrides in kinds.items():
            about = {"model": args.model, "variant": kind}
            case("train", about, lambda overrides=overrides: training(overrides, args, device))


if __name__ == "__main__":
    main()
