"""The surprise meter: where in its text a context's model met what its memories did not predict.

The text is read again, on the side. What a reading would cost is not taken from every reading instead, because that
would tell too little: a server reads prompts packed with others, answers are written by single steps and contexts made
before have no record, while a text can be read again whoever made its context. And watching turns off a kernel of wide
heads, so that a context would no longer have the bits that the same text has elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_mlp.context.context import Context, Reader
from llm_mlp.context.format import ContextError
from llm_mlp.infer import read_tokens
from llm_mlp.infer.prefill import PREFILL
from llm_mlp.models.mixer import State
from llm_mlp.models.perception import surprise, watching

PARTS = 32


@dataclass(frozen=True)
class Surprise:
    """Means over the heads and over the tokens of equal parts of a text; 1/2 is an empty memory's, less is known."""

    ends: tuple[int, ...]  # tokens up to the end of each part
    layers: dict[int, tuple[float, ...]]  # of each perception layer, a number a part
    seconds: float  # that reading took

    @property
    def overall(self) -> tuple[float, ...]:
        """Of all layers, a number a part."""
        return tuple(sum(part) / len(part) for part in zip(*self.layers.values(), strict=True))

    def report(self) -> dict[str, Any]:
        """What `llm-mlp context show --surprise --json` and the server tell."""
        layers = [{"layer": n, "mean": [round(x, 4) for x in parts]} for n, parts in self.layers.items()]
        mean = [round(x, 4) for x in self.overall]
        return {"ends": list(self.ends), "mean": mean, "layers": layers, "seconds": round(self.seconds, 3)}


def measure_surprise(
    reader: Reader, context: Context, *, parts: int = PARTS, progress: Callable[[int], None] | None = None
) -> Surprise:
    """Read the context's text once more and tell how surprise ran over it.

    Args:
        parts: of the text, as equal as its tokens allow; a text of fewer tokens has a part for each.
        progress: called with the number of tokens read so far.

    Raises:
        ContextError: no parts, a composed context, whose text was never read as one, a context of another model, or a
            model without perception heads.
    """
    pieces = measuring(reader, context, parts=parts)
    while True:
        try:
            done = next(pieces)
        except StopIteration as end:
            found: Surprise = end.value
            return found
        if progress is not None:
            progress(done)


def measuring(
    reader: Reader, context: Context, *, parts: int = PARTS, piece: int = PREFILL
) -> Generator[int, None, Surprise]:
    """What `measure_surprise` does, in pieces of that many tokens, between which others may use the model; yields how
    many are read. Raises as `measure_surprise`, from its first piece."""
    if parts < 1:
        raise ContextError(f"{parts} parts: at least one is needed")
    if context.manifest.composed:
        raise ContextError(f"context {context.id} is composed: its text was never read as one")
    if "perception" not in reader.model.config.mixers:
        raise ContextError("the model has no perception heads, whose surprise could be told")
    reader.check(context.manifest)
    total = len(context.tokens)
    part = torch.arange(total) * min(parts, total) // total  # of each token
    counts = part.bincount()
    sums: dict[int, Tensor] = {}
    state: State | None = None
    seconds, done = 0.0, 0

    def see(layer: int, k: Tensor, w: Tensor, log_decay: Tensor, beta: Tensor | None, residual: Tensor) -> None:
        own = surprise(w, residual)[0].double().mean((-2, -1)).cpu()
        found = sums.setdefault(layer, torch.zeros(len(counts), dtype=torch.float64))
        found.index_add_(0, part[done : done + len(own)], own)

    while done < total:
        end, begun = min(total, done + piece), time.perf_counter()
        with watching(reader.model, see):
            state, _ = read_tokens(reader.model, context.tokens[done:end], state, position=done)
        done, seconds = end, seconds + time.perf_counter() - begun
        yield done
    layers = {n: tuple((sums[n] / counts).tolist()) for n in sorted(sums)}
    return Surprise(tuple(counts.cumsum(0).tolist()), layers, seconds)
