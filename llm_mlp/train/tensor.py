"""Tensor parallelism: the processes of a tensor group share every layer, each computing some of its groups.

A perception layer's groups do not know of each other, nor do the hidden units of an FFN: a process holds an ordinary
layer of fewer groups and hidden units. What enters a layer is the same on all, and what the parts of a layer return is
summed, so there are two sums of the residual stream a layer in each direction (by DTensor: its gradient is `Partial`
before a layer, its values are behind it). Embedding, head and routing are computed alike by all.

A parameter keeps its name and is cut at the seams of what is fused in it (`Cut`). The gates' first factors and the
units' gains belong to all groups: every process holds them, sees its own groups' part of their gradient, and these
parts are summed once a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from llm_mlp.config import ModelConfig
from llm_mlp.models import LM
from llm_mlp.models.perception import PerceptionMixer
from llm_mlp.train.parallel import World, like, squared_norm, whole


@dataclass(frozen=True)
class Cut:
    """How a parameter is shared out: along ``dim`` lie pieces of the lengths ``whole``, of which a process holds
    ``part``: less of those that are cut, all of those that belong to every group."""

    shape: tuple[int, ...]  # of the whole parameter
    dim: int
    whole: tuple[int, ...]
    part: tuple[int, ...]

    @property
    def shared(self) -> bool:
        """Whether nothing is cut."""
        return self.whole == self.part

    def take(self, full: Tensor, rank: int) -> Tensor:
        """What process ``rank`` of the group holds of a whole parameter."""
        pieces = zip(full.split(self.whole, self.dim), self.part, strict=True)
        return torch.cat(
            [p if p.shape[self.dim] == n else p.narrow(self.dim, rank * n, n) for p, n in pieces], self.dim
        )

    def join(self, parts: list[Tensor]) -> Tensor:
        """The whole parameter from what the processes of the group hold."""
        columns = zip(*(p.split(self.part, self.dim) for p in parts), strict=True)
        pieces = [
            c[0] if w == n else torch.cat(c, self.dim) for c, w, n in zip(columns, self.whole, self.part, strict=True)
        ]
        return torch.cat(pieces, self.dim)


class Cuts:
    """Which part of a model's parameters, and of what belongs to them, this process of its tensor group holds.

    Without tensor parallelism every parameter is whole (it may still be sharded by ``fully_shard``). ``mesh``: the
    tensor group; ``stage``: all processes of this one's pipeline stage, as CPUs.
    """

    def __init__(
        self, table: Mapping[str, Cut] | None = None, mesh: DeviceMesh | None = None, stage: DeviceMesh | None = None
    ) -> None:
        self.table = dict(table or {})
        self.group, self.stage = None if mesh is None else mesh.get_group(), stage
        self.size, self.rank = (1, 0) if mesh is None else (mesh.size(), mesh.get_local_rank())

    def __bool__(self) -> bool:
        return self.size > 1

    def shape(self, name: str, t: Tensor) -> tuple[int, ...]:
        """The shape of the whole of parameter ``name`` (or of a state that belongs to it), of which ``t`` is held."""
        return self.table[name].shape if t.ndim and name in self.table else tuple(t.shape)

    def whole(self, name: str, t: Tensor) -> Tensor:
        """The full value of parameter ``name``, or of a state that belongs to it; all processes must ask for it."""
        t, cut = whole(t), self.table.get(name)
        if cut is None or cut.shared or not t.ndim:
            return t
        parts = [torch.empty_like(t, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, t.contiguous(), group=self.group)
        return cut.join(parts)

    def like(self, name: str, value: Tensor, pattern: Tensor) -> Tensor:
        """The inverse of `whole`: what this process holds of a full value, sharded as ``pattern`` is."""
        cut = self.table.get(name)
        return like(value if cut is None or not value.ndim else cut.take(value, self.rank), pattern)

    def rows(self, name: str, t: Tensor) -> Tensor:
        """What of parameter ``name`` (or of a state that belongs to it) this process stores: rows of the whole, in main
        memory, shared out among all processes of the stage (which must all ask); what is not cut as it is."""
        cut = self.table.get(name)
        if cut is None or cut.shared or not t.ndim:
            return t
        assert self.stage is not None
        full = self.whole(name, t)
        share = -(-len(full) // self.stage.size())
        begin = share * self.stage.get_local_rank()
        own = full[begin : begin + share].to("cpu", copy=True)
        return DTensor.from_local(
            own, self.stage, [Shard(0)], run_check=False, shape=full.shape, stride=full.contiguous().stride()
        )

    # -- gradients -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sum_shared(self, model: LM) -> None:
        """Sum the gradients of what belongs to all groups, of which each process has seen its own groups' part."""
        if not self:
            return
        found = [v for name, p in model.named_parameters() if p.grad is not None for v in self._shared(name, p.grad)]
        if found:
            sums = self._sum(found).split([v.numel() for v in found])
            torch._foreach_copy_(found, [s.view_as(v) for s, v in zip(sums, found, strict=True)])

    def _sum(self, pieces: list[Tensor]) -> Tensor:
        """The sum of the group's pieces, one behind the other."""
        flat = torch.cat([v.flatten() for v in pieces])
        dist.all_reduce(flat, group=self.group)
        return flat

    def clip(self, model: LM, limit: float, world: World) -> float:
        """Scale the gradients down to a norm of ``limit`` if theirs, over all stages, is above; the norm they had."""
        if not self and world.config.pipeline == 1:
            return float(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)))
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norm = math.sqrt(world.over_stages(float(self.squared_norm(gradients))))
        factor = limit / (norm + 1e-6)  # as torch's own; what is not a number makes all gradients so
        if not factor >= 1:
            torch._foreach_mul_(_local(gradients.values()), factor)
        return norm

    @torch.no_grad()
    def squared_norm(self, tensors: Mapping[str, Tensor], *, summed: bool = True) -> Tensor:
        """Sum of the squares of all numbers of tensors that belong to parameters (float64); those that all hold count
        once. ``summed``: gradients are as `sum_shared` leaves them, not as it finds them."""
        if not self:
            return squared_norm(list(tensors.values()))
        parts = [v for name, t in tensors.items() for v in self._shared(name, t)] if not summed else []
        once = [v for name, t in tensors.items() if summed or name not in self.table for v in self._alike(name, t)]
        total = _squares(_local(tensors.values()))
        if once:
            total -= (1 - 1 / self.size) * _squares(once)
        if parts:
            total += self._sum(parts).double().square().sum() / self.size - _squares(parts)
        sharded = next((t for t in tensors.values() if isinstance(t, DTensor)), None)
        if sharded is not None:
            dist.all_reduce(total, group=sharded.device_mesh.get_group("shard"))
        dist.all_reduce(total, group=self.group)
        return total

    def _alike(self, name: str, t: Tensor) -> Iterator[Tensor]:
        """Views of what all processes of the group hold of ``t`` (of its shard here)."""
        if name in self.table:
            yield from self._shared(name, t)
        else:
            yield t.to_local() if isinstance(t, DTensor) else t

    def _shared(self, name: str, t: Tensor) -> Iterator[Tensor]:
        """Views of the pieces of ``t`` (of its shard here) that belong to all groups."""
        cut = self.table.get(name)
        if cut is None or all(w != n for w, n in zip(cut.whole, cut.part, strict=True)):
            return
        local, begin = t, 0
        if isinstance(t, DTensor):
            # fully_shard cuts the first dimension, along which these pieces lie, into equal parts but for the last.
            local = t.to_local()
            begin = t.device_mesh.get_local_rank("shard") * -(-t.shape[0] // t.device_mesh["shard"].size())
        end = 0
        for w, n in zip(cut.whole, cut.part, strict=True):
            first, end = end, end + n
            low, high = max(first - begin, 0), min(end - begin, local.shape[cut.dim])
            if w == n and low < high:
                yield local.narrow(cut.dim, low, high - low)


def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def _squares(tensors: list[Tensor]) -> Tensor:
    return torch.stack(list(torch._foreach_norm(tensors))).double().square().sum()


# -- cutting a model ---------------------------------------------------------------------------------------------------


def part_config(config: ModelConfig, size: int) -> ModelConfig:
    """The layers of one of ``size`` processes, as a config of fewer groups and hidden units; d_model stays whole."""
    p, f = config.perception, config.ffn
    perception = p.model_copy(update={"groups": p.groups // size})
    ffn = f.model_copy(update={"hidden": f.hidden // size, "adaptive_groups": f.adaptive_groups // size})
    return config.model_copy(update={"perception": perception, "ffn": ffn})


@torch.no_grad()
def share_out(model: LM, world: World) -> Cuts:
    """Leave of a model this process's part of every layer, and join the parts' outputs and gradients.

    ``model.config`` stays that of the whole.
    """
    size = world.config.tensor
    if size == 1:
        return Cuts()
    assert world.mesh is not None
    mesh = world.mesh["tensor"]
    with torch.device("meta"):
        parts = LM(part_config(model.config, size))
    table: dict[str, Cut] = {}
    for i, block in model.blocks.named_children():  # of a stage: some of them
        part = parts.blocks[int(i)]
        for kind in ("mixer", "ffn"):
            full, own = getattr(block, kind), getattr(part, kind)
            cuts = _cuts(full, own)
            held = {name: cuts[name].take(p, world.tensor_rank) for name, p in full.named_parameters()}
            own.load_state_dict(held, assign=True)
            setattr(block, kind, own)
            _join(own, mesh)
            table |= {f"blocks.{i}.{kind}.{name}": c for name, c in cuts.items()}
    shape = (world.config.pipeline, world.size // world.config.pipeline)
    return Cuts(table, mesh, init_device_mesh("cpu", shape, mesh_dim_names=("pipeline", "stage"))["stage"])


def _cuts(full: nn.Module, part: nn.Module) -> dict[str, Cut]:
    """How the parameters of a layer were cut, seen from its shapes and seams and those of its part."""
    own, seams, part_seams = dict(part.named_parameters()), _seams(full), _seams(part)
    found = {}
    for name, p in full.named_parameters():
        differ = [d for d in range(p.ndim) if p.shape[d] != own[name].shape[d]]
        assert len(differ) <= 1, f"{name} is cut along more than one dimension"
        dim = differ[0] if differ else 0
        lengths = seams.get(name, (p.shape[dim],)), part_seams.get(name, (own[name].shape[dim],))
        found[name] = Cut(tuple(p.shape), dim, *lengths)
    return found


def _seams(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameters in which several things lie on top of each other, and the rows of each."""
    if not isinstance(layer, PerceptionMixer):
        return {}
    rows = layer.fused_rows["in_proj.weight"]
    qkv, heads = rows[:3], layer.head_split
    return {"in_proj.weight": rows, "conv": qkv, "slope": qkv, "head_proj.weight": heads, "head_proj.bias": heads}


def _join(layer: nn.Module, mesh: DeviceMesh) -> None:
    """What enters the layer gets the sum of all parts' gradients, what comes out is the sum of all parts' outputs."""

    def enter(_: nn.Module, args: tuple) -> tuple:
        x = DTensor.from_local(args[0], mesh, [Replicate()], run_check=False)
        return x.to_local(grad_placements=[Partial()]), *args[1:]

    def leave(_: nn.Module, args: tuple, out):
        y, *rest = out if isinstance(out, tuple) else (out,)
        y = DTensor.from_local(y, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()
        return (y, *rest) if rest else y

    layer.register_forward_pre_hook(enter)
    layer.register_forward_hook(leave)
