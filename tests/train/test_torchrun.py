"""Runs that torchrun starts: killed, asked to stop, and with nobody to meet."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train_cases import tiny

from llm_mlp.config import dump
from llm_mlp.train.console import read_metrics
from llm_mlp.train.snapshot import checkpoints

pytestmark = pytest.mark.slow


def torchrun(folder: Path, config: Path, *arguments: str, processes: int = 2) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "llm_mlp", "train", str(config), "--quiet", *arguments]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)


def under_way(folder: Path) -> tuple[Path, subprocess.Popen]:
    """A run's config, and the run with its first checkpoint saved."""
    config = folder / "config.yaml"
    config.write_text(dump(tiny(folder, "steps=3000", "checkpoint.every=20", "device=cpu")))
    job = torchrun(folder, config)
    end = time.monotonic() + 120
    while not checkpoints(folder / "run") and time.monotonic() < end:
        time.sleep(0.2)
    return config, job


def test_torchrun_trains_dies_and_resumes(tmp_path):
    """A worker is killed; torchrun ends the others; the run goes on where its last checkpoint stands."""
    config, job = under_way(tmp_path)
    workers = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    said = job.communicate(timeout=120)[1]
    assert job.returncode != 0 and "Signal 9" in said
    before = checkpoints(tmp_path / "run")[-1].name
    again = torchrun(tmp_path, config, "--resume", "--stop-after", str(int(before[5:]) + 30), processes=1)
    said = again.communicate(timeout=120)[1]
    assert again.returncode == 0, said
    assert checkpoints(tmp_path / "run")[-1].name == f"step-{int(before[5:]) + 30:07d}"


def test_torchrun_is_asked_to_stop(tmp_path):
    """SIGTERM, as a scheduler sends it: every process ends with the step under way, and a checkpoint is saved."""
    _, job = under_way(tmp_path)
    job.terminate()
    said = job.communicate(timeout=120)[1]
    assert "a checkpoint will be saved" in said
    step = int(checkpoints(tmp_path / "run")[-1].name[5:])
    last = [line for line in read_metrics(tmp_path / "run") if "lr" in line][-1]
    assert step == last["step"] < 3000


def test_what_goes_wrong_in_the_interpreters_end_fails_no_run_of_several_processes():
    """As a thread of gloo's does that then lets go of its last tensor."""
    program = "import atexit, os; atexit.register(os.abort); from llm_mlp.cli import main; main()"
    for size, fails in (("1", True), ("2", False)):
        done = subprocess.run(
            [sys.executable, "-c", program, "config", "demo"],
            env={**os.environ, "WORLD_SIZE": size},
            capture_output=True,
            text=True,
        )
        assert (done.returncode != 0) == fails and "batch_size:" in done.stdout


def test_a_rendezvous_that_nobody_answers(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(dump(tiny(tmp_path, "parallel.timeout=3", "device=cpu")))
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "llm_mlp", "train", str(config)],
        env={**os.environ, **where},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode != 0 and "cannot be reached at 127.0.0.1:9" in done.stderr + done.stdout
