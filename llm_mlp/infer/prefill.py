"""Reading a text into a state, a bounded number of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llm_mlp.models import LM
from llm_mlp.models.mixer import State

PREFILL = 4096  # tokens read at once: bounds the memory a long text takes


@torch.no_grad()
def read_tokens(
    model: LM,
    tokens: Sequence[int] | Tensor,
    state: State | None = None,
    *,
    position: int = 0,
    progress: Callable[[int], None] | None = None,
) -> tuple[State, Tensor]:
    """The state after ``tokens`` and the logits ``[1, vocabulary]`` of what follows.

    Args:
        tokens: at least one id. state: after the ``position`` tokens before them; it is not changed.
        progress: called with the number of tokens read so far.

    Pieces end at multiples of `PREFILL` from the start of the text, wherever the reading begins: a text that is read
    in two goes, the first ending at such a multiple, is read in the same pieces as in one.

    Raises:
        ValueError: no tokens, or an id outside the vocabulary.
    """
    ids = torch.as_tensor(tokens, dtype=torch.int64).reshape(1, -1)
    if not ids.numel():
        raise ValueError("no tokens to read")
    check_tokens(model, ids)
    ids = ids.to(next(model.parameters()).device)
    done, total, logits = 0, ids.shape[1], None
    while done < total:
        end = min(total, done + PREFILL - (position + done) % PREFILL)
        out = model(ids[:, done:end], state, logits="last" if end == total else "none")
        state, logits, done = out.state, out.logits, end
        if progress is not None:
            progress(done)
    assert state is not None and logits is not None
    return state, logits[:, -1]


def check_tokens(model: LM, ids: Tensor) -> None:
    """Raise `ValueError` where an id is outside the model's vocabulary."""
    if ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= model.config.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"token {bad} is outside the model's vocabulary of {model.config.vocab_size}")
