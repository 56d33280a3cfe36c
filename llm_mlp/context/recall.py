"""The recall meter: what of a text of some length does a context still retrieve?

Pairs of a cue and a value are planted into the text at log-spaced depths and the text is read with them, on the side:
the context itself stays as it is. Then each cue is read after it, and the value that the model finds most likely among
all planted ones is compared with the right one. Guessing finds one in as many as there are pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from llm_mlp.context.compose import compose
from llm_mlp.context.context import Context, Reader
from llm_mlp.context.format import ContextError
from llm_mlp.infer import Start, read_tokens
from llm_mlp.models.mixer import State

CUE, VALUE = 3, 1  # tokens
BATCH = 16  # cues that are asked at a time


@dataclass(frozen=True)
class Recall:
    """How many of the planted pairs came back."""

    pairs: int
    found: int
    depths: tuple[int, ...]  # tokens from each pair to the end, ascending
    hits: tuple[bool, ...]  # of each depth

    @property
    def chance(self) -> float:
        return 1 / self.pairs

    @property
    def rate(self) -> float:
        return self.found / self.pairs

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the rate (Wilson)."""
        n, z = self.pairs, 1.96
        centre = self.rate + z * z / (2 * n)
        spread = z * math.sqrt(self.rate * (1 - self.rate) / n + (z / (2 * n)) ** 2)
        return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))

    @property
    def reach(self) -> int | None:
        """The largest depth up to which at least half of the pairs came back; None: at no depth."""
        best, seen = None, 0
        for n, (depth, hit) in enumerate(zip(self.depths, self.hits, strict=True), 1):
            seen += hit
            if hit and 2 * seen >= n:
                best = depth
        return best

    def report(self) -> dict[str, Any]:
        """What `llm-mlp context show --recall --json` and the server tell."""
        found = vars(self) | {"rate": self.rate, "chance": self.chance, "interval": self.interval}
        return found | {"reach": self.reach, "warning": self.warning}

    @property
    def warning(self) -> str | None:
        """What to tell a user whose text is longer than what the state holds."""
        low, _ = self.interval
        if low <= self.chance:
            return f"nothing planted in this text comes back more often than by chance ({self.chance:.1%})"
        if self.reach is not None and self.reach < self.depths[-1] // 2:
            return f"what lies further back than about {self.reach:,} tokens is mostly out of reach"
        return None


@dataclass(frozen=True)
class SourceRecall:
    """What of one document came back after several were composed, and after they were read as one text."""

    composed: Recall
    concatenated: Recall

    def report(self) -> dict[str, Any]:
        """What `llm-mlp context compose --recall --json` and the server tell."""
        return {"composed": self.composed.report(), "concatenated": self.concatenated.report()}


@dataclass(frozen=True)
class Planted:
    """A text with pairs in it, to be read from nothing; `ask` the state after it."""

    tokens: Tensor
    cues: Tensor  # [pairs, CUE]
    values: Tensor  # [pairs]
    depths: tuple[int, ...]


def measure_recall(
    reader: Reader, context: Context, *, pairs: int = 64, seed: int = 0, progress: Callable[[int], None] | None = None
) -> Recall:
    """Plant ``pairs`` pairs into the context's text, read it on the side, and ask for each.

    The text is read once more, with `CUE` + `VALUE` tokens of every pair in it.

    Raises:
        ContextError: fewer than 64 pairs (the interval would say nothing), a text too short for them, or a composed
            context, whose text was never read as one.
    """
    planted = plant(reader, context, pairs=pairs, seed=seed)
    return ask(reader, planted, read_tokens(reader.model, planted.tokens, progress=progress)[0])


def plant(reader: Reader, context: Context, *, pairs: int = 64, seed: int = 0) -> Planted:
    """The context's text with pairs in it; raises as `measure_recall` does."""
    vocabulary = reader.tokenizer.vocab_size if reader.tokenizer else reader.model.config.vocab_size
    length = len(context.tokens)
    if pairs < 64:
        raise ContextError(f"{pairs} pairs: at least 64 are needed for an interval that says something")
    if vocabulary < 2 * pairs:
        raise ContextError(f"a vocabulary of {vocabulary} has too few tokens for {pairs} pairs")
    if length < 2 * pairs:
        raise ContextError(f"a text of {length} tokens is too short for {pairs} pairs; give at least {2 * pairs}")
    if context.manifest.composed:
        raise ContextError(f"context {context.id} is composed; measure the documents it came from (compose --recall)")
    generator = torch.Generator().manual_seed(seed)
    values = torch.randperm(vocabulary, generator=generator)[:pairs]
    cues = torch.randint(vocabulary, (pairs, CUE), generator=generator)
    # Log-spaced depths, each at another place of the text.
    at = torch.logspace(0, math.log10(length), pairs, dtype=torch.float64).long().clamp(1, length - 1)
    for n in range(1, pairs):
        at[n] = max(int(at[n]), int(at[n - 1]) + 1)
    at = at.clamp(max=length - 1)
    parts, done = [], 0
    text = context.tokens.long()
    for n in reversed(range(pairs)):
        place = length - int(at[n])
        parts += [text[done:place], cues[n], values[n : n + 1]]
        done = place
    parts.append(text[done:])
    depths = tuple(int(d) + (CUE + VALUE) * n for n, d in enumerate(at))  # later pairs stand between, too
    return Planted(torch.cat(parts), cues, values, depths)


def measure_composed(
    reader: Reader, contexts: Sequence[Context], separator: Sequence[int] | Tensor, *, pairs: int = 64, seed: int = 0
) -> list[SourceRecall]:
    """Plant ``pairs`` pairs into each of several documents, compose them, and ask for each; beside that, the same of
    the documents with their pairs read as one text, the separator last.

    Everything is read on the side, twice. Depths are those in the one text; composing knows no such order.

    Raises:
        ContextError: as `plant`, for any of the documents, and as `compose`.
    """
    planted = plant_each(reader, contexts, len(separator), pairs=pairs, seed=seed)
    apart = []
    for one in planted:
        with reader.observed(None) as seen:
            end = Start(one.tokens, *read_tokens(reader.model, one.tokens))
        apart.append(reader.wrap(end, None, seen))
    whole = torch.cat([*(one.tokens for one in planted), torch.as_tensor(separator, dtype=torch.int64)])
    states = compose(reader, apart, separator).state, read_tokens(reader.model, whole)[0]
    return [SourceRecall(*(ask(reader, one, state) for state in states)) for one in planted]


def plant_each(
    reader: Reader, contexts: Sequence[Context], behind: int, *, pairs: int = 64, seed: int = 0
) -> list[Planted]:
    """Texts of several documents, each with pairs of its own in it; depths are those in all of them read as one text
    with ``behind`` tokens more. Raises as `measure_composed`."""
    planted = [plant(reader, context, pairs=pairs, seed=seed + n) for n, context in enumerate(contexts)]
    later = [*accumulate((len(one.tokens) for one in reversed(planted[1:])), initial=behind)][::-1]
    return [replace(one, depths=tuple(d + n for d in one.depths)) for one, n in zip(planted, later, strict=True)]


@torch.no_grad()
def ask(reader: Reader, planted: Planted, state: State) -> Recall:
    """Which of the planted pairs the state after their text brings back; ``state`` is forked, not changed."""
    pairs, values, hits = len(planted.cues), planted.values, list[bool]()
    for a in range(0, pairs, BATCH):
        some = planted.cues[a : a + BATCH].to(reader.device)
        forks = {name: t.repeat(len(some), *[1] * (t.ndim - 1)) for name, t in state.items()}
        logits: Tensor | None = reader.model(some, forks, logits="last").logits
        assert logits is not None
        best = logits[:, -1, values.to(reader.device)].argmax(-1).cpu()
        hits += (best == torch.arange(a, a + len(some))).tolist()
    return Recall(pairs, sum(hits), planted.depths, tuple(hits))
