"""The training loop."""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_mlp.allocator import keep_freed_memory
from llm_mlp.checkpoint import CheckpointError, load_tokenizer, load_weights, resolve, save_model
from llm_mlp.config import ConfigError, TrainConfig, dump
from llm_mlp.data import Batch, Dataset, Loader, held_out_batches, prepare
from llm_mlp.device import pick_device
from llm_mlp.eval.text import TextScore, score_batches
from llm_mlp.models import LM, build_model
from llm_mlp.models.capture import CapturedGradients
from llm_mlp.ops import debug_checks
from llm_mlp.precision import Precision
from llm_mlp.train import snapshot
from llm_mlp.train.console import Console, read_metrics
from llm_mlp.train.optim import make_optimizers, set_rate
from llm_mlp.train.schedule import rate_factor

log = logging.getLogger("llm_mlp.train")


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step and the samples."""


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

    Args:
        resume: continue from the last checkpoint in ``config.out``; on a CPU bit for bit.
        init_from: a checkpoint whose weights and tokenizer to start from.
        quiet: no progress bar.
        stop_after: leave after this step with a checkpoint, as Ctrl-C does.
        on_step: called with (step, loss) after each step.

    Raises:
        ConfigError, DataError, CheckpointError: what is asked for cannot be done.
        TrainingError: a NaN or infinite loss or gradient under ``on_nan: stop``.
    """
    run = Path(config.out)
    if resume and init_from:
        raise ConfigError("--resume continues a run's own weights; it cannot be combined with --init-from")
    if stop_after is not None and not 1 <= stop_after <= config.steps:
        raise ConfigError(f"--stop-after {stop_after}: expected a step from 1 to steps = {config.steps}")
    device = pick_device(config.device)
    if config.compile and device.type == "cpu":
        _need_compiler()
    if config.cuda_graph and device.type != "cuda":
        raise ConfigError(f"cuda_graph: true needs a CUDA device; this run is on {device}")
    if device.type == "cpu":
        keep_freed_memory()
    last = snapshot.checkpoints(run)
    if resume and not last:
        raise CheckpointError(f"{run}: no checkpoint to resume from")
    if last and not resume:
        raise CheckpointError(
            f"{run}: already holds a run ({last[-1].name}); continue it with --resume or choose another --out"
        )
    start_from = last[-1] if resume else resolve(init_from) if init_from else None
    tokenizer = load_tokenizer(start_from) if start_from else None
    dataset = prepare(config.data, tokenizer=tokenizer, progress=not quiet)
    if dataset.tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {config.model.vocab_size} is smaller than the tokenizer's "
            f"{dataset.tokenizer.vocab_size} tokens"
        )
    model = build_model(config.model, seed=config.seed, device=device)
    model.activation_checkpointing = config.activation_checkpointing
    optimizers = make_optimizers(model, config.optimizer)
    loader = Loader(dataset, config.data, batch_size=config.batch_size, steps_hint=config.steps)
    torch.manual_seed(config.seed)
    progress = snapshot.Progress()
    if resume:
        progress = snapshot.restore(last[-1], config, model, optimizers)
        loader.load_state_dict(progress.loader)
        if stop_after is not None and stop_after <= progress.step:
            raise ConfigError(f"--stop-after {stop_after}: the run is already at step {progress.step}")
    elif init_from:
        load_weights(model, resolve(init_from) / "model.safetensors")
    if config.compile:
        for block in model.blocks:
            block.compile(dynamic=False)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(dump(config), encoding="utf8")
    return _Run(config, run, device, model, dataset, loader, optimizers, progress, stop_after, on_step).go(quiet)


def _need_compiler() -> None:
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    if not any(shutil.which(name) for name in names):
        raise ConfigError(
            f"compile: true needs a C++ compiler on a CPU (none of {', '.join(names)}); set compile: false"
        )


class _Run:
    """One run's parts; `go` is the loop."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        device: torch.device,
        model: LM,
        dataset: Dataset,
        loader: Loader,
        optimizers: list[torch.optim.Optimizer],
        progress: snapshot.Progress,
        stop_after: int | None,
        on_step: Callable[[int, float], None] | None,
    ) -> None:
        self.config, self.run, self.device, self.model, self.dataset = config, run, device, model, dataset
        self.loader, self.optimizers, self.progress = loader, optimizers, progress
        self.stop_after, self.on_step = stop_after, on_step
        self.precision = Precision(config.precision, device)
        if progress.scaler:
            self.precision.scaler.load_state_dict(progress.scaler)
        self.result = TrainResult(run, progress.step, 0, 0.0, 0.0, math.nan, math.nan, 0)
        # Made with the first batch, when the model is where it stays.
        self._captured: CapturedGradients | None = None
        self._times: list[float] = []
        self._best = False  # whether the last evaluation was the best so far
        self._saved_at = progress.step if progress.step else -1

    def go(self, quiet: bool) -> TrainResult:
        config, result = self.config, self.result
        checks: AbstractContextManager = debug_checks() if config.debug_checks else nullcontext()
        console = Console(self.run, config, self.progress.step, quiet)
        with console, _Stop() as stop, checks:
            self.model.train()
            for step in range(self.progress.step, config.steps):
                started = time.perf_counter()
                loss, norm = self._step(step)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                self._times.append(time.perf_counter() - started)
                self.progress.step = result.steps = step + 1
                result.loss = loss
                result.curve.append((step + 1, loss))
                rate = config.optimizer.lr * rate_factor(config.schedule, step, config.steps)
                speed = config.batch_size * config.data.seq_len / self._times[-1]
                console.step(step + 1, {"loss": loss, "lr": rate, "grad_norm": norm, "tokens_per_second": speed})
                if self.on_step:
                    self.on_step(step + 1, loss)
                done = step + 1 == config.steps
                if done or _due(config.evaluation.every, step + 1):
                    self._evaluate(step + 1, console)
                if stop.asked or step + 1 == self.stop_after:
                    result.interrupted = not done
                if done or result.interrupted or _due(config.checkpoint.every, step + 1):
                    self._save()
                if result.interrupted:
                    console.say(f"stopped at step {step + 1}; continue with --resume")
                    break
        self._finish()
        return result

    def _finish(self) -> None:
        result, config = self.result, self.config
        result.seconds = sum(self._times)
        result.tokens = len(self._times) * config.batch_size * config.data.seq_len
        settled = sorted(self._times[5:] or self._times)
        if settled:
            result.tokens_per_second = config.batch_size * config.data.seq_len / settled[len(settled) // 2]
        if self.device.type == "cuda":
            result.memory = torch.cuda.max_memory_allocated(self.device)
        if not self._times:
            self._recall()
        if not result.interrupted and (self._times or not (self.run / "model").is_dir()):
            save_model(self.run / "model", self.model, self.dataset.tokenizer)

    def _recall(self) -> None:
        """Nothing was left to do: the result is what the run had come to."""
        for line in read_metrics(self.run):
            if "bits_per_byte" in line:
                self.result.bits_per_byte = line["bits_per_byte"]
                self.result.evaluations.append((line["step"], line["held_out_loss"]))
            else:
                self.result.loss = line["loss"]

    def _step(self, step: int) -> tuple[float, float]:
        """One optimizer step; returns the mean loss and the gradient norm before clipping."""
        config, scaler = self.config, self.precision.scaler
        first = self.loader.state_dict()["sample"]
        micro = config.micro_batch or config.batch_size
        batches = [self.loader.samples(first + i, micro) for i in range(0, config.batch_size, micro)]
        counted = sum(int((b.targets >= 0).sum()) for b in batches)
        set_rate(self.optimizers, config.optimizer.lr * rate_factor(config.schedule, step, config.steps))
        total = torch.zeros((), device=self.device)
        for batch in batches:
            total += self._gradients(batch, 1 / max(1, counted))
        for optimizer in self.optimizers:
            scaler.unscale_(optimizer)
        limit = config.optimizer.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        mean, size = float(total), float(norm)
        self.loader.load_state_dict({**self.loader.state_dict(), "sample": first + config.batch_size})
        good = math.isfinite(mean) and math.isfinite(size)
        overflow = scaler.is_enabled() and math.isfinite(mean) and not good
        if overflow:
            log.info("step %d: fp16 gradients overflowed; the loss scale falls, the step is skipped", step + 1)
        elif not good:
            self._bad_step(step, mean, size, batches)
        for optimizer in self.optimizers:
            if good or overflow:
                scaler.step(optimizer)  # after an overflow it does nothing but remember
            if self._captured is None:
                optimizer.zero_grad(set_to_none=True)
        if self._captured is not None:
            self._captured.clear()
        scaler.update()
        return mean, size

    def _gradients(self, batch: Batch, scale: float) -> Tensor:
        """Adds a micro-batch's gradients; its summed loss times ``scale``."""
        if self.config.cuda_graph:
            if self._captured is None:
                rows, length = batch.tokens.shape
                self._captured = CapturedGradients(self.model, rows, length, self.precision.autocast)
            return self._captured(batch.tokens, batch.targets, scale)
        loss = self._loss(batch) * scale
        self.precision.scaler.scale(loss).backward()
        return loss.detach()

    def _loss(self, batch: Batch) -> Tensor:
        """Summed loss of a micro-batch; streams carry their state on."""
        state = self._carried_in(batch) if batch.carried is not None else None
        with self.precision.autocast():
            out = self.model(
                batch.tokens.to(self.device, non_blocking=True),
                state,
                batch.cu_seqlens,
                targets=batch.targets.to(self.device, non_blocking=True),
                reduction="sum",
            )
        if batch.last is not None:
            self._carry_out(batch, out.state)
        return out.loss

    def _carried_in(self, batch: Batch) -> dict[str, Tensor]:
        """State of the batch's packed sequences: that of the stream a sequence continues, else an empty one."""
        assert batch.carried is not None
        compute = self.precision.dtype or next(self.model.parameters()).dtype
        # Rows: the streams' states, then one empty state for sequences that start afresh.
        pool = self.model.init_state(self.config.batch_size + 1, dtype=compute)
        for name, saved in self.progress.carried.items():
            pool[name][: saved.shape[0]] = saved.to(pool[name].dtype)
        fresh = self.config.batch_size
        rows = torch.tensor([fresh if stream < 0 else stream for stream in batch.carried], device=self.device)
        return {name: t.index_select(0, rows) for name, t in pool.items()}

    def _carry_out(self, batch: Batch, state: dict[str, Tensor]) -> None:
        assert batch.last is not None
        for stream, sequence in enumerate(batch.last):
            if sequence < 0:
                continue
            for name, t in state.items():
                if name not in self.progress.carried:
                    self.progress.carried[name] = t.new_zeros((self.config.batch_size, *t.shape[1:]))
                self.progress.carried[name][stream] = t[sequence].detach()

    def _bad_step(self, step: int, loss: float, norm: float, batches: list[Batch]) -> None:
        samples = [i for b in batches for i in b.sample_ids]
        what = f"step {step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}; samples {samples[0]} to {samples[-1]}"
        if self.config.on_nan == "stop":
            raise TrainingError(
                f"{what}. Nothing of this step was applied; the last checkpoint stands. Lower optimizer.lr, or set "
                "on_nan: skip to leave such steps out"
            )
        log.warning("%s: step skipped", what)
        self.progress.skipped.append(step + 1)

    def _evaluate(self, step: int, console: Console) -> TextScore | None:
        config = self.config
        if not any(len(data.tokens) for data in self.dataset.held_out):
            console.say("no held-out documents: no evaluation")
            return None
        batch = config.micro_batch or config.batch_size
        batches = held_out_batches(
            self.dataset, seq_len=config.data.seq_len, batch_size=batch, max_tokens=config.evaluation.tokens
        )
        # Evaluation is short: running it uncompiled is quicker than compiling the blocks for it.
        with torch.compiler.set_stance("force_eager") if config.compile else nullcontext():
            score = score_batches(self.model, batches, self.precision)
        self.result.bits_per_byte = score.bits_per_byte
        self.result.evaluations.append((step, score.loss))
        console.evaluation(step, {"held_out_loss": score.loss, "bits_per_byte": score.bits_per_byte})
        self._best = score.loss < self.progress.best_loss
        self.progress.best_loss = min(self.progress.best_loss, score.loss)
        return score

    def _save(self) -> None:
        if self._saved_at == self.progress.step:
            return
        self._saved_at = self.progress.step
        self.progress.loader = self.loader.state_dict()
        self.progress.scaler = self.precision.scaler.state_dict()
        snapshot.save(
            self.run,
            self.config,
            self.model,
            self.dataset.tokenizer,
            self.optimizers,
            self.progress,
            best=self._best,
        )
        self._best = False


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
