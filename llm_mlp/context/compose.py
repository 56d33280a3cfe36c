"""Several documents' contexts as one, without reading them again. Experimental.

A text maps a layer's second layers linearly: S <- exp(log_a) P S + Z, where Z is what it leaves from nothing. So
documents that were read apart compose layer by layer, in any order; the layers above the first were computed from
inputs that did not know the other documents, and a convolution's first tokens saw no tail: an approximation. Orders are
averaged over the cyclic ones (after PICASO, arXiv 2502.17605), memorised units merged, and a separator is read at the
end, for the convolutions' tails and the logits.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from llm_mlp.context.context import Context, Reader
from llm_mlp.context.format import ContextError
from llm_mlp.infer import Start, read_tokens
from llm_mlp.models.mixer import State
from llm_mlp.ops import Units, units_merge

UNITS = tuple(f"units.{name}" for name in Units._fields)


def compose(reader: Reader, contexts: Sequence[Context], separator: Sequence[int] | Tensor) -> Context:
    """One context of several, in this order, the separator last.

    Args:
        contexts: of the reader's model, each read from nothing by a reader with ``transitions``.

    Raises:
        ContextError: none, one without transitions, one that is composed itself, or a layer of attention.
    """
    pieces = composing(reader, contexts, separator)
    while True:
        try:
            next(pieces)
        except StopIteration as done:
            return reader.composed(done.value)


def composing(
    reader: Reader, contexts: Sequence[Context], separator: Sequence[int] | Tensor
) -> Generator[None, None, Start]:
    """What `compose` does, in pieces of a layer and an order each, between which others may use the model; returns what
    `Reader.composed` makes the context of. Raises as `compose` does, from its first piece."""
    if not contexts:
        raise ContextError("nothing to compose: give at least one context")
    for context in contexts:
        reader.check(context.manifest)
        if context.manifest.composed:
            raise ContextError(f"context {context.id} is composed itself; compose the documents it came from")
        if context.transition is None:
            raise ContextError(
                f"context {context.id} was read without its transitions; read the text again as composable "
                "(`context create --composable`, or a Reader with transitions=True)"
            )
    own = [c.to(reader.device) for c in contexts]
    state: State = {}
    perception = reader.model.config.perception
    for number, block in enumerate(reader.model.blocks):
        layer = f"layers.{number}."
        if f"{layer}fast_weights" not in own[0].state:
            raise ContextError(f"layer {number} ({type(block.mixer).__name__}) has no second layers to compose")
        total = None
        for first in range(len(own)):
            S = _in_order([*own[first:], *own[:first]], number)
            total = S if total is None else total + S
            yield
        assert total is not None
        state[f"{layer}fast_weights"] = total / len(own)
        if perception.block:
            merged = Units(*(own[0].state[layer + name] for name in UNITS))
            for context in own[1:]:
                after = Units(*(context.state[layer + name] for name in UNITS))
                merged = units_merge(merged, after, block=perception.block, slots=perception.slots)
            state.update({layer + name: t for name, t in zip(UNITS, merged, strict=True)})
            yield
        if f"{layer}conv" in own[-1].state:
            state[f"{layer}conv"] = own[-1].state[f"{layer}conv"]
    end = torch.as_tensor(separator, dtype=torch.int32)
    tokens = torch.cat([*(c.tokens for c in own), end])
    return Start(tokens, *read_tokens(reader.model, end, state, position=len(tokens) - len(end)))


def _in_order(contexts: Sequence[Context], number: int) -> Tensor:
    """A layer's second layers after these documents, one after another, ``[1, G, F, m, V]``."""
    layer = f"layers.{number}."
    S = contexts[0].state[f"{layer}fast_weights"]
    for context in contexts[1:]:
        assert context.transition is not None
        P, log_a = context.transition[f"{layer}P"], context.transition[f"{layer}log_a"]
        Z = context.state[f"{layer}fast_weights"].to(P.dtype)
        S = torch.einsum("bgij,bgjmv->bgimv", P, S.to(P.dtype)) * log_a.exp()[:, :, None, :, None] + Z
    return S
