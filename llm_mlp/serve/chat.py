"""Chat messages to one text: the tokenizer folder's Jinja template, in a sandbox in which nothing can be changed."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

log = logging.getLogger("llm_mlp.serve")

DEFAULT = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class ChatError(ValueError):
    """Messages that the template refuses."""


class ChatTemplate:
    """A template, and the special tokens that it may name.

    Args:
        source: Jinja; None: ``role: content`` lines, for models that have no template of their own.
    """

    def __init__(self, source: str | None, tokens: dict[str, str] | None = None) -> None:
        self.own = source is not None
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
        self._tokens = tokens or {}
        try:
            self._template = environment.from_string(source if source is not None else DEFAULT)
        except TemplateError as error:
            raise ChatError(f"the chat template cannot be read: {error}") from None

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate:
        """Of a tokenizer folder: ``chat_template.jinja``, else ``chat_template`` in ``tokenizer_config.json``.

        Raises:
            ChatError: it is there and damaged.
        """
        file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        settings: dict[str, Any] = {}
        try:
            if config.is_file():
                settings = json.loads(config.read_text(encoding="utf8"))
            source = file.read_text(encoding="utf8") if file.is_file() else settings.get("chat_template")
        except (OSError, ValueError) as error:
            raise ChatError(f"{folder}: the chat template cannot be read ({error})") from None
        if isinstance(source, list):  # several, by name
            source = next((row["template"] for row in source if row.get("name") == "default"), None)
        tokens = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = settings.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                tokens[name] = value
        if source is None:
            log.info("%s has no chat template: messages are lines 'role: content'", folder)
        return cls(source, tokens)

    @property
    def stop(self) -> list[str]:
        """Texts that end a turn; those of the default template, which has no token for it."""
        return [] if self.own else ["\nuser:", "\nsystem:"]

    def render(self, messages: Sequence[dict[str, Any]], tools: Any = None, **more: Any) -> str:
        """The text of a conversation, up to where the assistant's answer begins.

        Raises:
            ChatError: the template refuses it.
        """
        try:
            return self._template.render(
                messages=messages, tools=tools, add_generation_prompt=True, **self._tokens, **more
            )
        except (TemplateError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ChatError(f"the chat template refuses these messages: {error}") from None


def _refuse(message: str) -> None:
    raise TemplateError(message)
