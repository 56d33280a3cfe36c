"""What a run shows and records: progress bar, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import IO, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llm_mlp.config import TrainConfig

log = logging.getLogger("llm_mlp.train")


class Console:
    """Progress on the terminal (a line every ``log_every`` steps where it is none), metrics.jsonl and TensorBoard."""

    def __init__(self, run: Path, config: TrainConfig, start: int, quiet: bool) -> None:
        self.config, self.run, self._start = config, run, start
        self.interactive = sys.stderr.isatty() and not quiet
        self.quiet = quiet
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            disable=not self.interactive,
            console=_stderr(),
        )
        self.task = self.bar.add_task(run.name, total=config.steps, completed=start, status="")
        self._file: IO[str] | None = None
        self._board: Any = None
        self._held_out = ""

    def __enter__(self) -> Console:
        path = self.run / "metrics.jsonl"
        if path.is_file():  # steps after the checkpoint will be recorded again
            kept = [line for line in read_metrics(self.run) if line["step"] <= self._start]
            temporary = path.with_name(".metrics.jsonl")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf8")
            temporary.replace(path)
        self._file = path.open("a", encoding="utf8")
        # TensorBoard's writer brings much with it; imported where it is used.
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self.run / "tensorboard"), purge_step=self._start + 1)
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        self._board.close()
        if self._file:
            self._file.close()

    def _record(self, step: int, values: dict[str, float]) -> None:
        assert self._file is not None
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def step(self, step: int, values: dict[str, float]) -> None:
        shown = f"loss {values['loss']:.3f}  {values['tokens_per_second']:,.0f} tok/s{self._held_out}"
        self.bar.update(self.task, completed=step, status=shown)
        if step % self.config.log_every and step != self.config.steps and step != 1:
            return
        self._record(step, values)
        if not self.interactive and not self.quiet:
            print(f"{self.run.name} step {step}/{self.config.steps}  {shown}", file=sys.stderr, flush=True)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        self._record(step, values)
        self._held_out = f"  held-out {values['bits_per_byte']:.3f} bits/byte"
        if not self.interactive and not self.quiet:
            print(f"{self.run.name} step {step}{self._held_out}", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        if not self.quiet:
            self.bar.console.print(line, highlight=False)


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``; one that a killed process left half written is left out."""
    lines = []
    for number, text in enumerate((Path(run) / "metrics.jsonl").read_text(encoding="utf8").splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            log.warning("%s/metrics.jsonl:%d: half written; left out", run, number)
    return lines


def _stderr() -> Any:
    from rich.console import Console as RichConsole

    return RichConsole(stderr=True)
