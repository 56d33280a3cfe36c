"""A decoding step, or a training batch's forward and backward pass, as a CUDA graph: many kernels launched as one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from llm_mlp.models.lm import LM
from llm_mlp.models.mixer import State


class CapturedStep:
    """`LM.step` of a batch of one size over one pool of states, replayed without Python in between.

    The model, the state's tensors and ``indices`` must stay where they are (moving the model to another dtype or device
    makes new ones): what is captured are their addresses.

    Args:
        state: a pool of states; the captured steps change it in place, building this object does not.
        batch: rows of a step. indices: int ``[batch]`` on the model's device, the rows of the pool that a step uses
            (-1: none), read anew by every step; None: row b uses row b.

    Raises:
        ValueError: the model is not on a CUDA device, or a layer's state grows (attention) and has no fixed address.
    """

    def __init__(self, model: LM, state: State, batch: int, indices: Tensor | None = None) -> None:
        device = next(model.parameters()).device
        if device.type != "cuda":
            raise ValueError(f"a CUDA graph needs a model on a CUDA device; this one is on {device}")
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        untouched = indices is not None and bool((indices < 0).all())  # of a large pool a copy may not fit
        before = {} if untouched else {name: tensor.clone() for name, tensor in state.items()}
        own = dict(state)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # kernels are compiled and checked here, not in the capture
            for _ in range(2):
                model.step(self.tokens, own, indices)
        torch.cuda.current_stream(device).wait_stream(stream)
        if grown := [name for name, tensor in own.items() if tensor is not state[name]]:
            raise ValueError(f"a CUDA graph cannot hold a state that grows: {', '.join(grown[:3])}")
        self.held = model, own, indices  # the graph knows addresses only: nobody else may let go of them
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = model.step(self.tokens, own, indices)
        for name, tensor in before.items():
            state[name].copy_(tensor)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch, vocabulary]`` after ``tokens [batch]``; the next call overwrites them."""
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits


class CapturedGradients:
    """Forward and backward of a batch of one shape, replayed without Python in between (a perception layer's two passes
    are some 80 launches, which a GPU is done with before Python has made them).

    Gradients are added to those of the parameters, whose tensors must stay where they are: clear them by `clear`,
    never by setting them to None. Sequences are not packed and carry no state.

    Args:
        batch, length: of tokens ``[batch, length]``. autocast: makes the context that the forward pass runs in.

    Raises:
        ValueError: the model is not on a CUDA device.
    """

    def __init__(
        self, model: LM, batch: int, length: int, autocast: Callable[[], AbstractContextManager] = nullcontext
    ) -> None:
        device = next(model.parameters()).device
        if device.type != "cuda":
            raise ValueError(f"a CUDA graph needs a model on a CUDA device; this one is on {device}")
        self.tokens, self.targets = (torch.zeros((batch, length), dtype=torch.int64, device=device) for _ in range(2))
        self.scale = torch.ones((), device=device)
        for p in model.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self.gradients = [p.grad for p in model.parameters() if p.grad is not None]
        before = [g.clone() for g in self.gradients]

        def run() -> Tensor:
            with autocast():
                loss = model(self.tokens, targets=self.targets, reduction="sum").loss * self.scale
            loss.backward()
            return loss.detach()

        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # kernels are compiled and checked here, not in the capture
            for _ in range(2):
                run()
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = run()
        torch._foreach_copy_(self.gradients, before)

    def __call__(self, tokens: Tensor, targets: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """The summed loss of ``targets`` times ``scale``; the next call overwrites it."""
        self.tokens.copy_(tokens, non_blocking=True)
        self.targets.copy_(targets, non_blocking=True)
        self.scale.fill_(scale)
        self.graph.replay()
        return self.loss

    def clear(self) -> None:
        """Gradients to zero."""
        torch._foreach_zero_(self.gradients)
