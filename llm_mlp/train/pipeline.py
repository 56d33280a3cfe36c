"""Pipeline parallelism: the layers are cut into stages, each on processes of its own, over torch's schedules.

What a step reads is cut into micro-batches as anywhere else. Every process reads all of them; torch's schedule is given
their numbers alone (it would cut along dimension 0, where a packed row has nothing to cut), and a stage looks up by
number what it needs: the first the tokens, the last the targets, all of them where packed sequences begin, and each the
states of its own layers. From stage to stage travel the activations and, where later layers route, the inputs of all
layers so far.

A process keeps of the model what its stages hold, under the model's own names; optimizers, averages and checkpoints
know nothing of stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from llm_mlp.config import ConfigError, TrainConfig
from llm_mlp.data import Batch
from llm_mlp.models import LM
from llm_mlp.models.lm import Output
from llm_mlp.models.mixer import State, rms_norm
from llm_mlp.precision import Precision
from llm_mlp.train.compress import Communication
from llm_mlp.train.parallel import World, Wrapped


def check_parts(config: TrainConfig, per: int) -> None:
    """Refuse numbers of micro-batches that the schedules cannot order; ``per``: samples a step and reader."""
    parallel = config.parallel
    parts = per // int(config.micro_batch)
    if parts < parallel.pipeline:
        raise ConfigError(
            f"parallel.pipeline = {parallel.pipeline} needs as many micro-batches, but micro_batch = "
            f"{config.micro_batch} makes {parts} of the {per} sequences a reader takes; set a smaller micro_batch"
        )
    if parallel.schedule == "1f1b":
        return
    rounds = parts // parallel.pipeline
    if parts % rounds:
        raise ConfigError(
            f"parallel.schedule = interleaved cannot deal {parts} micro-batches to parallel.pipeline = "
            f"{parallel.pipeline} in {rounds} equal rounds; choose micro_batch so that it divides them"
        )
    if config.control.batch == "ramp" and parts % parallel.pipeline:  # else a multiple of them might not be dealt
        raise ConfigError(
            f"parallel.schedule = interleaved with control.batch = ramp needs micro-batches in multiples of "
            f"parallel.pipeline = {parallel.pipeline}, but micro_batch = {config.micro_batch} makes {parts}"
        )


# -- the cut --------------------------------------------------------------------------------------------------------


def layers_of(stage: int, stages: int, n_layers: int) -> range:
    """The layers of a stage: as equal numbers as can be."""
    return range(n_layers * stage // stages, n_layers * (stage + 1) // stages)


def own_stages(world: World) -> range:
    """The numbers of this process's stages; neighbouring stages lie on neighbouring processes."""
    return range(world.pipeline_rank, world.config.stages, world.config.pipeline)


def cut(model: LM, world: World) -> LM:
    """Take away from a whole model what this process's stages do not hold."""
    stages, own = world.config.stages, own_stages(world)
    kept = {i for stage in own for i in layers_of(stage, stages, model.config.n_layers)}
    for i in set(range(model.config.n_layers)) - kept:
        del model.blocks._modules[str(i)]  # ModuleList's own way of deleting would number the others anew
    if 0 not in own:
        del model.embedding
    if stages - 1 not in own:
        del model.head
    return model


def elsewhere(model: LM) -> set[str]:
    """Names of the whole model's tensors that this process's part of it lacks."""
    with torch.device("meta"):
        return LM(model.config).state_dict().keys() - model.state_dict().keys()


def collected(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """On the main process the named tensors of all stages, on the CPU; on others their own (all must ask)."""
    if world.config.pipeline == 1:
        return tensors
    found = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    told = world.gather({name: (t.shape, t.dtype) for name, t in found.items()})
    for stage in range(1, world.config.pipeline):
        rank = stage * (world.size // world.config.pipeline)
        if world.rank == rank:
            for name in sorted(found):
                dist.send(found[name], 0)
        elif world.main:
            for name, (shape, dtype) in sorted(told[rank].items()):
                found[name] = torch.empty(shape, dtype=dtype)
                dist.recv(found[name], rank)
    return found


Measure = Callable[[Iterable[tuple[str, nn.Parameter]]], Tensor]


# -- a stage --------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """A micro-batch under way; states of this process's layers before it, and (if streams go on) after it."""

    batch: Batch
    state: State | None = None
    after: State = field(default_factory=dict)


class Stage(nn.Module):
    """Consecutive layers, behind the embedding in the first stage and before head and loss in the last."""

    def __init__(self, model: LM, number: int, world: World, precision: Precision) -> None:
        super().__init__()
        stages = world.config.stages
        self.number, self.first, self.last = number, number == 0, number == stages - 1
        self.layers = layers_of(number, stages, model.config.n_layers)
        self.config, self.precision, self.device = model.config, precision, world.device
        self.dtype = next(model.parameters()).dtype
        # Methods: the model itself is no part of the stage.
        self.through, self.head_loss = model.through, model.head_loss
        self.embedding: Any = model.embedding if self.first else None
        self.blocks = nn.ModuleList(model.blocks._modules[str(i)] for i in self.layers)
        self.head: Any = model.head if self.last else None
        self.parts: Sequence[Part] = ()
        self.scale = 1.0  # of the loss
        self.gather_last = False  # sharded: exchange gradients with the last part alone
        self.named: list[tuple[str, nn.Parameter]] = []  # parameters by the model's names, sharded where they are
        self.measure: Measure | None = None
        self.measured: Tensor | None = None  # what it says of the first part's gradients

    def forward(self, x: Tensor, *earlier: Tensor, number: int | Tensor) -> Tensor | tuple[Tensor, ...]:
        """Part ``number``'s x ``[B, T, D]`` (of the first stage: nothing) and the inputs of the layers before.

        Returns the same for the next stage, or the summed loss times `scale`, ``[1]``.
        """
        part = self.parts[int(number)]
        batch, inputs = part.batch, list(earlier)
        with self.precision.autocast():
            if self.first:
                x = rms_norm(self.embedding(self._here(batch.tokens)), self.config.norm_eps)
            blocks = zip(self.layers, self.blocks, strict=True)
            x, after = self.through(blocks, x, inputs, part.state, batch.cu_seqlens)
            if self.last:
                x, targets = rms_norm(x, self.config.norm_eps), self._here(batch.targets)
                x = self.head_loss(x, targets, "sum").view(1) * self.scale
        if batch.last is not None:
            part.after |= {name: t.detach() for name, t in after.items()}
        if self.measure is not None and int(number) == 1 and x.requires_grad:
            x.register_hook(self._measure)  # the first part's backward pass is over, this one's has reached no weight
        if self.gather_last and int(number) == len(self.parts) - 1 and x.requires_grad:
            x.register_hook(self._gather)  # runs before the part's backward pass reaches a weight
        return x if self.last else (x, *inputs)

    def _here(self, t: Tensor) -> Tensor:
        return t.to(self.device, non_blocking=True)

    def _gather(self, _: Tensor) -> None:
        assert isinstance(self, FSDPModule)
        self.set_requires_gradient_sync(True)

    def _measure(self, _: Tensor) -> None:
        assert self.measure is not None
        self.measured = self.measure(self.named)

    def inputs(self, shape: Sequence[int], **options: Any) -> tuple[Tensor, ...]:
        """Empty tensors like those that come in for tokens of ``shape``."""
        return (torch.zeros(1, dtype=torch.int64),) if self.first else self._activations(self.layers[0], shape, options)

    def outputs(self, shape: Sequence[int], **options: Any) -> tuple[Tensor, ...]:
        """Empty tensors like those that go out for tokens of ``shape``."""
        if not self.last:
            return self._activations(self.layers[-1] + 1, shape, options)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return (torch.empty(1, dtype=wide, **options),)

    def _activations(self, layer: int, shape: Sequence[int], options: dict[str, Any]) -> tuple[Tensor, ...]:
        """Of the cut before ``layer``."""
        count = 1 + (layer if self.config.routing.last_layers else 0)
        size = (*shape, self.config.d_model)
        return tuple(torch.empty(size, dtype=self.dtype, **options) for _ in range(count))


class _Hidden(nn.Module):
    """A sharded stage that torch's schedules do not see to be one.

    They would gather all of a stage's weights at once and keep whole gradients until the last micro-batch, whatever
    ``parallel.zero`` says; ``fully_shard``'s own hooks do as it says, in these backward passes as in any other.
    """

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self._stage = (stage,)  # not a submodule

    def forward(self, *args: Tensor, number: Tensor) -> Any:
        return self._stage[0](*args, number=int(number))  # fully_shard would move the number to the GPU


class _Forward(nn.Module):
    """The stages one after another, without a backward pass; called as the model is, by all processes of a copy.

    The loss is that of the last stage's process, and 0 on the others.
    """

    def __init__(self, stages: list[Stage], world: World) -> None:
        super().__init__()
        self.stages, self.world = nn.ModuleList(stages), world

    def forward(self, tokens: Tensor, *, cu_seqlens: Any, targets: Tensor, reduction: str = "sum") -> Output:
        assert self.world.mesh is not None and reduction == "sum"
        group, processes = self.world.mesh.get_group("pipeline"), self.world.config.pipeline
        bounds = None if cu_seqlens is None else torch.as_tensor(cu_seqlens)
        part = Part(Batch(tokens, targets, bounds, None, None, []))
        loss = torch.zeros((), device=self.world.device)
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.parts, stage.scale = (part,), 1.0
            inputs = stage.inputs(tokens.shape, device=self.world.device)
            if not stage.first:
                for t in inputs:
                    dist.recv(t, group=group, group_src=(stage.number - 1) % processes)
            out = stage(*inputs, number=0)
            stage.parts = ()
            if stage.last:
                loss = out[0]
                continue
            for t in out:
                dist.send(t.contiguous(), group=group, group_dst=(stage.number + 1) % processes)
        return Output(None, loss, {})


class Pipeline(Wrapped):
    """A model cut into stages; ``call`` reads forward only (see `_Forward`), `gradients` goes both ways."""

    def __init__(self, model: LM, world: World, precision: Precision) -> None:
        self.model, self.world = model, world
        self.communication = Communication()
        self.stages = [Stage(model, number, world, precision) for number in own_stages(world)]
        self.modules = [self._wrap(stage) for stage in self.stages]
        for stage in self.stages:
            own = {id(p) for p in stage.parameters()}
            stage.named = [(name, p) for name, p in model.named_parameters() if id(p) in own]
        if self.sharded:
            self.modules = [_Hidden(stage) for stage in self.modules]
        self.call = _Forward(self.stages, world)
        self._made: tuple[tuple[int, ...], Any] = ((), None)
        # NCCL wants a group's first exchange to be of all its processes, and the schedules begin with those of two.
        world.over_stages(0.0)

    def gradients(self, parts: Sequence[Part], scale: float, measure: Measure | None) -> tuple[Tensor, Tensor | None]:
        """Adds the gradients of the parts' summed losses times ``scale``, met between the copies.

        ``measure`` is given the named parameters of each stage while their gradients are the first part's.

        Returns those losses' sum on the last stage's processes, 0 on others; and the sum of what ``measure`` says of
        this process's stages. The parts' ``after`` is filled in.
        """
        schedule = self._schedule(len(parts), parts[0].batch.tokens.shape)
        for stage in self.stages:
            stage.parts, stage.scale, stage.measure, stage.measured = parts, scale, measure, None
            if self.sharded:
                assert isinstance(stage, FSDPModule)
                stage.gather_last = self.world.config.zero == 1
                stage.set_requires_gradient_sync(not stage.gather_last)
        first, last = self.stages[0].first, self.stages[-1].last
        numbers = torch.arange(len(parts))
        losses: list[Tensor] = []
        try:
            schedule.step(*[numbers] * first, target=numbers if last else None, losses=losses, number=numbers)
        except RuntimeError as error:
            if error.__cause__ is None:
                raise
            raise error.__cause__ from None  # what a stage raises comes wrapped up in the schedule's own error
        finally:
            for stage in self.stages:
                stage.parts, stage.measure = (), None
        loss = torch.stack(losses).sum().detach() if last else torch.zeros((), device=self.world.device)
        measured = [stage.measured for stage in self.stages if stage.measured is not None]
        return loss, torch.stack(measured).sum() if measure else None

    def _schedule(self, count: int, shape: torch.Size) -> Any:
        """torch's schedule for ``count`` parts of tokens of one shape; what receives activations is kept with it."""
        key = (count, *shape)
        if self._made[0] != key:
            world, kept = self.world, {"device": "meta", "requires_grad": True}
            assert world.mesh is not None
            stages: list[Any] = [
                PipelineStage(
                    module,
                    stage.number,
                    world.config.stages,
                    world.device,
                    input_args=stage.inputs(shape, **kept),
                    output_args=stage.outputs(shape, **kept),
                    group=world.mesh.get_group("pipeline"),
                )
                for module, stage in zip(self.modules, self.stages, strict=True)
            ]
            if world.config.schedule == "interleaved":
                schedule: Any = ScheduleInterleaved1F1B(stages, count, loss_fn=_loss, scale_grads=False)
            else:
                schedule = Schedule1F1B(stages[0], count, loss_fn=_loss, scale_grads=False)
            self._made = (key, schedule)
        return self._made[1]


def _loss(output: Tensor, _: Tensor) -> Tensor:
    """The last stage's output is the loss already: its head runs inside the module that is sharded or averaged."""
    return output[0]
