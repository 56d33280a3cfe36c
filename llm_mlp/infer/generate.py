"""Text generation from one prompt: prefill, then one step a token at constant cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from llm_mlp.infer.sampling import Sampling, sample
from llm_mlp.models import LM

PREFILL = 4096  # tokens read at once: bounds the memory a long prompt takes


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
) -> Iterator[int]:
    """Token ids that follow ``prompt``, one after another.

    Args:
        prompt: at least one token id (a separator starts a text from nothing).
        max_tokens: how many at most. stop: an id that ends the text; it is not returned.
        seed: of the sampling; None draws a fresh one.
        vocabulary: ids from here on are never chosen (a model's vocabulary may be padded beyond its tokenizer's).

    Raises:
        ValueError: an empty prompt, or an id outside the vocabulary.
    """
    sampling = sampling or Sampling()
    if not len(prompt):
        raise ValueError("the prompt is empty; give at least one token")
    known = model.config.vocab_size
    for i in prompt:
        if not 0 <= i < known:
            raise ValueError(f"prompt token {i} is outside the model's vocabulary of {known}")
    device = next(model.parameters()).device
    generator = torch.Generator(device=device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    ids = torch.tensor([list(prompt)], device=device)
    state = None
    for a in range(0, ids.shape[1], PREFILL):
        out = model(ids[:, a : a + PREFILL], state, logits="last")
        state = out.state
    assert state is not None and out.logits is not None
    logits = out.logits[:, -1]
    seen = torch.zeros((1, known), dtype=torch.bool, device=device)
    seen[0, ids[0]] = True
    for i in range(max_tokens):
        if vocabulary is not None:
            logits[:, vocabulary:] = -torch.inf
        token = sample(logits, seen, sampling, generator)
        if stop is not None and int(token) == stop:
            return
        yield int(token)
        seen[0, token] = True
        if i + 1 < max_tokens:
            logits = model.step(token, state)
