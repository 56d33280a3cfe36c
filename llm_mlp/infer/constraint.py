"""Output bound by a JSON schema or a regular expression.

The engine knows `Constraint` alone. `Grammars` makes them with llguidance: one wheel of 3 MB without dependencies,
where xgrammar brings a tensor ABI (apache-tvm-ffi) and outlines ten packages. It steps an automaton of bytes over the
vocabulary as it goes, so that little is prepared for each schema.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from llm_mlp.data.tokenizer import Tokenizer
from llm_mlp.infer import grammar as grammar_file

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

log = logging.getLogger("llm_mlp.infer")

# Between tokens of JSON: nothing, a space, or a new line with its indent. The library's default allows any amount, in
# which a small model can stay for good.
JSON_STYLE = {"whitespace_pattern": r" ?|\n {0,32}"}

_PLACE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")


class ConstraintError(ValueError):
    """A schema or an expression that cannot be compiled, or that became too complex while it was followed."""


class Constraint(Protocol):
    """What tokens may follow in one text; called from the engine's thread."""

    @property
    def finished(self) -> bool:
        """Nothing may follow any more."""

    def allowed(self) -> tuple[Tensor, bool]:
        """Bool ``[at most vocabulary]`` on the CPU, True for ids that may follow, and whether the text may end here."""

    def take(self, token: int) -> None:
        """``token`` was chosen."""


def allowed(constraint: Constraint, size: int, vocabulary: int, stop: Collection[int]) -> Tensor | None:
    """Ids that may follow, bool ``[size]`` on the CPU; None where the text is complete.

    Raises:
        ConstraintError: nothing may follow, and the text may not end.
    """
    if constraint.finished:
        return None
    found, end = constraint.allowed()
    mask = torch.zeros(size, dtype=torch.bool)
    mask[: len(found)] = found
    mask[vocabulary:] = False
    # Also a stop id that is an ordinary token may not end a text too early.
    mask[list(stop)] = end
    if not mask.any():
        if end:
            return None
        raise ConstraintError("no token of the vocabulary may follow")
    return mask


class Matcher:
    """A `Constraint` by llguidance."""

    def __init__(self, inner: LLMatcher, eos: int) -> None:
        self._inner, self._eos = inner, eos
        self.error = ""  # why it gave up

    @property
    def finished(self) -> bool:
        return not self.error and self._inner.is_stopped()

    @property
    def satisfied(self) -> bool:
        """The text so far is a whole one."""
        return not self.error and self._inner.is_accepting()

    def allowed(self) -> tuple[Tensor, bool]:
        mask = torch.frombuffer(bytearray(self._inner.compute_logit_bias()), dtype=torch.uint8) != 0
        self._check()
        end = bool(mask[self._eos])
        mask[self._eos] = False
        return mask, end

    def take(self, token: int) -> None:
        self._inner.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._inner.is_error():
            self.error = f"too complex: {_first_line(self._inner.get_error())}"
            raise ConstraintError(self.error)


class Grammar:
    """A compiled schema or expression; `matcher` for each text."""

    def __init__(self, inner: LLMatcher, eos: int) -> None:
        self._inner, self._eos, self._lock = inner, eos, threading.Lock()

    def matcher(self) -> Matcher:
        with self._lock:
            return Matcher(self._inner.deep_copy(), self._eos)


class Grammars:
    """Compiles, and keeps the last ones. From any thread but the engine's: it takes up to ``seconds``.

    Args:
        max_bytes: of a schema as JSON, or of an expression. seconds: to compile one. keep: compiled ones.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_bytes: int = 1 << 16, seconds: float = 5.0, keep: int = 64) -> None:
        self._tokenizer, self.max_bytes, self.seconds, self.keep = tokenizer, max_bytes, seconds, keep
        self._table: LLTokenizer | None = None
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def schema(self, schema: Mapping[str, Any]) -> Grammar:
        """Of JSON texts that satisfy a schema; objects have their properties in the schema's order.

        Raises:
            ConstraintError: it is too large, takes too long, is none, or has keywords that are not supported.
        """
        try:
            if not isinstance(schema, Mapping):
                raise TypeError("it is no object")
            options = schema.get("x-guidance", {})
            text = json.dumps({**schema, "x-guidance": {**JSON_STYLE, **options}}, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConstraintError(f"not a JSON schema: {error}") from None
        return self._compiled(f"%json {text}", text)

    def regex(self, pattern: str) -> Grammar:
        """Of texts that match an expression (Rust's syntax: no look-around, no back references) from begin to end.

        Raises:
            ConstraintError: as `schema`.
        """
        _needed()
        from llguidance import regex_to_lark

        if not pattern:
            raise ConstraintError("the expression is empty")
        if (len(pattern) - len(pattern.rstrip("\\"))) % 2:  # the library would drop it without a word
            raise ConstraintError("the expression ends with a backslash that escapes nothing")
        return self._compiled(f"/{regex_to_lark(pattern)}/", pattern)

    def _compiled(self, body: str, text: str) -> Grammar:
        _needed()
        try:
            size = len(text.encode())
        except UnicodeError:
            raise ConstraintError("not Unicode text (half a surrogate pair)") from None
        if size > self.max_bytes:
            raise ConstraintError(f"{size:,} bytes; at most {self.max_bytes:,} are compiled")
        # Where decoding drops the space ahead of a text, the tokens have it all the same.
        ahead = '" " ' if self._tokenizer.drops_first_space else ""
        grammar = f"start: {ahead}body\nbody: {body}\n"
        with self._lock:
            if grammar in self._kept:
                self._kept.move_to_end(grammar)
                return self._kept[grammar]
        self._try(grammar)
        try:
            found = Grammar(grammar_file.compiled(self._vocabulary(), grammar), self._tokenizer.eos)
        except ValueError as error:
            raise ConstraintError(_first_line(str(error))) from None
        with self._lock:
            self._kept[grammar] = found
            while len(self._kept) > self.keep:
                self._kept.popitem(last=False)
        return found

    def _try(self, grammar: str) -> None:
        """In a process of its own, which the time limit can end and whose end harms nobody."""
        # -P: nothing is imported from the file's own folder.
        command = [sys.executable, "-P", grammar_file.__file__]
        try:
            done = subprocess.run(command, input=grammar.encode(), capture_output=True, timeout=self.seconds)
        except subprocess.TimeoutExpired:
            raise ConstraintError(f"not compiled within {self.seconds:g} s: it is too complex") from None
        try:
            said = json.loads(done.stdout)
        except ValueError:
            why = done.stderr[-500:].decode("utf8", "replace")
            log.warning("a grammar's trial ended with %d: %s", done.returncode, why)
            raise ConstraintError("too deep or too large to be compiled") from None
        if said:
            raise ConstraintError(_first_line(said))

    def _vocabulary(self) -> LLTokenizer:
        with self._lock:
            if self._table is None:
                own = self._tokenizer
                tokens = [own.spelling(i) for i in range(own.vocab_size)]
                special = sorted(own.special_tokens.values())
                self._table = grammar_file.table(tokens, special, own.eos, _encoder(own, tokens))
            return self._table


def _encoder(tokenizer: Tokenizer, spelling: Sequence[bytes]) -> Callable[[str], list[int]]:
    """Ids of a text within another, whose bytes are the text's; the library asks it for text that has to come."""
    mark = "\x02"  # takes the space that SentencePiece puts ahead
    special = set(tokenizer.special_tokens.values())
    known = {text: i for i, text in enumerate(spelling) if text and i not in special}
    longest = max(map(len, known))

    def encode(text: str) -> list[int]:
        ids, raw, ahead, n = tokenizer.encode(mark + text), text.encode(), b"", 0
        while n < len(ids) and not ahead.endswith(mark.encode()):
            ahead, n = ahead + spelling[ids[n]], n + 1
        if b"".join(spelling[i] for i in ids[n:]) == raw:
            return ids[n:]
        found, at = list[int](), 0  # a normaliser has changed it, or the mark is no token: the longest tokens that fit
        while at < len(raw):
            part = next((raw[at : at + k] for k in range(longest, 0, -1) if raw[at : at + k] in known), None)
            if part is None:  # nothing spells it, so the model cannot write it either
                break
            found.append(known[part])
            at += len(part)
        return found

    return encode


def _needed() -> None:
    if importlib.util.find_spec("llguidance") is None:
        raise ConstraintError("constrained output needs llguidance: pip install 'llm-mlp[serve]'")


def _first_line(text: str) -> str:
    """Of a library's message, which may go on for pages; of those about expressions also the last, the reason."""
    text = _PLACE.sub("", text)  # in the library's own form of the grammar, which nobody has seen
    lines = [line for line in text.splitlines() if line.strip()]
    reason = next((line for line in lines[1:] if line.startswith("error: ")), "")
    return f"{lines[0][:200]}{' ' + reason[:200] if reason else ''}" if lines else "refused"
