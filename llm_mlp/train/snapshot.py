"""Checkpoints of a run: saved atomically, the last k and the best kept, resumed exactly.

A checkpoint folder holds the model (see `llm_mlp.checkpoint`), ``training.safetensors`` (optimizer state keyed by
parameter name, carried stream states, random number state) and ``training.json`` (step, sample index, config).
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llm_mlp.checkpoint import (
    FORMAT_VERSION,
    CheckpointError,
    load_weights,
    read_json,
    read_tensors,
    write_folder,
    write_json,
    write_model,
)
from llm_mlp.config import ConfigError, TrainConfig, build, diff
from llm_mlp.data.tokenizer import Tokenizer
from llm_mlp.models import LM
from llm_mlp.train.optim import load_optimizer_tensors, optimizer_tensors

log = logging.getLogger("llm_mlp.train")

_NAME = re.compile(r"^step-(\d+)$")
# What may differ on resume without changing the steps that are left.
_FREE = ("out", "log_every", "device", "compile", "debug_checks", "data.cache_dir", "data.prepared")
_FREE_PREFIXES = ("evaluation.", "checkpoint.")


@dataclass
class Progress:
    """Where a run is: everything a resumed run needs besides weights and optimizer."""

    step: int = 0
    loader: dict[str, Any] = field(default_factory=dict)
    best_loss: float = float("inf")
    skipped: list[int] = field(default_factory=list)  # steps the NaN guard skipped
    scaler: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, Tensor] = field(default_factory=dict)  # state of the streams


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [(int(m[1]), p) for p in (run / "checkpoints").glob("step-*") if (m := _NAME.match(p.name))]
    return [p for _, p in sorted(found)]


def save(
    run: Path,
    config: TrainConfig,
    model: LM,
    tokenizer: Tokenizer,
    optimizers: list[torch.optim.Optimizer],
    progress: Progress,
    *,
    best: bool,
) -> Path:
    """Write ``checkpoints/step-N`` and remove what is neither among the last k nor the best."""
    folder = run / "checkpoints" / f"step-{progress.step:07d}"

    def fill(temporary: Path) -> None:
        write_model(temporary, model, tokenizer)
        tensors = {f"optimizer/{k}": v for k, v in optimizer_tensors(model, optimizers).items()}
        tensors |= {f"carried/{k}": v for k, v in progress.carried.items()}
        tensors["rng/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available() and next(model.parameters()).is_cuda:
            tensors["rng/cuda"] = torch.cuda.get_rng_state()
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, temporary / "training.safetensors")
        facts = {
            "format_version": FORMAT_VERSION,
            "step": progress.step,
            "loader": progress.loader,
            "best_loss": progress.best_loss if progress.best_loss < float("inf") else None,
            "skipped": progress.skipped,
            "scaler": progress.scaler,
            "config": config.model_dump(mode="json"),
        }
        write_json(temporary / "training.json", facts)

    write_folder(folder, fill)
    marker = run / "checkpoints" / "best.json"
    if best:
        temporary = marker.with_name(".best.json")
        temporary.write_text(json.dumps({"format_version": FORMAT_VERSION, "name": folder.name}), encoding="utf8")
        temporary.replace(marker)
    kept = {folder.name, *(p.name for p in checkpoints(run)[-config.checkpoint.keep_last :])}
    if config.checkpoint.keep_best and marker.is_file():
        kept.add(read_json(marker)["name"])
    for old in checkpoints(run):
        if old.name not in kept:
            shutil.rmtree(old)
    return folder


def check_same_run(old: TrainConfig, new: TrainConfig, folder: Path) -> None:
    """Refuse to resume with a config that would change what comes, saying what differs."""
    lines = [
        line for line in diff(old, new) if not line.startswith(_FREE_PREFIXES) and line.partition(":")[0] not in _FREE
    ]
    if lines:
        raise CheckpointError(
            f"{folder}: was made with another config: {'; '.join(lines)}. Resume with the same values, or start a new "
            "run from its weights with --init-from"
        )


def read_train_config(folder: Path) -> TrainConfig:
    """The config of the run that wrote a checkpoint."""
    try:
        return build(TrainConfig, read_json(folder / "training.json")["config"], str(folder / "training.json"))
    except (ConfigError, KeyError) as error:
        raise CheckpointError(f"{folder / 'training.json'}: no usable config ({error})") from None


def restore(folder: Path, config: TrainConfig, model: LM, optimizers: list[torch.optim.Optimizer]) -> Progress:
    """Fill model, optimizers and random number generators from a checkpoint; the rest is returned.

    Raises:
        CheckpointError: incomplete, damaged or of another run.
    """
    facts = read_json(folder / "training.json")
    check_same_run(read_train_config(folder), config, folder)
    load_weights(model, folder / "model.safetensors")
    tensors = read_tensors(folder / "training.safetensors")
    parts: dict[str, dict[str, Tensor]] = {"optimizer": {}, "carried": {}, "rng": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        parts.setdefault(kind, {})[rest] = tensor
    device = next(model.parameters()).device
    try:
        load_optimizer_tensors(model, optimizers, parts["optimizer"])
        torch.set_rng_state(parts["rng"]["cpu"])
        if device.type == "cuda" and "cuda" in parts["rng"]:
            torch.cuda.set_rng_state(parts["rng"]["cuda"])
    except KeyError as error:
        raise CheckpointError(f"{folder / 'training.safetensors'}: tensor {error} is missing or foreign") from None
    missing = {"step", "loader", "best_loss", "skipped", "scaler"} - facts.keys()
    if missing:
        raise CheckpointError(f"{folder / 'training.json'}: no {', '.join(sorted(missing))}; the file was edited")
    best = facts["best_loss"]
    return Progress(
        step=facts["step"],
        loader=facts["loader"],
        best_loss=float("inf") if best is None else best,
        skipped=facts["skipped"],
        scaler=facts["scaler"],
        carried={name: t.to(device) for name, t in parts["carried"].items()},
    )
