"""Answers in OpenAI's two forms, whole and as streams."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from llm_mlp.serve.http import both, error_detail, event
from llm_mlp.serve.protocol import Generation
from llm_mlp.serve.service import UNSERVED, Piece, Prompt, Refused, Service

log = logging.getLogger("llm_mlp.serve")


class Kind:
    """What differs between the two ways of writing."""

    prefix: str
    objects: tuple[str, str]  # of a whole answer and of a piece

    def __init__(self, service: Service, alternatives: int | None, stops: list[str]) -> None:
        self.service, self.alternatives, self.stops = service, alternatives, stops
        self.stop_ids = frozenset([service.tokenizer.eos])
        self.closing: list[int] = []  # what a stored answer ends with, so that the next turn can stand behind it

    def spelled(self, token: int) -> tuple[str, list[int]]:
        spelling = self.service.tokenizer.spelling(token)
        return spelling.decode("utf8", "replace"), list(spelling)

    def piece(self, index: int, text: str, first: bool, finish: str | None, logprobs: Any) -> dict[str, Any]:
        raise NotImplementedError("Kind.piece")  # an abstract method

    def whole(self, index: int, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
        raise NotImplementedError("Kind.whole")  # an abstract method

    def logprobs(self, tokens: list[tuple[int, float, tuple[tuple[int, float], ...]]], offset: int) -> Any:
        raise NotImplementedError("Kind.logprobs")  # an abstract method


class Chat(Kind):
    prefix, objects = "chatcmpl-", ("chat.completion", "chat.completion.chunk")

    def __init__(self, service: Service, alternatives: int | None, stops: list[str]) -> None:
        super().__init__(service, alternatives, stops)
        self.stop_ids, self.closing = service.template.stop_ids, service.template.closing

    def piece(self, index: int, text: str, first: bool, finish: str | None, logprobs: Any) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if text or first:
            delta["content"] = text
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def whole(self, index: int, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def logprobs(self, tokens: list[tuple[int, float, tuple[tuple[int, float], ...]]], offset: int) -> Any:
        if self.alternatives is None:
            return None

        def row(token: int, value: float) -> dict[str, Any]:
            text, raw = self.spelled(token)
            return {"token": text, "logprob": value, "bytes": raw}

        rows = [row(t, p) | {"top_logprobs": [row(*pair) for pair in top]} for t, p, top in tokens]
        return {"content": rows, "refusal": None}


class Completion(Kind):
    prefix, objects = "cmpl-", ("text_completion", "text_completion")

    def piece(self, index: int, text: str, first: bool, finish: str | None, logprobs: Any) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def whole(self, index: int, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
        return self.piece(index, text, False, finish, logprobs)

    def logprobs(self, tokens: list[tuple[int, float, tuple[tuple[int, float], ...]]], offset: int) -> Any:
        if self.alternatives is None:
            return None
        texts = [self.spelled(t)[0] for t, _, _ in tokens]
        offsets = [offset + sum(map(len, texts[:i])) for i in range(len(texts))]
        tops = [{self.spelled(t)[0]: p for t, p in top} for _, _, top in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [p for _, p, _ in tokens],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


class Writer:
    """Pieces to a client's form, and what was used."""

    def __init__(
        self, service: Service, kind: Kind, prompt: Prompt, body: Generation, user: str, deadline: float
    ) -> None:
        self.service, self.kind, self.prompt, self.body, self.user = service, kind, prompt, body, user
        self.deadline = deadline
        self.head: dict[str, Any] = {
            "id": kind.prefix + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": service.settings.name,
        }
        self.texts = [""] * (body.n or 1)
        self.tokens, self.joules = 0, 0.0
        self.facts = {"id": self.head["id"], "prompt_tokens": prompt.tokens, "cached_tokens": prompt.cached}
        self.facts |= {"user": user, "cache": prompt.reason.partition(":")[0], "energy_joules": None}

    def count(self, piece: Piece) -> None:
        """What a piece adds to what was written and used."""
        self.texts[piece.index] += piece.text
        self.tokens += len(piece.tokens)
        self.joules += piece.joules or 0.0
        # Nothing runs without energy: where none was told, nobody knows.
        self.facts |= {"completion_tokens": self.tokens, "energy_joules": round(self.joules, 6) or None}

    @property
    def usage(self) -> dict[str, Any]:
        read = self.prompt.tokens
        return {
            "prompt_tokens": read,
            "completion_tokens": self.tokens,
            "total_tokens": read + self.tokens,
            "prompt_tokens_details": {"cached_tokens": self.prompt.cached, "cache": self.prompt.reason},
            "energy_joules": self.facts["energy_joules"],
        }

    async def _saved(self, piece: Piece) -> dict[str, Any]:
        """Where an answer that is to be saved ends: what it was saved as, or why it was not. The answer itself is
        whole by then, and whatever goes wrong is told beside it."""
        name = self.body.save_context
        if name is None or piece.finish is None:
            return {}
        stored, why = None, None
        try:
            stored = await self._save(name, piece)
        except UNSERVED as error:
            why = error_detail(self.service.refusal(error)) | {"param": "save_context"}
        except Exception:
            log.exception("%s: the state after the answer was not saved", self.head["id"])
            why = error_detail(Refused(500, "an error of the server; its log has it", "save_context"))
        self.facts["saved"] = why is None
        return {"context": stored, "context_error": why}

    async def _save(self, name: str, piece: Piece) -> dict[str, Any]:
        if piece.lost is not None:
            raise piece.lost
        if piece.final is None:  # a stop text has ended it
            piece = await self.service.state_after(self.prompt, self.texts[0], self.deadline)
            self.count(piece)
        assert piece.final is not None
        base = self.prompt.base if self.body.context is not None else None
        return await self.service.save(self.user, name, piece.final, base, self.kind.closing)

    async def stream(self, first: Piece, pieces: AsyncIterator[Piece]) -> AsyncIterator[str]:
        """The events of an answer whose first piece was waited for."""
        begun: set[int] = set()
        head = {**self.head, "object": self.kind.objects[1]}

        try:
            async for piece in both(first, pieces):
                offset = len(self.texts[piece.index])
                self.count(piece)
                saved = await self._saved(piece)
                if not piece.text and piece.finish is None and (self.kind.alternatives is None or not piece.tokens):
                    continue
                logprobs = self.kind.logprobs(piece.tokens, offset)
                new = piece.index not in begun
                begun.add(piece.index)
                row = {**head, "choices": [self.kind.piece(piece.index, piece.text, new, piece.finish, logprobs)]}
                yield event(row | saved)
            if self.body.usage_in_stream:
                yield event({**head, "choices": [], "usage": self.usage})
            yield "data: [DONE]\n\n"
        except UNSERVED as error:  # the status has been sent
            yield event({"error": error_detail(self.service.refusal(error))})
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]

    async def whole(self, pieces: AsyncIterator[Piece]) -> dict[str, Any]:
        """The answer in one."""
        finish = [""] * len(self.texts)
        tokens: list[list] = [[] for _ in finish]
        saved: dict[str, Any] = {"context": None, "context_error": None}
        try:
            async for piece in pieces:
                self.count(piece)
                tokens[piece.index] += piece.tokens
                if piece.finish is not None:
                    finish[piece.index] = piece.finish
                saved |= await self._saved(piece)
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]
        rows = zip(self.texts, finish, tokens, strict=True)
        choices = [self.kind.whole(i, text, end, self.kind.logprobs(own, 0)) for i, (text, end, own) in enumerate(rows)]
        return {**self.head, "object": self.kind.objects[0], "choices": choices, "usage": self.usage, **saved}
