"""The verb ``llm-mlp context``."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from llm_mlp.cli.options import Device, Kept, ModelDir, StoreDir, Weights

context_app = typer.Typer(
    help="Texts that were read once, as files: saved, forked, shared, asked. The store is --store, else "
    "$LLM_MLP_CONTEXTS, else ~/.local/share/llm-mlp/contexts.",
    no_args_is_help=True,
)

ContextName = Annotated[str, typer.Argument(metavar="NAME", help="Name of a context.")]
Text = Annotated[str, typer.Option("--text", "-t", help="The text itself.")]
File = Annotated[Path | None, typer.Option("--file", "-f", help="A UTF-8 text file; - is standard input.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Expires = Annotated[
    float | None,
    typer.Option("--expires-hours", min=0, help="It is gone after so many; gc removes its file.", show_default=False),
]
EVERY = 262_144
Every = Annotated[int, typer.Option(min=1, help="Tokens between savings of a long reading.")]
Replace = Annotated[bool, typer.Option("--replace", help="A name that exists takes the new context.")]


def _text(text: str, file: Path | None) -> str:
    """What --text or --file say."""
    from llm_mlp.config import ConfigError

    if bool(text) == (file is not None):
        raise ConfigError("give the text by --text or by --file, one of them")
    if file is None:
        return text
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf8")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{file}: cannot be read as UTF-8 text ({error})") from None


def _until(hours: float | None) -> timedelta | None:
    return None if hours is None else timedelta(hours=hours)


def _reader(model: Path, device: str, weights: str, kept: str, transitions: bool = False) -> Any:
    from llm_mlp.checkpoint import load_model
    from llm_mlp.context import Reader
    from llm_mlp.device import pick_device

    logging.getLogger("llm_mlp.ops").setLevel(logging.WARNING)
    return Reader(*load_model(model, device=pick_device(device), weights=weights, state=kept), transitions=transitions)


def _read_into(own: Any, name: str, reader: Any, tokens: Any, every: int, base: Any = None) -> Any:
    """The context of ``tokens``, read behind ``base`` on the way into ``name`` of store ``own``: from where an
    interrupted reading of the same has come to, and kept on the way."""
    return _read_on(own, name, reader, tokens, every, base, own.begun(name, reader))


def _read_aside(own: Any, name: str, reader: Any, tokens: Any, base: Any = None) -> Any:
    """As `_read_into` of a text that is the command's own: what is left of another one is not in its way."""
    from llm_mlp.context import ContextError

    try:
        begun = own.begun(name, reader)
        if begun is not None:
            reader.check_begun(begun, tokens, base, reader.keeps_transitions(base))
    except ContextError as error:
        typer.echo(f"what is left of an interrupted reading is not used: {error}", err=True)
        begun = None
    return _read_on(own, name, reader, tokens, EVERY, base, begun)


def _read_on(own: Any, name: str, reader: Any, tokens: Any, every: int, base: Any, begun: Any) -> Any:
    """What `_read_into` and `_read_aside` give, from ``begun`` on."""
    done = next((len(c.tokens) for c in (begun, base) if c is not None), 0)
    with _reading(len(tokens), done) as progress:
        for context in reader.pieces(begun, tokens, every, base):
            if len(context.tokens) < len(tokens):
                own.keep_reading(context, name)
            progress(len(context.tokens))
    return context


@contextlib.contextmanager
def _reading(total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Shows in a terminal how far a reading is and how long it will take; to be told the tokens read so far."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("reading tokens", total=total, completed=done)
        yield lambda read: bar.update(task, completed=read)


def _curves(ran: Any) -> list[str]:
    """A `Surprise` as lines: a mark a part, between the least and the most of its line."""
    parts, size = len(ran.ends), ran.ends[0]
    lines = [
        f"surprise over the text, in {parts} parts of some {size:,} tokens (0.5: nothing known, less: predicted); read "
        f"again in {ran.seconds:.1f} s"
    ]
    for name, row in (("all", ran.overall), *((f"layer {n:>2}", row) for n, row in ran.layers.items())):
        mean = sum(row) / parts
        lines.append(f"{name:8}  {_sparkline(row)}  {min(row):.3f} to {max(row):.3f}, mean {mean:.3f}")
    return lines


def _sparkline(row: Sequence[float]) -> str:
    """A mark a number, from its least to its most; digits where the terminal has no bars."""
    marks = "▁▂▃▄▅▆▇█"
    try:
        marks.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        marks = "12345678"
    low, span = min(row), max(row) - min(row) or 1.0
    return "".join(marks[round((x - low) / span * (len(marks) - 1))] for x in row)


def _brought_back(found: Any) -> str:
    """A `Recall` in words."""
    low, high = found.interval
    return f"{found.found} of {found.pairs} planted pairs, {found.rate:.1%} ({low:.1%} to {high:.1%})"


def _say(context: Any, name: str) -> None:
    m = context.manifest
    note = ", read again from its token ids" if m.replayed else ""
    typer.echo(f"{name}: {context.id}, {m.tokens:,} tokens, {context.bytes / 1e6:.1f} MB{note}")


@context_app.command("create")
def context_create(
    name: ContextName,
    model: ModelDir,
    text: Text = "",
    file: File = None,
    every: Every = EVERY,
    composable: Annotated[bool, typer.Option("--composable", help="Keep what composing needs: a larger file.")] = False,
    replace: Replace = False,
    expires_hours: Expires = None,
    store: StoreDir = None,
    weights: Weights = "fp32",
    kept: Kept = "auto",
    device: Device = "auto",
) -> None:
    """Read a text into a context. An interrupted reading goes on where it was when the command is given again."""
    import torch

    from llm_mlp.context import ContextError, Store

    own = Store(store)
    if own.look(name) is not None and not replace:
        raise ContextError(f"context {name!r} exists; choose another name, or --replace")
    reader = _reader(model, device, weights, kept, composable)
    tokens = torch.tensor(reader.encode(_text(text, file), begin=True))
    context = _read_into(own, name, reader, tokens, every)
    own.commit(context, name, replace=replace, expires=_until(expires_hours))
    own.forget_reading(name)
    _say(context, name)


@context_app.command("append")
def context_append(
    name: ContextName,
    model: ModelDir,
    text: Text = "",
    file: File = None,
    every: Every = EVERY,
    expires_hours: Expires = None,
    store: StoreDir = None,
    weights: Weights = "fp32",
    kept: Kept = "auto",
    device: Device = "auto",
) -> None:
    """Read on in a context; what it was before can be come back to (undo). An interrupted reading goes on where it was
    when the command is given again."""
    import torch

    from llm_mlp.context import ContextError, Store

    own = Store(store)
    if own.entry(name).unfinished:
        raise ContextError(f"context {name!r} is an interrupted reading; give the command that began it again")
    reader = _reader(model, device, weights, kept)
    base = own.get(name, reader)
    tokens = torch.cat([base.tokens, torch.tensor(reader.encode(_text(text, file), begin=False), dtype=torch.int32)])
    context = _read_into(own, name, reader, tokens, every, base)
    own.commit(context, name, expires=_until(expires_hours))
    own.forget_reading(name)
    _say(context, name)


def listing(own: Any) -> Iterator[str]:
    """Lines of the contexts of a store, and what it takes."""
    from llm_mlp.context.store import summary

    manifests, usage, entries = own.manifests(), own.usage(), own.entries()
    for row in (summary(e, manifests.get(e.id)) for e in entries):
        notes = [n for n in ("unfinished", "replayed") if row[n]]
        notes += [f"until {row['expires']}"] if row["expires"] else []
        size = f"{row['tokens'] or 0:>10,} tokens"
        yield f"{row['name']:24} {row['id']}  {size}  {row['created']}  {' '.join(notes)}".rstrip()
    yield (
        f"{own.folder}: {len(entries)} names, {usage['objects']} objects, {usage['disk_bytes'] / 1e6:,.1f} MB of which "
        f"earlier versions {usage['snapshot_bytes'] / 1e6:,.1f} MB"
    )


@context_app.command("ls")
def context_ls(store: StoreDir = None, as_json: AsJson = False) -> None:
    """List contexts, and what the store takes."""
    from llm_mlp.context import Store
    from llm_mlp.context.store import summary

    own = Store(store)
    if as_json:
        manifests = own.manifests()
        rows = [summary(e, manifests.get(e.id)) for e in own.entries()]
        typer.echo(json.dumps({"folder": str(own.folder), "contexts": rows, "usage": own.usage()}, indent=1))
        return
    for line in listing(own):
        typer.echo(line)


@context_app.command("show")
def context_show(
    name: ContextName,
    model: Annotated[Path | None, typer.Option("--model", "-m", help="Adds half-lives and the text's end.")] = None,
    store: StoreDir = None,
    recall: Annotated[bool, typer.Option("--recall", help="Measure what still comes back (reads it again).")] = False,
    surprise: Annotated[
        bool, typer.Option("--surprise", help="Tell what of the text surprised (reads it again, once).")
    ] = False,
    as_json: AsJson = False,
    weights: Weights = "fp32",
    kept: Kept = "auto",
    device: Device = "auto",
) -> None:
    """What a context holds: norms of its fast weights, memorised units, half-lives, what it still recalls, and what
    surprised it."""
    from llm_mlp.config import ConfigError
    from llm_mlp.context import Store, ask, describe, measure_surprise, plant

    for asked, option in ((recall, "--recall"), (surprise, "--surprise")):
        if asked and model is None:
            raise ConfigError(f"{option} asks the model: give it by --model")
    own = Store(store)
    own.entry(name)
    reader = _reader(model, device, weights, kept) if model else None
    context = own.get(name, reader)
    found = describe(context, reader.model if reader else None)
    back = None
    if recall and reader is not None:
        planted = plant(reader, context)
        back = ask(reader, planted, _read_aside(own, f"{name}.recall", reader, planted.tokens).state)
        own.forget_reading(f"{name}.recall")
        found["recall"] = back.report()
    ran = None
    if surprise and reader is not None:
        with _reading(len(context.tokens)) as progress:
            ran = measure_surprise(reader, context, progress=progress)
        found["surprise"] = ran.report()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    _say(context, name)
    if back is not None:
        note = back.warning or "all depths within reach"
        typer.echo(f"recall {_brought_back(back)}, by chance {back.chance:.1%}; {note}")
    m = context.manifest
    typer.echo(f"made {m.created} on {m.device}, weights {m.weights}, parent {m.parent or 'none'}")
    typer.echo(f"marks {', '.join(map(str, m.marks)) or 'none'}; state {found['state_bytes'] / 1e6:.1f} MB")
    if reader is not None and reader.tokenizer is not None:
        typer.echo(f"ends with {reader.tokenizer.decode(context.tokens[-24:].tolist())!r}")
    for row in found["layers"]:
        line = f"layer {row['layer']:>2}"
        if "fast_weight_norm" in row:
            line += f"  |S| {row['fast_weight_norm']:>9.2f}"
        if "units" in row:
            line += f"  units {row['units_used']:>5} of {row['units']}"
        if "surprise" in row:
            line += f"  surprise median {row['surprise']['median']:.3g}, most {row['surprise']['most']:.3g}"
        if "half_lives" in row:
            line += f"  half-lives {min(row['half_lives']):.0f} to {max(row['half_lives']):,.0f} tokens"
        typer.echo(line)
    if ran is not None:
        typer.echo("\n".join(_curves(ran)))


@context_app.command("fork")
def context_fork(name: ContextName, new: Annotated[str, typer.Argument(metavar="NEW")], store: StoreDir = None) -> None:
    """Give a context another name; both go their own way from there. Nothing is copied."""
    from llm_mlp.context import Store

    typer.echo(f"{new}: {Store(store).fork(name, new).id}")


@context_app.command("undo")
def context_undo(
    name: ContextName,
    model: ModelDir,
    steps: Annotated[int, typer.Option(min=1, help="Marks to go back.")] = 1,
    to: Annotated[int | None, typer.Option(help="Go back to the mark at this number of tokens.")] = None,
    store: StoreDir = None,
    weights: Weights = "fp32",
    kept: Kept = "auto",
    device: Device = "auto",
) -> None:
    """Go back to what a context was before it was appended to. Where that is not stored any more the text is read
    again; an interrupted reading goes on where it was when the command is given again."""
    from llm_mlp.context import Store

    own = Store(store)
    own.entry(name)
    reader = _reader(model, device, weights, kept)
    plan = own.plan_undo(name, reader, steps=steps, tokens=to)
    made = plan.exact
    if made is None:
        reader.transitions = plan.composable
        read = _read_aside(own, f"{name}.undo", reader, plan.now.tokens[: plan.tokens], plan.nearest)
        made = reader.replayed(plan.now, read.start, plan.nearest, read.transition)
    own.go_back(plan, made)
    own.forget_reading(f"{name}.undo")
    _say(made, name)


@context_app.command("diff")
def context_diff(
    first: Annotated[str, typer.Argument(metavar="A")],
    second: Annotated[str, typer.Argument(metavar="B")],
    store: StoreDir = None,
    as_json: AsJson = False,
) -> None:
    """How two contexts differ: their texts' common beginning, and each layer's distance."""
    from llm_mlp.context import Store, diff

    own = Store(store)
    found = diff(own.get(first), own.get(second))
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    a, b = found["tokens"]
    typer.echo(f"{first} {a:,} tokens, {second} {b:,} tokens; the first {found['common_tokens']:,} are the same")
    for row in found["layers"]:
        parts = [f"layer {row['layer']:>2}"]
        if "fast_weight_distance" in row:
            parts.append(f"fast weights differ by {row['fast_weight_distance']:.3g} of the norm")
        if "units_shared" in row:
            parts.append(f"units shared {row['units_shared']} of {row['units_used'][0]} and {row['units_used'][1]}")
        typer.echo("  ".join(parts))


@context_app.command("compose")
def context_compose(
    new: Annotated[str, typer.Argument(metavar="NEW")],
    names: Annotated[list[str], typer.Argument(metavar="NAME...")],
    model: ModelDir,
    recall: Annotated[
        bool, typer.Option("--recall", help="Measure what comes back of each, beside reading them as one text.")
    ] = False,
    store: StoreDir = None,
    as_json: AsJson = False,
    weights: Weights = "fp32",
    kept: Kept = "auto",
    device: Device = "auto",
) -> None:
    """EXPERIMENTAL: one context of several documents', without reading them again (made with --composable)."""
    from llm_mlp.context import ContextError, Store, compose, measure_composed

    own = Store(store)
    if own.look(new) is not None:
        raise ContextError(f"context {new!r} exists; choose another name")
    reader = _reader(model, device, weights, kept)
    parts, separator = [own.get(name, reader) for name in names], [reader.tokenizer.eos]
    made = compose(reader, parts, separator)
    back = measure_composed(reader, parts, separator) if recall else None
    own.commit(made, new)
    if as_json:
        rows = None if back is None else [{"source": name} | b.report() for name, b in zip(names, back, strict=True)]
        typer.echo(json.dumps({"name": new, "id": made.id, "tokens": made.manifest.tokens, "recall": rows}, indent=1))
        return
    _say(made, new)
    for name, each in zip(names, back or [], strict=False):
        typer.echo(
            f"recall of {name}: composed {_brought_back(each.composed)}; read as one text "
            f"{_brought_back(each.concatenated)}; by chance {each.composed.chance:.1%}"
        )


@context_app.command("export")
def context_export(name: ContextName, path: Annotated[Path, typer.Argument()], store: StoreDir = None) -> None:
    """Write a context's file elsewhere, to keep or to share."""
    from llm_mlp.context import Store

    Store(store).export(name, path)
    typer.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


@context_app.command("import")
def context_import(
    path: Annotated[Path, typer.Argument()], name: ContextName, replace: Replace = False, store: StoreDir = None
) -> None:
    """Take a context's file into the store; cut or altered ones are refused."""
    from llm_mlp.context import Store

    _say(Store(store).import_(path, name, replace=replace), name)


@context_app.command("rm")
def context_rm(name: ContextName, store: StoreDir = None) -> None:
    """Remove a context, and the objects that no other name needs."""
    from llm_mlp.context import Store

    Store(store).remove(name)


@context_app.command("gc")
def context_gc(store: StoreDir = None) -> None:
    """Remove what nothing needs: expired names, objects without a name, leftovers of killed writers."""
    from llm_mlp.context import Store

    done = Store(store).gc()
    typer.echo(
        f"removed {done['names']} expired names, {done['objects']} objects ({done['bytes'] / 1e6:,.1f} MB), "
        f"{done['temporary']} temporary files"
    )
