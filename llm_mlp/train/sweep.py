"""Learning rates compared under one budget, for several models alike."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_mlp.bench.record import record
from llm_mlp.config import ConfigError, TrainConfig, apply_overrides, build
from llm_mlp.train.loop import TrainingError, pick_device, train


@dataclass(frozen=True)
class SweepResult:
    """Held-out loss (nats a token) of each rate of one model; infinite where training failed."""

    model: str
    losses: dict[float, float]

    @property
    def best(self) -> float:
        return min(self.losses, key=lambda rate: self.losses[rate])

    @property
    def interior(self) -> bool:
        """Whether the best rate has a tried rate on both sides."""
        return min(self.losses) < self.best < max(self.losses)


def sweep(
    config: TrainConfig,
    models: Sequence[str],
    rates: Sequence[float],
    *,
    results: str | Path | None = None,
    quiet: bool = False,
    label: str = "",
) -> list[SweepResult]:
    """Train each preset of ``models`` (empty: the config's model) at each rate; everything else equal.

    Runs land in ``out/sweep/...`` and are removed; one line a run goes to the file ``results``.
    """
    if len(set(rates)) < 2:
        raise ConfigError("a sweep needs at least two rates (five or more to find an interior optimum)")
    out = []
    for model in models or ("config",):
        losses = {}
        for rate in sorted(rates):
            folder = Path(config.out) / "sweep" / f"{model}-{rate:g}"
            shutil.rmtree(folder, ignore_errors=True)
            values: dict[str, Any] = config.model_dump(mode="json")
            if model != "config":
                values["model"] = model
            values = apply_overrides(values, [f"out={folder}", f"optimizer.lr={rate!r}", "evaluation.every=0"])
            run = build(TrainConfig, values)
            try:
                result = train(run, quiet=quiet)
                loss, bits, speed = result.evaluations[-1][1], result.bits_per_byte, result.tokens_per_second
            except TrainingError:
                loss, bits, speed = math.inf, math.inf, 0.0
            losses[rate] = loss
            shutil.rmtree(folder, ignore_errors=True)
            if results:
                facts = {"model": model, "label": label, "lr": rate, "held_out_loss": loss, "bits_per_byte": bits}
                facts |= {"steps": run.steps, "tokens_per_step": run.batch_size * run.data.seq_len}
                record(
                    results,
                    "sweep",
                    facts | {"tokens_per_second": speed},
                    device=pick_device(run.device),
                    seed=run.seed,
                )
        out.append(SweepResult(model, losses))
    return out
