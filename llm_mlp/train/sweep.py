"""Learning rates compared under one budget, for several models alike."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_mlp.bench.record import record
from llm_mlp.config import ConfigError, TrainConfig, build
from llm_mlp.device import pick_device
from llm_mlp.train.gradients import TrainingError
from llm_mlp.train.loop import train

OWN = "config"  # the name of the model that the config itself describes


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

    Runs land in a temporary folder; one line a run goes to the file ``results``.

    Raises:
        ConfigError: fewer than two rates, or runs that could not be compared; before any is trained.
        KeyboardInterrupt: a run was interrupted.
    """
    if len(set(rates)) < 2:
        raise ConfigError("a sweep needs at least two rates (five or more to find an interior optimum)")
    if config.data.held_out == 0:
        raise ConfigError("a sweep compares held-out losses: data.held_out must be above 0")
    if results and Path(results).is_dir():
        raise ConfigError(f"{results}: a folder; name a file for the results")
    with tempfile.TemporaryDirectory(prefix="llm-mlp-sweep-") as folder:
        runs = {
            model: {
                rate: _variant(config, model, rate, f"{folder}/{model}/{n}")
                for n, rate in enumerate(sorted(set(rates)))
            }
            for model in models or (OWN,)
        }
        return [
            SweepResult(model, {rate: _run(run, model, results, quiet, label) for rate, run in variants.items()})
            for model, variants in runs.items()
        ]


def _variant(config: TrainConfig, model: str, rate: float, out: str) -> TrainConfig:
    values: dict[str, Any] = config.model_dump(mode="json")
    if model != OWN:
        values["model"] = model
    values["out"] = out
    values["optimizer"]["lr"] = rate
    values["evaluation"]["every"] = values["checkpoint"]["every"] = 0
    return build(TrainConfig, values, f"{model} at {rate:g}")


def _run(run: TrainConfig, model: str, results: str | Path | None, quiet: bool, label: str) -> float:
    """The held-out loss of one run, recorded; infinite where training failed."""
    try:
        result = train(run, quiet=quiet)
        if result.interrupted:
            raise KeyboardInterrupt
        if not result.evaluations:
            raise ConfigError("a sweep compares held-out losses, and no document is held out: give it more documents")
        loss, bits, speed = result.evaluations[-1][1], result.bits_per_byte, result.tokens_per_second
    except TrainingError:
        loss, bits, speed = math.inf, math.inf, 0.0
    shutil.rmtree(run.out, ignore_errors=True)
    if results:
        facts = {"model": model, "label": label, "lr": run.optimizer.lr, "held_out_loss": loss, "bits_per_byte": bits}
        facts |= {"steps": run.steps, "tokens_per_step": run.batch_size * run.data.seq_len, "tokens_per_second": speed}
        record(results, "sweep", facts, device=pick_device(run.device), seed=run.seed)
    return loss
