"""Is a run that was killed and resumed the run that was not? Both are run, by the command line, and compared."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llm_mlp.checkpoint import read_json, read_tensors
from llm_mlp.config import ConfigError, TrainConfig, dump, load
from llm_mlp.device import pick_device
from llm_mlp.train.console import read_metrics
from llm_mlp.train.snapshot import checkpoints

# Losses may differ by this share where bits cannot be the same: sums in another order, accumulated over the steps.
BOUNDS = {"fp64": 1e-9, "fp32": 1e-2, "bf16": 5e-2, "fp16": 5e-2}


@dataclass(frozen=True)
class Verdict:
    """What the two runs came to after the checkpoint that the killed one was resumed from.

    ``loss_error``: largest relative difference of a step's loss; ``weight_error``: largest difference of a weight
    tensor relative to its norm; ``bound``: what ``loss_error`` may be, 0 where every bit has to be the same.
    """

    steps: int
    killed_after: int
    resumed_from: int
    processes: tuple[int, int]
    samples_equal: bool
    loss_error: float
    weight_error: float
    bound: float

    @property
    def passed(self) -> bool:
        weights = self.weight_error == 0 if self.bound == 0 else math.isfinite(self.weight_error)
        return self.samples_equal and self.loss_error <= self.bound and weights


class VerifyError(RuntimeError):
    """One of the runs could not be made; the message has the last lines it wrote."""


def verify_resume(
    recipe: str | Path,
    overrides: Sequence[str],
    *,
    folder: Path,
    steps: int = 10,
    processes: int = 1,
    resume_processes: int | None = None,
    bound: float | None = None,
) -> Verdict:
    """Train 2 ``steps`` in one go; again, killed with SIGKILL after ``steps`` and a checkpoint, and resumed.

    Args:
        folder: of the two runs, ``whole`` and ``killed``; it must not exist yet.
        resume_processes: of the resumed part, if others than ``processes``.
        bound: largest relative difference of a loss that passes; None: 0 on a CPU (and with ``deterministic``) and the
            same number of processes, else `BOUNDS` of the precision.

    Raises:
        ConfigError: a config that cannot be run so.
        VerifyError: a run that fails.
    """
    resume_processes = resume_processes or processes
    if folder.exists():
        raise ConfigError(f"{folder}: is there already; name a new folder")
    if steps < 1 or min(processes, resume_processes) < 1:
        raise ConfigError("--steps and --processes must be at least 1")
    fixed = [f"steps={2 * steps}", f"checkpoint.every={steps}", "checkpoint.keep_last=2", "evaluation.every=0"]
    config = load(TrainConfig, recipe, [*overrides, *fixed, "evaluation.tokens=4096", "log_every=1"])
    if bound is None:
        exact = pick_device(config.device).type == "cpu" or config.deterministic
        bound = 0.0 if exact and processes == resume_processes else BOUNDS[config.precision]
    folder.mkdir(parents=True)
    path = folder / "config.yaml"
    path.write_text(dump(config), encoding="utf8")
    whole, killed = folder / "whole", folder / "killed"
    with _started(path, whole, processes) as job:
        _finish(job, whole)
    with _started(path, killed, processes) as job:
        after = _kill(job, killed, steps)
    resumed_from = int(checkpoints(killed)[-1].name.removeprefix("step-"))
    if resumed_from > steps:
        raise VerifyError(f"{killed}: the run was over before it could be killed; give more --steps")
    with _started(path, killed, resume_processes, "--resume") as job:
        _finish(job, killed)
    return _compare(whole, killed, resumed_from, after, (processes, resume_processes), bound)


@contextlib.contextmanager
def _started(config: Path, out: Path, processes: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run that does not outlive the block; its errors go to ``OUT.log``: a pipe that nobody reads would stop it."""
    module = ["-m", "llm_mlp", "train", str(config), "--quiet", "--out", str(out), *options]
    if processes > 1:
        module = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *module]
    with _log(out).open("wb") as log:
        # A session of its own, so that all its processes can be killed at once.
        job = subprocess.Popen([sys.executable, *module], stdout=subprocess.DEVNULL, stderr=log, start_new_session=True)
    try:
        yield job
    finally:
        if job.poll() is None:
            _kill_all(job.pid)
            job.wait()


def _log(out: Path) -> Path:
    return out.with_suffix(".log")


def _failed(out: Path) -> VerifyError:
    said = _log(out).read_text(encoding="utf8", errors="replace").strip().splitlines()
    return VerifyError(f"{out}: the run failed:\n" + "\n".join(said[-8:]))


def _finish(job: subprocess.Popen[bytes], out: Path) -> None:
    if job.wait():
        raise _failed(out)


def _kill(job: subprocess.Popen[bytes], out: Path, after: int) -> int:
    """Kill a run once it is past step ``after``; the last step it recorded."""
    while job.poll() is None:
        lines = (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").is_file() else 0
        if lines > after:
            _kill_all(job.pid)
            break
        time.sleep(0.005)
    if job.wait() == 0:
        raise VerifyError(f"{out}: the run was over before it could be killed; give more --steps")
    if job.returncode != -signal.SIGKILL:
        raise _failed(out)
    return max(line["step"] for line in read_metrics(out))


def _kill_all(pid: int) -> None:
    """A process and all it started; torchrun's workers are in sessions of their own."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in children.read_text().split()] if children.is_file() else []
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for child in found:
        _kill_all(child)


def _compare(
    whole: Path, killed: Path, resumed_from: int, after: int, processes: tuple[int, int], bound: float
) -> Verdict:
    one, other = ({m["step"]: m for m in read_metrics(run) if "sample" in m} for run in (whole, killed))
    states = [read_json(checkpoints(run)[-1] / "training.json")["loader"] for run in (whole, killed)]
    samples = [[m["sample"] for m in run.values()] for run in (one, other)]
    losses = [abs(m["loss"] - other[step]["loss"]) / abs(m["loss"]) for step, m in one.items() if step in other]
    tensors = [read_tensors(run / "model" / "model.safetensors") for run in (whole, killed)]
    weights = [_difference(tensors[0][name], tensors[1][name]) for name in tensors[0]]
    return Verdict(
        steps=len(one),
        killed_after=after,
        resumed_from=resumed_from,
        processes=processes,
        # A sample is what its number says, given the data's fingerprint.
        samples_equal=samples[0] == samples[1] and states[0] == states[1],
        loss_error=max(losses),
        weight_error=max(weights),
        bound=bound,
    )


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    if torch.equal(a, b):
        return 0.0
    return float((a.double() - b.double()).norm() / a.double().norm().clamp_min(1e-30))
