"""What perception heads do with a text: how long they remember, how much they erase, what surprises them."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from llm_mlp.models import LM
from llm_mlp.models.perception import watching
from llm_mlp.train.parallel import World

DEAD = 0.01  # a feature whose mean square is below this share of the average feature's


class HeadStatistics:
    """Of the first batch that a model reads inside `watching`; `values` then has, for each perception layer n:

    - ``heads/half_life/layer{n}``: tokens after which half of what a head wrote has faded, median over the heads;
    - ``heads/erase/layer{n}``: mean of beta, the share of what stood under a key that is taken away before writing;
    - ``heads/surprise/layer{n}``: what was written against what was found, root of mean squares;
    - ``heads/dead_features/layer{n}``: share of the first layer's features that hardly ever answer.
    """

    def __init__(self, model: LM) -> None:
        self._model = model
        self._found: dict[str, float] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self._found = {}
        with watching(self._model, self._see):
            yield

    @torch.no_grad()
    def _see(self, n: int, k: Tensor, w: Tensor, log_decay: Tensor, beta: Tensor | None, residual: Tensor) -> None:
        """k ``[B, T, G, F]``, w ``[B, T, G, m, V]``, log_decay and residual ``[B, T, G, m]``, beta or None."""
        if f"heads/surprise/layer{n}" in self._found or not k.numel():
            return
        decay = -log_decay.double().flatten(0, 1).mean(0)  # of each head
        squares = k.double().square().flatten(0, 1).mean(0)
        written = w.double().square().sum(-1).mean()
        values = {
            "half_life": float((math.log(2) / decay.clamp_min(1e-12)).median()),
            "erase": 0.0 if beta is None else float(beta.double().mean()),
            "surprise": float((residual.double().mean() / written.clamp_min(1e-30)).sqrt()),
            "dead_features": float((squares < DEAD * squares.mean(-1, keepdim=True)).double().mean()),
        }
        self._found |= {f"heads/{name}/layer{n}": value for name, value in values.items()}

    def values(self, world: World) -> dict[str, float]:
        """The mean over the processes that hold a layer (all must ask)."""
        found: dict[str, list[float]] = defaultdict(list)
        for own in world.gather(self._found):
            for name, value in own.items():
                found[name].append(value)
        return {name: sum(values) / len(values) for name, values in sorted(found.items())}
