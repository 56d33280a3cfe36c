"""Gradients on the wire of data-parallel training: plain, in bfloat16, or by PowerSGD (arXiv 1905.13727)."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd
from torch.nn.parallel import DistributedDataParallel

from llm_mlp.config import ParallelConfig

log = logging.getLogger("llm_mlp.train")

START = 2  # steps whose gradients travel whole before PowerSGD begins: the fewest that torch's hook allows
_KEPT = ("error_dict", "p_memory_dict", "q_memory_dict")  # of torch's state, by the bucket's number


class Communication:
    """What DDP's gradient exchange sent, and how large each process's own gradient was.

    ``sent_bytes`` of ``plain_bytes`` (what the gradients themselves would take) a process; both grow over a run.
    """

    def __init__(self) -> None:
        self.sent_bytes = self.plain_bytes = self.exchanges = 0
        self.measure = False
        self.group: dist.ProcessGroup | None = None
        self._own: list[Tensor] = []
        self._power_states: list[powersgd.PowerSGDState] = []  # one for each stage of this process

    def register(self, model: DistributedDataParallel, config: ParallelConfig) -> None:
        self.group = model.process_group
        hook: Any = {"none": self._plain, "bf16": self._bfloat16, "powersgd": None}[config.compress]
        if config.compress == "powersgd":
            logging.getLogger(powersgd.__name__).setLevel(logging.WARNING)
            state = powersgd.PowerSGDState(
                self.group,
                matrix_approximation_rank=config.powersgd_rank,
                start_powerSGD_iter=START,
                compression_stats_logging_frequency=2**62,
            )
            self._power_states.append(state)
            hook = partial(self._power, state)  # error buffers belong to a model's buckets
        model.register_comm_hook(None, lambda _, bucket: self._measured(hook, bucket))

    def tensors(self) -> dict[str, Tensor]:
        """What PowerSGD goes on with, for a checkpoint: this process's error buffers, the last factors, the count."""
        found = {}
        for n, state in enumerate(self._power_states):
            found[f"{n}/steps"] = torch.tensor(state.iter)
            found |= {f"{n}/{kind}/{bucket}": t for kind in _KEPT for bucket, t in getattr(state, kind).items()}
        return found

    def load_tensors(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        """The inverse of `tensors`, in the same layout of processes."""
        for name, t in tensors.items():
            n, kind, *bucket = name.split("/")
            state = self._power_states[int(n)]
            if kind == "steps":
                state.iter = int(t)
            else:
                getattr(state, kind)[int(bucket[0])] = t.to(device)

    def own_squares(self) -> Tensor | None:
        """Sum of squares of this process's gradient before it met the others' (since the last call), if ``measure``."""
        found = torch.stack(self._own).sum() if self._own else None
        self._own = []
        return found

    def _measured(self, hook: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        if self.measure:
            self._own.append(buffer.double().square().sum())
        self.plain_bytes += buffer.nbytes
        self.exchanges += 1
        return hook(bucket)

    def _plain(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer().div_(dist.get_world_size(self.group))
        self.sent_bytes += buffer.nbytes
        return self._all_reduce(buffer).then(lambda future: future.value()[0])

    def _bfloat16(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        # torch's own hook of this kind is for NCCL.
        buffer = bucket.buffer()
        small = buffer.div(dist.get_world_size(self.group)).bfloat16()
        self.sent_bytes += small.nbytes
        return self._all_reduce(small).then(lambda future: buffer.copy_(future.value()[0]))

    def _power(self, state: powersgd.PowerSGDState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        if state.iter < START:
            self.sent_bytes += bucket.buffer().nbytes
            return powersgd.powerSGD_hook(state, bucket)
        before = state.total_numel_after_compression
        future = powersgd.powerSGD_hook(state, bucket)
        self.sent_bytes += (state.total_numel_after_compression - before) * bucket.buffer().element_size()
        return future

    def _all_reduce(self, buffer: Tensor) -> torch.futures.Future[list[Tensor]]:
        return dist.all_reduce(buffer, group=self.group, async_op=True).get_future()
