"""The processes of a run: who reads which samples, how gradients meet, what happens when one of them dies.

Distribution is torch's own (torchrun, DDP, ``fully_shard``) and is applied from outside: models know no mesh. With one
process everything here is the identity.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from llm_mlp import __version__
from llm_mlp.config import ConfigError, ParallelConfig, TrainConfig, build, diff
from llm_mlp.device import pick_device
from llm_mlp.models import LM
from llm_mlp.train.compress import Communication

log = logging.getLogger("llm_mlp.train")

T = TypeVar("T")


class RankError(RuntimeError):
    """A process of the run is gone or failed; the message names it and what it said."""


class World:
    """This process among those of a run.

    ``rank`` of ``size`` processes. From the outside in: ``pipeline`` stages (which may lie on different nodes), in each
    ``copies`` of the stage that read different texts or (every ``context`` neighbours) spans of the same, each copy
    made of ``tensor`` processes. There are ``data_size`` readers of different samples, of which this is number
    ``data_rank``.
    """

    def __init__(self, config: ParallelConfig, device: torch.device, rank: int = 0, size: int = 1) -> None:
        self.config, self.device, self.rank, self.size = config, device, rank, size
        left = size
        for name, share in (("pipeline", config.pipeline), ("tensor", config.tensor), ("context", config.context)):
            if left % share:
                raise ConfigError(f"parallel.{name} = {share} does not divide the {left} processes")
            left //= share
        self.copies = left * config.context
        if self.copies % config.replicas:
            raise ConfigError(f"parallel.replicas = {config.replicas} does not divide the {self.copies} processes")
        stage, self.tensor_rank = divmod(rank, config.tensor)
        self.pipeline_rank, self.copy = divmod(stage, self.copies)
        self.data_rank, self.context_rank = divmod(self.copy, config.context)
        self.data_size = self.copies // config.context
        self.mesh: DeviceMesh | None = None
        self.context_group: dist.ProcessGroup | None = None
        if size > 1:
            replicas = config.replicas
            shape = (config.pipeline, replicas, self.copies // replicas, config.tensor)
            self.mesh = init_device_mesh(device.type, shape, mesh_dim_names=("pipeline", "replica", "shard", "tensor"))
        if config.context > 1:
            ranks = torch.arange(size).view(-1, config.context, config.tensor).mT.reshape(-1, config.context)
            self.context_group, _ = dist.new_subgroups_by_enumeration(ranks.tolist())
        self.copies_group: dist.ProcessGroup | None = None  # None: all processes
        if self.copies < size:
            ranks = torch.arange(size).view(-1, self.copies, config.tensor).mT.reshape(-1, self.copies)
            self.copies_group, _ = dist.new_subgroups_by_enumeration(ranks.tolist())
        self.collectives = 0  # asked for here; those that DDP and fully_shard start are theirs

    @property
    def main(self) -> bool:
        """Whether this process writes what a run writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            self.collectives += 1
            dist.all_reduce(values)
        return values

    def once(self, values: Tensor) -> Tensor:
        """``values`` to be summed over all processes, where those of a tensor group have the same."""
        return values if self.tensor_rank == 0 else torch.zeros_like(values)

    def over_stages(self, value: float) -> float:
        """The sum over the stages of this process's copy of the model."""
        if self.config.pipeline == 1 or self.mesh is None:
            return value
        self.collectives += 1
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.mesh.get_group("pipeline"))
        return float(total)

    def any(self, flag: bool) -> bool:
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def barrier(self) -> None:
        self.any(False)

    def gather(self, value: T) -> list[T]:
        """Everybody's value (a plain Python object of this program's own making), by rank."""
        if self.size == 1:
            return [value]
        self.collectives += 1
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value)
        return out

    def first(self, work: Callable[[], T]) -> T:
        """``work()``, on the main process before the others; if it fails there, it fails everywhere."""
        if self.size == 1:
            return work()
        result, error = None, None
        if self.main:
            try:
                result = work()
            except (ValueError, OSError, RuntimeError) as caught:
                error = caught
        said = self.gather(f"{error}" if error else None)[0]
        if error is not None:
            raise error
        if said is not None:
            raise RankError(f"rank 0: {said}")
        return result if self.main else work()  # type: ignore[return-value]

    def agree(self, error: BaseException | None, doing: str) -> None:
        """Raise on all processes if one of them has an ``error``."""
        said = self.gather(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, text in enumerate(said):
            if text is not None:
                raise RankError(f"rank {rank} failed while {doing}: {text}")

    def same(self, what: str, value: str) -> None:
        """Refuse a ``value`` of which another process has another, naming ``what`` it is."""
        told = self.gather(value)
        for rank, other in enumerate(told):
            if other != told[0]:
                raise ConfigError(f"{what}: {other} on rank {rank}, {told[0]} on rank 0; all processes need the same")

    def per_rank(self, batch_size: int) -> int:
        """Samples of a batch that each reader takes."""
        if batch_size % self.data_size:
            raise ConfigError(
                f"batch_size = {batch_size} cannot be dealt to {self.data_size} processes; give a multiple"
            )
        return batch_size // self.data_size


# -- starting and ending -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_world(run: TrainConfig) -> Iterator[World]:
    """The processes that torchrun started (or that are connected already), else this one alone.

    Raises:
        ConfigError: a rendezvous that cannot be reached, more processes than devices, a layout that needs more,
            processes that were started with different configs or versions.
        RankError: inside, for a failure of another process.
    """
    config, device = run.parallel, run.device
    started = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not started and not dist.is_initialized():
        alone = World(ParallelConfig(), pick_device(device))
        if max(config.context, config.replicas, config.pipeline, config.tensor) > 1:
            raise ConfigError(
                "parallel.context, replicas, pipeline and tensor need several processes: "
                "torchrun --nproc-per-node N -m llm_mlp train ..."
            )
        yield alone
        return
    on = _own_device(device)
    if started:
        _connect(config, on)
    _check_same_start(run)
    world = World(config, on, dist.get_rank(), dist.get_world_size())
    if world.rank:
        logging.getLogger("llm_mlp").setLevel(logging.WARNING)  # the main process says what all of them do
    try:
        yield world
    except RankError:
        raise
    except BaseException as error:
        _last_words(world, error)
        lost = _who_is_gone(world) if _is_communication(error) else None
        if lost:
            raise RankError(lost) from error
        raise
    finally:
        if started:
            with contextlib.suppress(RuntimeError):  # after a failure there is nobody to say good-bye to
                dist.destroy_process_group()


def _own_device(name: str) -> torch.device:
    device = pick_device(name)
    if device.type != "cuda":
        return device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise ConfigError(f"process {local} of this machine has no GPU of its own ({torch.cuda.device_count()} here)")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _connect(config: ParallelConfig, device: torch.device) -> None:
    where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    try:
        dist.init_process_group(
            "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=config.timeout)
        )
    except (dist.DistError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the other processes cannot be reached at {where} ({str(error).splitlines()[0]}); check MASTER_ADDR, "
            "MASTER_PORT, WORLD_SIZE and RANK, and that all of them were started"
        ) from None


# What may be another on each machine: where things lie. That the texts are the same is checked once they are read.
_OF_A_MACHINE = ("data.cache_dir", "data.prepared", "device")


def _check_same_start(config: TrainConfig) -> None:
    """Processes of different configs would wait for each other in vain, or train what nobody asked for."""
    mine = ({"llm-mlp": __version__, "torch": torch.__version__}, config.model_dump(mode="json"))
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    (versions, fields) = told[0]
    for rank, (other_versions, other_fields) in enumerate(told):
        found = [f"{name}: {v} -> {other_versions[name]}" for name, v in versions.items() if v != other_versions[name]]
        if not found and fields != other_fields:  # of one version, so both can be read
            lines = diff(build(TrainConfig, fields), build(TrainConfig, other_fields))
            found = [line for line in lines if line.partition(":")[0] not in _OF_A_MACHINE]
        if found:
            raise ConfigError(
                f"rank {rank} was not started as rank 0 was ({'; '.join(found)}); start all processes with the same "
                "config, overrides and versions"
            )


def _is_communication(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and any(word in text for word in ("gloo", "nccl", "connection", "peer", "timed out"))
    )


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _last_words(world: World, error: BaseException) -> None:
    """Left for the others, who will only see a connection that closes."""
    if _is_communication(error):
        return
    with contextlib.suppress(Exception):
        _store().set(f"llm_mlp/said/{world.rank}", f"{type(error).__name__}: {error}"[:2000])


def _who_is_gone(world: World, wait: float = 5.0) -> str | None:
    """After a failed exchange: those left report, and who does not has died."""
    try:
        store = _store()
        store.set(f"llm_mlp/left/{world.rank}", socket.gethostname())
        end = time.monotonic() + wait
        lost = [r for r in range(world.size) if r != world.rank]
        while time.monotonic() < end and lost:
            lost = [r for r in lost if not store.check([f"llm_mlp/left/{r}"])]
            time.sleep(0.1)
        words = []
        for r in lost:
            key = f"llm_mlp/said/{r}"
            words.append(
                f"rank {r} of {world.size} " + (f"failed: {store.get(key).decode()}" if store.check([key]) else "died")
            )
    except Exception:
        return "rank 0, which holds the rendezvous, is gone; the last checkpoint stands, continue with --resume"
    if not words:
        return None
    return (
        f"{'; '.join(words)}; the last checkpoint stands, continue with --resume (also on other numbers of processes)"
    )


# -- the model ------------------------------------------------------------------------------------------------------


class Wrapped:
    """A model made ready for a run's processes: what to call, and when gradients are exchanged."""

    def __init__(self, model: LM, world: World) -> None:
        self.model, self.world = model, world
        self.communication = Communication()
        self.call = self._wrap(model)

    def _wrap(self, module: nn.Module) -> nn.Module:
        """A module of ``blocks`` and what is around them: sharded, or as what averages its copies' gradients."""
        world = self.world
        if world.copies == 1:
            return module
        if self.sharded:
            shard(module, world)
            return module
        # No device_ids: what goes in lies where it should (cu_seqlens on the CPU), and stays there.
        parallel = DistributedDataParallel(module, process_group=world.copies_group)
        _settle(parallel)
        self.communication.register(parallel, world.config)
        return parallel

    @property
    def sharded(self) -> bool:
        return self.world.copies > 1 and self.world.config.data == "fsdp"

    @contextlib.contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of a part of the batch; gradients are exchanged in the ``last``."""
        if isinstance(self.call, DistributedDataParallel) and not last:
            with self.call.no_sync():
                yield
            return
        if self.sharded:
            zero = self.world.config.zero
            # ZeRO-1 keeps gradients whole until the last part; ZeRO-2 and 3 scatter those of every part.
            assert isinstance(self.model, FSDPModule)
            self.model.set_requires_gradient_sync(last or zero > 1)
        yield

    def reshard(self) -> None:
        """After forward passes alone: give back the weights that only a backward pass would."""
        for module in self.call.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _settle(parallel: DistributedDataParallel) -> None:
    """Let DDP lay its buckets out now, as it does anew after a first backward pass: a resumed run would sum its first
    step's gradients in another order than the uninterrupted one."""
    parameters = list(parallel.parameters())
    parallel.reducer.prepare_for_backward([])
    torch.stack([p.reshape(-1)[0] * 0 for p in parameters]).sum().backward()
    parallel.reducer._rebuild_buckets()
    parallel.zero_grad(set_to_none=True)


def shard(model: nn.Module, world: World) -> None:
    """Shard a model (or stage) over its copies as the world's config says, each block on its own, then the rest."""
    config = world.config
    assert world.mesh is not None
    mesh = world.mesh["replica", "shard"] if config.replicas > 1 else world.mesh["shard"]
    dtype = {"same": None, "bf16": torch.bfloat16, "fp32": torch.float32}[config.reduce_dtype]
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=dtype)}
    # What blocks return is never changed in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, reshard_after_forward=config.zero == 3, **options)
    fully_shard(model, reshard_after_forward=False, **options)


# -- sharded tensors ------------------------------------------------------------------------------------------------


def whole(t: Tensor) -> Tensor:
    """A sharded tensor's full value (all processes of its mesh must ask for it); any other as it is."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def like(value: Tensor, pattern: Tensor) -> Tensor:
    """A full value that every process has, sharded as ``pattern`` is; nothing is sent."""
    if not isinstance(pattern, DTensor):
        return value
    from torch.distributed.tensor import Replicate

    mesh = pattern.device_mesh
    spread = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return spread.redistribute(placements=pattern.placements)


def squared_norm(tensors: list[Tensor]) -> Tensor:
    """Sum of the squares of all numbers of all tensors (float64); of sharded ones over all shards, by one exchange."""
    first = tensors[0]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    norms = torch.stack(list(torch._foreach_norm(local)))
    total = norms.double().square().sum()
    if isinstance(first, DTensor):
        mesh = first.device_mesh
        dist.all_reduce(total, group=mesh.get_group("shard"))
    return total
