"""`llm-mlp chat`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from llm_mlp.cli.contexts import listing
from llm_mlp.cli.options import Device, Kept, ModelDir, StoreDir, Weights


class _Command(NamedTuple):
    takes: str  # "", NAME, or [NAME]
    does: str
    run: Callable[[_Session, str], None]


class _Session:
    """A conversation, the store that it is kept in, and what can be done with them."""

    def __init__(self, reader: Any, talk: Callable[..., Any], folder: Path | None) -> None:
        """``talk``: makes a `Talk` behind a context or None, with a system message."""
        self.reader, self._talk, self.folder = reader, talk, folder
        self.talk: Any = None
        self.name = ""  # of the context that the conversation goes on

    @cached_property
    def store(self) -> Any:
        """Made where it is first needed: talking alone leaves no folder."""
        from llm_mlp.context import Store

        return Store(self.folder)

    def begin(self, name: str, system: str = "") -> None:
        """A conversation from nothing, or behind a stored context."""
        base = self.store.get(name, self.reader) if name else None
        self.talk, self.name = self._talk(base, system), name
        if base is not None:
            _note(f"context {name}: {len(base.tokens):,} tokens, none read again")

    def say(self, text: str, **how: Any) -> None:
        """An answer as it comes, and one line of what it took."""
        for piece in self.talk.say(text, **how):
            typer.echo(piece, nl=False)
            sys.stdout.flush()
        typer.echo()
        typer.secho(self.talk.facts.line, dim=True, err=True)

    def run(self, line: str) -> None:
        """A line that begins with a slash."""
        word, _, rest = line.partition(" ")
        command, rest = COMMANDS.get(word), rest.strip()
        if command is None:
            _note(f"{word}: unknown; /help lists what there is")
        elif (command.takes == "NAME" and not rest) or (rest and not command.takes):
            _note(f"{word} takes {command.takes or 'nothing'}: {command.does}")
        else:
            command.run(self, rest)

    def save(self, name: str) -> None:
        if not (name or self.name):
            _note("under which name? /save NAME")
        elif self._keep(name or self.name, "saved"):
            self.name = self.name or name

    def load(self, name: str) -> None:
        self.begin(name)

    def fork(self, name: str) -> None:
        from llm_mlp.context import ContextError

        if self.store.look(name) is not None:
            raise ContextError(f"context {name!r} exists; choose another name")
        if self._keep(name, "forked to"):  # with the versions before it, as `llm-mlp context fork` does
            self.name = name

    def _keep(self, name: str, done: str) -> bool:
        there = self.store.look(name)
        made = self.talk.context(there.id if there is not None else None)
        if made is None:
            _note("nothing was said yet")
            return False
        older = self.store.versions(self.name, made) if self.name and there is None else ()
        self.store.commit(made, name, versions=older)
        self.talk.keep(made)
        _note(f"{done} {name}: {len(made.tokens):,} tokens")
        return True

    def undo(self, _: str) -> None:
        _note("taken back" if self.talk.undo() else "nothing to take back")

    def contexts(self, _: str) -> None:
        for row in listing(self.store):
            _note(row)

    def help(self, _: str) -> None:
        for word, command in COMMANDS.items():
            _note(f"{word + ' ' + command.takes:14} {command.does}")

    def quit(self, _: str) -> None:
        raise typer.Exit


COMMANDS = {
    "/save": _Command("[NAME]", "store the conversation as a context; without NAME the one it goes on", _Session.save),
    "/load": _Command("NAME", "go on from a stored context", _Session.load),
    "/fork": _Command(
        "NAME", "store the conversation and its versions under a new name, and go on there", _Session.fork
    ),
    "/undo": _Command("", "take the last exchange back", _Session.undo),
    "/contexts": _Command("", "list what is stored", _Session.contexts),
    "/help": _Command("", "list these", _Session.help),
    "/quit": _Command("", "end; so does Ctrl-D", _Session.quit),
}


def _note(text: str) -> None:
    typer.echo(text, err=True)


def chat(
    model: ModelDir,
    context: Annotated[str, typer.Option("--context", help="Go on from this stored context; it stays as it is.")] = "",
    system: Annotated[str, typer.Option(help="What the conversation begins with.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 400,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Keep the most likely tokens up to this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1)] = None,
    store: StoreDir = None,
    weights: Weights = "fp32",
    kept: Kept = "auto",
    device: Device = "auto",
) -> None:
    """Talk to a model in the terminal. /help lists what else can be said there: to save, load and fork the conversation
    as a context, to take an exchange back. Ctrl-D ends."""
    from llm_mlp.checkpoint import load_model
    from llm_mlp.config import ConfigError
    from llm_mlp.context import ContextError, Reader
    from llm_mlp.device import pick_device
    from llm_mlp.infer import Sampling

    try:
        from llm_mlp.data.chat import ChatError, ChatTemplate
        from llm_mlp.serve.talk import Talk, TalkError
    except ImportError as error:
        raise ConfigError(f"chatting needs {error.name}: pip install 'llm-mlp[serve]'") from None
    logging.getLogger("llm_mlp").setLevel(logging.WARNING)
    how = {"max_tokens": max_tokens, "sampling": Sampling(temperature, top_p=top_p), "seed": seed}
    lm, tokenizer = load_model(model, device=pick_device(device), weights=weights, state=kept)
    try:
        reader = Reader(lm, tokenizer)
        session = _Session(reader, partial(Talk, reader, ChatTemplate(tokenizer)), store)
        session.begin(context, system)
    except ChatError as error:
        raise ConfigError(str(error)) from None
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        try:
            if line.startswith("/"):
                session.run(line)
            elif line:
                session.say(line, **how)
        except (ContextError, ChatError, TalkError) as error:
            _note(f"error: {error}")
        except KeyboardInterrupt:
            _note("\n(stopped)")
