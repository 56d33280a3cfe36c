"""Check every launch configuration of the kernels against float64 on this device, and time each kernel alone.

    python benchmarks/tune_kernels.py [perceive|perceive_wide|memorise|heads|cross_entropy] [--kernels _scan]

Each configuration (CANDIDATES below) of one kernel (the others as they are) runs forward and backward on fresh random
inputs, in a process of its own, because a miscompiled one may take the device's context with it. A tensor passes whose
root mean square and largest error are at most twice those of `chunked` in the same dtype with the same rounding of
operands, or 2 eps of its dtype times the root mean square of the truth, which is the reference in float64. Those that
pass are timed alone, at 131,072 tokens, by torch's profiler.
JSON lines; a configuration that fails says which tensor and by how much; of `memorise` they count the rows that the
truth chooses for its slots, and those of them that the kernels do not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from triton.errors import TritonError

from llm_mlp.bench.ops import Shape, memorise_inputs, perceive_inputs, wide_inputs
from llm_mlp.bench.record import record
from llm_mlp.ops import linear_cross_entropy, memorise, perceive, perceive_wide
from llm_mlp.ops.checks import both_ways, choices, compare
from llm_mlp.ops.cross_entropy import kernels as cross_entropy_kernels
from llm_mlp.ops.heads import head_inputs, head_outputs
from llm_mlp.ops.heads import kernels as head_kernels
from llm_mlp.ops.memorise import kernels as memorise_kernels
from llm_mlp.ops.perceive import kernels as perceive_kernels
from llm_mlp.ops.tune import ASSEMBLER, assembler_version, newest_assembler
from llm_mlp.ops.wide import kernels as wide_kernels

DEVICE = torch.device("cuda")
SMALL = {"batch": 2, "length": 400, "groups": 2, "block": 256, "slots": 64}
NAMES = {
    "perceive": "y state residual dq dk de dw dlog_decay",
    "perceive_wide": "y state residual dq dk dweight dslope dbeta dw dlog_decay",
    "memorise": "y keys values dq dk dw dsink",
    "heads": "q k w units_q units_k out dx dconv dslope dwrite dgain dy dread dshare dgate",
    "cross_entropy": "loss dhidden dweight",
}


WIDTH, VOCABULARY, CAP = 1024, 32768, 15.0  # of the model whose loss is timed
EPS = 1e-6


def _launches(*numbers: tuple[int, ...]) -> list[dict[str, int]]:
    """Warps and stages; before them, where there are four numbers, the tiles of queries and rows."""
    names = ("BQ", "BK", "num_warps", "num_stages")
    return [dict(zip(names[-len(n) :], n, strict=True)) for n in numbers]


def _layers(*numbers: tuple[int, ...]) -> list[dict[str, int]]:
    """Tokens and features of a tile, warps and stages."""
    return [dict(zip(("BT", "BF", "num_warps", "num_stages"), n, strict=True)) for n in numbers]


def _tokens(*numbers: tuple[int, int]) -> list[dict[str, int]]:
    """Tokens of a tile, and warps."""
    return [{"BT": tokens, "num_warps": warps} for tokens, warps in numbers]


CANDIDATES = {
    "_inverse": _launches((4, 1), (8, 1)),
    "_scan": [{"columns": c, **n} for c in (64, 32) for n in _launches((4, 1), (4, 2))],
    "_scan_back": [{"columns": c, **n} for c in (64, 32) for n in _launches((4, 1), (4, 2))],
    "_gradients": _launches((4, 1), (8, 1)),
    "_read": _launches((64, 64, 4, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 3)),
    "_read_back": _launches((64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (128, 32, 8, 3)),
    "_rows_back": _launches((32, 64, 4, 2), (32, 64, 4, 3), (32, 64, 4, 4), (32, 32, 4, 3), (64, 32, 4, 3)),
    "_first": _layers((64, 128, 4, 2), (64, 128, 4, 1), (64, 128, 8, 2), (128, 128, 8, 2), (64, 64, 4, 2)),
    "_first_back": _layers((64, 64, 4, 1), (64, 64, 4, 2), (64, 128, 8, 1), (64, 128, 8, 2), (128, 64, 8, 2)),
    "_inputs": _tokens((32, 4), (32, 8), (16, 4), (64, 8)),
    "_inputs_back": [{"RUN": run, "num_warps": warps} for run, warps in ((128, 1), (64, 1), (256, 1), (128, 2))],
    "_outputs": _tokens((32, 4), (16, 4), (32, 8)),
    "_outputs_back": _tokens((32, 4), (16, 4), (32, 8)),
    "_loss": [{"BLOCK": b, "num_warps": w} for b, w in ((4096, 8), (8192, 8), (8192, 16), (2048, 4))],
}
TABLES = {
    "perceive": perceive_kernels.LAUNCH,
    "perceive_wide": wide_kernels.LAUNCH,
    "memorise": memorise_kernels.LAUNCH,
    "heads": head_kernels.LAUNCH,
    "cross_entropy": cross_entropy_kernels.LAUNCH,
}


INPUTS = {"perceive": perceive_inputs, "perceive_wide": wide_inputs, "memorise": memorise_inputs}
FEATURES = {"perceive_wide": 512}  # F of each op, else 128


def runner(op: str, backend: str, s: Shape) -> Callable[..., tuple[Tensor, ...]]:
    if op == "perceive":
        return lambda *x: perceive(*x, return_residual=True, backend=backend)
    if op == "perceive_wide":
        return lambda *x: perceive_wide(*x, eps=EPS, return_residual=True, backend=backend)
    plain = "triton" if backend == "triton" else "chunked"  # the other ops' reference is plain torch
    if op == "heads":

        def run(*x: Tensor) -> tuple[Tensor, ...]:
            form: dict[str, Any] = {"groups": s.groups, "heads": (s.heads, s.value_width)}
            found, _ = head_inputs(*x[:5], **form, eps=EPS, backend=plain)
            out = head_outputs(*x[5:], eps=EPS, backend=plain)
            return *(y for y in found if y is not None), out

        return run
    if op == "cross_entropy":
        return lambda h, w, targets: (linear_cross_entropy(h, w, targets, cap=CAP, backend=plain),)
    size: dict[str, Any] = {"block": s.block, "slots": s.slots, "activation": s.activation}
    return lambda *x: (lambda y, units: (y, units.keys, units.values))(*memorise(*x, **size, backend=backend))


def make_inputs(op: str, s: Shape) -> list[Tensor]:
    if op in INPUTS:
        return INPUTS[op](s, torch.bfloat16, DEVICE)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=dtype)

    if op == "cross_entropy":
        targets = torch.randint(VOCABULARY, (s.tokens,), device=DEVICE)
        return [normal(s.tokens, WIDTH), normal(VOCABULARY, WIDTH) / WIDTH**0.5, targets]
    B, T, G, m, V, R = s.batch, s.length, s.groups, s.heads, s.value_width, s.features
    C, wide = 2 * G * R + G * m * V, torch.float32
    before = [normal(B, T, C), normal(C, 4, dtype=wide), normal(C, dtype=wide), normal(B, T, G * m * V)]
    after = [normal(B, T, G, m, V), normal(B, T, G, m, V), normal(B, T, G, m), normal(B, T, G * m * V)]
    return [*before, normal(2, R, dtype=wide), *after]


def failures(op: str, s: Shape) -> tuple[list[str], dict[str, float], tuple[int, int]]:
    """What is wrong at this shape, each tensor's root mean square error over the yardstick's, and of the memorised rows
    that the truth chooses how many there are and how many the kernels do not choose."""
    torch.manual_seed(1)
    inputs = make_inputs(op, s)
    truth = both_ways(runner(op, "reference", s), [x.double() if x.is_floating_point() else x for x in inputs])
    yard = both_ways(runner(op, "chunked", s), inputs)
    torch.cuda.empty_cache()
    got = both_ways(runner(op, "triton", s), inputs)
    again = both_ways(runner(op, "triton", s), inputs)
    names = NAMES[op].split()
    found = compare(names, got, yard, truth, largest=1)
    found += [f"{name}: two runs differ" for name, a, b in zip(names, got, again, strict=True) if not torch.equal(a, b)]
    errors = {
        name: [float((x.double() - t).square().mean().sqrt()) for x in (g, y)]
        for name, g, y, t in zip(names, got, yard, truth, strict=True)
    }
    counts = (0, 0)
    if "keys" in names:
        counts = choices(*(x[names.index("keys")][:, :, : s.slots] for x in (got, truth)))
    return found, {name: round(mine / other, 3) for name, (mine, other) in errors.items() if other}, counts


def check(op: str, m: int, V: int) -> dict[str, Any]:
    torch.set_float32_matmul_precision("high")  # the yardstick may use TF32 where the kernels do
    torch.use_deterministic_algorithms(True, warn_only=True)  # so that uninitialised memory is poisoned
    torch.utils.deterministic.fill_uninitialized_memory = True
    found: list[str] = []
    ratios: dict[str, float] = {}
    slots = differing = 0
    try:
        for activation in ("relu2", "softmax") if op == "memorise" else ("relu2",):
            size = {"features": FEATURES.get(op, 128), "read_width": 128, "heads": m, "value_width": V}
            more, ratios, counts = failures(op, Shape(**SMALL, **size, activation=activation))
            found += [f"{activation} {text}" if op == "memorise" else text for text in more]
            slots, differing = slots + counts[0], differing + counts[1]
    except (RuntimeError, TritonError) as error:  # too much shared memory, a compiler's failure, a lost device
        found.append((str(error).splitlines() or [type(error).__name__])[0][:200])
    return {"failures": found, "error_ratios": ratios, "slots": slots, "differing_slots": differing}


def check_apart(op: str, kernel: str, launch: dict[str, int], m: int, V: int) -> dict[str, Any]:
    """`check` with one kernel launched so, in a process of its own."""
    spec = json.dumps({"op": op, "kernel": kernel, "launch": launch, "m": m, "V": V})
    done = subprocess.run([sys.executable, __file__, "--one", spec], capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        failed = f"exit {done.returncode}: {done.stderr.strip()[-300:]}"
        return {"failures": [failed], "error_ratios": {}, "slots": 0, "differing_slots": 0}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def kernel_times(op: str, s: Shape, repeats: int) -> dict[str, float]:
    """Mean milliseconds a forward and backward pass spends in each kernel."""
    run = runner(op, "triton", s)
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in make_inputs(op, s)]

    def call() -> None:
        found = run(*leaves)
        found = found if op == "heads" else found[:1]
        torch.autograd.backward(found, [torch.ones_like(y) for y in found])
        for x in leaves:
            x.grad = None

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    return {e.key: e.self_device_time_total / repeats / 1e3 for e in found.key_averages()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", default=list(TABLES))
    parser.add_argument("--kernels", default="", help="only these, comma-separated")
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--value-width", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=8, help="processes that check at a time")
    parser.add_argument("--no-times", action="store_true", help="check only (the device is busy)")
    parser.add_argument(
        "--checked", help="results of an earlier run with --no-times on this device: do not check again"
    )
    parser.add_argument("--results", default="benchmarks/results/kernels.jsonl")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        spec = json.loads(args.one)
        TABLES[spec["op"]][spec["kernel"]] = spec["launch"]
        print(json.dumps(check(spec["op"], spec["m"], spec["V"])))
        return
    if newest := newest_assembler():  # for this process and those that check
        os.environ[ASSEMBLER] = newest
    number = ".".join(map(str, assembler_version(os.environ.get(ASSEMBLER, ""))))
    assembler = f"ptxas {number}" if number else "Triton's own"
    if unknown := set(args.ops) - set(TABLES):
        parser.error(f"unknown op {', '.join(sorted(unknown))}; known: {', '.join(TABLES)}")
    wanted = [k for k in args.kernels.split(",") if k] or list(CANDIDATES)
    jobs = [
        (op, kernel, launch)
        for op in args.ops
        for kernel in TABLES[op]
        if kernel in wanted
        for launch in CANDIDATES.get(kernel, ())
    ]
    if args.checked:
        rows = [json.loads(line) for line in Path(args.checked).read_text(encoding="utf8").splitlines()]
        kept = ("failures", "error_ratios", "slots", "differing_slots")
        found = {(r["kernel"], str(r["launch"])): {x: r[x] for x in kept if x in r} for r in rows}
        checks = [found[kernel, str(launch)] for _, kernel, launch in jobs]
    else:
        with ThreadPoolExecutor(args.workers) as pool:
            checks = list(pool.map(lambda job: check_apart(*job, args.heads, args.value_width), jobs))
    for (op, kernel, launch), row in zip(jobs, checks, strict=True):
        tokens = args.tokens // 4 if op == "cross_entropy" else args.tokens  # logits of all would be 8 GB
        row = {
            "op": op,
            "kernel": kernel,
            "launch": launch,
            "assembler": assembler,
            "length": args.length,
            **row,
        }
        if not row["failures"] and not args.no_times:
            width = FEATURES.get(op, 128)
            s = Shape(tokens // args.length, args.length, 8, width, 128, args.heads, args.value_width, 256, 64, "relu2")
            before, TABLES[op][kernel] = TABLES[op][kernel], launch
            times = kernel_times(op, s, args.repeats)
            row["ms"], TABLES[op][kernel] = times.get(kernel), before
            row["all_ms"] = {name: ms for name, ms in times.items() if name in TABLES[op]}
        record(args.results, "kernel-launch", row, device=DEVICE, seed=1)
        ms = row.get("ms")
        time = "" if ms is None else f"{ms:.3f} ms "
        other = f" other slots: {row['differing_slots']} of {row['slots']}" if row.get("slots") else ""
        verdict = "; ".join(row["failures"])[:200] or f"{time}{row['error_ratios']}{other}"
        print(f"{op}.{kernel:12} {launch}: {verdict}", flush=True)


if __name__ == "__main__":
    main()
