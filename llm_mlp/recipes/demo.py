"""`llm-mlp demo`: a perception model and its transformer twin on the text that ships with the package.

Both are trained on equal data with equal steps, measured, and shown side by side in one table and one report.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from llm_mlp.bench.record import device_name, record
from llm_mlp.bench.speed import time_decoding
from llm_mlp.checkpoint import CheckpointError, load_model, write_json
from llm_mlp.config import ConfigError, TrainConfig, load
from llm_mlp.device import pick_device
from llm_mlp.infer import Sampling, generate
from llm_mlp.models import model_cost
from llm_mlp.presets import TWIN
from llm_mlp.recipes import find
from llm_mlp.recipes.report import Figure, Series, write_report
from llm_mlp.train import TrainResult, train

PRESETS = {"perception": "demo", "transformer": "demo" + TWIN}
CONTEXTS = (512, 4096, 16384)
# No space at the end: the first token would have to be one that follows a lone space.
PROMPTS = ("", "The", "It was a dark night, and")
NAMES = {"perception": "perception heads", "transformer": "transformer twin"}
_MARKER = "demo.json"


@dataclass
class _Model:
    """One of the two: how it was trained, and what it was measured at."""

    name: str
    config: TrainConfig
    result: TrainResult
    decoding: dict[int, dict[str, float]]  # by context: seconds a token, state_bytes

    @property
    def parameters(self) -> int:
        return model_cost(self.config.model).parameters


def demo(
    out: str | Path = "runs/demo",
    *,
    steps: int | None = None,
    contexts: Sequence[int] = CONTEXTS,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> bool:
    """Train, measure, write ``out`` (checkpoints, report.html, samples.txt, results.jsonl), print the table.

    Args:
        out: a new folder, or that of an earlier demo, which is replaced.
        steps: of each model; None takes the recipe's.
        contexts: tokens already read when decoding is timed.
        overrides: of the recipe, for both models alike.

    Returns:
        False if it was interrupted.

    Raises:
        ConfigError: something that is asked for cannot be; an earlier demo still stands.
        CheckpointError: ``out`` holds something else.
    """
    out = Path(out)
    configs = {name: _config(preset, out, name, overrides, steps) for name, preset in PRESETS.items()}
    if not contexts or min(contexts) < 1:
        raise ConfigError(f"contexts {list(contexts)}: expected numbers of at least 1")
    with _replacing(out):
        return _demo(out, configs, contexts, as_shipped=not overrides and steps is None, quiet=quiet)


def _demo(
    out: Path, configs: dict[str, TrainConfig], contexts: Sequence[int], *, as_shipped: bool, quiet: bool
) -> bool:
    models = []
    for name, config in configs.items():
        result = train(config, quiet=quiet)
        if result.interrupted:
            return False
        models.append(_Model(name, config, result, {}))
    device = pick_device(configs["perception"].device)
    console = Console()
    jobs = [(model, context) for model in models for context in contexts]
    for model, context in track(jobs, "timing the decoding", console=Console(stderr=True), disable=quiet):
        lm, _ = load_model(model.config.out, device=device)
        model.decoding[context] = time_decoding([lm], context, steps=20)[0]
    samples = _samples(models[0])
    _write(out, models, contexts, samples, device, as_shipped)
    console.print(_table(models, contexts))
    console.print(f"\nreport: {out / 'report.html'}   samples: {out / 'samples.txt'}", soft_wrap=True, highlight=False)
    print(f"next: {next_command(out)}", flush=True)
    return True


def _config(preset: str, out: Path, name: str, overrides: Sequence[str], steps: int | None) -> TrainConfig:
    """The recipe with this preset, in ``out``; everything is checked before anything is written."""
    for item in overrides:
        if item.partition("=")[0] in ("out", "model", "data.cache_dir"):
            raise ConfigError(f"override {item!r}: the demo sets this itself (--out names its folder)")
    places = [f"out={json.dumps(str(out / name))}", f"data.cache_dir={json.dumps(str(out / 'data'))}"]
    more = [] if steps is None else [f"steps={steps}"]
    config = load(TrainConfig, find("demo"), [f"model={preset}", *places, *overrides, *more])
    if config.data.held_out == 0:
        raise ConfigError("the demo compares held-out losses: data.held_out must be above 0")
    return config


def next_command(out: Path) -> str:
    """The command that continues a text with the demo's model, as it can be typed here."""
    program = "llm-mlp"
    own = Path(sys.executable).parent / program
    found = shutil.which(program)
    if own.is_file() and (found is None or Path(found).resolve() != own.resolve()):
        # Not on the PATH (make demo uses .venv): name it by its path, relative where that is shorter.
        program = str(own.relative_to(Path.cwd())) if own.is_relative_to(Path.cwd()) else str(own)
    return f"{shlex.quote(program)} generate --model {shlex.quote(str(out / 'perception'))} --prompt 'The old man'"


@contextmanager
def _replacing(out: Path) -> Iterator[None]:
    """An empty ``out``; an earlier demo there comes back if what follows fails or is interrupted before its report."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise CheckpointError(f"{out}: not a folder; choose another --out")
    earlier = out.with_name(f".{out.name}.{os.getpid()}.earlier")
    if out.exists() and any(out.iterdir()):
        if not (out / _MARKER).is_file():
            raise CheckpointError(f"{out}: not empty, and not an earlier demo; choose another --out")
        out.rename(earlier)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / _MARKER, {"format_version": 1, "what": "a folder of `llm-mlp demo`, which replaces it"})
    try:
        yield
    finally:
        if earlier.exists() and not (out / "report.html").is_file():
            shutil.rmtree(out)
            earlier.rename(out)
        shutil.rmtree(earlier, ignore_errors=True)


def _samples(model: _Model) -> list[tuple[str, str]]:
    """(prompt, text) pairs, not selected."""
    lm, tokenizer = load_model(model.config.out)
    texts = []
    for seed, prompt in enumerate(PROMPTS):
        ids = [tokenizer.eos, *tokenizer.encode(prompt)]
        tokens = generate(
            lm,
            ids,
            max_tokens=150,
            sampling=Sampling(0.8),
            seed=seed,
            stop=tokenizer.eos,
            vocabulary=tokenizer.vocab_size,
        )
        texts.append((prompt, tokenizer.decode(tokens)))
    return texts


def _rows(models: list[_Model], contexts: Sequence[int]) -> list[list[str]]:
    """The table, first row its head."""
    rows = [["", *(NAMES[m.name] for m in models)]]
    rows.append(["parameters", *(f"{m.parameters:,}" for m in models)])
    rows.append(["held-out bits per byte", *(f"{m.result.bits_per_byte:.3f}" for m in models)])
    rows.append(["training, tokens/s", *(f"{m.result.tokens_per_second:,.0f}" for m in models)])
    for context in contexts:
        at = [m.decoding[context] for m in models]
        rows.append([f"decoding at {context:,}, tokens/s", *(f"{1 / d['seconds']:,.0f}" for d in at)])
    for context in contexts:
        at = [m.decoding[context] for m in models]
        rows.append([f"state at {context:,}, bytes", *(f"{d['state_bytes']:,.0f}" for d in at)])
    return rows


def _table(models: list[_Model], contexts: Sequence[int]) -> Table:
    head, *body = _rows(models, contexts)
    table = Table(title="equal data, tokenizer and steps")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for row in body:
        table.add_row(*row)
    return table


def _write(
    out: Path,
    models: list[_Model],
    contexts: Sequence[int],
    samples: list[tuple[str, str]],
    device: torch.device,
    as_shipped: bool,
) -> None:
    for m in models:
        facts: dict[str, Any] = {
            "model": m.name,
            "parameters": m.parameters,
            "lr": m.config.optimizer.lr,
            "steps": m.result.steps,
            "tokens": m.result.tokens,
            "held_out_loss": m.result.evaluations[-1][1] if m.result.evaluations else None,
            "bits_per_byte": m.result.bits_per_byte,
            "tokens_per_second": m.result.tokens_per_second,
            "decoding": {str(c): m.decoding[c] for c in contexts},
        }
        record(out / "results.jsonl", "demo", facts, device=device, seed=m.config.seed)
    (out / "samples.txt").write_text(
        "\n\n".join(f"--- prompt: {prompt!r}\n{prompt}{text}" for prompt, text in samples) + "\n", encoding="utf8"
    )
    figures = [
        Figure(
            "Training loss",
            "step",
            "nats a token",
            [Series(NAMES[m.name], [s for s, _ in m.result.curve], [y for _, y in m.result.curve]) for m in models],
        ),
        Figure(
            "Decoding: time a token",
            "tokens of context",
            "milliseconds",
            [Series(NAMES[m.name], list(contexts), [1e3 * m.decoding[c]["seconds"] for c in contexts]) for m in models],
            log_x=True,
            from_zero=True,
        ),
        Figure(
            "Decoding: memory of the context",
            "tokens of context",
            "megabytes",
            [
                Series(NAMES[m.name], list(contexts), [m.decoding[c]["state_bytes"] / 1e6 for c in contexts])
                for m in models
            ],
            log_x=True,
            log_y=True,
        ),
    ]
    steps, config = models[0].result.steps, models[0].config
    intro = (
        f"A model of perception heads and a transformer of equal size, trained for {steps} steps of "
        f"{config.batch_size * config.data.seq_len:,} tokens on {device_name(device)}, torch {torch.__version__}. "
        + ("The learning rates come from one sweep for both. " if as_shipped else "")
        + "A run this short says how the machinery "
        "works, not how good the models can be."
    )
    write_report(out / "report.html", "llm-mlp demo", intro, _rows(models, contexts), figures, samples)
