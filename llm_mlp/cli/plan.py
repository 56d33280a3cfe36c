"""``llm-mlp plan``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

SCALES = {
    "bytes": ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")),
    "J": ((3.6e12, "GWh"), (3.6e9, "MWh"), (3.6e6, "kWh")),
    "s": ((3.156e7, "years"), (86400, "days")),
}


def plan(
    preset: Annotated[str, typer.Option(help="The model, or what --params makes larger.")],
    params: Annotated[float | None, typer.Option(help="Parameters: the preset is scaled to about as many.")] = None,
    gpus: Annotated[int, typer.Option(help="Devices.")] = 1,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, b200 or cpu.")] = "h100",
    seq: Annotated[int, typer.Option(help="Tokens a sequence.")] = 2048,
    tokens: Annotated[float | None, typer.Option(help="Tokens of the run; default: 20 a parameter.")] = None,
    batch: Annotated[float | None, typer.Option(help="Tokens a step; default: by the model's size.")] = None,
    layout: Annotated[str, typer.Option(help="Fix some of fsdp, pp, cp, tp, zero, micro: pp=4,tp=8.")] = "",
    checkpointing: Annotated[str, typer.Option(help="auto, none, selective or full.")] = "auto",
    optimizer: Annotated[str, typer.Option(help="muon or adamw.")] = "muon",
    optimizer_state: Annotated[str, typer.Option(help="same or 8bit.")] = "same",
    module_precision: Annotated[str, typer.Option(help="Parts not in bf16, as in a run: mixer=fp32,ffn=fp8.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a run needs: a layout that fits, memory, exchanges, FLOPs, time, cost and energy, and where each is from."""
    from llm_mlp.train.plan import make_plan

    found = make_plan(
        preset,
        parameters=params,
        gpus=gpus,
        gpu=gpu,
        length=seq,
        tokens=tokens,
        batch=batch,
        layout=layout,
        checkpointing=checkpointing,
        optimizer=optimizer,
        optimizer_state=optimizer_state,
        module_precision=module_precision,
    )
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    rejected = found.pop("rejected")
    notes: dict[str, int] = {}  # where the numbers are from, told once each
    table = Table(box=None, pad_edge=False)
    for column in ("", "", "value", "unit", "from"):
        table.add_column(column, justify="right" if column == "value" else "left", no_wrap=True)
    for part, values in found.items():
        rows = {"": values} if "value" in values else values
        for i, (name, row) in enumerate(rows.items()):
            value, unit = _shown(row)
            kind, _, note = row["source"].partition(": ")
            origin = f"{kind} ({notes.setdefault(note, len(notes) + 1)})" if note else kind
            table.add_row("" if i else part, name, value, unit, origin)
    console = Console(highlight=False)
    console.print(table)
    for note, number in notes.items():
        console.print(f"({number}) {note}", soft_wrap=True)
    if rejected:
        others = Table(title="\nnot taken", title_justify="left", box=None, pad_edge=False)
        for column in ("layout", "why"):
            others.add_column(column)
        for row in rejected:
            others.add_row(row["layout"], row["why"])
        console.print(others)


def _shown(row: dict[str, Any]) -> tuple[str, str]:
    """A number and its unit as one reads them."""
    value, unit = row["value"], row["unit"]
    if isinstance(value, str):
        return value, unit
    for name, scales in SCALES.items():
        if unit == name or unit.startswith(f"{name} "):
            for scale, short in scales:
                if value >= scale:
                    return f"{value / scale:,.2f}", short + unit.removeprefix(name)
    if not value or (isinstance(value, int) and value < 1e15):
        return f"{value:,.0f}", unit
    return (f"{value:,.3f}" if 1e-3 <= value < 1e6 else f"{value:.3e}"), unit
