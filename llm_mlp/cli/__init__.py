"""The command ``llm-mlp``: verbs to functions. Heavy imports happen inside the verbs, so that --help is quick."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import llm_mlp
from llm_mlp.cli.chat import chat
from llm_mlp.cli.contexts import context_app
from llm_mlp.cli.options import Device, Kept, ModelDir, Overrides, Plot, Repeats, StoreDir, Threads, Tokens, Weights
from llm_mlp.cli.plan import plan
from llm_mlp.cli.runs import run_app
from llm_mlp.cli.serving import serve

app = typer.Typer(
    help="LLM-MLP: language models without attention, made of perception heads.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
eval_app = typer.Typer(help="Measure a model.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure speed and memory beside the transformer twin; JSON lines.", no_args_is_help=True)
app.add_typer(eval_app, name="eval")
app.add_typer(bench_app, name="bench")
app.add_typer(context_app, name="context")
app.add_typer(run_app, name="run")
app.command()(serve)
app.command()(chat)
app.command()(plan)


# How often torch's CPU threads look for one another behind an operation before they sleep; left alone, they do so for
# milliseconds, and where other programs run take the core from the very thread they wait for (docs/serving.md has
# figures). 10,000 times cost hardly anything on idle cores. A server has company of its own, and doctor a hundred
# thousand small operations.
_SPINS, _SPINS_OF = 10_000, {"serve": 0, "doctor": 0}


def _wait_calmly(verb: str | None) -> None:
    """Before torch is loaded, which reads it then; what the user has set stands."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(_SPINS_OF.get(verb or "", _SPINS)))


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        typer.echo(llm_mlp.__version__)
        raise typer.Exit
    if context.invoked_subcommand != "bench":
        _wait_calmly(context.invoked_subcommand)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("llm_mlp").setLevel(logging.INFO)


@bench_app.callback()
def _start_bench(context: typer.Context) -> None:
    _wait_calmly(context.invoked_subcommand)  # of serve: both the server and the engine beside it as a server waits


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a shipped recipe (demo, 30m ...).")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run (the config's `out`).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in this folder, exactly.")] = False,
    init_from: Annotated[Path | None, typer.Option(help="Start from the weights of this checkpoint.")] = None,
    stop_after: Annotated[int | None, typer.Option(help="Stop with a checkpoint after this step.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Train a model.

    Example: llm-mlp train demo data.sources='[{path: my-texts/}]' optimizer.lr=0.004 --out runs/mine
    """
    from llm_mlp.config import TrainConfig, load
    from llm_mlp.recipes import find
    from llm_mlp.train import train as run

    extra = [f"out={json.dumps(str(out))}"] if out else []
    settings = load(TrainConfig, find(config), [*(overrides or []), *extra])
    result = run(settings, resume=resume, init_from=init_from, stop_after=stop_after, quiet=quiet)
    if result.interrupted and result.steps != stop_after:
        raise SystemExit(130)
    if not result.interrupted:
        speed = f"{result.tokens_per_second:,.0f} tokens/s" if result.tokens else "finished before"
        scored = result.evaluations and result.evaluations[-1][0] == result.steps
        quality = f"held-out {result.bits_per_byte:.4f} bits per byte" if scored else "nothing held out"
        instruct = any(source.format == "instruct" for source in settings.data.sources)
        verb = f"chat --model {result.out}" if instruct else f"generate --model {result.out} --prompt 'The old man'"
        typer.echo(f"{result.steps} steps, {speed}, {quality}\nllm-mlp {verb}")


@app.command()
def demo(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder for everything it writes; an earlier demo there is replaced.")] = (
        Path("runs/demo")
    ),
    steps: Annotated[int | None, typer.Option(help="Steps of each model; fewer is quicker.")] = None,
    contexts: Annotated[str, typer.Option(help="Contexts decoding is timed at.")] = "512,4096,16384",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Train a small perception model and its transformer twin on the text that ships, and compare them."""
    from llm_mlp.recipes.demo import demo as run

    if not run(out, steps=steps, contexts=_numbers(contexts), overrides=overrides or (), quiet=quiet):
        raise SystemExit(130)


@app.command()
def sweep(
    config: Annotated[str, typer.Argument(help="YAML file or recipe.")],
    overrides: Overrides = None,
    rates: Annotated[str, typer.Option(help="Peak learning rates, comma-separated.")] = "0.001,0.002,0.004,0.008,0.016",
    models: Annotated[str, typer.Option(help="Presets to sweep alike, comma-separated; empty: the config's.")] = "",
    results: Annotated[Path | None, typer.Option(help="Append one JSON line a run to this file.")] = None,
    label: Annotated[str, typer.Option(help="Named in the result lines.")] = "",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Compare learning rates, everything else equal; says whether the best one is interior."""
    from llm_mlp.config import ConfigError, TrainConfig, load
    from llm_mlp.recipes import find
    from llm_mlp.train.sweep import sweep as run

    try:
        values = [float(r) for r in rates.split(",")]
    except ValueError:
        raise ConfigError(f"--rates {rates!r}: expected numbers, comma-separated") from None
    settings = load(TrainConfig, find(config), overrides or [])
    names = [m for m in models.split(",") if m]
    for found in run(settings, names, values, results=results, quiet=quiet, label=label):
        line = "  ".join(f"{rate:g}: {loss:.4f}" for rate, loss in sorted(found.losses.items()))
        verdict = "interior" if found.interior else "AT THE EDGE: widen --rates"
        typer.echo(f"{found.model}: {line}  -> {found.best:g} ({verdict})")


@app.command()
def config(
    recipe: Annotated[str | None, typer.Argument(help="YAML file or recipe; nothing: the defaults.")] = None,
    overrides: Overrides = None,
    fields: Annotated[bool, typer.Option("--fields", help="List every field, its default and what it does.")] = False,
) -> None:
    """Print the whole config of a run as YAML, presets and overrides filled in."""
    from llm_mlp.config import TrainConfig, describe, dump, load
    from llm_mlp.recipes import find

    if fields:
        typer.echo("\n".join(describe(TrainConfig)))
    else:
        typer.echo(dump(load(TrainConfig, find(recipe) if recipe else None, overrides or [])), nl=False)


@app.command()
def prepare(
    config: Annotated[str, typer.Argument(help="YAML file or recipe.")],
    overrides: Overrides = None,
) -> None:
    """Tokenise a run's data, and print where the shards are (also for data.prepared on another machine)."""
    from llm_mlp.config import TrainConfig, load
    from llm_mlp.data import prepare as run
    from llm_mlp.recipes import find

    dataset = run(load(TrainConfig, find(config), overrides or []).data)
    typer.echo(json.dumps({"folder": str(dataset.folder), **dataset.describe()}, indent=1))


@app.command()
def generate(
    model: ModelDir,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; - reads standard input.")] = "",
    max_tokens: Annotated[int, typer.Option(min=0, help="Tokens to write at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the most likely tokens up to this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Keep tokens this likely relative to the most likely.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages tokens seen.")] = 1.0,
    context: Annotated[str, typer.Option("--context", help="Go on from this stored context; it stays as it is.")] = "",
    store: StoreDir = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Of the sampling; the same seed gives the same text.")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="File of a JSON schema; what is written satisfies it.", show_default=False)
    ] = None,
    regex: Annotated[str, typer.Option(help="What is written matches this expression.", show_default=False)] = "",
    weights: Weights = "fp32",
    kept: Kept = "auto",
    device: Device = "auto",
) -> None:
    """Continue a text, token by token."""
    from llm_mlp.checkpoint import load_model
    from llm_mlp.config import ConfigError
    from llm_mlp.device import pick_device
    from llm_mlp.infer import Grammars, Sampling
    from llm_mlp.infer import generate as run

    logging.getLogger("llm_mlp").setLevel(logging.WARNING)  # nothing but the text, unless something is wrong
    choice = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    lm, tokenizer = load_model(model, device=pick_device(device), weights=weights, state=kept)
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        text.encode("utf8")
    except UnicodeError:
        raise ConfigError("the prompt is not UTF-8 text") from None
    if json_schema and regex:
        raise ConfigError("--json-schema and --regex: give one of them")
    grammars, constraint = Grammars(tokenizer), None
    try:
        if json_schema:
            constraint = grammars.schema(json.loads(json_schema.read_text(encoding="utf8"))).matcher()
        elif regex:
            constraint = grammars.regex(regex).matcher()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{f'--json-schema {json_schema}' if json_schema else '--regex'}: {error}") from None
    start = None
    if context:
        from llm_mlp.context import Reader, Store

        found = Store(store).get(context, Reader(lm, tokenizer))
        start = found.start
        typer.echo(f"context {context}: {len(found.tokens):,} tokens, none read again", err=True)
    ids = [*([] if start else [tokenizer.eos]), *tokenizer.encode(text)]
    typer.echo(text, nl=False)
    stream = tokenizer.stream()
    count = 0
    for token in run(
        lm,
        ids,
        max_tokens=max_tokens,
        sampling=choice,
        seed=seed,
        stop=tokenizer.eos,
        vocabulary=tokenizer.vocab_size,
        start=start,
        constraint=constraint,
    ):
        count += 1
        typer.echo(stream.step(token), nl=False)
        sys.stdout.flush()
    typer.echo(stream.finish())
    if constraint is not None and not constraint.satisfied:
        typer.echo(f"cut off after {count} tokens, before it was complete: give more --max-tokens", err=True)


@app.command()
def doctor(
    model: Annotated[Path | None, typer.Option("--model", "-m", help="Checkpoint; none: random weights.")] = None,
    preset: Annotated[str, typer.Option(help="Of the random weights.")] = "demo",
    weights: Weights = "fp32",
    kept: Kept = "auto",
    tokens: Annotated[int, typer.Option(min=20, help="Of the text that is read in every way.")] = 600,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check that every way of reading a text agrees on this machine, and show which backends run and why."""
    from llm_mlp.checkpoint import load_model
    from llm_mlp.config import ModelConfig, build
    from llm_mlp.device import pick_device
    from llm_mlp.doctor import environment, examine, report, table
    from llm_mlp.models import build_model
    from llm_mlp.weights import hold

    on = pick_device(device)
    if model is not None:
        lm, _ = load_model(model, device=on, weights=weights, state=kept)
    else:
        lm = hold(build_model(build(ModelConfig, {"preset": preset}), device=on).randomize_(), weights).keep_state(kept)
    checks, chosen = examine(lm, tokens=tokens)
    found = report(checks, chosen, environment(on))
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        for name, value in found["environment"].items():
            typer.echo(f"{name:20} {value}")
        for row in chosen:
            typer.echo(f"{row['op']:20} {row['backend']}: {row['why']}")
        typer.echo("\n".join(table(checks)))
    if not found["passed"]:
        raise SystemExit(1)


@app.command()
def info(
    preset: Annotated[str | None, typer.Option(help="A preset, for example 900m or 125m-transformer.")] = None,
    model: Annotated[Path | None, typer.Option("--model", "-m", help="A checkpoint folder.")] = None,
    context: Annotated[int, typer.Option(min=0, help="Tokens of context the figures are for.")] = 2048,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32: of activations and rows in the state.")] = "bf16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Parameters, forward FLOPs per token and state bytes; without arguments, all presets."""
    from llm_mlp.checkpoint import read_config
    from llm_mlp.config import ConfigError, ModelConfig, build
    from llm_mlp.models import model_cost
    from llm_mlp.presets import preset_names

    if preset is not None and model is not None:
        raise ConfigError("name a --preset or a --model, not both")
    sizes = {"bf16": 2, "fp32": 4}
    if dtype not in sizes:
        raise ConfigError(f"--dtype {dtype!r}: expected bf16 or fp32")

    def row(name: str, c: ModelConfig) -> dict[str, Any]:
        cost = model_cost(c, context=context, dtype_bytes=sizes[dtype])
        heads = c.perception.heads if "perception" in c.mixers else c.attention.heads
        return {
            "name": name,
            "parameters": cost.parameters,
            "parameters_without_embedding": cost.parameters - c.vocab_size * c.d_model,
            "flops_per_token": cost.flops,
            "state_bytes": cost.state_bytes,
            "context": context,
            "d_model": c.d_model,
            "n_layers": c.n_layers,
            "heads": heads,
            "vocab_size": c.vocab_size,
            "mixers": sorted(set(c.mixers)),
            "config": c.model_dump(mode="json"),
        }

    if model is not None:
        rows = [row(str(model), read_config(model))]
    else:
        rows = [row(n, build(ModelConfig, {"preset": n})) for n in ([preset] if preset else preset_names())]
    if as_json:
        typer.echo(json.dumps(rows[0] if len(rows) == 1 else rows))
        return
    from rich.console import Console
    from rich.table import Table

    title = (
        "million parameters with and without the embedding, forward GFLOP a token and MB of state\n"
        f"at a context of {context:,} tokens, {dtype}"
    )
    table = Table(title=title, box=None, pad_edge=False)
    for column in ("name", "M", "w/o emb.", "GFLOP", "state MB", "D", "L", "heads", "vocab"):
        table.add_column(column, justify="left" if column == "name" else "right", no_wrap=True)
    for r in rows:
        table.add_row(
            r["name"],
            f"{r['parameters'] / 1e6:.1f}",
            f"{r['parameters_without_embedding'] / 1e6:.1f}",
            f"{r['flops_per_token'] / 1e9:.3f}",
            f"{r['state_bytes'] / 1e6:.1f}",
            *(str(r[key]) for key in ("d_model", "n_layers", "heads", "vocab_size")),
        )
    Console().print(table)


@eval_app.command("text")
def eval_text(
    path: Annotated[Path, typer.Argument(help="Text file, folder, JSON lines, Parquet.")],
    model: ModelDir,
    context: Annotated[int, typer.Option(help="Tokens a piece; each starts from an empty state.")] = 1024,
    carry: Annotated[bool, typer.Option("--carry", help="Carry the state through each document instead.")] = False,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Stop after about this many tokens.")] = None,
    text_field: Annotated[str, typer.Option(help="Field of JSON lines and Parquet.")] = "text",
    precision: Annotated[str, typer.Option(help="Of products while fp32 weights train: fp32, bf16 or fp16.")] = "fp32",
    weights: Weights = "fp32",
    kept: Kept = "auto",
    steps: Annotated[bool, typer.Option("--steps", help="Read token by token, as decoding does.")] = False,
    results: Annotated[Path | None, typer.Option(help="Append a JSON line to this file.")] = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Bits per byte and perplexity of a text, and loss by position."""
    from llm_mlp.bench.record import record
    from llm_mlp.checkpoint import load_model
    from llm_mlp.config import ConfigError
    from llm_mlp.device import pick_device
    from llm_mlp.eval.text import score_text
    from llm_mlp.precision import Precision

    if precision not in ("fp32", "bf16", "fp16"):
        raise ConfigError(f"--precision {precision!r}: expected fp32, bf16 or fp16")
    if context < 1:
        raise ConfigError(f"--context {context}: expected at least 1")
    on = pick_device(device)
    lm, tokenizer = load_model(model, device=on, weights=weights, state=kept)
    score, by_position = score_text(
        lm,
        tokenizer,
        path,
        context=context,
        carry=carry,
        max_tokens=max_tokens,
        text_field=text_field,
        precision=Precision(precision, on),  # type: ignore[arg-type]
        steps=steps,
    )
    values = {
        "bits_per_byte": score.bits_per_byte,
        "perplexity": score.perplexity,
        "loss": score.loss,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "loss_by_position": by_position,
    }
    if results:
        facts = {"text": path.name, "weights": weights, "state": kept, "steps": steps, "carry": carry}
        record(results, "eval-text", {**facts, "length": context, **values}, device=on, seed=0)
    if as_json:
        typer.echo(json.dumps(values))
        return
    typer.echo(
        f"{score.bits_per_byte:.4f} bits per byte, perplexity {score.perplexity:.2f} ({score.loss:.4f} nats a token) "
        f"over {score.tokens:,} tokens, {score.bytes:,} bytes"
    )
    for bin_, loss in by_position.items():
        typer.echo(f"  position {bin_:>12}: {loss:.4f} nats")


@bench_app.command("train")
def bench_train(
    preset: Annotated[str, typer.Option(help="Preset; its twin runs beside it.")] = "30m",
    lengths: Annotated[str, typer.Option(help="Sequence lengths, comma-separated.")] = "1024,8192",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    compile_: Annotated[bool, typer.Option("--compile", help="torch.compile every block.")] = False,
    graph: Annotated[bool, typer.Option("--graph", help="Forward and backward as one CUDA graph, of both.")] = False,
    checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Keep a layer's input, compute the rest again.")
    ] = False,
    tokens: Tokens = 8192,
    repeats: Repeats = 3,
    results: Annotated[Path | None, typer.Option(help="Append JSON lines to this file.")] = None,
    threads: Threads = 0,
    device: Device = "auto",
) -> None:
    """Training speed (forward and backward) against the twin, in turn, as ratios."""
    from llm_mlp.bench.speed import bench_training

    for line in bench_training(
        preset, _numbers(lengths), precision, compile_, graph, checkpointing, tokens, repeats, results, threads, device
    ):
        typer.echo(line)


@bench_app.command("decode")
def bench_decode(
    preset: Annotated[str, typer.Option(help="Preset; its twin runs beside it.")] = "30m",
    contexts: Annotated[str, typer.Option(help="Tokens already read, comma-separated.")] = "512,4096,16384",
    steps: Repeats = 40,
    batch: Annotated[str, typer.Option(help="Sequences that decode together, comma-separated.")] = "1",
    weights: Weights = "fp32",
    kept: Kept = "auto",
    graph: Annotated[bool, typer.Option("--graph", help="The preset's steps as a CUDA graph.")] = False,
    results: Annotated[Path | None, typer.Option(help="Append JSON lines to this file.")] = None,
    plot: Plot = None,
    threads: Threads = 0,
    device: Device = "auto",
) -> None:
    """Decoding speed, bytes of weights and state and energy against the twin with its cache. Quantised weights and
    narrower states run beside the same in bf16, or what they compute in."""
    from llm_mlp.bench.speed import bench_decoding

    for line in bench_decoding(
        preset, _numbers(contexts), steps, _numbers(batch), weights, kept, graph, results, plot, threads, device
    ):
        typer.echo(line)


@bench_app.command("serve")
def bench_serve(
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="Checkpoint; none: random weights.", show_default=False)
    ] = None,
    preset: Annotated[str, typer.Option(help="Of the random weights.")] = "demo",
    clients: Annotated[str, typer.Option(help="That ask at a time; several numbers, comma-separated, in turn.")] = "64",
    seconds: Annotated[float, typer.Option(min=0.5, help="That they ask for.")] = 30.0,
    slots: Annotated[int, typer.Option(min=1, help="Requests that run at a time.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="About.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 64,
    invariant: Annotated[bool, typer.Option("--invariant", help="The batch-invariant mode.")] = False,
    weights: Weights = "fp32",
    kept: Kept = "auto",
    results: Annotated[Path | None, typer.Option(help="Append JSON lines to this file.")] = None,
    plot: Plot = None,
    threads: Threads = 0,
    device: Device = "auto",
) -> None:
    """A server under load beside the bare engine: throughput, latencies, memory, CPU, energy."""
    from llm_mlp.bench.serving import bench_serving

    for line in bench_serving(
        model,
        preset,
        _numbers(clients),
        seconds,
        slots,
        prompt_tokens,
        max_tokens,
        invariant,
        weights,
        kept,
        results,
        plot,
        threads,
        device,
    ):
        typer.echo(line)


@bench_app.command("op")
def bench_op(
    op: Annotated[str, typer.Argument(help="perceive, perceive_wide or memorise.")],
    lengths: Annotated[str, typer.Option(help="Sequence lengths, comma-separated.")] = "2048,131072",
    tokens: Tokens = 131_072,
    groups: Annotated[int, typer.Option(min=1, help="G: groups.")] = 8,
    features: Annotated[int, typer.Option(min=1, help="F (memorise: R).")] = 128,
    read_width: Annotated[int, typer.Option(min=1, help="perceive_wide: R.")] = 128,
    heads: Annotated[int, typer.Option(min=1, help="m: heads of a group.")] = 4,
    value_width: Annotated[int, typer.Option(min=1, help="V: values of a head.")] = 32,
    block: Annotated[int, typer.Option(min=1, help="memorise: tokens of a block.")] = 256,
    slots: Annotated[int, typer.Option(min=0, help="memorise: slots.")] = 64,
    activation: Annotated[str, typer.Option(help="memorise: relu2 or softmax.")] = "relu2",
    erase: Annotated[str, typer.Option(help="perceive: scalar (one number a group) or vector.")] = "scalar",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    implementations: Annotated[
        str, typer.Option(help="triton, chunked, sdpa-cudnn, sdpa-flash, fla ...; empty: all that can run.")
    ] = "",
    repeats: Repeats = 10,
    results: Annotated[Path | None, typer.Option(help="Append JSON lines to this file.")] = None,
    threads: Threads = 0,
    device: Device = "auto",
) -> None:
    """An op beside its peers: milliseconds, and how far from the floor this device sets."""
    from llm_mlp.bench.ops import bench_ops

    sizes = {"groups": groups, "features": features, "heads": heads, "value_width": value_width}
    sizes |= {"block": block, "slots": slots, "read_width": read_width}
    names = [name for name in implementations.split(",") if name]
    rows = bench_ops(
        op,
        _numbers(lengths),
        tokens,
        {**sizes, "activation": activation, "erase": erase},
        dtype,
        names,
        repeats,
        results,
        threads,
        device,
    )
    top = next(rows)
    typer.echo(
        f"{top['device']}: copy {top['copy_bytes_per_second'] / 1e12:.3g} TB/s, {dtype} product "
        f"{top['flops_per_second'] / 1e12:.3g} TFLOP/s"
    )
    typer.echo(f"{'':14}{'length':>8} {'':8}{'ms':>10}{'floor ms':>10}{'share':>7}{'GB':>8}{'GFLOP':>9}")
    for row in rows:
        way = "fwd+bwd" if row["backward"] else "fwd"
        line = f"{row['implementation']:14}{row['length']:>8} {way:8}"
        if row["seconds"] is None:
            typer.echo(f"{line}  {row['error']}")
            continue
        typer.echo(
            f"{line}{row['seconds'] * 1e3:>10.3f}{row['floor_seconds'] * 1e3:>10.3f}{row['share_of_roofline']:>7.1%}"
            f"{row['bytes'] / 1e9:>8.2f}{row['flops'] / 1e9:>9.0f}"
        )


def _numbers(text: str) -> list[int]:
    from llm_mlp.config import ConfigError

    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{text!r}: expected whole numbers, comma-separated") from None
    if min(numbers) < 1:
        raise ConfigError(f"{text!r}: expected numbers of at least 1")
    return numbers


def main() -> None:
    """Entry point: errors a user can mend end with one line and exit status 1."""
    from llm_mlp.config import ConfigError

    try:
        app()
    except SystemExit as end:
        _leave(end)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(141) from None
    except ConfigError as error:
        _fail(error)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error)
    except (ValueError, RuntimeError) as error:
        # DataError, TokenizerError, CheckpointError, TrainingError, and the ValueErrors of bad arguments. Other kinds
        # of errors are bugs and keep their traceback.
        if type(error).__module__.startswith("llm_mlp.") or type(error) is ValueError:
            _fail(error)
        raise


def _leave(end: SystemExit) -> None:
    """One of several processes ends without the interpreter's own end, in which a thread of gloo's that still lets go
    of a tensor would abort it: the run would be over, and torchrun would call it failed."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not isinstance(end.code, int | None):
        raise end
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end.code or 0)


def _fail(error: BaseException | str) -> None:
    typer.echo(f"error: {error}", err=True)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
