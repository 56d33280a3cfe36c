"""A conversation in one process: every exchange goes on from the state after the one before."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from llm_mlp.context import Context, Reader
from llm_mlp.data.chat import ChatTemplate
from llm_mlp.infer import Engine, Event, Request, Sampling, Start, state_bytes
from llm_mlp.serve.service import Text


class TalkError(RuntimeError):
    """The engine could not go on, out of memory say; the conversation is as it was before."""


@dataclass(frozen=True)
class Facts:
    """What an answer took.

    Args:
        written: tokens of the answer. rate: of them a second, from the first to the last; None where there is no second
            one. held: tokens that the context holds behind it. state: its bytes, whatever it holds. cached: tokens that
            were not read again. cache: what they were of, and why no more, as a server tells it.
    """

    written: int
    rate: float | None
    held: int
    state: int
    cached: int
    cache: str

    @property
    def line(self) -> str:
        """All of it."""
        rate = "" if self.rate is None else f", {self.rate:.1f} tokens/s"
        held = f"{self.held:,} tokens held in {self.state / 1e6:.2f} MB"
        return f"{self.written:,} tokens{rate} | {held} | cached {self.cached:,} ({self.cache})"


@dataclass
class _Mark:
    """After an exchange: how many messages there are, the state, and the contexts that it was stored as."""

    messages: int
    start: Start | None
    kept: list[Context] = field(default_factory=list)


class Talk:
    """Args: base: a context that it goes on from. system: what it begins with."""

    def __init__(self, reader: Reader, template: ChatTemplate, base: Context | None = None, system: str = "") -> None:
        self._reader, self._template = reader, template
        assert reader.tokenizer is not None
        self._tokenizer = reader.tokenizer
        self._engine = Engine(reader.model, slots=1, vocabulary=self._tokenizer.vocab_size)
        self._messages = [{"role": "system", "content": system}] if system else []
        self._marks = [_Mark(len(self._messages), base.start if base else None, [base] if base else [])]
        self.facts: Facts | None = None  # of the last answer

    def say(self, text: str, max_tokens: int, sampling: Sampling, seed: int | None) -> Iterator[str]:
        """The answer's text as it comes, then `facts`. Left early, the exchange did not happen.

        Raises:
            TalkError: the engine failed; the exchange did not happen either.
        """
        count, start = self._marks[-1].messages, self._marks[-1].start
        messages = [*self._messages[:count], {"role": "user", "content": text}]
        # What the state has read is not read again.
        first = len(self._marks) == 1
        turn = self._template.encode(messages, generate=True).ids if first else self._template.next_turn(messages)
        ids = [*([self._tokenizer.eos] if start is None else []), *turn]
        cached, cache = self._cached(len(ids))
        times: list[float] = []  # of the answer's tokens
        written: list[int] = []
        final: Start | None = None
        out = Text(self._tokenizer, self._template.stop)
        events: list[Event] = []
        answer = ""
        stop = self._template.stop_ids
        ticket = self._engine.submit(Request(ids, max_tokens, sampling, seed, stop, start, keep=True), events.append)
        try:
            while self._engine.busy:
                self._engine.step()
                for event in events:
                    if event.token is not None and not out.stopped:
                        times.append(time.perf_counter())
                        written.append(event.token)
                        piece = out.feed(event.token)
                        answer += piece
                        yield piece
                        if out.stopped:
                            ticket.cancel()
                    if event.finish == "error":
                        raise TalkError(event.error)
                final = events[-1].final if events else None
                events.clear()
        finally:
            ticket.cancel()
            while self._engine.busy:
                self._engine.step()
        if out.stopped:  # the state has read into the next turn: read the answer alone instead
            start = self._read([*ids, *self._tokenizer.encode(answer)], start)
        else:
            piece = out.finish()
            answer += piece
            yield piece
            # Without a state the last step failed, which only completes it.
            start = final if final is not None else self._read([*ids, *written], start)
        start = self._read(self._template.closing, start)
        self._messages = [*messages, {"role": "assistant", "content": answer}]
        self._marks.append(_Mark(len(self._messages), start))
        rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
        held = 0 if start is None else len(start.tokens)
        self.facts = Facts(len(times), rate, held, state_bytes(self._reader.model), cached, cache)

    def _cached(self, new: int) -> tuple[int, str]:
        """How much of a prompt that ends with ``new`` ids is not read again, and why no more."""
        mark = self._marks[-1]
        if mark.start is None:
            return 0, "miss: nothing was said yet"
        n = len(mark.start.tokens)
        source = mark.kept[0].id if len(self._marks) == 1 else "the conversation"
        return n, f"hit: {n} of {n + new} tokens from {source}"

    def _read(self, ids: list[int], start: Start | None) -> Start | None:
        """The state after ``ids`` behind ``start``."""
        if not ids:
            return start
        events: list[Event] = []
        self._engine.submit(Request(ids, 0, start=start, keep=True), events.append)
        while self._engine.busy:
            self._engine.step()
        if events[-1].final is None:
            raise TalkError(events[-1].error)
        return events[-1].final

    def undo(self) -> bool:
        """Take the last exchange back; False if there is none."""
        if len(self._marks) == 1:
            return False
        self._marks.pop()
        self._messages = self._messages[: self._marks[-1].messages]
        return True

    def context(self, after: str | None = None) -> Context | None:
        """The conversation so far; None if nothing was read yet.

        It continues what it was stored as last (`keep`), or the context of id ``after`` if it has come through that
        one: a name that means that one can then mean this one. The end of each exchange is a mark.
        """
        mark = self._marks[-1]
        if mark.start is None:
            return None
        kept = {context.id: context for each in self._marks for context in each.kept}
        parent = kept.get(after or "") or next(reversed(kept.values()), None)
        if parent is not None and any(parent is context for context in mark.kept):
            return parent  # nothing was said since
        ends = [len(each.start.tokens) for each in self._marks if each.start is not None]
        return self._reader.wrap(mark.start, parent, marks=ends)

    def keep(self, context: Context) -> None:
        """The conversation so far was stored as this context."""
        self._marks[-1].kept.append(context)
