"""Choosing the next tokens of a batch from logits, each row by its own rules and its own random number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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
        top_p: keep the smallest set of most likely tokens that holds this probability, and what is as likely as
            the least of them.
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
    logits = _changed(logits, settings, seen, written)
    tokens = logits.argmax(-1)
    drawn = [b for b, own in enumerate(settings) if own.temperature > 0]
    if drawn:
        at = torch.tensor(drawn, device=logits.device)
        tokens[at] = _draw(logits[at], [settings[b] for b in drawn], uniform.to(logits.device)[at])
    return tokens


def _column(like: Tensor, values: Iterable[float], dtype: torch.dtype) -> Tensor:
    """A number for each row, ``[B, 1]``."""
    return torch.tensor(list(values), dtype=dtype, device=like.device)[:, None]


def _changed(logits: Tensor, settings: Sequence[Sampling], seen: Tensor | None, written: Tensor | None) -> Tensor:
    """Logits with penalties and bias; those given stay as they are."""
    repeated = [b for b, own in enumerate(settings) if own.repetition_penalty != 1.0] if seen is not None else []
    counted = [b for b, own in enumerate(settings) if own.counts] if written is not None else []
    biased = [(b, i, x) for b, own in enumerate(settings) for i, x in own.logit_bias.items()]
    if not (repeated or counted or biased):
        return logits
    logits = logits.clone()
    exact = torch.promote_types(logits.dtype, torch.float32)
    if repeated:
        assert seen is not None
        own = logits[repeated].to(exact)
        penalty = _column(logits, (settings[b].repetition_penalty for b in repeated), exact)
        penalised = torch.where(own > 0, own / penalty, own * penalty)
        logits[repeated] = torch.where(seen[repeated], penalised, own).to(logits.dtype)
    if counted:
        assert written is not None
        often = written[counted].to(exact)
        frequency = _column(logits, (settings[b].frequency_penalty for b in counted), exact)
        presence = _column(logits, (settings[b].presence_penalty for b in counted), exact)
        logits[counted] = (logits[counted] - frequency * often - presence * (often > 0)).to(logits.dtype)
    if biased:
        rows, ids, values = zip(*biased, strict=True)
        logits[rows, ids] += torch.tensor(values, dtype=logits.dtype, device=logits.device)
    return logits


def _draw(logits: Tensor, settings: Sequence[Sampling], uniform: Tensor) -> Tensor:
    def column(values: Iterable[float], dtype: torch.dtype = torch.float64) -> Tensor:
        return _column(logits, values, dtype)

    # The largest is 0, so that no temperature however low overflows.
    logits = (logits.double() - logits.amax(-1, keepdim=True)) / column(s.temperature for s in settings)
    if some := [b for b, own in enumerate(settings) if 0 < own.top_k < logits.shape[-1]]:
        most = [settings[b].top_k for b in some]
        kth = logits[some].topk(max(most)).values.gather(1, column(most, torch.int64) - 1)
        logits[some] = logits[some].masked_fill(logits[some] < kth, -torch.inf)
    probabilities = torch.softmax(logits, -1)
    if any(own.min_p for own in settings):
        least = column(s.min_p for s in settings) * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities * (probabilities >= least)
    if some := [b for b, own in enumerate(settings) if own.top_p < 1]:
        own = probabilities[some]
        probabilities[some] = own * (own >= _least(own, column(settings[b].top_p for b in some)))
    # Inverse of the distribution function; rounding at its end must not choose a token that cannot be.
    running = probabilities.cumsum(-1)
    token = torch.searchsorted(running, (uniform[:, None] * running[:, -1:]), right=True)[:, 0]
    last = probabilities.shape[-1] - 1 - (probabilities.flip(-1) > 0).to(torch.int8).argmax(-1)
    return torch.minimum(token, last)


def _least(p: Tensor, top_p: Tensor, among: int = TOP) -> Tensor:
    """The least probability in the smallest set of most likely tokens that holds ``top_p``, looked for ``among`` so
    many at first; ``[B, vocabulary]``, ``[B, 1]`` -> ``[B, 1]``."""
    # Sums are running ones: those of `sum` may depend, in the last bit, on the number of rows.
    wanted = top_p * p.cumsum(-1)[:, -1:]
    ordered = p.topk(min(among, p.shape[-1])).values
    running = ordered.cumsum(-1)
    least = ordered.masked_fill(running - ordered >= wanted, torch.inf).amin(-1, keepdim=True)
    if among < p.shape[-1] and (further := (running[:, -1:] < wanted)[:, 0]).any():
        least[further] = _least(p[further], top_p[further], p.shape[-1])
    return least
