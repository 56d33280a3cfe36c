"""A report of runs as one self-contained HTML page: a table, plots as inline SVG, generated samples."""

from __future__ import annotations

import html
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Series:
    """One line of a plot."""

    name: str
    x: list[float]
    y: list[float]


@dataclass(frozen=True)
class Figure:
    """One plot."""

    title: str
    x_label: str
    y_label: str
    series: list[Series] = field(default_factory=list)
    log_x: bool = False
    log_y: bool = False
    from_zero: bool = False


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b }}
table {{ border-collapse: collapse; margin: 1.5rem 0 }}
th, td {{ padding: .3rem .9rem; border-bottom: 1px solid #d6d6d6; text-align: right }}
th:first-child, td:first-child {{ text-align: left }}
figure {{ margin: 2rem 0 }} svg {{ max-width: 100%; height: auto }}
pre {{ white-space: pre-wrap; background: #f5f5f5; padding: 1rem }} mark {{ background: #ffeeb8 }}
</style></head><body>
<h1>{title}</h1>
<p>{intro}</p>
<table><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table>
{figures}
{samples}
</body></html>
"""


def _svg(figure: Figure) -> str:
    # matplotlib takes a second to import; only reports need it. The Agg-free SVG canvas needs no display.
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(7.5, 3.6), layout="constrained")
    FigureCanvasSVG(canvas)
    axes = canvas.add_subplot()
    for series in figure.series:
        axes.plot(series.x, series.y, marker="o" if len(series.x) < 12 else None, label=series.name)
    if figure.log_x:
        axes.set_xscale("log", base=2)
        ticks = sorted({x for s in figure.series for x in s.x})
        axes.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
    if figure.log_y:
        axes.set_yscale("log")
    elif figure.from_zero:
        axes.set_ylim(bottom=0)
    axes.set(xlabel=figure.x_label, ylabel=figure.y_label, title=figure.title)
    axes.grid(alpha=0.3)
    axes.legend()
    text = io.StringIO()
    canvas.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def write_report(
    path: Path,
    title: str,
    intro: str,
    rows: Sequence[Sequence[str]],
    figures: Sequence[Figure],
    samples: Sequence[tuple[str, str]],
) -> None:
    """Write the page. ``rows``: the table, first its head; ``samples``: (prompt, text that followed)."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)

    page = _PAGE.format(
        title=html.escape(title),
        intro=html.escape(intro),
        head=cells(rows[0], "th"),
        body="\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows[1:]),
        figures="\n".join(f"<figure>{_svg(f)}</figure>" for f in figures),
        samples="<h2>Samples, not selected</h2>"
        + "".join(f"<pre><mark>{html.escape(p)}</mark>{html.escape(t)}</pre>" for p, t in samples)
        if samples
        else "",
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(page, encoding="utf8")
    temporary.replace(path)
