"""Checkpoints of a run: saved atomically, the last k and the best kept, resumed exactly.

A checkpoint folder holds the model (see `llm_mlp.checkpoint`), ``training.safetensors`` (optimizer state and averages
keyed by parameter name, carried stream states) and ``training.json`` (step, sample index, controllers, config, which
launches of the kernels were chosen). A run whose weights are spread over processes writes ``shards/`` instead:
safetensors by torch's distributed checkpointing, which any number of processes can read. Parts of layers are stored as
rows of whole parameters, shared out anew among the processes. What PowerSGD owes each process's gradients stands in a
file of the process. Nothing is pickled.
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
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llm_mlp.checkpoint import (
    FORMAT_VERSION,
    SHARDS,
    CheckpointError,
    load_weights,
    read_json,
    read_shards,
    read_tensors,
    shards_in,
    write_folder,
    write_json,
    write_model,
)
from llm_mlp.config import ConfigError, TrainConfig, build, diff
from llm_mlp.data.tokenizer import Tokenizer
from llm_mlp.models import LM
from llm_mlp.ops import tune
from llm_mlp.train.average import Averages
from llm_mlp.train.compress import Communication
from llm_mlp.train.optim import empty_state, load_optimizer_tensors, optimizer_tensors
from llm_mlp.train.parallel import World, whole
from llm_mlp.train.pipeline import collected, elsewhere
from llm_mlp.train.tensor import Cuts

log = logging.getLogger("llm_mlp.train")

_NAME = re.compile(r"^step-(\d+)$")
# What may differ on resume without changing the steps that are left.
_FREE = (
    "out",
    "log_every",
    "wandb",
    "device",
    "compile",
    "debug_checks",
    "data.cache_dir",
    "data.prepared",
    "micro_batch",
)
_FREE_PREFIXES = ("evaluation.", "checkpoint.", "parallel.")


@dataclass
class Progress:
    """Where a run is: everything a resumed run needs besides weights and optimizer."""

    step: int = 0
    loader: dict[str, Any] = field(default_factory=dict)
    best_loss: float = float("inf")
    skipped: list[int] = field(default_factory=list)  # steps that were not applied
    scaler: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 0  # sequences a step, now
    micro_batch: int = 0  # sequences a forward pass of a process, now
    factors: dict[str, float] = field(default_factory=dict)  # of the learning rate, by action
    controllers: dict[str, Any] = field(default_factory=dict)
    world_size: int = 1
    carried: dict[str, Tensor] = field(default_factory=dict)  # state of this process's streams


@dataclass
class Parts:
    """What a checkpoint is made of besides `Progress`."""

    model: LM
    optimizers: list[torch.optim.Optimizer]
    averages: Averages
    world: World
    cuts: Cuts
    communication: Communication


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [(int(m[1]), p) for p in (run / "checkpoints").glob("step-*") if (m := _NAME.match(p.name))]
    return [p for _, p in sorted(found)]


def save(
    run: Path, config: TrainConfig, parts: Parts, tokenizer: Tokenizer, progress: Progress, *, sharded: bool, best: bool
) -> Path:
    """Write ``checkpoints/step-N`` and remove what is neither among the last k nor the best.

    All processes call it; the main one writes what all share.

    Raises:
        CheckpointError, RankError: on every process, if one could not write; earlier checkpoints stand.
    """
    world = parts.world
    folder = run / "checkpoints" / f"step-{progress.step:07d}"
    carried = _gathered(progress.carried, world)
    state = {} if sharded else _state(parts)
    facts = {
        "format_version": FORMAT_VERSION,
        "step": progress.step,
        "loader": progress.loader,
        "best_loss": progress.best_loss if progress.best_loss < float("inf") else None,
        "skipped": progress.skipped,
        "scaler": progress.scaler,
        "batch_size": progress.batch_size,
        "micro_batch": progress.micro_batch,
        "factors": progress.factors,
        "controllers": progress.controllers,
        "average": {"updates": parts.averages.updates, "points": len(parts.averages.points)},
        "world_size": world.size,
        "sharded": sharded,
        "buffers": _has_buffers(config, world),
        "kernels": tune.choices(),
        "config": config.model_dump(mode="json"),
    }

    def fill(temporary: Path) -> None:
        tensors = {f"carried/{k}": v for k, v in carried.items()}
        tensors |= {k: v for k, v in state.items() if not k.startswith("model/")}
        weights = {k.removeprefix("model/"): v for k, v in state.items() if k.startswith("model/")}
        write_model(temporary, parts.model, tokenizer, weights=not sharded, tensors=weights)
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, temporary / "training.safetensors")
        write_json(temporary / "training.json", facts)

    def write_own(temporary: Path) -> None:
        if sharded:
            _write_shards(temporary, parts)
        if facts["buffers"]:
            own = {name: t.contiguous().cpu() for name, t in parts.communication.tensors().items()}
            save_file(own, temporary / _buffers_of(world.rank))

    if sharded or facts["buffers"]:
        _together(folder, fill, write_own, world)
    else:
        _alone(world, lambda: write_folder(folder, fill), folder)
    if world.main:
        _tidy(run, config, folder, best)
    return folder


def _alone(world: World, write: Any, folder: Path) -> None:
    """Only the main process writes, and all learn how it went."""
    error = None
    if world.main:
        try:
            write()
        except CheckpointError as caught:
            error = caught
    world.agree(error, f"saving {folder}")


def _has_buffers(config: TrainConfig, world: World) -> bool:
    """Whether processes keep what the compression of their gradients owes them."""
    return config.parallel.compress == "powersgd" and world.copies > 1


def _buffers_of(rank: int) -> str:
    return f"powersgd-{rank:05d}.safetensors"


def _together(folder: Path, fill: Any, write_own: Any, world: World) -> None:
    """The main process makes the folder and fills it, all write what is theirs into it, then it gets its name."""
    error: BaseException | None = None
    if world.main:
        told = all_there = False

        def whole_fill(temporary: Path) -> None:
            nonlocal told, all_there
            fill(temporary)
            told = True
            world.gather(str(temporary))
            _write_own(write_own, temporary, folder, world)
            all_there = True

        try:
            write_folder(folder, whole_fill)
        except CheckpointError as caught:
            if told and not all_there:
                raise  # as it is on every process
            error = caught
        if not told:
            world.gather("")
    elif temporary := world.gather("")[0]:
        _write_own(write_own, Path(temporary), folder, world)
    world.agree(error, f"saving {folder}")


def _write_own(write: Any, temporary: Path, folder: Path, world: World) -> None:
    """This process's part of a checkpoint, and wait for those of the others."""
    error = None
    try:
        write(temporary)
    except (OSError, dcp.CheckpointException, SafetensorError, CheckpointError) as caught:
        error = CheckpointError(f"{folder}: could not be saved ({_short(caught)}); earlier checkpoints stand")
    world.agree(error, f"saving {folder}")


def _short(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1][:300] if str(error).strip() else type(error).__name__


def _state(parts: Parts) -> dict[str, Tensor]:
    """Weights, optimizer state and averages as this process holds them, by name."""
    found = {f"model/{k}": v.detach() for k, v in parts.model.state_dict().items()}
    found |= {f"optimizer/{k}": v for k, v in optimizer_tensors(parts.model, parts.optimizers).items()}
    return found | {f"average/{k}": v for k, v in parts.averages.tensors().items()}


def _parameter(key: str) -> str:
    """The parameter that a tensor of `_state` is or belongs to."""
    kind, _, name = key.partition("/")
    return {"model": name, "optimizer": name.rpartition("/")[0], "average": name.partition("/")[2]}[kind]


def _stored(state: dict[str, Tensor], cuts: Cuts) -> dict[str, Tensor]:
    """`_state` as shards hold it (all must ask); one by one: a device need not hold all parameters whole."""
    return {key: cuts.rows(_parameter(key), t) for key, t in state.items()}


def _write_shards(temporary: Path, parts: Parts) -> None:
    """Every process its shards; read back before the folder may get its name."""
    folder = temporary / SHARDS
    state = _stored(_state(parts), parts.cuts)
    known = {name for names in parts.world.gather(sorted(state)) for name in names}  # stages hold different ones
    # Tensors only: one other entry would make the files unreadable.
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    if parts.world.main and (missing := sorted(known - shards_in(folder).keys())):
        raise CheckpointError(f"{folder}: {missing[0]} was not written ({len(missing)} tensors in all)")


def _gathered(carried: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """The streams' states of all processes, by stream, on the CPU (of other stages on the main process alone)."""
    if not world.any(bool(carried)):
        return carried
    if world.data_size == 1:
        return collected(carried, world)
    if missing := [r for r, names in enumerate(world.gather(sorted(carried))) if not names]:
        raise CheckpointError(f"rank {missing[0]} carries no state of its streams")  # every step feeds every stream
    out = {}
    for name, own in sorted(carried.items()):
        rows = [torch.empty_like(own) for _ in range(world.copies)]
        torch.distributed.all_gather(rows, own.contiguous(), group=world.copies_group)
        out[name] = torch.cat(rows[:: world.config.context]).cpu()
    return collected(out, world)


def _tidy(run: Path, config: TrainConfig, folder: Path, best: bool) -> None:
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
        values = read_json(folder / "training.json")["config"]
        if "ffn_precision" in values:  # runs made before `module_precision` have its ffn under a name of its own
            values["module_precision"] = {"ffn": values.pop("ffn_precision")}
        return build(TrainConfig, values, str(folder / "training.json"))
    except (ConfigError, KeyError) as error:
        raise CheckpointError(f"{folder / 'training.json'}: no usable config ({error})") from None


def restore(folder: Path, config: TrainConfig, parts: Parts) -> Progress:
    """Fill model, optimizers and averages from a checkpoint, however many processes wrote it; the rest is returned.

    Raises:
        CheckpointError: incomplete, damaged or of another run.
    """
    facts = read_json(folder / "training.json")
    check_same_run(read_train_config(folder), config, folder)
    tune.go_by(facts.get("kernels", {}))
    missing = {"step", "loader", "best_loss", "skipped", "scaler"} - facts.keys()
    if missing:
        raise CheckpointError(f"{folder / 'training.json'}: no {', '.join(sorted(missing))}; the file was edited")
    average = facts.get("average", {"updates": 0, "points": 0})
    parts.averages.updates = average["updates"]
    kinds: dict[str, dict[str, Tensor]] = {"optimizer": {}, "average": {}, "carried": {}}
    for name, tensor in read_tensors(folder / "training.safetensors").items():
        kind, _, rest = name.partition("/")
        kinds.setdefault(kind, {})[rest] = tensor
    try:
        if facts.get("sharded"):
            _read_shards(folder, parts, average["points"])
        else:
            into = parts.cuts.like
            others = elsewhere(parts.model) if config.parallel.pipeline > 1 else set()
            load_weights(parts.model, folder, into=into, elsewhere=others)
            own = {name: t for name, t in kinds["optimizer"].items() if name.rpartition("/")[0] not in others}
            load_optimizer_tensors(parts.model, parts.optimizers, own, into=into)
            _load_averages(parts, kinds["average"], average["points"])
    except KeyError as error:
        raise CheckpointError(f"{folder / 'training.safetensors'}: tensor {error} is missing or foreign") from None
    world, device = parts.world, parts.world.device
    rows = slice(None)
    if kinds["carried"] and world.data_size > 1:
        per = len(next(iter(kinds["carried"].values()))) // world.data_size
        rows = slice(world.data_rank * per, (world.data_rank + 1) * per)
    layers = {number for number, _ in parts.model.blocks.named_children()}
    if config.parallel.compress == "powersgd":
        _load_buffers(folder, facts, config, parts)
    best = facts["best_loss"]
    return Progress(
        step=facts["step"],
        loader=facts["loader"],
        best_loss=float("inf") if best is None else best,
        skipped=facts["skipped"],
        scaler=facts["scaler"],
        batch_size=facts.get("batch_size", config.batch_size),
        micro_batch=facts.get("micro_batch", 0),
        factors=facts.get("factors", {}),
        controllers=facts.get("controllers", {}),
        world_size=facts.get("world_size", 1),
        carried={name: t[rows].to(device) for name, t in kinds["carried"].items() if name.split(".")[1] in layers},
    )


def _load_buffers(folder: Path, facts: dict[str, Any], config: TrainConfig, parts: Parts) -> None:
    """PowerSGD goes on with its buffers where each process has the same gradients as before, else with empty ones."""
    world, before = parts.world, facts.get("world_size", 1)
    changed = [
        line for line in diff(read_train_config(folder).parallel, config.parallel) if not line.startswith("timeout:")
    ]
    if before != world.size:
        changed = [f"they belonged to {before} processes"]
    elif not facts.get("buffers"):
        changed = ["none were saved"]
    if changed:
        log.info("PowerSGD starts with empty error buffers: %s", "; ".join(changed))
        return
    parts.communication.load_tensors(read_tensors(folder / _buffers_of(world.rank)), world.device)


def _load_averages(parts: Parts, tensors: dict[str, Tensor], points: int) -> None:
    parts.averages.expected(points, any(name.startswith("ema/") for name in tensors))
    for name, t in parts.averages.tensors().items():
        t.copy_(parts.cuts.like(_parameter(f"average/{name}"), tensors[name].to(t.device), t))


def _read_shards(folder: Path, parts: Parts, points: int) -> None:
    """Read by torch's distributed checkpointing, each process its shards under the layout of now."""
    path = folder / SHARDS
    names = shards_in(path).keys()
    empty_state(parts.optimizers)
    parts.averages.expected(points, any(name.startswith("average/ema/") for name in names))
    own = _state(parts)
    state = _stored(own, parts.cuts)
    known = {name for told in parts.world.gather(sorted(state)) for name in told}  # stages hold different ones
    if missing := sorted(known - names):
        raise CheckpointError(f"{path}: tensor {missing[0]!r} is missing ({len(missing)} in all)")
    if foreign := sorted(names - known):
        raise CheckpointError(f"{path}: tensor {foreign[0]!r} is foreign ({len(foreign)} in all)")
    read_shards(path, state, together=parts.world.size > 1)
    for key, t in own.items():
        if state[key] is not t:  # a part of a layer: taken from the whole, of which rows were read
            t.copy_(parts.cuts.like(_parameter(key), whole(state[key]).to(t.device), t))


def full_weights(model: LM, cuts: Cuts) -> dict[str, Tensor]:
    """The model's tensors on the CPU, gathered where they are cut or sharded (all processes must ask)."""
    return {name: cuts.whole(name, t.detach()).cpu() for name, t in model.state_dict().items()}
