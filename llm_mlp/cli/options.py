"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Overrides, NAME=VALUE: optimizer.lr=4e-3 model.n_layers=4", show_default=False),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
ModelDir = Annotated[Path, typer.Option("--model", "-m", help="Checkpoint folder, or the folder of a finished run.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves torch's choice.")]
Plot = Annotated[
    Path | None, typer.Option("--plot", help="Write a page of plots (HTML) to this file.", show_default=False)
]
Repeats = Annotated[int, typer.Option(min=1, help="Timed calls of each; the median counts.")]
Weights = Annotated[
    str, typer.Option("--weights", help="Held in fp32, bf16, fp16, int8 or int4 (the last two compute in bf16).")
]
Kept = Annotated[
    str,
    typer.Option(
        "--state",
        help="Fast weights + memorised rows are kept in: auto (fp32 + what the model computes in), fp32+bf16, "
        "bf16+bf16 or bf16+8bit.",
    ),
]
StoreDir = Annotated[Path | None, typer.Option("--store", help="Folder of the context store.", show_default=False)]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens a call (at least one sequence).")]
