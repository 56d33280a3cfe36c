"""Runs compared in one HTML page: what they came to, how their configs differ, curves, actions, quarantined samples."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from llm_mlp.config import ConfigError, TrainConfig, diff, load
from llm_mlp.page import STYLES, Figure, Series, figures, page, short, table, write
from llm_mlp.train.console import read_lines, read_metrics

UNAVAILABLE = "unavailable"
SMOOTH = 50  # smoothed curves: mean over this part of what a run recorded
# Key in metrics.jsonl, title, unit, factor to that unit, logarithmic axis; in the order of the page.
PLOTS = {
    "Held-out documents": [
        ("bits_per_byte", "Held-out bits per byte", "bits a byte", 1.0, False),
        ("held_out_loss", "Held-out loss", "nats a token", 1.0, False),
    ],
    "Optimization": [
        ("lr", "Learning rate", "rate", 1.0, False),
        ("grad_norm", "Gradient norm, before clipping", "norm", 1.0, True),
        ("noise_scale", "Gradient noise scale", "samples", 1.0, True),
        ("batch_size", "Batch size", "sequences", 1.0, False),
        ("sample", "Data position", "samples", 1.0, False),
    ],
    "Speed, memory and energy": [
        ("tokens_per_second", "Training speed", "tokens/s", 1.0, False),
        ("mfu", "Model FLOPs utilization", "% of the device's peak", 100.0, False),
        ("memory_bytes", "Peak memory on the device", "GB", 1e-9, False),
        ("watts", "Power", "W", 1.0, False),
        ("joules_per_token", "Energy", "J a token", 1.0, False),
    ],
}
NOISY = {"grad_norm", "tokens_per_second", "mfu", "watts", "joules_per_token"}
SMOOTHED = f"Faint: as recorded. Strong: exponential mean over a {SMOOTH}th of the recorded steps."
KNOWN = {"step", "loss", *(key for plots in PLOTS.values() for key, *_ in plots)}


class ReportError(ValueError):
    """Runs that cannot be reported on; the message names the path."""


@dataclass(frozen=True)
class Run:
    """What a run's folder has recorded."""

    name: str
    folder: Path
    config: TrainConfig
    metrics: list[dict[str, Any]]
    actions: list[dict[str, Any]]
    quarantine: list[dict[str, Any]]

    @cached_property
    def _places(self) -> tuple[list[int], list[int]]:
        """Steps and the samples that had been read after them."""
        batch = self.config.batch_size
        # Runs of a version that did not record the position had one batch size throughout.
        known = [(m["step"], m.get("sample", m["step"] * batch)) for m in self.metrics if "loss" in m]
        step, sample = known[-1]
        beyond = 10**9  # a step after the last that was recorded, to interpolate steps between the two
        last = next((m["batch_size"] for m in reversed(self.metrics) if m.get("batch_size")), batch)
        known = [(0, 0), *known, (step + beyond, sample + beyond * last)]
        return [s for s, _ in known], [n for _, n in known]

    def tokens(self, steps: Sequence[int]) -> list[float]:
        """How many tokens had been read after each of ``steps``."""
        return (np.interp(steps, *self._places) * self.config.data.seq_len).tolist()

    def column(self, key: str) -> tuple[list[float], list[float]]:
        """Tokens and values of a scalar; NaN where it was unavailable, nothing if it never was."""
        lines = [m for m in self.metrics if key in m]
        values = [_number(m[key]) for m in lines]
        if not any(map(math.isfinite, values)):
            return [], []
        return self.tokens([m["step"] for m in lines]), values

    def values(self, key: str) -> list[float]:
        """The finite values of a scalar."""
        return [v for v in self.column(key)[1] if math.isfinite(v)]


def write_report(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write one self-contained page that compares the runs in ``folders``.

    Raises:
        ReportError, ConfigError: a folder is not a run's, or has recorded nothing; nothing is written.
    """
    path = Path(out)
    if path.is_dir():
        raise ReportError(f"{path}: a folder; name a file for the report")
    runs = read_runs(folders)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, _render(runs))
    return path


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Runs of the names that their folders have, with as much of the path as tells them apart."""
    if not 1 <= len(folders) <= STYLES:
        raise ReportError(f"{len(folders)} runs: expected 1 to {STYLES}, as many as a plot can tell apart")
    paths = [Path(f) for f in folders]
    return [_read(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    whole = [f.resolve() for f in folders]
    for n, path in enumerate(whole):
        if path in whole[:n]:
            raise ReportError(f"{folders[n]}: named twice")
    names = []
    for path in whole:
        rivals = [p for p in whole if p.name == path.name]
        parts = 1
        while len({p.parts[-parts:] for p in rivals}) < len(rivals):
            parts += 1
        names.append("/".join(path.parts[-parts:]).replace("//", "/"))
    return names


def _read(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such folder")
    if not (folder / "config.yaml").is_file():
        raise ReportError(f"{folder}: not a run's folder (it has no config.yaml)")
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ReportError(f"{path}: not there; the run has recorded nothing yet")
    try:
        config = load(TrainConfig, folder / "config.yaml")
    except ConfigError as error:
        raise ReportError(f"{error} (written by another version of llm-mlp?)") from None
    run = Run(
        name,
        folder,
        config,
        read_metrics(folder),
        read_lines(folder / "actions.jsonl"),
        read_lines(folder / "quarantine.jsonl"),
    )
    for lines in (run.metrics, run.actions, run.quarantine):
        if not all(isinstance(line, dict) and isinstance(line.get("step"), int) for line in lines):
            raise ReportError(f"{folder}: lines without a step; not what a run records")
    if not any("loss" in m for m in run.metrics):
        raise ReportError(f"{path}: no step is recorded in it")
    return run


def _number(value: Any) -> float:
    """A recorded scalar: null is NaN, and what JSON has no number for is text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


# -- the page ----------------------------------------------------------------------------------------------------


def _render(runs: list[Run]) -> str:
    title = "Report of " + (f"the run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs")
    parts = ["<h2>Runs</h2>", _summary(runs), "<h2>Configuration</h2>", _differences(runs)]
    missing: list[str] = []
    parts += ["<h2>Training loss</h2>", figures(_losses(runs))]
    for heading, plots in PLOTS.items():
        found = []
        for key, name, unit, factor, log in plots:
            plot = _plot(runs, key, name, unit, factor, log)
            found += [plot] if plot.series else []
            missing += [] if plot.series else [name]
        if found:
            parts += [f"<h2>{heading}</h2>", figures(found)]
    if missing:
        parts.append(f"<p>Unavailable in every run, and not plotted: {html.escape('; '.join(missing))}.</p>")
    groups = _groups(runs)
    for heading, own in (("Head statistics", True), ("Further scalars", False)):
        chosen = {group: keys for group, keys in groups.items() if group.startswith("heads") == own}
        if chosen:
            parts += [f"<h2>{heading}</h2>", *_scalars(runs, heading, chosen)]
    parts += ["<h2>Actions of the controllers</h2>", _listed(runs, "actions", ACTIONS)]
    parts += ["<h2>Quarantined samples</h2>", _listed(runs, "quarantine", QUARANTINE)]
    return page(title, "\n".join(parts))


def _best(run: Run, key: str) -> str:
    found = [(_number(m[key]), m["step"]) for m in run.metrics if key in m and math.isfinite(_number(m[key]))]
    return f"{min(found)[0]:.4f} (step {min(found)[1]:,})" if found else UNAVAILABLE


def _typical(key: str, form: str, factor: float = 1.0) -> Callable[[Run], str]:
    def cell(run: Run) -> str:
        values = run.values(key)
        return format(median(values) * factor, form) if values else UNAVAILABLE

    return cell


def _last(run: Run) -> dict[str, Any]:
    return [m for m in run.metrics if "loss" in m][-1]


def _progress(run: Run) -> str:
    tokens = run.tokens([_last(run)["step"]])[0]
    return f"{tokens / (run.config.steps * run.config.batch_size * run.config.data.seq_len):.1%}"


def _summary(runs: list[Run]) -> str:
    rows: dict[str, Callable[[Run], str]] = {
        "folder": lambda run: str(run.folder),
        "steps": lambda run: f"{_last(run)['step']:,}",
        "tokens": lambda run: f"{run.tokens([_last(run)['step']])[0]:,.0f}",
        "progress": _progress,
        "training loss, last recorded": lambda run: f"{_number(_last(run)['loss']):.4f}",
        "held-out loss, best": lambda run: _best(run, "held_out_loss"),
        "held-out bits per byte, best": lambda run: _best(run, "bits_per_byte"),
    }
    for kind in _averages(runs):
        rows[f"held-out loss, best of average {kind}"] = lambda run, k=kind: _best(run, f"held_out_loss_{k}")  # type: ignore[misc]
        rows[f"bits per byte, best of average {kind}"] = lambda run, k=kind: _best(run, f"bits_per_byte_{k}")  # type: ignore[misc]
    rows |= {
        "tokens/s, median": _typical("tokens_per_second", ",.0f"),
        "model FLOPs utilization, median": _typical("mfu", ".1%"),
        "peak memory, GB": lambda run: (
            f"{max(run.values('memory_bytes')) / 1e9:,.2f}" if run.values("memory_bytes") else UNAVAILABLE
        ),
        "power, median, W": _typical("watts", ",.0f"),
        "joules per token, median": _typical("joules_per_token", ".4g"),
        "actions of controllers": lambda run: f"{len(run.actions):,}",
        "quarantined steps": lambda run: f"{len(run.quarantine):,}",
    }
    body = [[name, *(cell(run) for run in runs)] for name, cell in rows.items()]
    caption = "What each run came to. Losses in nats a token; medians over the recorded steps"
    return table(caption, ["", *(run.name for run in runs)], body, numbers=True)


def _averages(runs: list[Run]) -> list[str]:
    prefix = "held_out_loss_"
    return sorted(
        {key.removeprefix(prefix) for run in runs for m in run.metrics for key in m if key.startswith(prefix)}
    )


def _differences(runs: list[Run]) -> str:
    if len(runs) == 1:
        return "<p>One run: there is nothing to compare it with.</p>"
    lines = [line for run in runs[1:] for line in diff(runs[0].config, run.config)]
    fields = [f for f in dict.fromkeys(line.partition(":")[0] for line in lines) if f != "out"]
    if not fields:
        return "<p>The runs have the same configuration, except for the folder, <code>out</code>.</p>"
    rows = [[f, *(_value(run.config, f) for run in runs)] for f in fields]
    return table("Fields in which the runs differ, except for out", ["field", *(run.name for run in runs)], rows)


def _value(config: TrainConfig, path: str) -> str:
    value: Any = config.model_dump(mode="json")
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return str(value)


def _listed(runs: list[Run], which: str, columns: Sequence[str]) -> str:
    rows = [[run.name, *(_text(line.get(c)) for c in columns)] for run in runs for line in getattr(run, which)]
    if not rows:
        return "<p>None.</p>"
    caption = f"{len(rows):,} lines of {which}.jsonl"
    return table(caption, ["run", *(c.replace("_", " ") for c in columns)], rows)


ACTIONS = ("step", "controller", "what", "value", "reason")
QUARANTINE = ("step", "first_sample", "last_sample", "loss", "grad_norm", "why")


def _text(value: Any) -> str:
    if value is None:
        return UNAVAILABLE
    return f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


# -- plots -------------------------------------------------------------------------------------------------------


def _losses(runs: list[Run]) -> list[Figure]:
    """The whole course, and its second half by itself: there the runs differ by less than a line's width in the first.

    The halves are those of the longest run.
    """
    columns = [run.column("loss") for run in runs]
    half = max(x[-1] for x, _ in columns if x) / 2 if any(x for x, _ in columns) else 0.0
    plots = []
    for title, start in (("Training loss", 0.0), ("Training loss, second half", half)):
        faint, strong = [], []
        for n, (run, (x, y)) in enumerate(zip(runs, columns, strict=True)):
            kept = [(a, b, c) for a, b, c in zip(x, y, _smooth(y), strict=True) if a >= start]
            if kept:
                tokens, raw, smooth = zip(*kept, strict=True)
                faint.append(Series(run.name, tokens, raw, n, kind="faint"))
                strong.append(Series(run.name, tokens, smooth, n))
        plots.append(Figure(title, "tokens", "nats a token", faint + strong, note=SMOOTHED))
    return plots


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean over a part of the values, without the bias of its beginning; NaN stays where it was."""
    share = 1 / max(1.0, len(values) / SMOOTH)
    total = weight = 0.0
    out = []
    for value in values:
        if math.isfinite(value):
            total += share * (value - total)
            weight += share * (1 - weight)
        out.append(total / weight if math.isfinite(value) else math.nan)
    return out


def _plot(runs: list[Run], key: str, title: str, unit: str, factor: float, log: bool) -> Figure:
    faint, strong, notes = [], [], []
    for n, run in enumerate(runs):
        x, y = run.column(key)
        # Infinity has no place on an axis, and a logarithmic one has none for zero.
        y = [v * factor if math.isfinite(v) and (v > 0 or not log) else math.nan for v in y]
        if not x:
            notes.append(f"{run.name}: {UNAVAILABLE}.")
        elif key in NOISY and len(y) > SMOOTH:
            faint.append(Series(run.name, x, y, n, kind="faint"))
            smooth = [math.exp(v) for v in _smooth([math.log(v) for v in y])] if log else _smooth(y)
            strong.append(Series(run.name, x, smooth, n))
        else:
            strong.append(Series(run.name, x, y, n))
    if faint:
        notes.append(SMOOTHED)
    if key == "lr" and any(run.actions for run in runs):
        strong += [s for n, run in enumerate(runs) for s in _marks(run, n)]
        notes.append("Triangles: actions of the controllers, listed below.")
    return Figure(title, "tokens", unit, faint + strong, log_y=log, note=" ".join(notes))


def _marks(run: Run, style: int) -> list[Series]:
    x, y = run.column("lr")
    places = run.tokens([a["step"] for a in run.actions])
    return [Series(run.name, places, np.interp(places, x, y).tolist(), style, kind="points")] if x and places else []


def _groups(runs: list[Run]) -> dict[str, list[str]]:
    """The scalars that have no plot of their own, by what stands before their last slash."""
    keys = {key for run in runs for m in run.metrics for key in m} - KNOWN
    found: dict[str, list[str]] = {}
    for key in sorted(keys, key=_natural):
        held_out = re.match(r"(held_out_loss|bits_per_byte)_", key)
        group = f"Averages of the weights: {held_out[1]}" if held_out else key.rpartition("/")[0] or key
        found.setdefault(group, []).append(key)
    return found


def _natural(key: str) -> list[Any]:
    """Sorts layer2 before layer10."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", key)]


def _scalars(runs: list[Run], heading: str, groups: dict[str, list[str]]) -> list[str]:
    """A plot of each group, a line a scalar, and a table of the last values."""
    plots = []
    for group, keys in groups.items():
        series = []
        for n, run in enumerate(runs):
            for place, key in enumerate(keys):
                x, y = run.column(key)
                strength = 1.0 if len(keys) == 1 else 0.3 + 0.7 * place / (len(keys) - 1)
                y = [v if math.isfinite(v) else math.nan for v in y]
                series += [Series(run.name, x, y, n, strength=strength)] if x else []
        names = [key.removeprefix(f"{group}/") for key in keys]
        note = f"From faint to strong: {', '.join(names)}." if len(names) > 1 else ""
        plots += [Figure(group, "tokens", "value", series, note=note)] if series else []
    rows = [
        [key, *(short(v[-1]) if (v := run.values(key)) else UNAVAILABLE for run in runs)]
        for keys in groups.values()
        for key in keys
    ]
    return [figures(plots), table(f"{heading}: last values", ["", *(run.name for run in runs)], rows, numbers=True)]
