"""What a run shows and records: progress bar, metrics.jsonl, actions.jsonl, quarantine.jsonl, TensorBoard."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import sys
import uuid
from pathlib import Path
from typing import IO, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llm_mlp.config import ConfigError, TrainConfig

log = logging.getLogger("llm_mlp.train")


FILES = ("metrics", "actions", "quarantine")


class Console:
    """Progress on the terminal (a line every ``log_every`` steps where it is none), JSON lines and TensorBoard.

    Only the ``main`` process of a run writes.
    """

    def __init__(self, run: Path, config: TrainConfig, start: int, quiet: bool, main: bool = True) -> None:
        self.config, self.run, self._start, self.main = config, run, start, main
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
        self._files: dict[str, IO[str]] = {}
        self._board: Any = None
        self._wandb: Any = None
        if config.wandb and main and importlib.util.find_spec("wandb") is None:
            raise ConfigError(f"wandb: {config.wandb} needs the package: pip install wandb; or set wandb: ''")
        self._held_out = ""

    def __enter__(self) -> Console:
        if not self.main:
            return self
        for name in FILES:
            path = self.run / f"{name}.jsonl"
            if path.is_file():  # steps after the checkpoint will be recorded again
                kept = [line for line in read_lines(path) if line["step"] <= self._start]
                temporary = path.with_name(f".{path.name}")
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf8")
                temporary.replace(path)
        # TensorBoard's writer brings much with it; imported where it is used.
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self.run / "tensorboard"), purge_step=self._start + 1)
        if self.config.wandb:
            import wandb

            # The same run of theirs when this one is resumed: its id is that of the folder's first start.
            path = self.run / "wandb.json"
            if not path.is_file():
                path.write_text(json.dumps({"id": uuid.uuid4().hex[:12]}), encoding="utf8")
            self._wandb = wandb.init(
                project=self.config.wandb,
                name=self.run.name,
                id=json.loads(path.read_text(encoding="utf8"))["id"],
                resume="allow",
                dir=str(self.run),
                config=self.config.model_dump(mode="json"),
            )
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.main:
            self.bar.stop()
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        for file in self._files.values():
            file.close()

    def write(self, name: str, line: dict[str, Any]) -> None:
        """Append a line to ``<name>.jsonl``. JSON has no infinity and no NaN: they are written as text."""
        if not self.main:
            return
        if name not in self._files:  # opened with its first line, so that a calm run has no empty files
            self._files[name] = (self.run / f"{name}.jsonl").open("a", encoding="utf8")
        plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        try:
            self._files[name].write(json.dumps(plain) + "\n")
            self._files[name].flush()
        except OSError as error:
            why = f"{error.strerror}; the last checkpoint stands, continue with --resume"
            raise OSError(error.errno, why, str(self.run / f"{name}.jsonl")) from None

    def _record(self, step: int, values: dict[str, Any]) -> None:
        self.write("metrics", {"step": step, **values})
        for name, value in values.items():
            if value is not None and self._board is not None:
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({name: value for name, value in values.items() if value is not None}, step=step)

    def step(self, step: int, place: float, values: dict[str, Any]) -> None:
        """``place``: steps of the configured batch size that are done; what the bar shows."""
        shown = f"loss {values['loss']:.3f}  {values['tokens_per_second']:,.0f} tok/s{self._held_out}"
        self.bar.update(self.task, completed=int(place), status=shown)
        if step % self.config.log_every and place < self.config.steps and step != 1:
            return
        self._record(step, values)
        if not self.interactive and not self.quiet:
            print(f"{self.run.name} step {step}/{self.config.steps}  {shown}", file=sys.stderr, flush=True)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """``values`` of the held-out documents, ``bits_per_byte`` among them."""
        self._record(step, values)
        self._held_out = f"  held-out {values['bits_per_byte']:.3f} bits/byte"
        if not self.interactive and not self.quiet:
            print(f"{self.run.name} step {step}{self._held_out}", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        if not self.quiet:
            self.bar.console.print(line, highlight=False)


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``; one that a killed process left half written is left out."""
    return read_lines(Path(run) / "metrics.jsonl")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON lines file, none if it is not there; half written ones are left out."""
    if not path.is_file():
        return []
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf8", errors="replace").splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            log.warning("%s:%d: half written; left out", path, number)
    return lines


def _stderr() -> Any:
    from rich.console import Console as RichConsole

    return RichConsole(stderr=True)
