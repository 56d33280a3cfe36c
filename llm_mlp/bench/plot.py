"""Pages of what the benchmarks record: plots and tables of one run's lines."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llm_mlp.config import ConfigError
from llm_mlp.page import Figure, Series, figures, page, table, write

Row = dict[str, Any]  # a line that `llm_mlp.bench.record.record` gave


class Column(NamedTuple):
    """One line of a plot: its name, and its value in a row (None: unavailable)."""

    name: str
    value: Callable[[Row], float | None]


class Plot(NamedTuple):
    title: str
    unit: str
    columns: list[Column]


class Group(NamedTuple):
    """Plots over one field of some rows."""

    axis: str
    label: str
    rows: list[Row]
    plots: list[Plot]


def check_place(path: Path | None) -> None:
    """Refuse a page's path before anything is measured for it; its folder is made.

    Raises:
        ConfigError: it is a folder. OSError: it cannot be there.
    """
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise ConfigError(f"--plot {path}: a folder; name a file in it")


def plot_serving(path: Path, rows: Sequence[Row]) -> None:
    """Throughput, latencies, CPU time and energy against the number of clients, of ``serve-speed`` lines."""

    def beside(part: str) -> list[Column]:
        return [_plain("server", part), _plain("engine alone", f"engine_{part}")]

    def percentiles(part: str) -> list[Column]:
        return [_inner(p, part) for p in ("p50", "p95", "p99")]

    plots = [
        Plot("Throughput", "tokens a second", beside("tokens_per_second")),
        Plot("Time to the first token", "ms", percentiles("first_token_ms")),
        Plot("Time between tokens", "ms", percentiles("between_tokens_ms")),
        Plot("CPU time outside the engine", "ms a token", [_plain("server", "server_cpu_ms_a_token")]),
        Plot("Energy", "J a token", beside("joules_per_token")),
        Plot("Mean power", "W", [_plain("server", "watts")]),
    ]
    by_clients = sorted(rows, key=lambda row: row["clients"])
    _write(path, f"Serving {rows[0]['model']}", [Group("clients", "clients", by_clients, plots)])


def plot_decoding(path: Path, rows: Sequence[Row]) -> None:
    """Tokens a second, milliseconds a step, state and energy against context and batch, of ``decode-speed`` lines."""
    groups = []
    for axis, label, other in (("context", "tokens already read", "batch"), ("batch", "sequences", "context")):
        if axis == "batch" and len({row["batch"] for row in rows}) == 1:
            continue
        for value in sorted({row[other] for row in rows}):
            own = sorted((row for row in rows if row[other] == value), key=lambda row: row[axis])
            names = list(dict.fromkeys(name for row in own for name in row["tokens_per_second"]))
            parts = [
                ("Decoding", "tokens a second", [_inner(name, "tokens_per_second") for name in names]),
                ("A step", "ms", [_step(name, p) for name in names for p in ("p50", "p95")]),
                ("State of a sequence", "MB", [_inner(name, "state_bytes", 1e-6) for name in names]),
                ("Energy", "J a token", [_inner(name, "joules_per_token") for name in names]),
                ("Mean power", "W", [_inner(name, "watts") for name in names]),
            ]
            plots = [Plot(f"{title}, {other} {value:,}", unit, columns) for title, unit, columns in parts]
            groups.append(Group(axis, label, own, plots))
    _write(path, f"Decoding {rows[0]['preset']}", groups)


def _plain(name: str, part: str) -> Column:
    return Column(name, lambda row: row[part])


def _inner(name: str, part: str, scale: float = 1.0) -> Column:
    def value(row: Row) -> float | None:
        found = row[part].get(name)
        return None if found is None else scale * found

    return Column(name, value)


def _step(name: str, percentile: str) -> Column:
    """A percentile of a model's steps, where it ran."""
    return Column(f"{name}, {percentile}", lambda row: row["step_ms"].get(name, {}).get(percentile))


def _write(path: Path, title: str, groups: Sequence[Group]) -> None:
    drawn, tables, missing = [], [], []
    for axis, label, rows, plots in groups:
        cells = []
        for plot in plots:
            series = []
            for column in plot.columns:
                values = [column.value(row) for row in rows]
                known = [(row[axis], y) for row, y in zip(rows, values, strict=True) if y is not None]
                if known:
                    series.append(Series(column.name, [x for x, _ in known], [y for _, y in known]))
                shown = ("unavailable" if y is None else f"{y:,.4g}" for y in values)
                cells.append([f"{plot.title}: {column.name}, {plot.unit}", *shown])
            if series:
                drawn.append(Figure(plot.title, label, plot.unit, series, log_x=len(rows) > 1, from_zero=True))
            else:
                missing.append(plot.title)
        tables.append(table(f"By {label}", ["", *(f"{row[axis]:,}" for row in rows)], cells, numbers=True))
    first = groups[0].rows[0]
    facts = f"{first['device']}, commit {first['commit']}, torch {first['torch']}, {first['time']}."
    parts = [f"<p>{html.escape(facts)}</p>"]
    if missing:
        parts.append(f"<p>Unavailable here, and not plotted: {html.escape('; '.join(missing))}.</p>")
    write(path, page(title, "\n".join([*parts, figures(drawn), *tables])))
