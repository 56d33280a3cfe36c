"""Muon for matrices with AdamW for the rest, or AdamW alone.

Muon (Jordan 2024; scaled to AdamW's root mean square as in arXiv 2502.16982) orthogonalises a whole logical matrix,
gathered where it is sharded. Fused weights are cut at their seams first (q, k, v and each gate are matrices of their
own) and per-group weights [G, R, F] are G matrices. Embedding, head, vectors, convolutions and matrices with a side
below 32 go to AdamW. ``optimizer.state: 8bit`` keeps the means of both in 8 bits (`llm_mlp.train.eight_bit`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llm_mlp.config import OptimizerConfig
from llm_mlp.models import LM
from llm_mlp.train.eight_bit import AdamW8bit, Codes, block_of, local, sharded_as
from llm_mlp.train.tensor import Cuts

MUON_SIDE = 32  # smallest side of a matrix that Muon takes
NEWTON_SCHULZ_STEPS = 5
AT_ONCE = 2**29  # numbers of whole matrices that Muon has changes of at a time, and of one more parameter


def newton_schulz(x: Tensor, steps: int = NEWTON_SCHULZ_STEPS) -> Tensor:
    """Approximately U V^T of each matrix ``[..., r, c]`` (quintic iteration of Muon).

    Runs in bfloat16 on CUDA, in the matrices' own dtype elsewhere.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    y = x.bfloat16() if x.is_cuda and x.dtype != torch.float64 else x
    flip = y.shape[-2] > y.shape[-1]
    if flip:
        y = y.mT
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = y @ y.mT
        y = a * y + (b * s + c * (s @ s)) @ y
    return (y.mT if flip else y).to(x.dtype)


class _Change(NamedTuple):
    """A change that Muon is about to make."""

    parameter: Tensor
    target: Tensor  # the parameter, or zeros of the whole of it where it is cut or sharded
    update: Tensor
    rows: tuple[int, ...]
    name: str


class Muon(torch.optim.Optimizer):
    """``rows`` of a parameter group: per parameter, the rows of the matrices stacked in it (empty: one matrix).

    ``names``: per parameter, under which name ``cuts`` knows it. ``eight_bit``: keep the momentum of parameters that
    are large enough (`block_of`) in 8 bits.
    """

    def __init__(
        self,
        groups: Iterable[dict],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        cuts: Cuts | None = None,
        eight_bit: bool = False,
    ) -> None:
        super().__init__(list(groups), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.cuts = cuts or Cuts()
        self.codes = Codes(signed=True, device=self.param_groups[0]["params"][0].device) if eight_bit else None

    def fresh(self, p: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        if self.codes is not None and (block := block_of(p.shape)):
            return self.codes.zeros("momentum", p, block)
        return {"momentum": torch.zeros_like(p)}

    def _momentum(self, p: Tensor, share: float) -> Tensor:
        """The running mean of a parameter's gradients, of which the newest makes up ``share``; it is kept."""
        assert p.grad is not None
        if not self.state[p]:
            self.state[p] = self.fresh(p)
        state = self.state[p]
        if "momentum" in state:
            return state["momentum"].lerp_(p.grad, share)
        assert self.codes is not None
        own = local(p.grad)
        mean = self.codes.read(state, "momentum", own.dtype).lerp_(own, share)
        self.codes.write(state, "momentum", mean)
        return sharded_as(mean, p)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            pending: list[_Change] = []
            numbers = 0
            for p, rows, name in zip(group["params"], group["rows"], group["names"], strict=True):
                if p.grad is None:
                    continue
                update = p.grad.lerp(self._momentum(p, 1 - group["momentum"]), group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                target: Tensor = p
                full = self.cuts.whole(name, update)
                if full is not update:
                    # The whole matrix is needed: it is gathered, every process computes the change and keeps its part.
                    target = torch.zeros_like(full)
                pending.append(_Change(p, target, full, rows, name))
                numbers += full.numel()
                if numbers >= AT_ONCE:
                    self._change(pending, group["lr"])
                    numbers = 0
            self._change(pending, group["lr"])

    def _change(self, pending: list[_Change], lr: float) -> None:
        """Orthogonalises the updates of the parameters ``pending``, matrices of one shape as one batch, and applies
        them; the list is emptied."""
        shapes: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for each in pending:
            own_and_change = zip(matrices_of(each.target, each.rows), matrices_of(each.update, each.rows), strict=True)
            for own, change in own_and_change:
                shapes[own.shape[-2], own.shape[-1]].append((own, change))
        for (r, c), pairs in shapes.items():
            change = newton_schulz(torch.stack([u for _, u in pairs]))
            torch._foreach_add_([own for own, _ in pairs], list(change.unbind(0)), alpha=-lr * 0.2 * max(r, c) ** 0.5)
        for each in pending:
            if each.target is not each.parameter:
                each.parameter.add_(self.cuts.like(each.name, each.target, each.parameter))
        pending.clear()


def matrices_of(weight: Tensor, rows: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The logical matrices of a weight, as views."""
    if weight.ndim == 3:
        return weight.unbind(0)
    return weight.split(rows) if rows else (weight,)


def make_optimizers(model: LM, config: OptimizerConfig, cuts: Cuts | None = None) -> list[torch.optim.Optimizer]:
    """The optimizers of a model, of which ``cuts`` says what part this is; together they hold every parameter once
    (asserted)."""
    cuts = cuts or Cuts()
    eight_bit = config.state == "8bit"
    fused = model.fused_rows()
    matrices: list[nn.Parameter] = []
    rows: list[tuple[int, ...]] = []
    names: list[str] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    embedding: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        parts, shape = fused.get(name, ()), cuts.shape(name, p)
        if parts and name in cuts.table:
            parts = cuts.table[name].whole
        smallest = min([*shape[-2:], *parts]) if p.ndim >= 2 else 0
        is_matrix = name.startswith("blocks.") and p.ndim in (2, 3) and smallest >= MUON_SIDE
        if config.name == "muon" and is_matrix:
            matrices.append(p)
            rows.append(parts)
            # Matrices of groups lie whole in a process of a tensor group; only of others does it hold a part.
            names.append(name if p.ndim == 2 else "")
        elif config.name == "adamw" and is_matrix:
            decayed.append(p)
        elif name == "embedding.weight":
            embedding.append(p)
        else:
            plain.append(p)
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(
            Muon(
                [{"params": matrices, "rows": rows, "names": names, "scale": config.matrix_rate}],
                lr=config.lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                cuts=cuts,
                eight_bit=eight_bit,
            )
        )
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    settings["fused"] = next(model.parameters()).is_cuda
    kinds = [(plain, 0.0, 1.0), (embedding, 0.0, config.embedding_rate)]
    kinds.append((decayed, config.weight_decay, config.matrix_rate))
    for kind, coded in ((torch.optim.AdamW, False), (AdamW8bit, True)):
        groups = []
        for parameters, weight_decay, scale in kinds:
            own = [p for p in parameters if (eight_bit and block_of(p.shape) > 0) == coded]
            if own:
                groups.append({"params": own, "weight_decay": weight_decay, "scale": scale})
        if groups:
            optimizers.append(kind(groups, **settings))
    held = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["decay"] = group["weight_decay"]  # what `set_rates` scales
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters())), "every parameter once"
    return optimizers


def set_rates(optimizers: list[torch.optim.Optimizer], rate: float, decay_factor: float, momentum: float) -> None:
    """The rate, the weight decay as a factor of the configured one, and Muon's momentum, for the next step."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]  # of this kind of parameters
            group["weight_decay"] = group["decay"] * decay_factor
            if "momentum" in group:
                group["momentum"] = momentum


def clip_limit(config: OptimizerConfig, parameters: int) -> float:
    """The gradient norm above which is clipped; infinite without clipping.

    ``clip_scale: size``: the norm of independent gradients grows as the root of their number; ``clip`` is for 100 M.
    """
    if not config.clip:
        return math.inf
    return config.clip * (math.sqrt(parameters / 1e8) if config.clip_scale == "size" else 1.0)


def optimizer_tensors(model: LM, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All optimizer state, keyed by parameter name: ``blocks.0.ffn.up.weight/momentum``."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(p)]}/{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(
    model: LM,
    optimizers: list[torch.optim.Optimizer],
    tensors: dict[str, Tensor],
    into: Callable[[str, Tensor, Tensor], Tensor],
) -> None:
    """The inverse of `optimizer_tensors`; ``into(name, stored, parameter)``: what of a stored tensor belongs here.

    Raises:
        KeyError: a name that is no parameter of the model.
    """
    parameters = dict(model.named_parameters())
    owner = {id(p): o for o in optimizers for g in o.param_groups for p in g["params"]}
    for full, value in tensors.items():
        name, _, key = full.rpartition("/")
        p = parameters[name]
        if key == "step":  # AdamW counts on the CPU unless fused
            on = p.device if owner[id(p)].defaults.get("fused") else torch.device("cpu")
            owner[id(p)].state[p][key] = value.to(on)
        else:  # everything else lives with the parameter
            owner[id(p)].state[p][key] = into(name, value.to(p.device), p)


@torch.no_grad()
def empty_state(optimizers: list[torch.optim.Optimizer]) -> None:
    """Make the state that the first step would make, all zero, for a checkpoint to fill."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if isinstance(optimizer, (Muon, AdamW8bit)):
                    optimizer.state[p] = optimizer.fresh(p)
                else:
                    on = p.device if optimizer.defaults.get("fused") else torch.device("cpu")
                    state = {"step": torch.zeros((), dtype=torch.float32, device=on)}
                    optimizer.state[p] = state | {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}


def momentum_tensors(model: LM, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The running means of the gradients, by parameter; empty before the first step (and what is in 8 bits is not
    among them)."""
    found = (full.rpartition("/") + (t,) for full, t in optimizer_tensors(model, optimizers).items())
    return {name: t for name, _, key, t in found if key in ("momentum", "exp_avg")}
