"""A plan as plain data, every number with its unit and where it comes from."""

from __future__ import annotations

import difflib
import math
from typing import Any

from llm_mlp.config import ConfigError, ModulePrecisionConfig, build
from llm_mlp.models.lm import Checkpointing
from llm_mlp.train.plan.figures import (
    LINK_SHARE,
    STATED,
    USABLE,
    Leaf,
    PlanError,
    find_gpu,
    leaf,
)
from llm_mlp.train.plan.layout import MODES, Job, Layout, Time
from llm_mlp.train.plan.scale import scaled
from llm_mlp.train.plan.trace import held_bytes

TOKENS_PER_PARAMETER = 20
BATCH_AT_1B = 2**19  # tokens a step of a model of 1e9 parameters
OVERLAP = "assumed that weights and gradients travel behind other layers' computing and nothing else does"
FIELDS = {
    "fsdp": "readers of different samples",
    "pp": "pipeline stages",
    "cp": "spans of a sequence",
    "tp": "parts of a layer",
    "zero": "stage (0: DDP)",
    "micro": "sequences a forward pass",
}


def make_plan(
    preset: str,
    *,
    parameters: float | None = None,
    gpus: int = 1,
    gpu: str = "h100",
    length: int = 2048,
    tokens: float | None = None,
    batch: float | None = None,
    layout: str = "",
    checkpointing: str = "auto",
    optimizer: str = "muon",
    optimizer_state: str = "same",
    module_precision: str = "",
) -> dict[str, Any]:
    """What training needs, in the fastest layout that fits.

    Args:
        preset, parameters: the model (`scaled`). gpus, gpu: devices, of a name in `GPUS`.
        length: tokens a sequence. tokens: of the run; None: 20 a parameter. batch: tokens a step, a multiple of
            ``length``; None: 2^19 for a model of 1e9 parameters, growing as their root, a power of two of sequences.
        layout: fixes some numbers, for example ``pp=4,tp=8``. checkpointing: ``auto | none | selective | full``.
        optimizer: ``muon | adamw``. optimizer_state: ``same | 8bit``.
        module_precision: parts that a run computes otherwise than in bf16, for example ``mixer=fp32,ffn=fp8``.

    Returns:
        ``model, layout, memory, link_bytes, flops, seconds, efficiency, bubble, cost, energy``: each a number
        ``{value, unit, source}`` or several by name; ``source`` begins with computed, measured or assumed. And
        ``rejected``: layouts near the chosen one and why they were not taken.

    Raises:
        PlanError: what is asked for is unknown or fits nowhere.
    """
    config, device = scaled(preset, parameters), find_gpu(gpu)
    if gpus < 1:
        raise PlanError(f"--gpus {gpus}: expected at least 1")
    if length < 8:
        raise PlanError(f"--seq {length}: expected at least 8 tokens")
    modes: dict[str, tuple[Checkpointing, ...]] = {"auto": MODES, **{mode: (mode,) for mode in MODES}}
    if checkpointing not in modes:
        raise PlanError(f"--checkpointing {checkpointing!r}: expected {', '.join(modes)}")
    if optimizer not in ("muon", "adamw"):
        raise PlanError(f"--optimizer {optimizer!r}: expected muon or adamw")
    if optimizer_state not in ("same", "8bit"):
        raise PlanError(f"--optimizer-state {optimizer_state!r}: expected same or 8bit")
    sequences, batch_source = _batch(batch, length, Job(config, device, gpus, length, 1, optimizer).parameters)
    modules = _modules(module_precision, device.name)
    job = Job(config, device, gpus, length, sequences, optimizer, optimizer_state, modules)
    if tokens is not None and not (math.isfinite(tokens) and tokens >= 1):
        raise PlanError(f"--tokens {tokens:g}: expected the tokens of the run, for example 1e9")
    total = tokens or TOKENS_PER_PARAMETER * job.parameters
    total_source = "assumed: 20 a parameter" if tokens is None else "assumed: as given by --tokens"
    wanted = _wanted(layout)
    chosen = job.choose(modes[checkpointing], wanted)
    memory, time = job.memory(chosen), job.time(chosen)
    _compare(job, chosen)
    model_flops, again, optimizer_flops = job.flops(chosen)
    step_tokens = sequences * length
    steps = math.ceil(total / step_tokens)
    run = steps * time.step
    hours = run * gpus / 3600
    engine = _engine(chosen)
    if module_precision:
        job.rate_source += f"; as if {module_precision} took no other time and sent nothing else"
    of_step = f"computed: compute at the rate ({job.rate_source}), exchanges at {LINK_SHARE} of the rates {STATED}"
    followed = (
        "computed: storages followed on fake tensors of one layer of each kind, eager, "
        f"{'bf16' if job.on_gpu else 'fp32'}{' but ' * bool(module_precision)}{module_precision}, with the "
        f"{'Triton kernels' if job.on_gpu else 'chunked torch path'}, times the layers"
    )
    in_bits = ", in 8 bits" if optimizer_state == "8bit" else ""
    built = "computed: the model built on the meta device, sharded by fully_shard over a fake process group"
    fields: dict[str, Leaf] = {
        name: leaf(getattr(chosen, name), unit, f"computed: the fastest that fits{engine}")
        for name, unit in FIELDS.items()
    }
    forced = "assumed: as given by --layout"
    for name in wanted:
        fields[name]["source"] = forced
    return {
        "model": {
            "preset": leaf(preset, "name", "assumed: as given by --preset"),
            "parameters": leaf(job.parameters, "numbers", "computed: from the config; equals the built model's"),
            "d_model": leaf(config.d_model, "channels", "computed: the rule of --params"),
            "n_layers": leaf(config.n_layers, "layers", "computed: the rule of --params"),
            "ffn_hidden": leaf(config.ffn.hidden, "channels", "computed: the rule of --params"),
            "groups": leaf(config.perception.groups, "groups", "computed: the rule of --params"),
            "sequence": leaf(length, "tokens", "assumed: as given by --seq"),
            "tokens": leaf(int(total), "tokens", total_source),
            "steps": leaf(steps, "steps", "computed: tokens over the batch"),
        },
        "layout": {
            "gpus": leaf(gpus, device.name, "assumed: as given by --gpus"),
            **fields,
            "checkpointing": leaf(
                chosen.checkpointing, "mode", "computed: the fastest that fits" if checkpointing == "auto" else forced
            ),
            "micro_batches": leaf(job.parts(chosen), "a step", "computed: batch / fsdp / micro"),
            "batch": leaf(step_tokens, "tokens a step", batch_source),
        },
        "memory": {
            "weights": leaf(memory.weights, "bytes", built),
            "gradients": leaf(memory.gradients, "bytes", f"{built}; fp32 as the weights"),
            "optimizer": leaf(memory.optimizer, "bytes", f"{built}; {optimizer}'s own state{in_bits}"),
            "activations": leaf(memory.activations, "bytes", f"{followed}; kept for backward passes"),
            "working": leaf(memory.working, "bytes", f"{followed}; beside them at the peak, {memory.when}"),
            "peak": leaf(memory.peak, "bytes", f"computed: the largest of the step's moments, {memory.when}{engine}"),
            "device": leaf(device.memory, "bytes", f"assumed: {STATED}" if job.on_gpu else "assumed"),
            "usable": leaf(job.usable, "bytes", f"assumed: {USABLE} of the device's, the rest is the driver's"),
        },
        "link_bytes": _links(time, engine),
        "flops": {
            "token": leaf(model_flops / step_tokens, "FLOP", "computed: matrix products, three times forward"),
            "step": leaf(model_flops, "FLOP", "computed: matrix products of all GPUs"),
            "recomputed": leaf(again, "FLOP a step", "computed: the layers' forward passes again"),
            "optimizer": leaf(optimizer_flops, "FLOP a step", "computed: Newton-Schulz steps of all GPUs"),
            "run": leaf(model_flops * steps, "FLOP", "computed: of the model, all steps"),
        },
        "seconds": {
            "rate": leaf(job.rate, "FLOP/s of a GPU", job.rate_source),
            "compute": leaf(time.compute, "s a step", f"computed: FLOPs of a stage at the rate ({job.rate_source})"),
            "exposed": leaf(time.exposed, "s a step", f"computed: at {LINK_SHARE} of stated rates; {OVERLAP}"),
            "optimizer": leaf(time.optimizer, "s a step", "computed: at measured product and copy rates of an H100"),
            "step": leaf(time.step, "s", of_step),
            "tokens": leaf(step_tokens / time.step, "tokens/s", of_step),
            "run": leaf(run, "s", f"{of_step}; without evaluation, checkpoints and failures"),
        },
        "efficiency": {
            "parallel": leaf(
                (model_flops + again) / (gpus * job.rate) / time.step,
                "share",
                "computed: the step without exchanges, bubble and optimizer over the step",
            ),
            "mfu": leaf(model_flops / (gpus * device.peak) / time.step, "share", f"computed: of the peak {STATED}"),
        },
        "bubble": leaf(time.bubble, "share of the step", "computed: (pp - 1) / (micro-batches + pp - 1)"),
        "cost": leaf(hours * device.price, "USD", f"assumed: {device.price} USD a GPU hour"),
        "energy": leaf(run * gpus * device.watts, "J", f"assumed: {device.watts:g} W a GPU throughout, no hosts"),
        "rejected": _rejected(job, chosen, modes[checkpointing], time),
    }


def _batch(batch: float | None, length: int, parameters: int) -> tuple[int, str]:
    """Sequences a step, and where they are from."""
    if batch is None:
        sequences = max(1, 2 ** math.floor(math.log2(max(1.0, BATCH_AT_1B * math.sqrt(parameters / 1e9) / length))))
        return sequences, "assumed: 2^19 tokens at 1e9 parameters, growing as their root; a power of two of sequences"
    if not math.isfinite(batch) or batch < length or batch % length:
        near = max(1, round(batch / length)) * length if math.isfinite(batch) else length
        raise PlanError(f"--batch {batch:g} tokens are not whole sequences of --seq {length}; the nearest is {near}")
    return int(batch // length), "assumed: as given by --batch"


def _modules(text: str, gpu: str) -> ModulePrecisionConfig:
    try:
        found = build(ModulePrecisionConfig, dict(item.split("=") for item in filter(None, text.split(","))))
    except ValueError as error:  # also of a part without a precision
        said = f" ({error})" if isinstance(error, ConfigError) else ""
        raise PlanError(f"--module-precision {text!r}: expected for example mixer=fp32,ffn=fp8{said}") from None
    if gpu == "cpu" and found.ffn == "fp8":
        raise PlanError("--module-precision ffn=fp8 needs a GPU")
    return found


def _wanted(text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for item in filter(None, text.split(",")):
        name, _, number = item.partition("=")
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise PlanError(f"--layout {text!r}: unknown name {name!r}{hint} Known: {', '.join(FIELDS)}")
        if not number.isdigit() or (int(number) < 1 and name != "zero"):
            raise PlanError(f"--layout {text!r}: {name} needs a whole number, for example pp=4,tp=8")
        found[name] = int(number)
    return found


def _compare(job: Job, chosen: Layout) -> None:
    """What the layout was chosen by is what building and sharding the model gives, to the byte."""
    memory = job.memory(chosen)
    stage = job.stage(chosen)
    built = held_bytes(stage.config, job.optimizer, chosen.shards, chosen.zero, job.state, stage.layers)
    assert built == (memory.weights, memory.gradients, memory.optimizer), (built, memory)


def _engine(layout: Layout) -> str:
    """What of a layout is planned for."""
    planned = [name for name, n in (("pp", layout.pp), ("tp", layout.tp)) if n > 1]
    if planned:
        return f"; {' and '.join(planned)} as they are meant, not yet compared with runs"
    return "; of several processes not yet compared with runs" if layout.shards > 1 else ""


def _links(time: Time, engine: str) -> dict[str, Leaf]:
    what = {
        "fsdp": "weights, gradients and Muon's updates, fp32",
        "pp": "the residual stream, what later layers route of it, and gradients, fp32",
        "cp": "tails, maps, rows and their gradients",
        "tp": "sums of the residual stream, bf16",
    }
    found = {
        name: leaf(size, f"bytes a step and GPU, {link}", f"computed: {what[name]}{engine}")
        for name, (size, link) in time.links.items()
    }
    for link in ("nvlink", "network"):
        size = sum(n for n, where in time.links.values() if where == link)
        found[link] = leaf(size, "bytes a step and GPU", "computed: the sum over what goes there")
    return found


def _rejected(job: Job, chosen: Layout, modes: tuple[Checkpointing, ...], time: Time) -> list[dict[str, str]]:
    """Those near the chosen layout, and why they were not taken."""
    rows = []
    for other in job.neighbours(chosen, modes):
        if isinstance(other, str):
            name, _, why = other.partition(": ")
        else:
            name, memory, step = str(other), job.memory(other), job.time(other).step
            if memory.peak > job.usable:
                why = f"needs {memory.peak / 1e9:,.1f} GB of {job.usable / 1e9:,.1f} usable GB ({memory.when})"
            else:
                why = f"fits, but a step takes {step:,.4g} s instead of {time.step:,.4g} s"
                if step < time.step:
                    why = f"a step takes {step:,.4g} s, but --layout or --checkpointing rules it out"
        rows.append({"layout": name, "why": why})
    return rows
