"""Functions run by several processes of this machine at once, connected by gloo."""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _one(rank: int, size: int, store: str, out: Any, function: Callable, args: tuple) -> None:
    import torch
    import torch.distributed as dist

    faulthandler.enable()  # a crash says where
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        out.put((rank, True, function(*args)))
        dist.destroy_process_group()
    except BaseException as error:
        out.put((rank, False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


def start(size: int, function: Callable, *args: Any) -> tuple[list[Any], Any]:
    """The processes, and the queue of their (rank, whether it went well, value or error)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llm_mlp.train", "torch.utils.tensorboard"])
    store = str(Path(tempfile.mkdtemp()) / "store")
    out = context.Queue()
    processes = [context.Process(target=_one, args=(r, size, store, out, function, args)) for r in range(size)]
    for process in processes:
        process.start()
    return processes, out


def outcomes(size: int, function: Callable, *args: Any) -> list[tuple[bool, Any]]:
    """What each rank returned, or the error it ended with."""
    processes, out = start(size, function, *args)
    found: dict[int, tuple[bool, Any]] = {}
    end = time.monotonic() + 300
    waiting = set(range(size))
    while waiting and time.monotonic() < end:
        gone = {r for r in waiting if not processes[r].is_alive()}  # before looking: what they said is there by now
        try:
            rank, well, value = out.get(timeout=1)
        except queue.Empty:
            waiting -= gone
            continue
        found[rank] = (well, value)
        waiting.discard(rank)
        if not well:
            end = min(end, time.monotonic() + 30)  # the others may wait for it in vain
    for rank, process in enumerate(processes):
        process.join(1 if waiting else 60)
        if rank not in found:
            found[rank] = (False, f"said nothing; exit code {process.exitcode}")
        process.kill()
    return [found[r] for r in range(size)]


def together(size: int, function: Callable, *args: Any) -> list[Any]:
    """What each rank returned; all must succeed."""
    found = outcomes(size, function, *args)
    failed = [f"rank {rank}: {value}" for rank, (well, value) in enumerate(found) if not well]
    assert not failed, "\n".join(failed)
    return [value for _, value in found]
