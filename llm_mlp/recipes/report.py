"""A report of runs as one self-contained HTML page: a table, plots as inline SVG, generated samples."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from llm_mlp.page import Figure, Series, figures, page, table, write

__all__ = ["Figure", "Series", "write_report"]


def write_report(
    path: Path,
    title: str,
    intro: str,
    rows: Sequence[Sequence[str]],
    plots: Sequence[Figure],
    samples: Sequence[tuple[str, str]],
) -> None:
    """Write the page. ``rows``: the table, first its head; ``samples``: (prompt, text that followed)."""
    parts = [f"<p>{html.escape(intro)}</p>", table("Measurements", rows[0], rows[1:], numbers=True), figures(plots)]
    if samples:
        parts.append("<h2>Samples, not selected</h2>")
    parts += [f"<pre><mark>{html.escape(p)}</mark>{html.escape(t)}</pre>" for p, t in samples]
    write(path, page(title, "\n".join(parts)))
