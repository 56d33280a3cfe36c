"""125m and its transformer twin on 60 M tokens of real text, at contexts of 4,096 and 16,384 tokens.

    python benchmarks/real_125m.py --prepared data/FOLDER                    # what is not in the results yet
    python benchmarks/real_125m.py --prepared data/FOLDER --only 125m/4096

One run a GPU at a time. The perception model reads long documents as streams, their state carried from step to step;
the twin, whose cache would grow without end, reads documents joined behind separators. Every run is killed once with
SIGKILL, a few steps behind its middle checkpoint, and resumed: the steps that are made twice are compared. Results go
to benchmarks/results/real_125m.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import torch

from llm_mlp.bench.record import record
from llm_mlp.config import TrainConfig, dump, load
from llm_mlp.presets import TWIN
from llm_mlp.recipes import find
from llm_mlp.train.console import read_metrics
from llm_mlp.train.snapshot import checkpoints

TOKENS, STEP = 60_000_000, 131_072
CASES = [(f"125m{kind}", length) for length in (4096, 16384) for kind in ("", TWIN)]
BEYOND = 5  # steps between the checkpoint and the kill


def config_of(model: str, length: int, args: argparse.Namespace, out: Path) -> TrainConfig:
    steps = TOKENS // STEP
    if model.endswith(TWIN):
        packing = ["data.packing=joined", "cuda_graph=true"]
    else:
        packing = ["data.packing=streams"]
    values = [
        f"model={model}",
        f"data.prepared={args.prepared}",
        f"data.seq_len={length}",
        f"batch_size={STEP // length}",
        f"micro_batch={args.micro * 4096 // length}",
        f"steps={steps}",
        f"checkpoint.every={steps // 2}",
        f"optimizer.lr={args.lr}",
        "optimizer.matrix_rate=0.5",  # of Muon, with the embedding's: benchmarks/ladder.py rates
        "optimizer.embedding_rate=32",
        "schedule.warmup=50",
        "schedule.decay=1.0",
        "evaluation.tokens=1000000",
        "log_every=1",
        f"out={out}",
    ]
    return load(TrainConfig, find("30m"), [*values, *packing, *args.override])


def start(config: Path, gpu: int, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llm_mlp", "train", str(config), "--quiet", *options]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible.split(",")[gpu] if visible else str(gpu)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(job: subprocess.Popen[str], what: str) -> None:
    said = job.communicate()[1]
    if job.returncode:
        raise RuntimeError(f"{what} failed:\n{said[-3000:]}")


def run(model: str, length: int, gpu: int, args: argparse.Namespace) -> dict[str, Any]:
    out = Path(args.runs) / f"{model}-{length}-{time.time_ns()}"
    config = config_of(model, length, args, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_suffix(".yaml")
    path.write_text(dump(config))
    job = start(path, gpu)
    middle = config.checkpoint.every
    while job.poll() is None and len(read_metrics(out)) < middle + BEYOND:
        time.sleep(0.1)
    if job.poll() is not None:
        finish(job, f"{model} at {length}")
    job.send_signal(signal.SIGKILL)
    job.communicate()
    before = {m["step"]: m["loss"] for m in read_metrics(out)}
    resumed_from = int(checkpoints(out)[-1].name.removeprefix("step-"))
    finish(start(path, gpu, "--resume"), f"{model} at {length}, resumed,")
    lines = [m for m in read_metrics(out) if "lr" in m]
    twice = [abs(m["loss"] - before[m["step"]]) for m in lines if resumed_from < m["step"] and m["step"] in before]
    last = next(m for m in reversed(read_metrics(out)) if "bits_per_byte" in m)

    def middle_of(name: str) -> float | None:
        values = sorted(m[name] for m in lines if m[name] is not None)
        return values[len(values) // 2] if values else None

    return {
        "model": model,
        "length": length,
        "packing": config.data.packing,
        "optimizer": {name: getattr(config.optimizer, name) for name in ("lr", "matrix_rate", "embedding_rate")},
        "tokens": len(lines) * STEP,
        "held_out_loss": last["held_out_loss"],
        "bits_per_byte": last["bits_per_byte"],
        **{name: middle_of(name) for name in ("tokens_per_second", "mfu", "watts", "joules_per_token")},
        "memory_bytes": max(m["memory_bytes"] for m in lines),
        "resumed_from": resumed_from,
        "steps_made_twice": len(twice),
        "largest_difference": max(twice),
        "heads": {k: v for k, v in last.items() if k.startswith("heads/")},
        "curve": [(m["step"], round(m["loss"], 4)) for m in lines if m["step"] % 20 == 0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", required=True, help="folder that `llm-mlp prepare` wrote")
    parser.add_argument("--only", default="", help="MODEL/LENGTH, comma-separated")
    parser.add_argument("--micro", type=int, default=16, help="sequences of 4,096 tokens (or as many tokens) a pass")
    parser.add_argument("--lr", type=float, default=0.008)
    parser.add_argument("--runs", default="/tmp/real-125m")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/real_125m.jsonl"))
    parser.add_argument("override", nargs="*", help="config overrides, NAME=VALUE")
    args = parser.parse_intermixed_args()
    have = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.is_file() else []
    known = {(line["model"], line["length"]) for line in have}
    wanted = [tuple(name.split("/")) for name in args.only.split(",") if name]
    todo = [c for c in CASES if c not in known and (not wanted or (c[0], str(c[1])) in wanted)]
    gpus: Queue[int] = Queue()
    for n in range(torch.cuda.device_count()):
        gpus.put(n)

    def one(case: tuple[str, int]) -> None:
        gpu = gpus.get()
        try:
            line = record(args.results, "real", run(*case, gpu, args), device=f"cuda:{gpu}", seed=0)
            print(json.dumps({k: v for k, v in line.items() if k not in ("curve", "heads")}), flush=True)
        finally:
            gpus.put(gpu)

    with ThreadPoolExecutor(max(1, gpus.qsize())) as pool:
        for outcome in [pool.submit(one, case) for case in todo]:
            outcome.result()


if __name__ == "__main__":
    main()
