"""Text generation from one prompt: prefill, then one step a token at constant cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llm_mlp.infer.constraint import Constraint, allowed
from llm_mlp.infer.prefill import check_tokens, read_tokens
from llm_mlp.infer.sampling import Sampling, sample
from llm_mlp.models import LM
from llm_mlp.models.mixer import State


class Start(NamedTuple):
    """A text that has been read: generation goes on from here without reading it again."""

    tokens: Sequence[int] | Tensor  # its ids
    state: State  # after it; not changed
    logits: Tensor  # [1, vocabulary] of what follows it


@torch.no_grad()
def generate(
    model: LM,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    seed: int | None = None,
    stop: int | None = None,
    vocabulary: int | None = None,
    start: Start | None = None,
    constraint: Constraint | None = None,
) -> Iterator[int]:
    """Token ids that follow ``prompt``, one after another.

    Args:
        prompt: at least one token id (a separator starts a text from nothing); may be empty after a ``start``.
        max_tokens: how many at most. stop: an id that ends the text; it is not returned.
        seed: of the sampling; None draws a fresh one.
        vocabulary: ids from here on are never chosen (a model's vocabulary may be padded beyond its tokenizer's).
        start: what stands before the prompt.
        constraint: what may follow; the text ends where it lets nothing follow.

    Raises:
        ValueError: an empty prompt, or an id outside the vocabulary.
    """
    sampling = sampling or Sampling()
    if start is None and not len(prompt):
        raise ValueError("the prompt is empty; give at least one token")
    known = model.config.vocab_size
    check_tokens(model, torch.as_tensor(prompt, dtype=torch.int64))
    device = next(model.parameters()).device
    generator = torch.Generator()
    generator.manual_seed(seed) if seed is not None else generator.seed()
    seen = torch.zeros((1, known), dtype=torch.bool, device=device)
    written = torch.zeros((1, known), dtype=torch.int32, device=device)
    state, position = None, 0
    if start is not None:
        before = torch.as_tensor(start.tokens, dtype=torch.int64)
        seen[0, before.to(device)] = True
        position = len(before)
        # Steps change a state in place; the one we were given stays as it is.
        state = {name: t.to(device, copy=True) for name, t in start.state.items()}
        logits = start.logits.to(device, copy=True)
    if len(prompt):
        state, logits = read_tokens(model, prompt, state, position=position)
        seen[0, torch.tensor(list(prompt), device=device)] = True
    assert state is not None
    for i in range(max_tokens):
        if vocabulary is not None:
            logits[:, vocabulary:] = -torch.inf
        if constraint is not None:
            mask = allowed(constraint, known, vocabulary or known, () if stop is None else (stop,))
            if mask is None:
                return
            logits = logits.masked_fill(~mask.to(device), -torch.inf)
        uniform = torch.rand(1, dtype=torch.float64, generator=generator)
        token = sample(logits, [sampling], uniform, seen, written)
        if stop is not None and int(token) == stop:
            return
        yield int(token)
        if constraint is not None:
            constraint.take(int(token))
        seen[0, token] = True
        written[0, token] += 1
        if i + 1 < max_tokens:
            logits = model.step(token, state)
