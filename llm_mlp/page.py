"""Pages of tables and plots: one self-contained HTML file, read in light and in dark, with and without eyes."""

from __future__ import annotations

import html
import io
import math
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any, Literal

LIGHT = ("#0072b2", "#d55e00", "#007a5e", "#a6498a", "#7a6200", "#4b3f9e", "#5a5a5a")
DARK = ("#56b4e9", "#f28e3b", "#2fc29a", "#e39bc5", "#f0e442", "#b3a8ff", "#c4c4c4")
DASHES = (("solid", "-"), ("dashed", (0, (4, 1.6))), ("dotted", (0, (1.2, 1.2))))  # CSS's name, matplotlib's pattern
STYLES = len(LIGHT) * len(DASHES)  # colour and dash each go round; the numbers have no common divisor
# matplotlib knows no CSS: it draws in these colours, which the page's own then take the place of.
_INK = "#fefe00"
_OWN = re.compile(r"#fefe1([0-9a-f])")


@dataclass(frozen=True)
class Series:
    """What a plot shows of one thing; the same name and style are one entry of the legend."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int | None = None  # colour and dash; None: its place in the figure
    kind: Literal["line", "faint", "points"] = "line"
    strength: float = 1.0  # opacity of a line


@dataclass(frozen=True)
class Figure:
    """One plot. ``note`` stands below it."""

    title: str
    x_label: str
    y_label: str
    series: list[Series] = field(default_factory=list)
    log_x: bool = False
    log_y: bool = False
    from_zero: bool = False
    note: str = ""


_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --ink: #1b1b1b; --back: #fff; --rule: #d0d0d0; --soft: #f3f3f3; $light }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --back: #161616; --rule: #444; --soft: #232323; $dark }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--back) }
p { max-width: 60rem }
.scroll { overflow: auto; max-height: 48rem; margin: 1rem 0 }
.scroll:has(.numbers) { max-height: none }
table { border-spacing: 0; font-variant-numeric: tabular-nums }
caption { text-align: left; padding: .3rem 0 }
caption span { display: inline-block; max-width: calc(100vw - 2rem) }
th, td { padding: .3rem 1.5rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top }
th { font-weight: 600; min-width: 7rem; max-width: 16rem; overflow-wrap: break-word }
td { overflow-wrap: anywhere; min-width: 5rem; max-width: 30rem }
tbody th { position: sticky; left: 0; background: var(--back) }
.numbers td { text-align: right; min-width: 7.5rem } .numbers thead th { text-align: right }
.numbers td, .numbers thead th { padding: .3rem 0 .3rem 1.5rem }
@media (max-width: 40rem) { table { font-size: .875rem } }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); gap: 1.5rem 2rem }
figure { margin: 0; min-width: 0 } figure > svg { display: block; width: 100%; max-width: 40rem; height: auto }
figcaption { font-weight: 600 } figure p { font-size: .875rem; margin: .2rem 0 }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0 1.2rem; margin: .2rem 0; padding: 0 }
.legend li { font-size: .875rem; overflow-wrap: anywhere }
.legend span { display: inline-block; width: 2rem; border-top: 3px; vertical-align: middle; margin-right: .4rem }
pre { white-space: pre-wrap; background: var(--soft); padding: 1rem }
mark { background: #ffeeb8; color: #1b1b1b }
</style></head><body>
<main>
<h1>$title</h1>
$body
</main>
</body></html>
""")


def page(title: str, body: str) -> str:
    """The whole page. ``body`` is HTML already, ``title`` is not."""
    colours = {
        name: "; ".join(f"--s{n}: {colour}" for n, colour in enumerate(palette))
        for name, palette in (("light", LIGHT), ("dark", DARK))
    }
    return _PAGE.substitute(title=html.escape(title), body=body, **colours)


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """A table whose first row and column are headers; scrolls by itself where it is wider than the page."""
    name = html.escape(caption)
    top = "".join(f'<th scope="col">{html.escape(cell)}</th>' if cell else "<td></td>" for cell in head)
    body = "\n".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    kind = "numbers" if numbers else "texts"
    return (
        f'<div class="scroll" role="region" aria-label="{name}" tabindex="0"><table class="{kind}">'
        f"<caption><span>{name}</span></caption>\n<thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def figures(plots: Sequence[Figure]) -> str:
    """Plots side by side where there is room, each with its legend and a description of where its lines go."""
    return '<div class="figures">\n' + "\n".join(map(_figure, plots)) + "\n</div>"


def write(path: Path, text: str) -> None:
    """Write a page; who reads it meanwhile sees the earlier one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _style(figure: Figure, place: int) -> int:
    own = figure.series[place].style
    return (place if own is None else own) % STYLES


def _figure(figure: Figure) -> str:
    entries: dict[tuple[str, int], str] = {}
    said = []
    for place, series in enumerate(figure.series):
        key = (series.name, _style(figure, place))
        if series.kind != "line" or key in entries:
            continue
        line = f"border-top-style: {DASHES[key[1] % len(DASHES)][0]}; border-color: var(--s{key[1] % len(LIGHT)})"
        entries[key] = f'<li><span style="{line}"></span>{html.escape(series.name)}</li>'
        values = [y for y in series.y if math.isfinite(y)]
        course = f"from {values[0]:.4g} to {values[-1]:.4g}" if values else "no finite value"
        said.append(f"{series.name} {course}")
    label = html.escape(f"{figure.title}, {figure.y_label} by {figure.x_label}: {'; '.join(said)}")
    note = f"<p>{html.escape(figure.note)}</p>" if figure.note else ""
    return (
        f"<figure><figcaption>{html.escape(figure.title)}</figcaption>\n"
        f'<svg role="img" aria-label="{label}" {_svg(figure)}\n<ul class="legend">{"".join(entries.values())}</ul>'
        f"{note}</figure>"
    )


def _svg(figure: Figure) -> str:
    """The SVG element from its first attribute on. It holds no text of a run's: titles and names are the page's."""
    # matplotlib takes a second to import; only reports need it. The SVG canvas needs no display.
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    settings: dict[Any, Any] = dict.fromkeys(names, _INK)
    settings |= {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    # Without a salt of its own the names in it differ each time. Noise within a pixel need not be drawn.
    settings |= {"svg.hashsalt": "page", "path.simplify_threshold": 0.5, "text.parse_math": False}
    with matplotlib.rc_context(settings):
        canvas = Canvas(figsize=(4.8, 2.9), layout="constrained", facecolor="none")
        FigureCanvasSVG(canvas)
        _draw(canvas.add_subplot(facecolor="none"), figure)
        text = io.StringIO()
        canvas.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()[text.getvalue().index("<svg ") + len("<svg ") :].rstrip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = _OWN.sub(lambda found: f"var(--s{int(found[1], 16)})", svg.replace(_INK, "currentColor"))
    # Names have to be unique within the page, and two plots have the same ones.
    own = f"f{zlib.crc32((figure.title + svg).encode()):x}-"
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{own}", svg)


def _draw(axes, figure: Figure) -> None:  # type: ignore[no-untyped-def]  # matplotlib is imported where it is used
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    for place, series in enumerate(figure.series):
        n = _style(figure, place)
        colour = f"#fefe1{n % len(LIGHT):x}"
        if series.kind == "points":
            axes.plot(series.x, series.y, linestyle="none", marker="v", markersize=6, color=colour, zorder=3)
        elif series.kind == "faint":
            axes.plot(series.x, series.y, color=colour, linewidth=0.8, alpha=0.35)
        else:
            marker = "o" if len(series.x) < 12 else None
            axes.plot(
                series.x,
                series.y,
                color=colour,
                linestyle=DASHES[n % len(DASHES)][1],
                linewidth=1.6,
                marker=marker,
                markersize=3.5,
                alpha=series.strength,
            )
    if figure.log_x:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({x for s in figure.series for x in s.x}))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))  # steps and tokens
    if figure.log_y:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        # Labels crowd where the axis spans decades, and there are none where it spans less than one.
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 1e3 * low else (1, 2, 5), numticks=9))
        axes.yaxis.set_minor_locator(NullLocator())
    elif figure.from_zero:
        axes.set_ylim(bottom=0)
    else:
        low, high = axes.get_ylim()
        if high - low < 1e-4 * abs(high):  # a constant: its ticks would all read the same
            axes.set_ylim(low - abs(low) / 100, high + abs(high) / 100)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set(xlabel=figure.x_label, ylabel=figure.y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def short(value: float) -> str:
    """A number as a tick shows it: 0.004, 1,024, 250 k, 1.5 M."""
    for least, size, unit in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:.6g} {unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"
