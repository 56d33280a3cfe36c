"""Averages of the weights: an exponential moving average, and the mean of the last few points of the run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from llm_mlp.config import AverageConfig
from llm_mlp.models import LM


class Averages:
    """Kept beside the weights, sharded as they are; named ``ema`` and ``mean``."""

    def __init__(self, model: LM, config: AverageConfig) -> None:
        self.model, self.config = model, config
        self.ema: list[Tensor] = []
        self.points: list[list[Tensor]] = []  # oldest first
        self.updates = 0

    def _weights(self) -> list[Tensor]:
        return [p.detach() for p in self.model.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """After a step. The moving average's decay rises from 0 (1 - 1/n), so that the start does not weigh on it."""
        self.updates += 1
        if self.config.ema:
            if not self.ema:
                self.ema = [w.clone() for w in self._weights()]
            share = 1 - min(self.config.ema, 1 - 1 / self.updates)
            torch._foreach_lerp_(self.ema, self._weights(), share)
        if self.config.last and self.updates % self.config.every == 0:
            self.points = [*self.points, [w.clone() for w in self._weights()]][-self.config.last :]

    @torch.no_grad()
    def values(self) -> dict[str, list[Tensor]]:
        """The averages there are by now, in the parameters' order."""
        found = {"ema": self.ema} if self.ema else {}
        if self.points:
            # In float64: the mean of many equal numbers is that number.
            found["mean"] = [
                (sum(t.double() for t in column) / len(column)).to(column[0])
                for column in zip(*self.points, strict=True)
            ]
        return found

    @contextlib.contextmanager
    def in_place(self, values: list[Tensor]) -> Iterator[None]:
        """The model with ``values`` as its weights."""
        own = [w.clone() for w in self._weights()]
        self._fill(values)
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        for w, value in zip(self._weights(), values, strict=True):  # torch._foreach_copy_ knows no sharded tensors
            w.copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint: ``ema/<name>``, ``0/<name>`` ... of the points."""
        names = [name for name, _ in self.model.named_parameters()]
        rows = {"ema": self.ema} if self.ema else {}
        rows |= {str(i): point for i, point in enumerate(self.points)}
        return {f"{key}/{name}": t for key, row in rows.items() for name, t in zip(names, row, strict=True)}

    def expected(self, points: int, has_ema: bool) -> None:
        """Make room for what `load` will fill."""
        if has_ema:
            self.ema = [w.clone() for w in self._weights()]
        self.points = [[w.clone() for w in self._weights()] for _ in range(points)]
