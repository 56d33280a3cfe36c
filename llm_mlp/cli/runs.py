"""The verb ``llm-mlp run``: what runs have recorded."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from llm_mlp.cli.options import Overrides

run_app = typer.Typer(help="Look into runs: the folders that train writes.", no_args_is_help=True)


@run_app.command("report")
def run_report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, finished or not.")],
    out: Annotated[Path, typer.Option(help="The page; an earlier one there is replaced.")] = Path("report.html"),
) -> None:
    """Compare runs in one HTML page: results, configs, curves, actions of controllers, quarantined samples."""
    from llm_mlp.train.report import write_report

    typer.echo(f"report: {write_report(runs, out)}")


@run_app.command("which-samples")
def run_which_samples(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    step: Annotated[int, typer.Option(help="Step, from 1: as in metrics.jsonl and quarantine.jsonl.")],
    width: Annotated[int, typer.Option(min=0, help="Characters of each sample that are shown.")] = 90,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the whole texts.")] = False,
) -> None:
    """Show the samples that a step read."""
    from llm_mlp.train.runs import which_samples

    found = which_samples(run, step)
    if as_json:
        typer.echo(json.dumps([asdict(sample) for sample in found]))
        return
    for sample in found:
        text = " ".join(sample.text.split())
        typer.echo(
            f"{sample.sample:>10,}  {sample.tokens:>7,} tokens  {text[:width]}{'...' if len(text) > width else ''}"
        )


@run_app.command("verify-resume")
def run_verify_resume(
    config: Annotated[str, typer.Argument(help="YAML file or recipe.")] = "demo",
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps before the run is killed, and after.")] = 10,
    processes: Annotated[int, typer.Option(min=1, help="Processes of the run (torchrun, on this machine).")] = 1,
    resume_processes: Annotated[int | None, typer.Option(min=1, help="Of the resumed part, if others.")] = None,
    bound: Annotated[float | None, typer.Option(min=0, help="Largest relative difference of a loss.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the two runs here; else they are deleted.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train, kill and resume a run, and compare it with one that was left alone."""
    import tempfile

    from llm_mlp.recipes import find
    from llm_mlp.train.verify import verify_resume

    with tempfile.TemporaryDirectory() as temporary:
        v = verify_resume(
            find(config),
            overrides or [],
            folder=out or Path(temporary) / "verify",
            steps=steps,
            processes=processes,
            resume_processes=resume_processes,
            bound=bound,
        )
    if as_json:
        typer.echo(json.dumps(asdict(v) | {"passed": v.passed}))
    else:
        a, b = v.processes
        typer.echo(
            f"killed after step {v.killed_after} of {v.steps} on {a} process{'es' if a > 1 else ''}, resumed from step "
            f"{v.resumed_from} on {b}\n"
            f"samples  {'the same' if v.samples_equal else 'DIFFERENT'}\n"
            f"losses   {'the same to the bit' if v.loss_error == 0 else f'differ by {v.loss_error:.2g}'}\n"
            f"weights  {'the same to the bit' if v.weight_error == 0 else f'differ by {v.weight_error:.2g}'}\n"
            + ("passed" if v.passed else f"FAILED (losses may differ by {v.bound:g})")
        )
    if not v.passed:
        raise SystemExit(1)
