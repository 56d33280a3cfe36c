"""Texts that are read into contexts, and what contexts are asked: beside the engine's other requests, or between its
steps."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from llm_mlp.context import (
    Context,
    ContextError,
    Recall,
    SourceRecall,
    Surprise,
    ask,
    composing,
    measuring,
    plant,
    plant_each,
)
from llm_mlp.infer import Request, Start, read_tokens
from llm_mlp.models.mixer import State
from llm_mlp.serve.service import Piece, Prompt, Refused, Service, last_piece

log = logging.getLogger("llm_mlp.serve")

# Tokens after which a long reading is stored, so that who asks again for what was cut off does not begin anew, and how
# long that is kept.
STRIDE, KEPT = 65_536, timedelta(days=1)


@dataclass(frozen=True)
class Reading:
    """A text on its way into a context.

    Args:
        prompt: what is still to be read, and what that stands behind. parent: the context that it continues; None for a
            new one, also where some of its text was found. composable: the map that the text is is kept.
    """

    user: str
    name: str
    prompt: Prompt
    parent: Context | None = None
    composable: bool = False


class Readings:
    """What a service reads for contexts."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._observing = asyncio.Lock()

    # -- into contexts ---------------------------------------------------------------------------------------------

    def create(self, user: str, name: str, text: str, *, composable: bool) -> Reading:
        """Of a text into a new context, behind whatever of it is stored.

        Raises:
            Refused: as `Service.prompt`.
        """
        if not composable:  # an interrupted reading of it is found as any beginning is
            return Reading(user, name, self.service.prompt(text, user, None))
        prompt = Prompt(self.service.prompt_ids(text), reason="miss: of a composable text all is read")
        return self._resumed(Reading(user, name, prompt, composable=True))

    def append(self, user: str, name: str, text: str) -> Reading:
        """Of a text behind context ``name``, which stays composable where it is.

        Raises:
            Refused: as `Service.prompt`.
        """
        prompt = self.service.prompt(text, user, name)
        composable = prompt.base is not None and prompt.base.transition is not None
        return self._resumed(Reading(user, name, prompt, prompt.base, composable))

    def _resumed(self, reading: Reading) -> Reading:
        """The same behind what an interrupted reading has left of it, if there is that."""
        reader, prompt = self.service.reader, reading.prompt
        before = [] if prompt.base is None else [prompt.base.tokens]
        tokens = torch.cat([*before, torch.tensor(prompt.ids, dtype=torch.int32)])
        try:
            begun = self.service.store(reading.user).begun(reading.name, reader)
            if begun is None:
                return reading
            reader.check_begun(begun, tokens, reading.parent, reading.composable)
        except ContextError as error:
            log.info("a reading that was cut off begins anew: %s", error)
            return reading
        n = len(begun.tokens)
        reason = f"hit: {n} of {len(tokens)} tokens from an interrupted reading"
        return replace(reading, prompt=Prompt(tokens[n:].tolist(), begun.start, begun, n, reason))

    async def pieces(self, reading: Reading) -> AsyncGenerator[Piece, None]:
        """Reads to the text's end, which may be a book's: every `STRIDE` tokens what is read is stored beside the name,
        where the same request finds it after whatever has ended this one.

        Raises:
            Refused: 504 over time; what was stored is not lost. `llm_mlp.infer.Full`: the queue is full.
            `llm_mlp.infer.Stopped`: the engine has failed, or is closing.
        """
        service, prompt, deadline = self.service, reading.prompt, self.service.deadline()
        stride = -(-STRIDE // service.settings.chunk) * service.settings.chunk
        last, versions = self._last_multiple(reading), tuple[str, ...]()
        if prompt.base is not None and prompt.cached == last and prompt.base is not reading.parent:
            versions = (prompt.base.id,)
        start, done, total = prompt.start, 0, len(prompt.ids)
        seen = prompt.base.transition if reading.composable and prompt.base is not None else None
        while True:
            end = min(total, done + stride - (prompt.cached + done) % stride)
            end = last - prompt.cached if done < last - prompt.cached < end else end
            ids = prompt.ids[done:end]
            if reading.composable:
                part = self._observed(ids, start, seen, deadline)
            else:
                part = service.run(Request(ids, 0, start=start, keep=True), [], deadline=deadline)
            try:
                async with contextlib.aclosing(part):
                    async for piece in part:
                        piece.read += done
                        if piece.final is not None and end < total:
                            if prompt.cached + end == last:
                                versions = await asyncio.to_thread(self._version, reading, piece)
                            else:
                                await asyncio.to_thread(self._keep, reading, piece)
                            start, seen = piece.final, piece.transition
                            piece.final, piece.finish = None, None
                        piece.versions = versions
                        yield piece
            except Refused as error:
                if error.status == 504 and done:
                    error.message += f"; {prompt.cached + done:,} tokens are kept: ask again to go on from there"
                raise
            done = end
            if done == total:
                return

    def _exact(self, reading: Reading) -> int | None:
        """`Manifest.pieces` of what the reading comes to."""
        base, pieces = reading.prompt.base, self.service.pieces
        if pieces is None or reading.composable:
            return None
        goes_on = base is None or (base.manifest.pieces == pieces and len(base.tokens) % pieces == 0)
        return pieces if goes_on else None

    def _last_multiple(self, reading: Reading) -> int:
        """Tokens up to the last place in its text from where a prompt that begins with it may go on to the bit, which
        has to be stored for that; 0: there is none, or it is the text's end."""
        pieces, total = self._exact(reading), reading.prompt.tokens
        return 0 if pieces is None or total % pieces == 0 else total // pieces * pieces

    def _context(self, reading: Reading, piece: Piece) -> Context:
        assert piece.final is not None
        pieces = self._exact(reading)
        return self.service.reader.wrap(piece.final, reading.parent, piece.transition, pieces=pieces)

    def _version(self, reading: Reading, piece: Piece) -> tuple[str, ...]:
        try:
            return (self.service.store(reading.user).commit(self._context(reading, piece)),)
        except ContextError as error:  # the reading itself goes on
            log.warning("prompts that begin with context %r will read it again: %s", reading.name, error)
            return ()

    def _keep(self, reading: Reading, piece: Piece) -> None:
        try:
            store = self.service.store(reading.user)
            store.keep_reading(self._context(reading, piece), reading.name, expires=KEPT)
        except ContextError as error:  # the reading itself goes on
            log.warning("a reading that is cut off will begin anew: %s", error)

    def commit(self, reading: Reading, piece: Piece, expires: timedelta | None) -> None:
        """Store what the last piece has come to.

        Raises:
            ContextError: the name is taken by now, or there is no room.
        """
        store = self.service.store(reading.user)
        store.commit(self._context(reading, piece), reading.name, expires=expires, versions=piece.versions)
        store.forget_reading(reading.name)

    async def _observed(
        self, ids: list[int], start: Start | None, seen: State | None, deadline: float
    ) -> AsyncGenerator[Piece, None]:
        """Reads ids behind a start, or from nothing, and keeps the map that the text is: what composing needs.
        ``seen``: that of the text before them.

        In pieces of a chunk between the engine's steps, one text at a time: the layers are watched meanwhile.

        Raises:
            Refused: 504 over time.
        """
        service = self.service
        chunk, done = service.settings.chunk, 0
        state, began = (None, torch.tensor([], dtype=torch.int32)) if start is None else (start.state, start.tokens)
        while done < len(ids):
            at = len(began) + done
            part = ids[done : done + chunk - at % chunk]

            def read(part: list[int] = part, at: int = at, before: Any = state, map_: State | None = seen) -> Any:
                with service.reader.observed(map_) as now:
                    return *read_tokens(service.model, part, before, position=at), now

            if asyncio.get_running_loop().time() > deadline:
                raise service.late()
            async with self._observing:
                state, logits, seen = await service.between_steps(read)
            done += len(part)
            piece = Piece(0, "", read=done)
            if done == len(ids):
                tokens = torch.cat([torch.as_tensor(began), torch.tensor(ids, dtype=torch.int32)])
                piece.final, piece.transition, piece.finish = Start(tokens, state, logits), seen, "length"
            yield piece

    # -- of contexts -----------------------------------------------------------------------------------------------

    async def recall(self, user: str, name: str, context: Context) -> Recall:
        """What the text of a context of that name still brings back, read once more with planted pairs as any prompt
        is; nothing of it stays.

        Raises:
            ContextError: a text too short. Refused: one too long, or over time.
        """
        planted = await asyncio.to_thread(plant, self.service.reader, context)
        self._readable(len(planted.tokens), "context", "with what is planted")
        end, _ = await self._aside(Reading(user, _beside(name, "recall"), Prompt(planted.tokens.tolist())))
        return await self.service.between_steps(partial(ask, self.service.reader, planted, end.state))

    async def _aside(self, reading: Reading) -> tuple[Start, State | None]:
        """The state and, of a composable text, the map after one that is read on the side. What is kept of it
        meanwhile, should it be cut off, is gone at its end.

        Raises:
            Refused: as `pieces`.
        """
        piece = await last_piece(self.pieces(await asyncio.to_thread(self._resumed, reading)))
        assert piece.final is not None
        await asyncio.to_thread(self.service.store(reading.user).forget_reading, reading.name)
        return piece.final, piece.transition

    async def surprise(self, context: Context) -> Surprise:
        """As `llm_mlp.context.measure_surprise`, in pieces of a chunk.

        Raises:
            ContextError: a composed context. Refused: a text too long, or over time.
        """
        self._readable(len(context.tokens), "context", "the text is")
        work = measuring(self.service.reader, context, piece=self.service.settings.chunk)
        return await self.service.in_pieces(work)

    def _readable(self, tokens: int, field: str, what: str) -> None:
        """Refuse to read more on the side than a prompt may have."""
        if tokens > (most := self.service.settings.max_prompt):
            raise Refused(400, f"{what} {tokens:,} tokens; {most:,} are read", field)

    async def compose(self, contexts: Sequence[Context]) -> Context:
        """As `llm_mlp.context.compose`, the separator last, in pieces between the engine's steps."""
        end = await self.service.in_pieces(composing(self.service.reader, contexts, [self.service.tokenizer.eos]))
        return await asyncio.to_thread(self.service.reader.composed, end)

    async def recall_composed(self, user: str, name: str, contexts: Sequence[Context]) -> list[SourceRecall]:
        """As `llm_mlp.context.measure_composed`, of what is composed into a name; the texts are read as prompts are,
        and refused as `recall` does."""
        separator = torch.tensor([self.service.tokenizer.eos])
        planted = await asyncio.to_thread(plant_each, self.service.reader, contexts, len(separator))
        text = torch.cat([*(one.tokens for one in planted), separator]).tolist()
        self._readable(len(text), "contexts", "with what is planted")
        whole, _ = await self._aside(Reading(user, _beside(name, "recall"), Prompt(text)))
        apart = []
        for n, one in enumerate(planted):
            own = Reading(user, _beside(name, f"recall.{n}"), Prompt(one.tokens.tolist()), composable=True)
            end, map_ = await self._aside(own)
            apart.append(await asyncio.to_thread(self.service.reader.wrap, end, None, map_))
        states = (await self.compose(apart)).state, whole.state
        between, reader = self.service.between_steps, self.service.reader
        return [SourceRecall(*[await between(partial(ask, reader, one, state)) for state in states]) for one in planted]

    async def undo(self, user: str, name: str, steps: int) -> None:
        """As `llm_mlp.context.Store.undo`; a text that has to be read again is read as any other is into a context.

        Raises:
            ContextError: no such mark. Refused: over time.
        """
        store, reader = self.service.store(user), self.service.reader
        plan = await asyncio.to_thread(store.plan_undo, name, reader, steps=steps)
        made, before = plan.exact, plan.nearest
        if made is None:
            start, done = (None, 0) if before is None else (before.start, len(before.tokens))
            prompt = Prompt(plan.now.tokens[done : plan.tokens].tolist(), start, before, done)
            end, map_ = await self._aside(Reading(user, _beside(name, "undo"), prompt, before, plan.composable))
            made = await asyncio.to_thread(reader.replayed, plan.now, end, before, map_)
        await asyncio.to_thread(store.go_back, plan, made)


def _beside(name: str, what: str) -> str:
    """Under which name a text is kept that is read on a context's behalf."""
    return f"{name[:100]}.{what}"
