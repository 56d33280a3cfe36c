"""The training loop: one for a single process and for many."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_mlp.allocator import keep_freed_memory
from llm_mlp.checkpoint import CheckpointError, load_tokenizer, load_weights, resolve, save_model
from llm_mlp.config import ConfigError, TrainConfig, dump
from llm_mlp.data import Batch, Dataset, Loader, held_out_batches, prepare
from llm_mlp.data.loader import IGNORED
from llm_mlp.eval.text import TextScore, score_batches
from llm_mlp.models import LM, build_model
from llm_mlp.ops import debug_checks
from llm_mlp.precision import Precision
from llm_mlp.train import snapshot
from llm_mlp.train.average import Averages
from llm_mlp.train.console import Console, read_lines, read_metrics
from llm_mlp.train.control import Action, BatchNoise, Guard, Metrics, Replay, make_controllers
from llm_mlp.train.float8 import check_float8, use_float8
from llm_mlp.train.gradients import Gradients, TrainingError
from llm_mlp.train.heads import HeadStatistics
from llm_mlp.train.meter import Meter
from llm_mlp.train.optim import clip_limit, make_optimizers, momentum_tensors, set_rates
from llm_mlp.train.parallel import World, Wrapped, open_world
from llm_mlp.train.pipeline import Pipeline, check_parts, collected, cut
from llm_mlp.train.schedule import decay_factor, momentum_at, rate_factor, warmup_steps
from llm_mlp.train.tensor import share_out

log = logging.getLogger("llm_mlp.train")


@dataclass
class TrainResult:
    """What a run came to. ``curve`` and ``evaluations``: (step, loss in nats a token)."""

    out: Path
    steps: int
    tokens: int
    seconds: float  # in training steps alone
    tokens_per_second: float  # median over the steps after the first few
    loss: float
    bits_per_byte: float
    memory: int  # peak bytes on the device, 0 on a CPU
    interrupted: bool = False
    curve: list[tuple[int, float]] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    averages: dict[str, float] = field(default_factory=dict)  # held-out loss of each average, at the end
    actions: list[Action] = field(default_factory=list)
    sent_bytes: int = 0  # gradients on the wire, of this process
    plain_bytes: int = 0  # what they would have been uncompressed
    collectives: int = 0  # that the loop asked for itself
    joules: float | None = None


class _Stop:
    """Ctrl-C and SIGTERM end the run after the step under way; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # not in the main thread: the caller handles signals
                break
        return self

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        log.warning("stopping after this step; a checkpoint will be saved")

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    init_from: str | Path | None = None,
    quiet: bool = False,
    stop_after: int | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainResult:
    """Train a model as ``config`` says, in the folder ``config.out``.

    Started by torchrun, every process calls it; `config.parallel` says how they share the work, the first one writes.

    Args:
        resume: continue from the last checkpoint in ``config.out``, also on another number of processes; on a CPU with
            the same number bit for bit.
        init_from: a checkpoint whose weights and tokenizer to start from.
        quiet: no progress bar.
        stop_after: leave after this step with a checkpoint, as Ctrl-C does.
        on_step: called with (step, loss) after each step.

    Raises:
        ConfigError, DataError, CheckpointError: what is asked for cannot be done.
        TrainingError: a NaN or infinite loss or gradient under ``on_nan: stop``; memory that does not suffice.
        RankError: another process of the run failed or died.
    """
    if resume and init_from:
        raise ConfigError("--resume continues a run's own weights; it cannot be combined with --init-from")
    if stop_after is not None and not 1 <= stop_after <= config.steps:
        raise ConfigError(f"--stop-after {stop_after}: expected a step from 1 to steps = {config.steps}")
    with open_world(config) as world, _deterministic(config.deterministic):
        _check(config, world)
        try:
            return _Run(config, world, resume, init_from, quiet, stop_after, on_step).go()
        except torch.OutOfMemoryError as error:  # those of a forward and backward pass are told where they happen
            raise TrainingError(
                f"rank {world.rank} ran out of memory beside the forward and backward passes ({_first_line(error)}): "
                "model, optimizer or evaluation do not fit. The last checkpoint stands; set optimizer.state: 8bit, "
                "a smaller model or micro_batch, or share the weights out with parallel.data: fsdp"
            ) from None


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """torch's deterministic algorithms, an error where there are none."""
    if not wanted:
        yield
        return
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # cuBLAS asks for it; read when its first handle is made
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _check(config: TrainConfig, world: World) -> None:
    """What needs the processes and their devices to be known."""
    device, parallel = world.device, config.parallel
    if config.compile and device.type == "cpu":
        _need_compiler()
    if config.cuda_graph and (device.type != "cuda" or world.size > 1):
        raise ConfigError(
            f"cuda_graph: true needs a CUDA device and one process; this run is on {device} with {world.size}"
        )
    if config.micro_batch == "auto" and (parallel.context > 1 or parallel.tensor > 1 or parallel.data == "fsdp"):
        raise ConfigError(
            "micro_batch: auto tries sizes on each process alone; give one with fsdp, parallel.context or tensor"
        )
    per = world.per_rank(config.batch_size)
    if config.micro_batch not in (0, "auto") and per % int(config.micro_batch):
        raise ConfigError(
            f"micro_batch = {config.micro_batch} does not divide the {per} sequences that each of the "
            f"{world.data_size} readers takes of batch_size = {config.batch_size}"
        )
    if parallel.pipeline > 1:
        check_parts(config, per)
    if config.module_precision.ffn == "fp8":
        check_float8(device)
    if device.type == "cpu":
        keep_freed_memory()


def _need_compiler() -> None:
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    if not any(shutil.which(name) for name in names):
        raise ConfigError(
            f"compile: true needs a C++ compiler on a CPU (none of {', '.join(names)}); set compile: false"
        )


GIVE_UP = 100  # refused steps in a row that end a run


class _Run:
    """One run's parts; `go` is the loop."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        resume: bool,
        init_from: str | Path | None,
        quiet: bool,
        stop_after: int | None,
        on_step: Callable[[int, float], None] | None,
    ) -> None:
        self.config, self.world, self.device = config, world, world.device
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.run = Path(config.out)
        self.stop_after, self.on_step, self.quiet = stop_after, on_step, quiet or not world.main
        last = snapshot.checkpoints(self.run)
        if resume and not last:
            raise CheckpointError(f"{self.run}: no checkpoint to resume from")
        if last and not resume:
            raise CheckpointError(
                f"{self.run}: already holds a run ({last[-1].name}); continue it with --resume or choose another --out"
            )
        world.same(f"{self.run}: where to start from", last[-1].name if resume else str(init_from or "scratch"))
        start_from = last[-1] if resume else resolve(init_from) if init_from else None
        tokenizer = load_tokenizer(start_from) if start_from else None
        self.dataset: Dataset = world.first(lambda: prepare(config.data, tokenizer=tokenizer, progress=not self.quiet))
        world.same("fingerprint of the tokenised data", self.dataset.fingerprint)
        if self.dataset.tokenizer.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size = {config.model.vocab_size} is smaller than the tokenizer's "
                f"{self.dataset.tokenizer.vocab_size} tokens"
            )
        staged = config.parallel.pipeline > 1
        # Stages and parts of layers are cut out of the whole model on the CPU, so that they start as they would there.
        self.model: LM = build_model(config.model, seed=config.seed)
        if config.precision == "fp64":
            self.model.double()
        if init_from:
            load_weights(self.model, resolve(init_from))
        self.parameters = sum(p.numel() for p in self.model.parameters())
        if staged:
            cut(self.model, world)
        self.model.activation_checkpointing = config.activation_checkpointing
        if config.compile:
            for block in self.model.blocks:
                block.compile(dynamic=False)
        self.cuts = share_out(self.model, world)
        if config.module_precision.ffn == "fp8":
            use_float8(self.model)
        self.model.to(self.device)
        self.precision = Precision(config.precision, self.device, config.module_precision)
        self.precision.apply(self.model)
        self.wrapped = Pipeline(self.model, world, self.precision) if staged else Wrapped(self.model, world)
        self.optimizers = make_optimizers(self.model, config.optimizer, self.cuts)
        self.averages = Averages(self.model, config.average)
        self.heads = HeadStatistics(self.model)
        self.loader = Loader(self.dataset, config.data, batch_size=config.batch_size, steps_hint=config.steps)
        self.guard = Guard(config.control.spikes == "skip", config.control.spike_sigma)
        momentum = config.optimizer.momentum if config.optimizer.name == "muon" else config.optimizer.betas[0]
        self.controllers = make_controllers(config.control, momentum=momentum, batch_size=config.batch_size)
        self.parts = snapshot.Parts(
            self.model, self.optimizers, self.averages, world, self.cuts, self.wrapped.communication
        )
        self.progress = snapshot.Progress(batch_size=config.batch_size)
        self.replay: Replay | None = None
        if resume:
            self._resume(last[-1])
        self.gradients = Gradients(
            config, self.wrapped, self.cuts, self.loader, self.precision, self.progress, self._act
        )
        self.gradients.after_out_of_memory()
        per = world.per_rank(self.progress.batch_size)
        if config.micro_batch != "auto":
            self.progress.micro_batch = self.progress.micro_batch or config.micro_batch or per
        torch.manual_seed(config.seed)
        self.result = TrainResult(self.run, self.progress.step, 0, 0.0, 0.0, math.nan, math.nan, 0)
        self._rate = 0.0  # of the last step
        self._times: list[tuple[float, int]] = []  # seconds and tokens of each step
        self._best = False  # whether the last evaluation was the best so far
        self._saved_at = self.progress.step if self.progress.step else -1
        if world.main:
            self.run.mkdir(parents=True, exist_ok=True)
            (self.run / "config.yaml").write_text(dump(config), encoding="utf8")
        self.console = Console(self.run, config, self.progress.step, self.quiet, main=world.main)

    def _resume(self, folder: Path) -> None:
        self.progress = snapshot.restore(folder, self.config, self.parts)
        self.loader.load_state_dict(self.progress.loader)
        if self.progress.scaler:
            self.precision.scaler.load_state_dict(self.progress.scaler)
        if self.stop_after is not None and self.stop_after <= self.progress.step:
            raise ConfigError(f"--stop-after {self.stop_after}: the run is already at step {self.progress.step}")
        for controller in self._kept():
            if controller.name in self.progress.controllers:
                controller.load_state_dict(self.progress.controllers[controller.name])
        if self.config.micro_batch != "auto" and self.config.micro_batch:
            self.progress.micro_batch = int(self.config.micro_batch)
        if self.progress.world_size != self.world.size:
            # Sums over other processes round differently, noise is measured over other parts: what was decided stands.
            # The main process's record: others may have no such file, or find it cut off at this step already.
            recorded = self.world.gather(read_lines(self.run / "actions.jsonl") if self.world.main else [])[0]
            self.replay = Replay(a for a in recorded if a["step"] > self.progress.step)
            self.progress.micro_batch = 0 if self.config.micro_batch == 0 else self.progress.micro_batch
            log.info(
                "continued on %d processes instead of %d; %s",
                self.world.size,
                self.progress.world_size,
                f"actions up to step {self.replay.until} are repeated as recorded"
                if self.replay.until
                else "no action is on record after this step",
            )

    # -- the loop --------------------------------------------------------------------------------------------------

    def go(self) -> TrainResult:
        config, result, progress = self.config, self.result, self.progress
        total = config.steps * config.batch_size
        checks: AbstractContextManager = debug_checks() if config.debug_checks else nullcontext()
        with self.console as console, _Stop() as stop, checks, Meter(config, self.device, self.world.size) as meter:
            if self.config.micro_batch == "auto" and not progress.micro_batch:
                self.gradients.find_micro_batch()
            self._check_noise()
            self.model.train()
            while self.loader.sample < total:
                started = time.perf_counter()
                metrics, stopping = self._step(min(progress.batch_size, total - self.loader.sample), stop.asked)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                tokens = metrics.batch_size * config.data.seq_len
                self._times.append((time.perf_counter() - started, tokens))
                step = result.steps = metrics.step
                result.loss = metrics.loss
                result.curve.append((step, metrics.loss))
                self._control(metrics)
                console.step(step, self.loader.sample / config.batch_size, self._shown(metrics, meter))
                if self.on_step:
                    self.on_step(step, metrics.loss)
                done = self.loader.sample >= total
                if done or _due(config.evaluation.every, step):
                    self._evaluate(step)
                # Several processes have to know of each other's wish: they learn of it in the next step's exchange.
                if stopping or step == self.stop_after or (stop.asked and self.world.size == 1):
                    result.interrupted = not done
                if done or result.interrupted or _due(config.checkpoint.every, step):
                    self._save()
                if result.interrupted:
                    console.say(f"stopped at step {step}; continue with --resume")
                    break
            result.joules = meter.joules()
        self._finish()
        return result

    def _check_noise(self) -> None:
        """Say why the gradient noise will be unavailable, if it will; a ramp, which waits for it, is refused."""
        per, wanted = self.world.per_rank(self.progress.batch_size), self.config.control.batch
        why = None if wanted == "off" else self.gradients.unmeasured(-(-per // self.progress.micro_batch))
        if why and wanted == "ramp":
            raise ConfigError(f"control.batch = ramp cannot measure the gradient noise: {why}")
        if why:
            log.info("gradient noise scale: unavailable (%s)", why)

    def _shown(self, m: Metrics, meter: Meter) -> dict[str, float | None]:
        seconds, tokens = self._times[-1]
        noise = next((c.scale for c in self.controllers if isinstance(c, BatchNoise)), None)
        values: dict[str, float | None] = {
            "loss": m.loss,
            "lr": self._rate,
            "grad_norm": m.grad_norm,
            "tokens_per_second": tokens / seconds,
            "batch_size": m.batch_size,
            "sample": self.loader.sample,
            "noise_scale": noise,  # None: unavailable
        }
        return values | {f"factor/{k}": v for k, v in self.progress.factors.items()} | meter.read(seconds, tokens)

    def _finish(self) -> None:
        result = self.result
        result.seconds = sum(seconds for seconds, _ in self._times)
        result.tokens = sum(tokens for _, tokens in self._times)
        settled = sorted(tokens / seconds for seconds, tokens in self._times[5:] or self._times)
        if settled:
            result.tokens_per_second = settled[len(settled) // 2]
        if self.device.type == "cuda":
            result.memory = torch.cuda.max_memory_allocated(self.device)
        sent = self.wrapped.communication
        result.sent_bytes, result.plain_bytes, result.collectives = (
            sent.sent_bytes,
            sent.plain_bytes,
            self.world.collectives,
        )
        if not self._times:
            self._recall()
        if not result.interrupted and (self._times or not (self.run / "model").is_dir()):
            self._export()

    def _export(self) -> None:
        """The finished model, and its averages, each as a folder of its own."""
        names = [name for name, _ in self.model.named_parameters()]
        weights = {"model": collected(snapshot.full_weights(self.model, self.cuts), self.world)}
        for kind, values in self.averages.values().items():
            own = {name: self.cuts.whole(name, t).cpu() for name, t in zip(names, values, strict=True)}
            weights[f"model-{kind}"] = weights["model"] | collected(own, self.world)
        if self.world.main:
            for name, tensors in weights.items():
                save_model(self.run / name, self.model, self.dataset.tokenizer, tensors)
        self.world.barrier()

    def _recall(self) -> None:
        """Nothing was left to do: the result is what the run had come to."""
        for line in read_metrics(self.run):
            if "bits_per_byte" in line:
                self.result.bits_per_byte = line["bits_per_byte"]
                self.result.evaluations.append((line["step"], line["held_out_loss"]))
            else:
                self.result.loss = line["loss"]

    # -- a step ----------------------------------------------------------------------------------------------------

    def _step(self, batch_size: int, asked: bool) -> tuple[Metrics, bool]:
        """One optimizer step on the next ``batch_size`` samples; and whether a process was asked to stop."""
        config, scaler = self.config, self.precision.scaler
        first, step = self.loader.sample, self.progress.step + 1
        # Schedules go by samples: how many steps of the configured batch size they make.
        place = first / config.batch_size
        if config.model.dropout:
            torch.manual_seed(_mixed(config.seed, step, self.world.copy))
        factor = max(math.prod(self.progress.factors.values()), config.control.min_factor)
        self._rate = config.optimizer.lr * rate_factor(config.schedule, place, config.steps) * factor
        decay = decay_factor(config.schedule, place, config.steps)
        momentum = momentum_at(config.schedule, config.optimizer.momentum, place)
        set_rates(self.optimizers, self._rate, decay, momentum)
        sums, counted = self.gradients.of(first, batch_size, step)
        self.cuts.sum_shared(self.model)
        for optimizer in self.optimizers:
            scaler.unscale_(optimizer)
        limit = clip_limit(config.optimizer, self.parameters)
        size = self.cuts.clip(self.model, limit, self.world)
        # One exchange for all that the processes have to agree on.
        sums = self.world.sum(torch.cat([sums, sums.new_tensor([float(asked)])]))
        loss, part_squares, parts, part_size, stopping = sums.tolist()
        self.loader.load_state_dict({**self.loader.state_dict(), "sample": first + batch_size})
        tensors = momentum_tensors(self.model, self.optimizers) if config.control.rate_from_gradients else {}
        momentum_squares = float(self.cuts.squared_norm(tensors)) if tensors else None
        metrics = Metrics(
            step,
            loss / max(1, counted),
            size,
            batch_size,
            warm=place >= warmup_steps(config.schedule, config.steps),
            momentum_norm=None if momentum_squares is None else math.sqrt(self.world.over_stages(momentum_squares)),
            clipped_norm=min(size, limit),
            micro_norm_squared=part_squares / parts if parts else None,
            micro_size=round(part_size / parts) if parts else None,
        )
        self._apply_step(metrics, range(first, first + batch_size))
        self.progress.step = step
        return metrics, stopping > 0

    def _apply_step(self, m: Metrics, samples: range) -> None:
        """Let the optimizers step unless the guard objects; gradients are cleared either way."""
        scaler = self.precision.scaler
        overflow = scaler.is_enabled() and math.isfinite(m.loss) and not math.isfinite(m.grad_norm)
        objection = None if overflow else self.guard.objection(m)
        if overflow:
            log.info("step %d: fp16 gradients overflowed; the loss scale falls, the step is skipped", m.step)
        elif objection:
            self._refuse(m, samples, objection)
        for optimizer in self.optimizers:
            if objection is None:
                scaler.step(optimizer)  # after an overflow it does nothing but remember
        self.gradients.forget()
        scaler.update()
        if objection is None and not overflow:
            self.averages.update()

    def _refuse(self, m: Metrics, samples: range, why: str) -> None:
        """The step is left out, on all processes alike: they hold the same metrics."""
        what = (
            f"step {m.step}: loss {m.loss:.4g}, gradient norm {m.grad_norm:.4g}; samples {samples[0]} to {samples[-1]}"
        )
        finite = math.isfinite(m.loss) and math.isfinite(m.grad_norm)
        if not finite and self.config.on_nan == "stop":
            raise TrainingError(
                f"{what}. Nothing of this step was applied; the last checkpoint stands. Lower optimizer.lr, or set "
                "on_nan: skip to leave such steps out"
            )
        if self.guard.refused >= GIVE_UP:
            raise TrainingError(f"{what}. The last {GIVE_UP} steps were all refused; nothing of them was applied")
        log.warning("%s: step skipped (%s); its samples are in quarantine.jsonl", what, why)
        self.progress.skipped.append(m.step)
        self.console.write(
            "quarantine",
            {
                "step": m.step,
                "first_sample": samples[0],
                "last_sample": samples[-1],
                "loss": m.loss,
                "grad_norm": m.grad_norm,
                "why": why,
            },
        )
        if not finite:  # a stream whose state is lost starts afresh, or it would spoil every step to come
            for t in self.progress.carried.values():
                for row in t:
                    if not bool(row.isfinite().all() | (row == -math.inf).any()):
                        row.zero_()

    # -- control, evaluation, checkpoints --------------------------------------------------------------------------

    def _control(self, m: Metrics) -> None:
        found = [action for controller in self.controllers for action in controller.observe(m)]
        if self.replay is not None and m.step <= self.replay.until:
            found = [a for a in self.replay.at(m.step) if a.what != "micro_batch"]
        for action in found:
            self._act(action)

    def _act(self, action: Action) -> None:
        """Apply an action, and say so."""
        if action.what in ("gradient_factor", "loss_factor"):
            self.progress.factors[action.what] = action.value
        elif action.what == "batch_size":
            self.progress.batch_size = int(action.value)
        log.warning(
            "step %d: %s: %s = %g (%s)", action.step, action.controller, action.what, action.value, action.reason
        )
        self.result.actions.append(action)
        self.console.write("actions", action.as_dict())

    def _kept(self) -> list[Any]:
        """What has a state among the controllers' in a checkpoint."""
        return [self.guard, *self.controllers]

    def _evaluate(self, step: int) -> None:
        console = self.console
        if not any(len(data.tokens) for data in self.dataset.held_out):
            console.say("no held-out documents: no evaluation")
            return
        with self.heads.watching():
            score = self._score()
        values = {"held_out_loss": score.loss, "bits_per_byte": score.bits_per_byte}
        values |= self.heads.values(self.world)
        for name, weights in self.averages.values().items():
            with self.averages.in_place(weights):
                other = self._score()
            self.result.averages[name] = other.loss
            values |= {f"held_out_loss_{name}": other.loss, f"bits_per_byte_{name}": other.bits_per_byte}
        self.result.bits_per_byte = score.bits_per_byte
        self.result.evaluations.append((step, score.loss))
        console.evaluation(step, values)
        self._best = score.loss < self.progress.best_loss
        self.progress.best_loss = min(self.progress.best_loss, score.loss)

    def _score(self) -> TextScore:
        """Of the held-out documents, each copy of the model a part of them."""
        config, world = self.config, self.world
        found = held_out_batches(
            self.dataset,
            seq_len=config.data.seq_len,
            batch_size=self.progress.micro_batch or config.batch_size,
            max_tokens=config.evaluation.tokens,
        )
        every = list(found) if world.size > 1 else found
        batches: Iterable[tuple[Batch, int]] = every
        if world.size > 1:
            assert isinstance(every, list)
            # Sharded weights are gathered by all together: each process reads equally many batches.
            rounds = -(-len(every) // world.copies)
            own = range(world.copy, rounds * world.copies, world.copies)
            batches = [every[n] if n < len(every) else _uncounted(every[0]) for n in own]
        # Evaluation is short: running it uncompiled is quicker than compiling the blocks for it.
        with torch.compiler.set_stance("force_eager") if config.compile else nullcontext():
            model: Any = self.wrapped.call if isinstance(self.wrapped, Pipeline) else self.model
            score = score_batches(model, batches, self.precision)
        self.wrapped.reshard()
        if world.size == 1:
            return score
        if world.pipeline_rank < config.parallel.pipeline - 1:
            score = TextScore(0, 0, 0.0)  # the last stage's process counts for those before it
        sums = torch.tensor([score.tokens, score.bytes, score.nats], dtype=torch.float64, device=self.device)
        tokens, size, nats = world.sum(world.once(sums)).tolist()
        return TextScore(round(tokens), round(size), nats)

    def _save(self) -> None:
        progress = self.progress
        if self._saved_at == progress.step:
            return
        self._saved_at = progress.step
        progress.loader = self.loader.state_dict()
        progress.scaler = self.precision.scaler.state_dict()
        progress.controllers = {c.name: c.state_dict() for c in self._kept()}
        snapshot.save(
            self.run,
            self.config,
            self.parts,
            self.dataset.tokenizer,
            progress,
            sharded=self.wrapped.sharded or self.config.parallel.pipeline > 1 or bool(self.cuts),
            best=self._best,
        )
        self._best = False
        if self.world.main:
            self.gradients.fitted(progress.step)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _uncounted(pair: tuple[Batch, int]) -> tuple[Batch, int]:
    """The batch with no target that counts."""
    batch, _ = pair
    return replace(batch, targets=torch.full_like(batch.targets, IGNORED)), 0


def _mixed(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence([n % 2**64 for n in numbers]).generate_state(1, np.uint64)[0] >> np.uint64(1))
