"""A conversation in one process: every exchange goes on from the state after the one before."""

from __future__ import annotations

from collections.abc import Iterator

from llm_mlp.context import Context, Reader
from llm_mlp.data.chat import ChatTemplate
from llm_mlp.infer import Engine, Event, Request, Sampling, Start
from llm_mlp.serve.service import Text


class Talk:
    """Args: base: a context that it goes on from. system: what it begins with."""

    def __init__(self, reader: Reader, template: ChatTemplate, base: Context | None = None, system: str = "") -> None:
        self._reader, self._template, self._base = reader, template, base
        assert reader.tokenizer is not None
        self._tokenizer = reader.tokenizer
        self._engine = Engine(reader.model, slots=1, vocabulary=self._tokenizer.vocab_size)
        self._messages = [{"role": "system", "content": system}] if system else []
        # After each exchange: how many messages there are, and the state.
        self._marks: list[tuple[int, Start | None]] = [(len(self._messages), base.start if base else None)]

    def say(self, text: str, max_tokens: int, sampling: Sampling, seed: int | None) -> Iterator[str]:
        """The answer's text as it comes. Left early, the exchange did not happen."""
        count, start = self._marks[-1]
        messages = [*self._messages[:count], {"role": "user", "content": text}]
        # What the state has read is not read again.
        first = len(self._marks) == 1
        turn = self._template.encode(messages, generate=True).ids if first else self._template.next_turn(messages)
        ids = [*([self._tokenizer.eos] if start is None else []), *turn]
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
                        piece = out.feed(event.token)
                        answer += piece
                        yield piece
                        if out.stopped:
                            ticket.cancel()
                    if event.finish == "error":
                        raise RuntimeError(event.error)
                final = events[-1].final if events else None
                events.clear()
                if final is not None:
                    start = final
        finally:
            ticket.cancel()
            while self._engine.busy:
                self._engine.step()
        if out.stopped:  # the state has read into the next turn: read the answer alone instead
            start = self._read([*ids, *self._tokenizer.encode(answer)], self._marks[-1][1])
        else:
            piece = out.finish()
            answer += piece
            yield piece
        start = self._read(self._template.closing, start)
        self._messages = [*messages, {"role": "assistant", "content": answer}]
        self._marks.append((len(self._messages), start))

    def _read(self, ids: list[int], start: Start | None) -> Start | None:
        """The state after ``ids`` behind ``start``."""
        if not ids:
            return start
        events: list[Event] = []
        self._engine.submit(Request(ids, 0, start=start, keep=True), events.append)
        while self._engine.busy:
            self._engine.step()
        return events[-1].final

    def undo(self) -> bool:
        """Take the last exchange back; False if there is none."""
        if len(self._marks) == 1:
            return False
        self._marks.pop()
        self._messages = self._messages[: self._marks[-1][0]]
        return True

    def context(self) -> Context | None:
        """The conversation so far; None if nothing was read yet."""
        start = self._marks[-1][1]
        return None if start is None else self._reader.wrap(start, self._base)
