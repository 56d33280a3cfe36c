"""How many tokens each rung of the training recipe needs to reach what tuned AdamW at a constant rate reaches.

    python benchmarks/ladder.py rates --prepared data/FOLDER                # matrices against embedding, a few runs
    python benchmarks/ladder.py run --prepared data/FOLDER --seconds 500    # as far as it comes; again: goes on
    python benchmarks/ladder.py report

The 30m preset on 20 M tokens. Every rung's rate is tuned at the full length on one seed, at least five values and until
the best is an interior one, and reused at the shorter lengths, which are runs of their own (0.7, 0.5, 0.35, 0.25 of
the tokens) until the target lies between two; the tokens needed are interpolated in the logarithm. The ends are
confirmed on a second seed. One process a GPU; benchmarks/results/ladder.jsonl also says what is still to run.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import queue
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from llm_mlp.bench.record import record
from llm_mlp.config import TrainConfig, load
from llm_mlp.recipes import find
from llm_mlp.train import train

STEPS, BATCH, LENGTH = 1224, 16, 1024  # 20.05 M tokens; at 64 sequences a step AdamW is left far behind
SHARES = (0.7, 0.5, 0.35, 0.25)
RATES = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128)
Job = tuple[str, float, float, int]  # rung, rate, share of the tokens, seed
RAMP = ["control.batch=ramp", "micro_batch=8", "control.max_batch=128"]


def _optimizer(name: str, matrices: float, embedding: float) -> list[str]:
    rates = [f"optimizer.matrix_rate={matrices:g}", f"optimizer.embedding_rate={embedding:g}"]
    return [f"optimizer.name={name}", *rates]


LINEAR = ["schedule.kind=linear", "schedule.decay=1.0"]
# What `rates` found, between two tried settings where they are close; a number of a matrix moves as far with both.
ADAMW, MUON = _optimizer("adamw", 0.1, 16), [*_optimizer("muon", 0.5, 32), *LINEAR]
RUNGS: dict[str, list[str]] = {
    "constant": [*ADAMW, "schedule.kind=constant"],
    "cosine": [*ADAMW, "schedule.kind=cosine"],
    "linear": [*ADAMW, *LINEAR],
    "muon": MUON,
    "ramp": [*MUON, *RAMP],
    "noise": [*MUON, *RAMP, "control.rate_from_gradients=true"],
}
# Explored once, at half the length: rates of the blocks' matrices and of the embedding beside that of the rest.
TRIALS = [("linear", lr, 1, e) for e in (1, 4, 16, 64) for lr in (0.001, 0.002)]
TRIALS += [("linear", lr, m, e) for m, e in ((0.2, 1), (0.2, 16), (0.05, 4)) for lr in (0.008, 0.016)]
TRIALS += [("linear", lr, m, e) for m, e in ((0.2, 4), (0.05, 1)) for lr in (0.008,)]
TRIALS += [("muon", 0.008, m, e) for m, e in ((1, 1), (1, 4), (1, 16), (1, 64), (2, 16), (0.5, 32))]
EXPLORED: dict[Job, list[str]] = {
    (f"{rung}, matrices x{m}, embedding x{e}", lr, 0.5, 0): [
        f"optimizer.name={'muon' if rung == 'muon' else 'adamw'}",
        *LINEAR,
        f"optimizer.matrix_rate={m}",
        f"optimizer.embedding_rate={e}",
    ]
    for rung, lr, m, e in TRIALS
}
# Averages change nothing of a run: every rung has them, the last one is their figure beside the last rung's.
AVERAGES = ["average.ema=0.99", "average.last=5", "average.every=20"]
OVERRIDES = RUNGS | {job[0]: overrides for job, overrides in EXPLORED.items()}
BASE = "constant"


def done(results: Path) -> dict[Job, dict[str, Any]]:
    if not results.is_file():
        return {}
    lines = [json.loads(line) for line in results.read_text(encoding="utf8").splitlines()]
    return {
        (r["rung"], r["lr"], r["share"], r["seed"]): r
        for r in lines
        if r["batch_size"] == BATCH and r.get("overrides") in (None, OVERRIDES.get(r["rung"]))
    }


def loss_of(line: dict[str, Any], average: bool = False) -> float:
    found = [line["held_out_loss"], *(line["averages"].values() if average else ())]
    found = [x for x in found if math.isfinite(x)]
    return min(found) if found else math.inf


def tuned(found: dict[Job, dict[str, Any]], rung: str) -> float | None:
    """The best rate of a rung at full length, once five are known and the best is not the first or last of them."""
    losses = {
        lr: loss_of(line) for (name, lr, share, seed), line in found.items() if (name, share, seed) == (rung, 1.0, 0)
    }
    if len(losses) < 5:
        return None
    best = min(losses, key=lambda lr: losses[lr])
    return best if min(losses) < best < max(losses) else None


def wanted(found: dict[Job, dict[str, Any]]) -> list[Job]:
    """What can be run now, the most needed first."""
    jobs: list[Job] = []
    for rung in RUNGS:
        known = sorted(lr for name, lr, share, seed in found if (name, share, seed) == (rung, 1.0, 0))
        best = tuned(found, rung)
        if best is None:
            middle = {"cosine": 0.016, "linear": 0.016}.get(rung, 0.008)
            if known:
                middle = min(known, key=lambda lr: loss_of(found[rung, lr, 1.0, 0]))
            at = RATES.index(middle)
            near = (
                RATES[max(0, at - 2) : at + 3]
                if len(known) < 5
                else (RATES[max(0, at - 1)], RATES[min(len(RATES) - 1, at + 1)])
            )
            # From the middle outwards, so that the first few already say which way it goes.
            near = sorted(near, key=lambda lr: abs(math.log(lr / middle)))
            jobs += [(rung, lr, 1.0, 0) for lr in near if lr not in known]
            continue
        if rung == BASE or tuned(found, BASE) is None:
            continue
        target = loss_of(found[BASE, tuned(found, BASE), 1.0, 0])
        for share in SHARES:
            job = (rung, best, share, 0)
            if job not in found:
                jobs.append(job)
                break
            if loss_of(found[job], average=True) > target:
                break
    if not jobs:
        for rung in (BASE, list(RUNGS)[-1]):
            best = tuned(found, rung)
            shares = [s for name, lr, s, seed in found if (name, lr, seed) == (rung, best, 0)]
            jobs += [(rung, best, share, 1) for share in shares if (rung, best, share, 1) not in found]
    return jobs


def run_one(job: Job, prepared: str, runs: str, device: str) -> dict[str, Any]:
    rung, lr, share, seed = job
    values = [
        f"data.prepared={prepared}",
        f"data.seed={seed}",
        f"seed={seed}",
        f"optimizer.lr={lr}",
        f"device={device}",
        f"steps={round(STEPS * share)}",
        f"batch_size={BATCH}",
        f"data.seq_len={LENGTH}",
        "schedule.warmup=100",
        "evaluation.tokens=500000",
        "cuda_graph=true",
        "log_every=50",
        "control.batch=off",
        f"out={runs}/{rung.replace(', ', '-').replace(' ', '-')}-{lr}-{share}-{seed}-{time.time_ns()}",
    ]
    config = load(TrainConfig, find("30m"), [*values, *AVERAGES, *OVERRIDES[rung]])
    start = time.monotonic()
    result = train(config, quiet=True)
    return {
        "rung": rung,
        "lr": lr,
        "share": share,
        "batch_size": BATCH,
        "tokens": result.tokens,
        "steps": result.steps,
        "held_out_loss": result.evaluations[-1][1],
        "curve": [(step, round(loss, 4)) for step, loss in result.curve if step % 51 == 0],
        "bits_per_byte": result.bits_per_byte,
        "averages": result.averages,
        "actions": [a.as_dict() for a in result.actions],
        "tokens_per_second": result.tokens_per_second,
        "seconds": time.monotonic() - start,
        "memory_bytes": result.memory,
        "overrides": OVERRIDES[rung],
    }


def worker(device: str, jobs: Any, out: Any, prepared: str, runs: str) -> None:
    logging.basicConfig(level=logging.WARNING, format=f"{device} %(message)s")
    while (job := jobs.get()) is not None:
        gc.collect()  # what the run before has captured
        try:
            out.put((job, run_one(job, prepared, runs, device), None))
        except Exception as error:  # a rate that diverges ends in an error: that is its result
            out.put((job, None, f"{type(error).__name__}: {error}"))


def run(args: argparse.Namespace) -> None:
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    context = mp.get_context("spawn")
    out, inboxes = context.Queue(), [context.Queue() for _ in devices]
    for device, inbox in zip(devices, inboxes, strict=True):
        context.Process(target=worker, args=(device, inbox, out, args.prepared, args.runs), daemon=True).start()
    end = time.monotonic() + args.seconds
    running: dict[Job, Any] = {}
    idle = list(inboxes)
    cost = args.first  # seconds a full run takes, measured as runs end
    while True:
        found = done(args.results)
        jobs = [job for job in EXPLORED if job not in found] if args.stage == "rates" else wanted(found)
        open_ = [job for job in jobs if job not in running]
        for job in open_[: len(idle)]:
            if time.monotonic() + cost * job[2] * 1.15 < end:
                inbox = idle.pop()
                running[job] = inbox
                inbox.put(job)
        if not running:
            break
        try:
            job, line, error = out.get(timeout=max(1.0, end + 60 - time.monotonic()))
        except queue.Empty:
            print("time is over with runs under way:", list(running), flush=True)
            break
        idle.append(running.pop(job))
        if line is None:
            line = {
                "rung": job[0],
                "lr": job[1],
                "share": job[2],
                "batch_size": BATCH,
                "held_out_loss": math.inf,
                "averages": {},
                "error": error,
            }
        else:
            cost = min(cost, line["seconds"] / job[2])  # the first runs also compile
        print(json.dumps({k: line[k] for k in line if k not in ("actions", "overrides", "curve")}), flush=True)
        record(args.results, "ladder", line, device=devices[0], seed=job[3])
    for inbox in inboxes:
        inbox.put(None)
    print("left:", wanted(done(args.results)), flush=True)


def needed(found: dict[Job, dict[str, Any]], rung: str, target: float, *, average: bool, seed: int = 0) -> str:
    """Share of the tokens at which a rung reaches the target."""
    best = tuned(found, rung)
    if best is None:
        return "not tuned yet"
    points = sorted(
        (s, loss_of(line, average)) for (name, lr, s, d), line in found.items() if (name, lr, d) == (rung, best, seed)
    )
    if not points:
        return "not run"
    above = [p for p in points if p[1] > target]
    below = [p for p in points if p[1] <= target]
    if not below:
        return f"> {points[-1][0]:g}"
    if not above or above[-1][0] > below[0][0]:
        return f"<= {below[0][0]:g}"
    (a, x), (b, y) = above[-1], below[0]
    return f"{a * (b / a) ** ((x - target) / (x - y)):.3f}"


def report(args: argparse.Namespace) -> None:
    found = done(args.results)
    base = tuned(found, BASE)
    target = loss_of(found[BASE, base, 1.0, 0]) if base else math.inf
    print(f"target: {target:.4f} nats a token, AdamW at a constant rate of {base}")
    for rung in RUNGS:
        losses = {
            lr: loss_of(found[name, lr, s, d]) for name, lr, s, d in sorted(found) if (name, s, d) == (rung, 1.0, 0)
        }
        print(
            f"{rung:10} best rate {tuned(found, rung)}  tokens needed {needed(found, rung, target, average=False)}, "
            f"with averaging {needed(found, rung, target, average=True)}"
        )
        print("           " + "  ".join(f"{lr:g}: {loss:.4f}" for lr, loss in losses.items()))
    for rung in (BASE, list(RUNGS)[-1]):
        second = {(s, lr): loss_of(found[rung, lr, s, 1]) for name, lr, s, d in sorted(found) if (name, d) == (rung, 1)}
        if rung == BASE and second:
            target = min(second.values())
        share = needed(found, rung, target, average=False, seed=1)
        losses = "  ".join(f"{s:g}: {loss:.4f}" for (s, _), loss in second.items())
        print(f"second seed, {rung}: tokens needed {share}  {losses}")


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("rates", "run", "report"))
    parser.add_argument("--prepared", default="", help="folder that `llm-mlp prepare` wrote")
    parser.add_argument("--runs", default="/tmp/ladder-runs")
    parser.add_argument("--seconds", type=float, default=500.0, help="no run starts that would end later")
    parser.add_argument("--first", type=float, default=90.0, help="seconds a full run is thought to take, at first")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/ladder.jsonl"))
    args = parser.parse_args()
    report(args) if args.stage == "report" else run(args)


if __name__ == "__main__":
    main()
