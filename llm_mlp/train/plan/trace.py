"""What a micro-batch makes in memory, followed on fake tensors; what a process holds, of models built without data.

A layer of each kind runs forward and backward under FakeTensorMode; every storage is counted while it lives, and
those that autograd saves for the backward pass by its hooks. A CPU-only torch cannot make fake CUDA tensors (it has no
device guard for them), so the tensors say that they are on the CPU while the ops follow their Triton kernels, whose
registered shapes do not depend on the device, and what torch itself does otherwise on CUDA stands in `_AsCuda`.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from llm_mlp.config import ModelConfig, ModulePrecisionConfig, OptimizerConfig, ParallelConfig
from llm_mlp.models.lm import LM, Block, Checkpointing, selective
from llm_mlp.models.mixer import rms_norm
from llm_mlp.ops import linear_cross_entropy
from llm_mlp.ops.backend import assuming
from llm_mlp.precision import Precision
from llm_mlp.train.eight_bit import AdamW8bit, block_of
from llm_mlp.train.float8 import use_float8
from llm_mlp.train.optim import AT_ONCE, Muon, empty_state, make_optimizers, matrices_of
from llm_mlp.train.parallel import World, shard
from llm_mlp.train.plan.figures import PlanError

SAME = ModulePrecisionConfig()
ROUND = 512  # bytes that CUDA's allocator deals in


@dataclass(frozen=True)
class Trace:
    """Bytes of one part of a model, reading one micro-batch; without its parameters and its input."""

    saved: int  # what autograd keeps for the backward pass
    state: int  # of the state after the last token, which the part returns, what is not saved as well
    whole_state: int
    forward: int  # most alive in the forward pass, the saved included
    backward: int  # most alive in the backward pass, the saved and all gradients included
    output: int


def saved_bytes(run: Callable[[], Any], known: list[Tensor]) -> int:
    """Bytes of the storages that autograd saves while ``run()`` computes; those of ``known`` tensors do not count."""
    with _saving(known) as found:
        keep = run()
        del keep
    return sum(found.values())


@contextlib.contextmanager
def _saving(known: list[Tensor]) -> Iterator[dict[int, int]]:
    """Sizes of distinct storages by identity. Real ones count whole: a view keeps the storage it looks into."""
    skip = {t.untyped_storage()._cdata for t in known}
    found: dict[int, int] = {}
    held: list[Any] = []  # a storage that is gone could leave its identity to another

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in skip:
            found[storage._cdata] = storage.nbytes()
            held.append(storage)
        return t.detach()  # of a node's own output: without the node, which would hold itself

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield found
    held.clear()  # the hooks live as long as the graph, which lets go of its tensors one by one


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that are alive and were made inside; those of ``known`` tensors do not count."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._known = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inside = _INSIDE.get(str(func.overloadpacket))
        if inside is not None:
            self.peak = max(self.peak, self.now + inside(*args))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._add(t)
        return out

    def _add(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in self._known:
            return
        self._sizes[key] = size = -(-storage.nbytes() // ROUND) * ROUND
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


# Large tensors that exist only while a kernel's host code runs, which its registered shapes do not show.
_INSIDE: dict[str, Callable[..., int]] = {
    # the gradients of the states before each chunk
    "llm_mlp.perceive_backward": lambda q, k, e, w, g, y, residual, before, *_: before.nbytes,
    # gradients of the rows in slots (fp32), and their order: keys and places, sorted
    "llm_mlp.memorise_read_backward": lambda q, k, w, old_k, old_w, slot, *_: (
        slot.numel() * (4 * (q.shape[-1] + w.shape[-1]) + 4 * 8)
    ),
}


class _RmsNorm(torch.autograd.Function):
    """What torch's fused kernel on CUDA saves: the input and a number a row."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        return torch.empty_like(ctx.saved_tensors[0])


class _AsCuda(TorchFunctionMode):
    """What torch does on CUDA and not on a CPU, as far as a layer can tell."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]  # another object every time
            return True
        if func is Tensor.data_ptr:
            return 0  # a fake tensor lies nowhere; CUDA's allocator aligns
        if func is F.rms_norm:
            return _RmsNorm.apply(args[0])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _fake(on_gpu: bool) -> Iterator[None]:
    as_cuda = _AsCuda() if on_gpu else contextlib.nullcontext()
    with FakeTensorMode(), assuming("triton" if on_gpu else "chunked"), as_cuda:
        yield


def _with_fake_parameters(module: nn.Module) -> None:
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype))


def _follow(
    module: nn.Module, shape: tuple[int, ...], run: Callable[..., tuple[Tensor, Any]], on_gpu: bool, inputs: int = 1
) -> Trace:
    """``run(x, ...)`` of so many inputs of ``shape`` and backward from its first result. bf16 by autocast on a GPU, as
    on a CPU fp32."""
    with _fake(on_gpu):
        _with_fake_parameters(module)
        read = [torch.empty(shape, requires_grad=True) for _ in range(inputs)]
        known = [*read, *module.parameters()]
        with _Live(known) as live:
            cast = torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if on_gpu else contextlib.nullcontext()
            with _saving(known) as saved, cast:
                y, kept = run(*read)
            forward, alive = live.peak, live.now
            states = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tree_leaves(kept)}
            own, whole_state = sum(saved.values()), sum(states.values())
            state = sum(size for key, size in states.items() if key not in saved)
            output, grad = y.nbytes, torch.empty_like(y)
            edge = torch.autograd.graph.get_gradient_edge(y)
            del y, kept
            if not own:  # checkpointing has hooks of its own, and keeps what it keeps: all that is alive now
                own = live.now - output  # its gradient's size
                state = alive - output - own
            live.peak = live.now
            torch.autograd.backward((edge,), (grad,))
            return Trace(own, state, whole_state, forward, live.peak, output)


def _in_precision(modules: ModulePrecisionConfig, on_gpu: bool, blocks: Sequence[nn.Module], loss: Any = None) -> Any:
    """Let blocks compute in the precisions that a run's `module_precision` gives their parts; the loss in its own."""
    part: Any = SimpleNamespace(blocks=blocks, head_loss=loss)  # what is asked of a model
    if modules.ffn == "fp8":
        use_float8(part)
    Precision("bf16" if on_gpu else "fp32", torch.device("cpu"), modules).apply(part)
    return part.head_loss


@cache
def block_trace(
    config: ModelConfig,
    layer: int,
    sequences: int,
    length: int,
    on_gpu: bool,
    mode: Checkpointing = "none",
    modules: ModulePrecisionConfig = SAME,
) -> Trace:
    """A layer of ``config`` reading ``sequences`` of ``length`` tokens; its input is the residual stream in fp32 (with
    routing: also that of all layers before, which is kept as theirs; its gradients count here).

    ``mode`` selective: as it is then run (of ``full`` nothing but the input is kept, which needs no trace of its own).
    """
    with torch.device("meta"):
        block = Block(config, layer)
    _in_precision(modules, on_gpu, [block])

    def run(x: Tensor, *others: Tensor) -> tuple[Tensor, Any]:
        earlier = list(others) if block.routing is not None else None
        if mode == "selective":
            return checkpoint(
                block, x, earlier, None, None, use_reentrant=False, preserve_rng_state=False, context_fn=selective
            )
        return block(x, earlier, None, None)

    inputs = 1 + (layer if block.routing is not None else 0)
    return _follow(block, (sequences, length, config.d_model), run, on_gpu, inputs)


@cache
def loss_trace(
    config: ModelConfig, sequences: int, length: int, on_gpu: bool, modules: ModulePrecisionConfig = SAME
) -> Trace:
    """The last norm, the head and the loss."""
    with torch.device("meta"):
        head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def summed(x: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(x, head.weight, targets, cap=config.logit_cap, reduction="sum")

    loss = _in_precision(modules, on_gpu, [], summed)

    def run(x: Tensor) -> tuple[Tensor, Any]:
        targets = torch.empty((sequences, length), dtype=torch.int64)
        return loss(rms_norm(x, config.norm_eps), targets), []

    return _follow(head, (sequences, length, config.d_model), run, on_gpu)


@cache
def step_bytes(config: ModelConfig, optimizer: str, state: str, on_gpu: bool) -> int:
    """Most that the optimizers' step makes beside weights, gradients and state (torch's own, fused, makes nothing)."""
    # Muon works through a bounded number of parameters at a time: more layers than fill that twice change nothing.
    kinds = len(config.pattern)
    own = sum(w.numbers for w in weights_of(config.model_copy(update={"n_layers": 1}), optimizer) if w.matrices)
    layers = min(config.n_layers, (2 * AT_ONCE // own if own else 0) + 2 * kinds)
    with torch.device("meta"):
        model = LM(config.model_copy(update={"n_layers": layers}))
    with _fake(on_gpu):
        _with_fake_parameters(model)
        found: list[torch.optim.Optimizer] = [
            o for o in make_optimizers(model, _settings(optimizer, state)) if isinstance(o, (Muon, AdamW8bit))
        ]
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        empty_state(found)
        held = [t for o in found for own in o.state.values() for t in own.values()]
        with _Live([*model.parameters(), *held]) as live:
            for o in found:
                o.step()
        return live.peak


# -- what a process holds -------------------------------------------------------------------------------------------


def _on_meta(config: ModelConfig, layers: range | None) -> LM:
    """A model with these of its layers alone (None: all)."""
    with torch.device("meta"):
        model = LM(config)
    if layers is not None:
        for i in set(range(config.n_layers)) - set(layers):
            del model.blocks._modules[str(i)]
    return model


def held_bytes(
    config: ModelConfig, optimizer: str, shards: int, zero: int, state: str = "same", layers: range | None = None
) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer state of rank 0 (the largest) of ``shards`` processes; ``layers``: of
    a model that has these alone.

    The model is built on the meta device, sharded by what training shards by over torch's fake process group
    (``shards`` 1 or ``zero`` 0: it is whole), and the optimizers make their state of it.

    Raises:
        PlanError: processes of a run are connected here already.
    """
    if dist.is_initialized():
        raise PlanError("a plan makes a process group of its own; this process is part of one already")
    model = _on_meta(config, layers)
    sharded = shards > 1 and zero > 0
    if sharded:
        from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

        dist.init_process_group("fake", rank=0, world_size=shards, store=FakeStore())
    try:
        if sharded:
            shard(model, World(ParallelConfig(data="fsdp", zero=zero), torch.device("cpu"), 0, shards))
        optimizers = make_optimizers(model, _settings(optimizer, state))
        empty_state(optimizers)
        weights = sum(_local(p) for p in model.parameters())
        states = (t for o in optimizers for own in o.state.values() for t in own.values())
        return weights, weights, sum(_local(t) for t in states)
    finally:
        if sharded:
            dist.destroy_process_group()


def _local(t: Tensor) -> int:
    return (t.to_local() if hasattr(t, "to_local") else t).nbytes


@dataclass(frozen=True)
class Weight:
    """A parameter of a layer (of none: ``layer`` -1)."""

    layer: int
    shape: tuple[int, ...]
    matrices: tuple[tuple[int, int], ...]  # that Muon orthogonalises in it; none: AdamW's
    block: int = 0  # numbers that share a scale in state of 8 bits; 0: state in full

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    def local(self, shards: int) -> int:
        """Numbers of the largest of its shards: fully_shard cuts the first dimension."""
        rows = self.shape[0]
        return -(-rows // shards) * (self.numbers // rows)

    def state_bytes(self, shards: int) -> int:
        """Muon keeps a mean of the gradients; AdamW two, and a count."""
        numbers = self.local(shards)
        mean = numbers + 4 * (numbers // self.block) if self.block else 4 * numbers
        return mean if self.matrices else 2 * mean + 4


@cache
def weights_of(
    config: ModelConfig, optimizer: str, state: str = "same", layers: range | None = None
) -> tuple[Weight, ...]:
    """The parameters of ``config``, with ``layers`` of these alone: of the model built on the meta device and the
    optimizers that get them."""
    model = _on_meta(config, layers)
    rows: dict[int, tuple[tuple[int, int], ...]] = {}
    muons = [o for o in make_optimizers(model, _settings(optimizer, state)) if isinstance(o, Muon)]
    for group in (group for o in muons for group in o.param_groups):
        for p, parts in zip(group["params"], group["rows"], strict=True):
            rows[id(p)] = tuple((m.shape[0], m.shape[1]) for m in matrices_of(p, parts))
    return tuple(
        Weight(
            int(name.split(".")[1]) if name.startswith("blocks.") else -1,
            tuple(p.shape),
            rows.get(id(p), ()),
            block_of(p.shape) if state == "8bit" else 0,
        )
        for name, p in model.named_parameters()
    )


def _settings(optimizer: str, state: str) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"name": optimizer, "state": state})
