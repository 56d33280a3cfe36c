"""Loss, perplexity and bits per byte of text, in all and by position."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_mlp.config import SourceConfig
from llm_mlp.data import Batch, Document, Tokenizer, read_documents
from llm_mlp.models import LM
from llm_mlp.models.mixer import State
from llm_mlp.precision import Precision


@dataclass(frozen=True)
class TextScore:
    """What a model makes of a text."""

    tokens: int
    bytes: int
    nats: float

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(1, self.bytes)


@torch.no_grad()
def score_batches(model: LM, batches: Iterable[tuple[Batch, int]], precision: Precision | None = None) -> TextScore:
    """Score (batch, bytes of its targets) pairs, each row (or packed sequence) read from an empty state."""
    device = next(model.parameters()).device
    precision = precision or Precision("fp32", device)
    tokens, size, nats = 0, 0, 0.0
    was_training = model.training
    model.eval()
    try:
        for batch, n_bytes in batches:
            targets = batch.targets.to(device)
            with precision.autocast():
                loss = model(
                    batch.tokens.to(device),
                    # Not as a tensor: fully_shard would move it to the device.
                    cu_seqlens=None if batch.cu_seqlens is None else batch.cu_seqlens.numpy(),
                    targets=targets,
                    reduction="sum",
                ).loss
            nats += float(loss)
            tokens += int((batch.targets >= 0).sum())
            size += n_bytes
    finally:
        model.train(was_training)
    return TextScore(tokens, size, nats)


def position_bins(length: int) -> list[tuple[int, int]]:
    """(0, 256), (256, 512) ... doubling, up to ``length``."""
    edges = [0, 256]
    while edges[-1] < length:
        edges.append(edges[-1] * 2)
    return [(a, min(b, length)) for a, b in zip(edges, edges[1:], strict=False) if a < length]


def _windows(documents: Iterable[Document], tokenizer: Tokenizer, context: int) -> Iterator[tuple[list[int], int]]:
    """(eos + at most ``context`` tokens, their bytes) pieces of each document."""
    for document in documents:
        ids = tokenizer.encode(document.text)
        for start in range(0, len(ids), context):
            part = ids[start : start + context]
            yield [tokenizer.eos, *part], tokenizer.byte_length(part)


@torch.no_grad()
def score_text(
    model: LM,
    tokenizer: Tokenizer,
    path: str | Path,
    *,
    context: int = 1024,
    precision: Precision | None = None,
    text_field: str = "text",
    max_tokens: int | None = None,
    carry: bool = False,
    steps: bool = False,
) -> tuple[TextScore, dict[str, float]]:
    """Score a text file (or folder, JSON lines ...) in pieces of ``context`` tokens.

    Each piece starts from an empty state behind a separator, or, with ``carry``, continues the state of its
    document's previous piece. ``steps``: token by token, as decoding does (the state is then kept, in its dtypes, after
    each).

    Returns:
        The score, and mean loss by position in the piece, keyed ``"0-256"`` and so on.
    """
    device = next(model.parameters()).device
    precision = precision or Precision("fp32", device)
    bins = position_bins(context)
    sums, counts = [0.0] * len(bins), [0] * len(bins)
    tokens, size, nats = 0, 0, 0.0
    model.eval()
    for document in read_documents(SourceConfig(path=str(path), text_field=text_field)):
        state, previous = None, tokenizer.eos
        for ids, n_bytes in _windows([document], tokenizer, context):
            if carry:
                ids[0] = previous
            row = torch.tensor([ids], device=device)
            with precision.autocast():
                loss, state = (_by_steps if steps else _at_once)(model, row, state)
            state, previous = (state, ids[-1]) if carry else (None, tokenizer.eos)
            loss = loss.double().cpu()
            nats, tokens, size = nats + float(loss.sum()), tokens + len(loss), size + n_bytes
            for i, (a, b) in enumerate(bins):
                sums[i] += float(loss[a:b].sum())
                counts[i] += len(loss[a:b])
            if max_tokens is not None and tokens >= max_tokens:
                break
        if max_tokens is not None and tokens >= max_tokens:
            break
    by_position = {f"{a}-{b}": s / n for (a, b), s, n in zip(bins, sums, counts, strict=True) if n}
    return TextScore(tokens, size, nats), by_position


def _at_once(model: LM, ids: Tensor, state: State | None) -> tuple[Tensor, State]:
    """Losses ``[T]`` of ``ids [1, T+1]`` but the first, and the state after all but the last."""
    out = model(ids[:, :-1], state, targets=ids[:, 1:], reduction="none")
    return out.loss[0], out.state


def _by_steps(model: LM, ids: Tensor, state: State | None) -> tuple[Tensor, State]:
    state = state or model.init_state(1)
    losses = [F.cross_entropy(model.step(ids[:, t], state), ids[:, t + 1]) for t in range(ids.shape[1] - 1)]
    return torch.stack(losses), state
