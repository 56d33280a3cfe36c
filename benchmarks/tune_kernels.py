"""Check every launch configuration of the kernels against float64 on this device, and time each kernel alone.

    python benchmarks/tune_kernels.py [perceive|memorise] [--warps 2,4,8] [--stages 1,2,3] [--results FILE]

Each configuration of one kernel (the others as they are) runs forward and backward on fresh random inputs; a tensor
passes whose root mean square and largest error are at most twice those of `chunked` in the same dtype with the same
rounding of operands, or 2 eps of its dtype times the root mean square of the truth. The time of the kernel alone, at
131,072 tokens, comes from torch's profiler. JSON lines; a configuration that fails says which tensor and by how much.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from triton.errors import TritonError

from llm_mlp.bench.ops import Shape, memorise_inputs, perceive_inputs
from llm_mlp.bench.record import record
from llm_mlp.ops import memorise, perceive
from llm_mlp.ops.memorise import kernels as memorise_kernels
from llm_mlp.ops.perceive import kernels as perceive_kernels

DEVICE = torch.device("cuda")
SMALL = Shape(2, 400, 2, 128, 4, 32, 256, 64, "relu2")


def both_ways(run: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of a fixed random projection of them."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = run(*leaves)
    generator = torch.Generator().manual_seed(0)
    loss = sum(
        (o.double() * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device)).sum()
        for o in outputs
    )
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [x.detach() for x in (*outputs, *(g for g in grads if g is not None))]


def runner(op: str, backend: str, s: Shape) -> Callable[..., tuple[Tensor, ...]]:
    if op == "perceive":
        return lambda *x: perceive(*x, return_residual=True, backend=backend)
    size: dict[str, Any] = {"block": s.block, "slots": s.slots, "activation": s.activation}
    return lambda *x: (lambda y, units: (y, units.keys, units.values))(*memorise(*x, **size, backend=backend))


class Checker:
    """Truth and yardstick of one op on fixed small inputs."""

    def __init__(self, op: str, activation: str) -> None:
        self.op, self.shape = op, Shape(**{**vars(SMALL), "activation": activation})
        make = perceive_inputs if op == "perceive" else memorise_inputs
        torch.manual_seed(1)
        self.inputs = make(self.shape, torch.bfloat16, DEVICE)
        self.truth = both_ways(runner(op, "reference", self.shape), [x.double() for x in self.inputs])
        self.yard = both_ways(runner(op, "chunked", self.shape), self.inputs)

    def failures(self) -> list[str]:
        torch.cuda.empty_cache()
        got = both_ways(runner(self.op, "triton", self.shape), self.inputs)
        found = []
        for n, (g, y, t) in enumerate(zip(got, self.yard, self.truth, strict=True)):
            if not g.isfinite().all():
                found.append(f"tensor {n}: not finite")
                continue
            mine, other = g.double() - t, y.double() - t
            floor = 2 * torch.finfo(g.dtype).eps * t.square().mean().sqrt()
            few = 4 if t.numel() < 1000 else 1  # an error of few numbers is chance
            for what, a, b in (("rms", mine.square().mean().sqrt(), other.square().mean().sqrt()),
                               ("largest", mine.abs().max(), other.abs().max())):  # fmt: skip
                if a > few * max(2 * b, floor):
                    found.append(f"tensor {n}: {what} {a:.3g}, yardstick {b:.3g}")
        return found


def kernel_times(op: str, s: Shape, repeats: int) -> dict[str, float]:
    """Mean milliseconds of each kernel of a forward and backward pass."""
    make = perceive_inputs if op == "perceive" else memorise_inputs
    inputs = make(s, torch.bfloat16, DEVICE)
    run = runner(op, "triton", s)
    leaves = [x.detach().requires_grad_() for x in inputs]

    def call() -> None:
        y = run(*leaves)[0]
        y.backward(torch.ones_like(y))
        for x in leaves:
            x.grad = None

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    return {e.key: e.self_device_time_total / e.count / 1e3 for e in found.key_averages()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", default=["perceive", "memorise"])
    parser.add_argument("--warps", default="2,4,8")
    parser.add_argument("--stages", default="1,2,3")
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", default="benchmarks/results/kernels.jsonl")
    args = parser.parse_args()
    if unknown := set(args.ops) - {"perceive", "memorise"}:
        parser.error(f"unknown op {', '.join(sorted(unknown))}; known: perceive, memorise")
    torch.set_float32_matmul_precision("high")  # the yardstick may use TF32 where the kernels do
    torch.use_deterministic_algorithms(True, warn_only=True)  # so that uninitialised memory is poisoned
    torch.utils.deterministic.fill_uninitialized_memory = True
    grid = list(itertools.product(*([int(x) for x in text.split(",")] for text in (args.warps, args.stages))))
    for op in args.ops:
        table = (perceive_kernels if op == "perceive" else memorise_kernels).LAUNCH
        checkers = [Checker(op, a) for a in (("relu2",) if op == "perceive" else ("relu2", "softmax"))]
        big = Shape(args.tokens // args.length, args.length, 8, 128, 4, 32, 256, 64, "relu2")
        for kernel in table:
            before = dict(table[kernel])
            for warps, stages in grid:
                table[kernel] = {"num_warps": warps, "num_stages": stages}
                row: dict[str, Any] = {"op": op, "kernel": kernel, **table[kernel], "length": args.length}
                try:
                    row["failures"] = [f for c in checkers for f in c.failures()]
                    if not row["failures"]:
                        row["ms"] = kernel_times(op, big, args.repeats).get(kernel)
                except (RuntimeError, TritonError) as error:  # too much shared memory, a compiler's failure
                    row["failures"] = [(str(error).splitlines() or [type(error).__name__])[0][:200]]
                    if "illegal memory access" in str(error):
                        raise  # the device is lost to this process: every later row would fail too
                record(args.results, "kernel-launch", row, device=DEVICE, seed=1)
                ms = row.get("ms")
                time = "not seen by the profiler" if ms is None else f"{ms:.3f} ms"
                verdict = "; ".join(row["failures"])[:150] or time
                print(f"{op}.{kernel:12} warps {warps} stages {stages}: {verdict}", flush=True)
            table[kernel] = before


if __name__ == "__main__":
    main()
