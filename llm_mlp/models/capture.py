"""One decoding step as a CUDA graph: some hundred small kernels launched as one."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_mlp.models.lm import LM
from llm_mlp.models.mixer import State


class CapturedStep:
    """`LM.step` of a batch of one size over one pool of states, replayed without Python in between.

    The model, the state's tensors and ``indices`` must stay where they are: what is captured are their addresses.

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
        before = {name: tensor.clone() for name, tensor in state.items()}
        own = dict(state)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # kernels are compiled and checked here, not in the capture
            for _ in range(2):
                model.step(self.tokens, own, indices)
        torch.cuda.current_stream(device).wait_stream(stream)
        if grown := [name for name, tensor in own.items() if tensor is not state[name]]:
            raise ValueError(f"a CUDA graph cannot hold a state that grows: {', '.join(grown[:3])}")
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = model.step(self.tokens, own, indices)
        for name, tensor in state.items():
            tensor.copy_(before[name])

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch, vocabulary]`` after ``tokens [batch]``; the next call overwrites them."""
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits
