"""Learning rate over the run, as a factor of the peak rate."""

from __future__ import annotations

import math

from llm_mlp.config import ScheduleConfig


def warmup_steps(config: ScheduleConfig, steps: int) -> int:
    """Warm-up, at most a tenth of the run."""
    return min(config.warmup, steps // 10)


def rate_factor(config: ScheduleConfig, step: float, steps: int) -> float:
    """Factor of the peak rate at ``step`` (0-based; between two where the batch size has changed) of ``steps``.

    Warm-up is linear. ``cosine`` and ``linear`` fall from its end (linear: over the last ``decay`` share of the run)
    to ``final``; ``wsd`` (warm-up, stable, decay; arXiv 2405.18392) falls as 1 - sqrt over the last ``decay`` share.
    """
    warmup = warmup_steps(config, steps)
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if config.kind == "constant":
        return rise
    if config.kind == "cosine":
        done = (step - warmup) / max(1, steps - warmup)
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))
    else:
        left = min(1.0, (steps - step) / (config.decay * steps))
        fall = left if config.kind == "linear" else 1 - math.sqrt(1 - left)
    return min(rise, config.final + (1 - config.final) * fall)


def decay_factor(config: ScheduleConfig, step: float, steps: int) -> float:
    """Factor of the configured weight decay at ``step``."""
    return rate_factor(config, step, steps) if config.weight_decay == "rate" else 1.0


def momentum_at(config: ScheduleConfig, momentum: float, step: float) -> float:
    """Muon's momentum at ``step``: it rises from 0.85 over ``momentum_warmup`` steps (or from itself, if lower)."""
    if not config.momentum_warmup:
        return momentum
    low = min(0.85, momentum)
    return low + (momentum - low) * min(1.0, step / config.momentum_warmup)
