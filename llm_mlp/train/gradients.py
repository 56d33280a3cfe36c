"""Gradients of a batch: in parts, met between processes, made again in smaller parts where memory ends."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm_mlp.checkpoint import CheckpointError
from llm_mlp.config import TrainConfig
from llm_mlp.data import Batch, Loader
from llm_mlp.models.capture import CapturedGradients
from llm_mlp.precision import Precision
from llm_mlp.train.context import SplitSequence
from llm_mlp.train.control import Action
from llm_mlp.train.parallel import Wrapped
from llm_mlp.train.pipeline import Part, Pipeline
from llm_mlp.train.snapshot import Progress
from llm_mlp.train.tensor import Cuts

log = logging.getLogger("llm_mlp.train")

Carried = list[tuple[int, str, Tensor]]  # of streams: place, name in the state, state
OUT_OF_MEMORY = "out_of_memory.json"


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step and the samples."""


class _OutOfMemory(Exception):
    """A part of a batch did not fit; nothing was exchanged yet, so the step can be repeated."""


class Gradients:
    """Makes the gradients of batches; ``progress`` holds the size of a part and the streams' states, which it moves on.

    ``act`` is told when the size of a part changes.
    """

    def __init__(
        self,
        config: TrainConfig,
        wrapped: Wrapped,
        cuts: Cuts,
        loader: Loader,
        precision: Precision,
        progress: Progress,
        act: Callable[[Action], None],
    ) -> None:
        self.config, self.wrapped, self.world, self.loader = config, wrapped, wrapped.world, loader
        self.model, self.device = wrapped.model, wrapped.world.device
        self.precision, self.progress, self.act, self.run = precision, progress, act, Path(config.out)
        self.cuts = cuts
        group = self.world.context_group
        self.split = None if group is None else SplitSequence(group)
        # Made with the first batch, when the model is where it stays.
        self._captured: CapturedGradients | None = None

    def of(self, first: int, batch_size: int, step: int) -> tuple[Tensor, int]:
        """Gradients of the batch's mean loss.

        Returns this process's [summed loss, squared norms of parts' gradients, parts, their samples] (float64) and the
        number of targets of the whole batch.
        """
        world = self.world
        per = world.per_rank(batch_size)
        mine = first + world.data_rank * per
        batches = self._read(mine, per)
        counted = sum(_targets(b) for b in batches)
        if world.data_size > 1:
            total = torch.tensor(float(counted), dtype=torch.float64, device=self.device)
            counted = round(float(world.sum(total))) // (world.size // world.data_size)  # several read the same
        while True:
            try:
                sums, carried = self._accumulate(batches, counted, step)
                break
            except _OutOfMemory as error:
                self.forget()
                self._halve(step, len(batches[0].sample_ids), str(error))
                batches = self._read(mine, per)
        for stream, name, t in carried:
            if name not in self.progress.carried:
                self.progress.carried[name] = t.new_zeros((per, *t.shape))
            self.progress.carried[name][stream] = t
        return world.once(sums), counted

    def _read(self, first: int, count: int) -> list[Batch]:
        """This process's samples in parts of a micro-batch."""
        micro = max(1, min(self.progress.micro_batch or count, count))
        return [self.loader.samples(first + i, min(micro, count - i)) for i in range(0, count, micro)]

    def _accumulate(self, batches: list[Batch], counted: int, step: int) -> tuple[Tensor, Carried]:
        """Forward and backward passes of the parts; the sums of `of`, and the streams' states after them."""
        world, wrapped = self.world, self.wrapped
        # DDP and fully_shard average the copies' gradients; their sum is meant.
        scale = world.copies / max(1, counted)
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        carried: Carried = []
        measure = self.config.control.batch != "off" and self.unmeasured(len(batches)) is None
        per = sum(len(b.sample_ids) for b in batches)
        if isinstance(wrapped, Pipeline):
            parts = [Part(batch, self._carried_in(batch)) for batch in batches]
            try:
                loss, squares = wrapped.gradients(parts, scale, self._squares if measure else None)
            except torch.OutOfMemoryError as error:
                raise self._does_not_fit(error, step, len(batches[0].sample_ids)) from error
            sums[0] = loss / scale
            if squares is not None:
                sums[1:] += self._mean(squares, batches[0], counted, per)
            for part in parts:
                self._carry_out(part.batch, part.after, carried)
            return sums, carried
        wrapped.communication.measure = measure and len(batches) == 1
        for n, batch in enumerate(batches):
            last = n == len(batches) - 1
            try:
                with wrapped.part(last):
                    sums[0] += self._gradients(batch, scale, carried) / scale
            except torch.OutOfMemoryError as error:
                # Processes that exchange something in every part wait for this one already.
                together = wrapped.sharded or self.split is not None or world.config.tensor > 1
                if self._captured is not None or (world.size > 1 and (last or together)):
                    raise self._does_not_fit(error, step, len(batch.sample_ids)) from error
                raise _OutOfMemory(str(error).splitlines()[0]) from None
            if measure and n == 0 and not last:
                sums[1:] += self._mean(self._squares(self.model.named_parameters()), batch, counted, per)
        own = wrapped.communication.own_squares()
        if own is not None:
            sums[1:] += self._mean(own, batches[0], counted, per)
        return sums, carried

    # -- the noise of gradients ------------------------------------------------------------------------------------

    def unmeasured(self, parts: int) -> str | None:
        """Why the gradient of a part cannot be held against that of the batch, which has so many; None if it can."""
        parallel = self.world.config
        if self.wrapped.sharded and parallel.zero == 1:
            return "parallel.zero = 1 gives no part's gradients away before the last; take zero = 2 or 3"
        if parts > 1:
            return None
        if self.wrapped.sharded or parallel.context > 1 or parallel.tensor > 1 or self.world.copies == 1:
            return "a process reads its share of the batch in a single part; set a smaller micro_batch"
        return None  # DDP: a process's own gradients are seen before they meet the others'

    def _squares(self, named: Iterable[tuple[str, nn.Parameter]]) -> Tensor:
        """Squared norm of the gradients of a part that parameters have: over all spans of its texts, all parts of
        layers and all shards. Nothing of them is changed."""
        gradients = {name: p.grad for name, p in named if p.grad is not None}
        if self.split is not None and not self.wrapped.sharded:  # fully_shard has summed over the spans
            flat = torch.cat([g.flatten() for g in gradients.values()])
            dist.all_reduce(flat, group=self.split.group)
            sums = flat.split([g.numel() for g in gradients.values()])
            gradients = {name: s.view_as(g) for s, (name, g) in zip(sums, gradients.items(), strict=True)}
        return self.cuts.squared_norm(gradients, summed=False)

    def _mean(self, squares: Tensor, batch: Batch, counted: int, per: int) -> Tensor:
        """[squared norm of a part's mean gradient, 1, its samples] from that of its gradient in this step's sum, for
        `of`; ``per``: samples of the step that this process reads. Stages add up: all but one count for nothing."""
        world, own, samples = self.world, _targets(batch), len(batch.sample_ids)
        if self.wrapped.sharded:  # which has summed the first parts of all readers
            undo, samples = per / samples, samples * world.data_size
        elif own:
            undo = counted / (own * world.copies)
        else:
            return torch.zeros(3, dtype=torch.float64, device=self.device)
        undo /= self.precision.scaler.get_scale()
        counts = float(world.pipeline_rank == world.config.pipeline - 1)
        return torch.cat([squares[None] * undo**2, squares.new_tensor([counts, counts * samples])])

    def _gradients(self, batch: Batch, scale: float, carried: Carried) -> Tensor:
        """Adds a micro-batch's gradients; its summed loss times ``scale``."""
        if self.config.cuda_graph:
            if self._captured is None:
                rows, length = batch.tokens.shape
                self._captured = CapturedGradients(self.model, rows, length, self.precision.autocast)
            return self._captured(batch.tokens, batch.targets, scale)
        with nullcontext(batch) if self.split is None else self.split.reading(self.model, batch) as part:
            loss = self._loss(part, carried) * scale
            self.precision.scaler.scale(loss).backward()
        return loss.detach()

    def _loss(self, batch: Batch, carried: Carried) -> Tensor:
        """Summed loss of a micro-batch; the states that its streams carry on are added to ``carried``."""
        state = self._carried_in(batch)
        with self.precision.autocast():
            out = self.wrapped.call(
                batch.tokens.to(self.device, non_blocking=True),
                state,
                # Not as a tensor: DDP and fully_shard would move it to the device.
                None if batch.cu_seqlens is None else batch.cu_seqlens.numpy(),
                targets=batch.targets.to(self.device, non_blocking=True),
                reduction="sum",
            )
        self._carry_out(batch, out.state, carried)
        return out.loss

    def _carry_out(self, batch: Batch, state: dict[str, Tensor], carried: Carried) -> None:
        """Adds to ``carried`` what the batch's streams go on with, of the states of its sequences."""
        carried += [
            (self._own_stream(stream), name, t[sequence].detach())
            for stream, sequence in enumerate(batch.last or ())
            if sequence >= 0
            for name, t in state.items()
        ]

    def _own_stream(self, stream: int) -> int:
        """The place of a stream among those that this process reads."""
        return stream % self.world.per_rank(self.config.batch_size)

    def _carried_in(self, batch: Batch) -> dict[str, Tensor] | None:
        """State of the batch's packed sequences: that of the stream a sequence continues, else an empty one."""
        if batch.carried is None:
            return None
        compute = self.precision.of("mixer") or next(self.model.parameters()).dtype
        # Rows: the streams' states, then one empty state for sequences that start afresh.
        fresh = self.world.per_rank(self.config.batch_size)
        pool = self.model.init_state(fresh + 1, dtype=compute, device=self.device)
        for name, saved in self.progress.carried.items():
            pool[name][: saved.shape[0]] = saved.to(pool[name].dtype)
        rows = [fresh if stream < 0 else self._own_stream(stream) for stream in batch.carried]
        index = torch.tensor(rows, device=self.device)
        return {name: t.index_select(0, index) for name, t in pool.items()}

    def forget(self) -> None:
        """Clear the gradients."""
        if self._captured is not None:
            self._captured.clear()
        else:
            self.model.zero_grad(set_to_none=True)

    # -- memory ----------------------------------------------------------------------------------------------------

    def _halve(self, step: int, micro: int, why: str) -> None:
        """Half the micro-batch from here on; the batch stays what it was."""
        if micro <= 1:
            raise TrainingError(
                f"step {step}: a single sequence of {self.config.data.seq_len} tokens does not fit in memory ({why}); "
                "set activation_checkpointing: full, or a smaller data.seq_len"
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.progress.micro_batch = max(1, micro // 2)
        reason = f"rank {self.world.rank} ran out of memory with {micro} sequences; the batch stays the same"
        self.act(Action(step, "memory", "micro_batch", self.progress.micro_batch, reason))

    def find_micro_batch(self) -> None:
        """The largest micro-batch that fits: the process's whole share, halved until both passes end."""
        per = self.world.per_rank(self.progress.batch_size)
        first = self.loader.sample + self.world.data_rank * per
        micro = per
        while True:
            failed = None
            try:
                # Not the wrapped model: a probe exchanges nothing.
                with self.precision.autocast():
                    batch = self.loader.samples(first, micro)
                    state = self._carried_in(batch)
                    tokens, targets = batch.tokens.to(self.device), batch.targets.to(self.device)
                    self.model(tokens, state, batch.cu_seqlens, targets=targets, reduction="sum").loss.backward()
            except torch.OutOfMemoryError as error:
                failed = str(error).splitlines()[0]
            self.forget()
            if not self.world.any(failed is not None):
                break
            self._halve(self.progress.step + 1, micro, failed or "on another process")
            micro = self.progress.micro_batch
        self.progress.micro_batch = micro
        log.info("micro_batch: %d sequences fit (of %d a step and process)", micro, per)

    def _does_not_fit(self, error: BaseException, step: int, micro: int) -> TrainingError:
        """Out of memory where others already wait for this process's gradients: the run ends, and says what next."""
        note = {"step": step, "rank": self.world.rank, "micro_batch": micro}
        path = self.run / OUT_OF_MEMORY
        temporary = path.with_name(f".{OUT_OF_MEMORY}.{self.world.rank}")
        temporary.write_text(json.dumps(note), encoding="utf8")
        temporary.replace(path)
        return TrainingError(
            f"step {step}: rank {self.world.rank} ran out of memory with {micro} sequences a forward pass "
            f"({str(error).splitlines()[0]}). The last checkpoint stands; continued with --resume, the run takes "
            f"{max(1, micro // 2)}"
        )

    def after_out_of_memory(self) -> None:
        """Halve the micro-batch that a run before this one could not fit."""
        path = self.run / OUT_OF_MEMORY
        if not path.is_file():
            return
        try:
            micro = int(json.loads(path.read_text(encoding="utf8"))["micro_batch"])
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{path}: not a note of this program; delete it") from None
        self.progress.micro_batch = max(1, min(self.progress.micro_batch or micro, micro // 2))
        log.warning("the run before ran out of memory with %d sequences; now %d", micro, self.progress.micro_batch)

    def fitted(self, step: int) -> None:
        """The checkpoint of ``step`` stands: a note of that step or an earlier one is done with."""
        path = self.run / OUT_OF_MEMORY
        # Another process may be a step ahead already, and have left a new one.
        if path.is_file() and json.loads(path.read_text(encoding="utf8"))["step"] <= step:
            path.unlink()


def _targets(batch: Batch) -> int:
    return int((batch.targets >= 0).sum())
