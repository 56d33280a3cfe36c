"""The verb ``llm-mlp run``: what runs have recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

run_app = typer.Typer(help="Look into runs: the folders that train writes.", no_args_is_help=True)


@run_app.command("report")
def run_report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, finished or not.")],
    out: Annotated[Path, typer.Option(help="The page; an earlier one there is replaced.")] = Path("report.html"),
) -> None:
    """Compare runs in one HTML page: results, configs, curves, actions of controllers, quarantined samples."""
    from llm_mlp.train.report import write_report

    typer.echo(f"report: {write_report(runs, out)}")
