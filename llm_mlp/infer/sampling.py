"""Choosing the next tokens of a batch from logits, each row by its own rules and its own random number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

TOP = 512  # most likely tokens that a nucleus is looked for among, before all are sorted


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the defaults sample from the model's own distribution.

    Args:
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens that holds this probability.
        min_p: keep tokens at least this likely relative to the most likely one.
        repetition_penalty: divide positive and multiply negative logits of tokens seen (arXiv 1909.05858); 1 is off.
        presence_penalty, frequency_penalty: subtracted from logits of tokens written so far, once and as often as they
            were written; 0 is off.
        logit_bias: added to the logits of these ids.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, good, allowed in (
            ("temperature", 0 <= self.temperature < math.inf, "at least 0 and finite"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 and finite"),
            ("presence_penalty", abs(self.presence_penalty) <= 2, "from -2 to 2"),
            ("frequency_penalty", abs(self.frequency_penalty) <= 2, "from -2 to 2"),
            ("logit_bias", all(abs(b) <= 100 for b in self.logit_bias.values()), "of values from -100 to 100"),
        ):
            if not good:
                raise ValueError(f"{name} = {getattr(self, name)} must be {allowed}")

    @property
    def counts(self) -> bool:
        """Whether it asks what was written before."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    def changed(self, logits: Tensor, seen: Tensor, written: Tensor) -> Tensor:
        """One row's logits ``[vocabulary]`` with penalties and bias."""
        if self.repetition_penalty != 1.0:
            penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        if self.counts:
            often = written.to(logits.dtype)
            logits = logits - self.frequency_penalty * often - self.presence_penalty * (often > 0)
        if self.logit_bias:
            logits = logits.clone()
            ids = torch.tensor(list(self.logit_bias), device=logits.device)
            logits[ids] += torch.tensor(list(self.logit_bias.values()), dtype=logits.dtype, device=logits.device)
        return logits


def sample(
    logits: Tensor,
    settings: Sequence[Sampling],
    uniform: Tensor,
    seen: Tensor | None = None,
    written: Tensor | None = None,
) -> Tensor:
    """One token a row: logits ``[B, vocabulary]`` float -> ``[B]`` int64. A row's token depends on that row alone.

    Args:
        settings: of each row. uniform: float64 ``[B]`` in [0, 1), the random number of each row.
        seen: bool ``[B, vocabulary]``, tokens the repetition penalty applies to. written: int ``[B, vocabulary]``, how
            often each was written. Both may be None where no row asks for them.
    """
    if changed := [b for b, s in enumerate(settings) if s.repetition_penalty != 1.0 or s.counts or s.logit_bias]:
        logits = logits.clone()
        empty = torch.zeros_like(logits[0], dtype=torch.bool)
        for b in changed:
            before = (empty if x is None else x[b] for x in (seen, written))
            logits[b] = settings[b].changed(logits[b], *before)
    tokens = logits.argmax(-1)
    drawn = [b for b, own in enumerate(settings) if own.temperature > 0]
    if drawn:
        at = torch.tensor(drawn, device=logits.device)
        tokens[at] = _draw(logits[at], [settings[b] for b in drawn], uniform.to(logits.device)[at])
    return tokens


def _draw(logits: Tensor, settings: Sequence[Sampling], uniform: Tensor) -> Tensor:
    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    # The largest is 0, so that no temperature however low overflows.
    logits = (logits.double() - logits.amax(-1, keepdim=True)) / column([s.temperature for s in settings])
    for b, own in enumerate(settings):
        if own.top_k and own.top_k < logits.shape[-1]:
            kth = logits[b].topk(own.top_k).values[-1]
            logits[b] = logits[b].masked_fill(logits[b] < kth, -torch.inf)
    probabilities = torch.softmax(logits, -1)
    if any(own.min_p for own in settings):
        least = column([s.min_p for s in settings]) * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities * (probabilities >= least)
    for b, own in enumerate(settings):
        if own.top_p < 1:
            probabilities[b] = _nucleus(probabilities[b], own.top_p)
    # Inverse of the distribution function; rounding at its end must not choose a token that cannot be.
    running = probabilities.cumsum(-1)
    token = torch.searchsorted(running, (uniform[:, None] * running[:, -1:]), right=True)[:, 0]
    last = probabilities.shape[-1] - 1 - (probabilities.flip(-1) > 0).to(torch.int8).argmax(-1)
    return torch.minimum(token, last)


def _nucleus(p: Tensor, top_p: float) -> Tensor:
    """Probabilities ``[vocabulary]``, zero outside the smallest set of most likely tokens that holds ``top_p``."""
    wanted = top_p * p.sum()
    ordered, order = p.topk(min(TOP, len(p)))
    if ordered.sum() < wanted:
        ordered, order = p.sort(descending=True, stable=True)
    keep = order[ordered.cumsum(0) - ordered < wanted]  # the first token always stays
    return torch.zeros_like(p).index_copy(0, keep, p[keep])
