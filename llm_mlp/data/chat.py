"""Conversations to ids: the tokenizer folder's Jinja template, in a sandbox in which nothing can be changed.

Training and serving both come here, so that a model is asked by exactly the ids it was trained on. The rendered text
is cut before it is encoded: at special tokens, which become their ids, and at both ends of every assistant's answer.
The text in front of an answer therefore has the same ids whether the answer is still to be written, is being trained
on, or stands earlier in the conversation.

Special tokens are those that the *template* writes. The same characters in a message stay text: nobody can end a turn
by spelling the token that ends turns.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llm_mlp.data.tokenizer import Tokenizer

log = logging.getLogger("llm_mlp.data")

# Of models that were not trained on chats: nothing tells where an answer ends but the next line's role. Tools are a
# line before all others, and a call is one behind the message that makes it.
PLAIN = (
    "{% if tools %}{{ 'tools: ' + tools | tojson + '\n' }}{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n"
    "{% for call in message.tool_calls or [] %}{{ call.function | tojson + '\n' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# What training uses where nothing else is named. Roles are text, which any tokenizer knows. An answer ends with the
# separator, behind which every text starts: the next question looks as the first one does. Contents stand on lines of
# their own because byte-level vocabularies know words behind a line end, but few without a space behind a space.
TRAINED = (
    "{% for message in messages %}{{ message.role + ':\\n' + message.content }}"
    "{{ eos_token if message.role == 'assistant' else '\\n' }}{% endfor %}"
    "{{ 'assistant:\\n' if add_generation_prompt else '' }}"
)


class ChatError(ValueError):
    """Messages that the template refuses, or a template that cannot be used. ``number``: which of several."""

    number = 0


@dataclass(frozen=True)
class Encoded:
    """Ids of a conversation, without the separator that starts a text.

    Args:
        counted: of each id, whether the assistant writes it: its answers, and the special token that ends each.
        answered: how many ids there are up to the end of the last answer; 0 where there is none, or where the
            template does not put answers in as they are.
    """

    ids: list[int]
    counted: list[bool]
    answered: int


class _Part(NamedTuple):
    """A text that is encoded on its own, or a special token; ``closes``: the last part of an answer."""

    what: str | int
    counted: bool = False
    closes: bool = False


class ChatTemplate:
    """The chat template of a tokenizer; ``role: content`` lines where it has none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises `ChatError`: the template is not Jinja."""
        self.tokenizer, source = tokenizer, tokenizer.chat_template
        self.own = source is not None
        if source is None:
            log.info("the tokenizer has no chat template: messages are lines 'role: content'")
        self._source = PLAIN if source is None else source
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
        try:
            self._template = environment.from_string(self._source)
            self.shows_tools = "tools" in find_undeclared_variables(environment.parse(self._source))
        except TemplateError as error:
            raise ChatError(f"the chat template cannot be read: {error}") from None
        self._names = {"eos_token": tokenizer.spelling(tokenizer.eos).decode(), **tokenizer.token_names}
        # A token of one character has no spelling that a guard could break: in a template it is text, as everywhere.
        specials = sorted((token for token in tokenizer.special_tokens if len(token) > 1), key=len, reverse=True)
        self._ids = {token: tokenizer.special_tokens[token] for token in specials}
        self._special = "|".join(map(re.escape, specials))
        # A message may end within the spelling of a special token that what follows would complete, or start within.
        self._heads = {token[:n] for token in specials for n in range(1, len(token))}
        self._tails = {token[n:] for token in specials for n in range(1, len(token))}
        self._longest = len(specials[0])

    @cached_property
    def _ending(self) -> tuple[int | None, list[int]]:
        """The special token that ends an answer, if there is one, and the ids between it and the next turn."""
        try:
            found = self.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        except ChatError:
            return None, []
        last = found.ids[found.answered - 1] if found.answered else -1
        return last if last in self._ids.values() else None, found.ids[found.answered :] if found.answered else []

    @property
    def end(self) -> int | None:
        """The special token that ends an answer; None where the template writes none."""
        return self._ending[0]

    @property
    def closing(self) -> list[int]:
        """What stands between an answer and the next turn, so that a turn can be read behind it."""
        end, more = self._ending
        return [*([] if end is None else [end]), *more]

    def next_turn(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of what is behind the last answer's `closing`, up to where the next answer begins.

        Raises:
            ChatError: the template refuses the messages.
        """
        whole, (_, more) = self.encode(messages, generate=True), self._ending
        rest = whole.ids[whole.answered :]
        if whole.answered and rest[: len(more)] == more:
            return rest[len(more) :]
        # The template rewrites earlier turns, which were read as they were: it is asked for this turn alone.
        return self.encode(messages[-1:], generate=True).ids

    @property
    def shows_calls(self) -> bool:
        """Whether the model sees the calls of tools that an assistant's message makes."""
        return "tool_calls" in self._source

    @property
    def stop(self) -> list[str]:
        """Texts that end a turn; those of the template of models without one, which has no token for it."""
        return [] if self.own else ["\nuser:", "\nsystem:", "\ntool:"]

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a turn."""
        return frozenset({self.tokenizer.eos} | ({self.end} if self.end is not None else set()))

    def check(self) -> None:
        """Raises `ChatError` unless a model can be trained on this template and then be asked by it."""
        messages = [{"role": role, "content": f"{role} {n}"} for n in (1, 2) for role in ("user", "assistant")]
        whole = self.encode(messages)
        if not whole.answered:
            raise ChatError("the chat template changes an assistant's content, so that it cannot be told from the rest")
        if self.end is None:
            raise ChatError(
                "the chat template does not end an answer with a special token, so the model would never learn to "
                "stop; write {{ eos_token }} behind an assistant's content"
            )
        for n in (1, 3):
            asked = self.encode(messages[:n], generate=True).ids
            if whole.ids[: len(asked)] != asked or not whole.counted[len(asked)] or whole.counted[len(asked) - 1]:
                raise ChatError(
                    "the chat template writes something else in front of an answer than with add_generation_prompt, "
                    "so the model would be asked by a text it never saw"
                )

    # -- text ------------------------------------------------------------------------------------------------------

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, *, generate: bool = True, **more: Any
    ) -> str:
        """The text of a conversation; ``generate``: up to where the assistant's answer begins.

        Raises:
            ChatError: the template refuses it.
        """
        try:
            return self._template.render(
                messages=messages, tools=tools, add_generation_prompt=generate, **self._names, **more
            )
        except (TemplateError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ChatError(f"the chat template refuses these messages: {error}") from None

    # -- ids -------------------------------------------------------------------------------------------------------

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Any = None, *, generate: bool = False) -> Encoded:
        """Ids of a conversation; ``generate``: up to where the assistant's answer begins.

        Raises:
            ChatError: the template refuses it.
        """
        return self._encoded([self._parts(messages, tools, generate)])[0]

    def encode_batch(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[Encoded]:
        """Ids of every conversation, as `encode`; runs on all cores.

        Raises:
            ChatError: the template refuses one, the error's ``number``.
        """
        rows = []
        for number, messages in enumerate(conversations):
            try:
                rows.append(self._parts(messages, None, False))
            except ChatError as error:
                error.number = number
                raise
        return self._encoded(rows)

    def _encoded(self, rows: list[list[_Part]]) -> list[Encoded]:
        texts = iter(self.tokenizer.encode_batch([p.what for row in rows for p in row if isinstance(p.what, str)]))
        out = []
        for row in rows:
            ids: list[int] = []
            counted: list[bool] = []
            answered = 0
            for part in row:
                own = next(texts) if isinstance(part.what, str) else [part.what]
                ids += own
                counted += [part.counted] * len(own)
                answered = len(ids) if part.closes else answered
            out.append(Encoded(ids, counted, answered))
        return out

    def _parts(self, messages: Sequence[Mapping[str, Any]], tools: Any, generate: bool) -> list[_Part]:
        """The rendered conversation, cut where it is encoded.

        Characters that occur nowhere else mark what has to be found again in the rendered text: ``guard`` breaks the
        spelling of special tokens in what the template is given, ``begin`` and ``end`` enclose answers.
        """
        used = set(self._source).union(*_texts(messages), *_texts(tools))
        free = (chr(c) for c in chain(range(0xFDD0, 0xFDF0), range(0x100000, 0x10FFFE)))
        unused = (c for c in free if c not in used)
        guard, begin, end = (next(unused, None) for _ in range(3))
        if guard is None or begin is None or end is None:
            raise ChatError("these messages use every private character of Unicode")
        messages = self._guarded(list(messages), guard)
        tools = self._guarded(tools, guard)
        plain = self.render(messages, tools, generate=generate)
        # Many templates trim answers, which marks at their ends would prevent: then trimmed ones are marked. Templates
        # that do more to them (leave out what was thought in earlier turns) are followed, without marks.
        for strip in (False, True):
            marked, answers = _marked(messages, begin, end, strip)
            text = self.render(marked, tools, generate=generate)
            whole = re.findall(f"{begin}(.*?){end}", text, re.DOTALL) == answers
            if whole and text.replace(begin, "").replace(end, "") == plain:
                return self._cut(text, guard, begin, end)
        return self._cut(plain, guard, begin, end)

    def _guarded(self, value: Any, guard: str) -> Any:
        """``value`` with the spelling of special tokens broken in all of its texts, also where it only starts or ends
        in one."""
        if isinstance(value, str):
            value = re.sub(self._special, lambda found: found[0][0] + guard + found[0][1:], value)
            core = value.strip()
            sizes = range(1, min(self._longest, len(core) + 1))
            if any(core[-n:] in self._heads for n in sizes):
                at = len(value.rstrip())
                value = value[:at] + guard + value[at:]
            if any(core[:n] in self._tails for n in sizes):
                at = len(value) - len(value.lstrip())
                value = value[:at] + guard + value[at:]
            return value
        if isinstance(value, Mapping):
            return {self._guarded(key, guard): self._guarded(item, guard) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._guarded(item, guard) for item in value]
        return value

    def _cut(self, text: str, guard: str, begin: str, end: str) -> list[_Part]:
        parts: list[_Part] = []
        inside = False  # an answer
        behind: int | None = None  # where an answer ended whose special token may still come, behind white space
        for piece in re.split(f"({begin}|{end}|{self._special})", text):
            if piece == begin:
                inside, behind = True, None
            elif piece == end:
                parts.append(_Part("", closes=True))
                inside, behind = False, len(parts)
            elif piece in self._ids:
                closes = behind is not None
                if behind is not None:
                    parts[behind:] = [part._replace(counted=True) for part in parts[behind:]]
                parts.append(_Part(self._ids[piece], inside or closes, closes))
                behind = None
            elif piece:
                behind = None if piece.strip() else behind
                parts.append(_Part(piece.replace(guard, ""), inside))
        return parts


def _marked(
    messages: Sequence[Mapping[str, Any]], begin: str, end: str, strip: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages with the answers between marks; the answers."""
    out, answers = [], []
    for message in messages:
        row, content = dict(message), message.get("content")
        if message.get("role") == "assistant" and isinstance(content, str):
            answers.append(content.strip() if strip else content)
            row["content"] = begin + answers[-1] + end
        out.append(row)
    return out, answers


def _texts(value: Any) -> Iterator[str]:
    """All texts in plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _refuse(message: str) -> None:
    raise TemplateError(message)
