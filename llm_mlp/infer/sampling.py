"""Choosing the next token from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the defaults sample from the model's own distribution.

    Args:
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens that holds this probability.
        min_p: keep tokens at least this likely relative to the most likely one.
        repetition_penalty: divide positive and multiply negative logits of tokens seen (arXiv 1909.05858); 1 is off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, good, allowed in (
            ("temperature", 0 <= self.temperature < math.inf, "at least 0 and finite"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not good:
                raise ValueError(f"{name} = {getattr(self, name)} must be {allowed}")


def sample(logits: Tensor, seen: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """One token a row: logits ``[B, vocabulary]`` float -> ``[B]`` int64.

    ``seen [B, vocabulary]`` bool: tokens the repetition penalty applies to.
    """
    if sampling.repetition_penalty != 1.0:
        penalised = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # The largest is 0, so that no temperature however low overflows.
    logits = (logits.double() - logits.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1]), -1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities = torch.softmax(logits, -1)
    if sampling.min_p:
        probabilities = probabilities * (probabilities >= sampling.min_p * probabilities.amax(-1, keepdim=True))
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        ordered = ordered / ordered.sum(-1, keepdim=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p  # the first token always stays
        probabilities = probabilities.masked_fill(outside.gather(-1, order.argsort(-1)), 0)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
