"""Optimizer state in 8 bits: a code a number and a scale a block, between steps; a step works in full.

Block-wise dynamic quantisation (Dettmers et al., arXiv 2110.02861), of plain tensors beside each other. (torchao's
`AdamW8bit` keeps tensor subclasses, which safetensors do not hold and shards do not cut, wants its rate as a tensor and
has no Muon.) Two things are not the paper's:

- A block lies within a row: the scales ``[rows, blocks]`` are cut along the same rows as the parameter by
  ``fully_shard``, so that any number of processes reads any checkpoint; and the row of a rare token has scales of its
  own, for which the paper needed another embedding.
- Of the squared gradients the root is kept, which is what a step divides by and has half their range; in a block with
  any it is never rounded to zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

BLOCK = 256  # numbers that share a scale, at most; of a row that is no multiple of it, its largest divisor below
SHORTEST = 64  # of shorter blocks the scales would weigh as much as what they save
FEWEST = 4096  # numbers of a tensor that is worth it, as in the paper

State = dict[str, Tensor]


def block_of(shape: Sequence[int]) -> int:
    """Numbers of a block in the state of a parameter of ``shape``; 0: it is kept in full."""
    if len(shape) < 2 or math.prod(shape) < FEWEST:
        return 0
    block = next(b for b in range(min(BLOCK, shape[-1]), 0, -1) if shape[-1] % b == 0)
    return block if block >= SHORTEST else 0


def local(t: Tensor) -> Tensor:
    """What this process holds of a tensor that may be sharded; it shares its memory."""
    return t.to_local() if isinstance(t, DTensor) else t


def sharded_as(t: Tensor, p: Tensor) -> Tensor:
    """This process's rows ``t`` of something, as a tensor that is sharded along the rows of ``p``, if ``p`` is."""
    if not isinstance(p, DTensor):
        return t
    shape = torch.Size((*p.shape[:-1], t.shape[-1]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(t, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)


class Codes:
    """The 256 values between -1 (or 0) and 1 that a code stands for: ``dynamic`` as in the paper, section 1.3.

    Dense near 1 and, by powers of ten, down to 1e-6. The nearest one is looked up by the number's bits in float16,
    which is faster than a search and moves the border between two codes by 4 % of their distance at most.
    """

    def __init__(self, *, signed: bool, device: torch.device) -> None:
        found = [0.0, 1.0]
        for exponent in range(-6, 1):
            count = 2 ** (exponent + 6) * (1 if signed else 2)  # the middles of as many parts of 0.1 to 1
            middles = [10.0**exponent * (0.1 + 0.9 * (i + 0.5) / count) for i in range(count)]
            found += middles + ([-x for x in middles] if signed else [])
        self.values = torch.tensor(sorted(found), dtype=torch.float32, device=device)
        halves = torch.arange(2**16, dtype=torch.int32, device=device).to(torch.int16).view(torch.float16)
        borders = (self.values[:-1] + self.values[1:]) / 2
        self.nearest = torch.bucketize(halves.float(), borders).to(torch.uint8)
        if not signed:
            self.nearest[:8].clamp_(min=1)  # 0 to 4e-7: a step divides by it

    def zeros(self, name: str, p: Tensor, block: int) -> State:
        """The state ``name`` of a parameter ``p``, all zero: codes as ``p``, scales ``[..., blocks]``."""
        own = local(p)
        codes = torch.zeros_like(own, dtype=torch.uint8)
        scale = torch.zeros((*own.shape[:-1], own.shape[-1] // block), dtype=torch.float32, device=own.device)
        return {f"{name}_codes": sharded_as(codes, p), f"{name}_scale": sharded_as(scale, p)}

    def read(self, state: State, name: str, dtype: torch.dtype) -> Tensor:
        """The numbers themselves, of this process's rows."""
        codes, scale = local(state[f"{name}_codes"]), local(state[f"{name}_scale"])
        blocks = self.values[codes.int()].unflatten(-1, (scale.shape[-1], -1))
        return blocks.mul_(scale[..., None]).flatten(-2).to(dtype)

    def write(self, state: State, name: str, numbers: Tensor) -> None:
        """The inverse of `read`, to the nearest code."""
        codes, scale = local(state[f"{name}_codes"]), local(state[f"{name}_scale"])
        blocks = numbers.float().unflatten(-1, (scale.shape[-1], -1))
        torch.linalg.vector_norm(blocks, math.inf, -1, out=scale)
        blocks = blocks / scale[..., None].clamp(min=torch.finfo(torch.float32).tiny)
        bits = blocks.flatten(-2).half().view(torch.int16).int()  # negative ones index from the end, as they should
        codes.copy_(self.nearest[bits])


class AdamW8bit(torch.optim.Optimizer):
    """torch's AdamW, its two means kept in 8 bits: ``mean_codes, mean_scale, root_codes, root_scale`` and ``step``.

    Args:
        groups: as of `torch.optim.AdamW`, of parameters of which `block_of` is not 0, all on one device.
        fused: use torch's fused kernel for the step between reading and writing.
    """

    def __init__(self, groups: list[dict], *, lr: float, betas: tuple[float, float], eps: float, fused: bool) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "fused": fused})
        device = self.param_groups[0]["params"][0].device
        self.mean, self.root = Codes(signed=True, device=device), Codes(signed=False, device=device)

    def fresh(self, p: Tensor) -> State:
        """The state of a parameter before its first step."""
        block = block_of(p.shape)
        count = torch.zeros((), dtype=torch.float32, device=p.device if self.defaults["fused"] else "cpu")
        return {"step": count, **self.mean.zeros("mean", p, block), **self.root.zeros("root", p, block)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p] = self.fresh(p)
                state = self.state[p]
                # One parameter at a time: no more than its own means exist in full.
                mean = self.mean.read(state, "mean", p.dtype)
                square = self.root.read(state, "root", p.dtype).square_()
                adamw(
                    [local(p)],
                    [local(p.grad)],
                    [mean],
                    [square],
                    [],
                    [state["step"]],
                    foreach=False,
                    fused=self.defaults["fused"],
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
                self.mean.write(state, "mean", mean)
                self.root.write(state, "root", square.sqrt_())
