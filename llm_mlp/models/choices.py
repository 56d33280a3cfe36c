"""Which tokens a state's slots hold, and how many of two states' choices differ.

Choosing is discontinuous: where two scores lie within rounding, two ways of reading a text may keep another token, and
neither is wrong. Such cases are counted. A state keeps a token's rows and not its place, so a slot is told by its
values: it holds the token of the text whose values, in float64, are the nearest. Tokens that wrote the same values (in
the first layer those behind the same few tokens) stand for one another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_mlp.models.lm import LM
from llm_mlp.models.mixer import State
from llm_mlp.models.perception import watching

SAME = 1e-6  # of the values' largest norm: how far apart those of tokens that stand for one another may be


@dataclass(frozen=True)
class Differing:
    """Slots of a layer, a number a group."""

    layer: int
    slots: list[int]  # in use, in whichever state uses more
    differing: list[int]  # that hold another token


class Written:
    """What a text wrote into each layer, by which the tokens in slots are told.

    Args:
        exact: the model in float64 (`llm_mlp.weights.exact_copy`).
        ids: the text from its start, ``[1, T]``.

    Attributes:
        logits: ``[1, T, vocabulary]`` of the exact model. state: its state after the text.
    """

    @torch.no_grad()
    def __init__(self, exact: LM, ids: Tensor) -> None:
        self._slots = exact.config.perception.slots
        self._values: dict[int, Tensor] = {}  # of each layer, [G, T, m * V]

        def see(layer: int, k: Tensor, w: Tensor, *_: Tensor | None) -> None:
            self._values[layer] = w[0].flatten(2).transpose(0, 1)

        with watching(exact, see):
            out = exact(ids)
        assert out.logits is not None
        self.logits, self.state = out.logits, out.state
        # The first token that stands for each, [G, T]; a group at a time, for there are T x T distances.
        self._names = {
            layer: torch.stack([_first_within(x, SAME * float(x.norm(dim=-1).max())) for x in values])
            for layer, values in self._values.items()
        }

    def compare(self, a: State, b: State) -> list[Differing]:
        """Of two states after the text, each of one sequence: the choices of every layer that has slots."""
        found = []
        for layer in sorted(self._values) if self._slots else ():
            x, y = self._held(a, layer), self._held(b, layer)
            missing = torch.maximum((x - y).clamp(min=0).sum(-1), (y - x).clamp(min=0).sum(-1))
            found.append(Differing(layer, torch.maximum(x.sum(-1), y.sum(-1)).tolist(), missing.tolist()))
        return found

    def _held(self, state: State, layer: int) -> Tensor:
        """How often each token stands in a layer's slots, ``[G, T]``."""
        values, scores = (state[f"layers.{layer}.units.{part}"][0, :, : self._slots] for part in ("values", "scores"))
        table, names = self._values[layer], self._names[layer]
        nearest = torch.cdist(values.flatten(2).to(table), table).argmin(-1)
        return torch.zeros_like(names).scatter_add_(1, names.gather(1, nearest), (scores > -torch.inf).to(names))


def _first_within(x: Tensor, distance: float) -> Tensor:
    """For each row of ``[T, n]`` the first row that is within ``distance`` of it, ``[T]``."""
    return (torch.cdist(x, x) <= distance).byte().argmax(-1)
