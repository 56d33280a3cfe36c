"""Between HTTP and the engine: texts to tokens and back, contexts by key, counting. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from llm_mlp.context import (
    Context,
    ContextError,
    Loaded,
    Reader,
    StorageError,
    Store,
    default_folder,
)
from llm_mlp.data.chat import ChatTemplate
from llm_mlp.data.tokenizer import Tokenizer
from llm_mlp.energy import Energy
from llm_mlp.infer import (
    ConstraintError,
    Engine,
    Event,
    Full,
    Grammars,
    Request,
    Start,
    Stopped,
    read_tokens,
    slots_within,
)
from llm_mlp.infer.constraint import Grammar
from llm_mlp.models import LM
from llm_mlp.models.mixer import State
from llm_mlp.serve.protocol import Generation, Message

log = logging.getLogger("llm_mlp.serve")

GIB = 2**30
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
Found = TypeVar("Found")


@dataclass(frozen=True)
class Settings:
    """How a server runs.

    Args:
        name: of the model in answers. keys: API keys; none: everybody is one user, on this machine only.
        slots, chunk, queue, invariant: as `llm_mlp.infer.Engine`. memory: bytes for running and stored states; None:
            no bound.
        store: folder of stored contexts; each key has one of its own in it. store_bytes: of each of these; None: as
            `llm_mlp.context.Store`.
        max_tokens: written at most by a request. max_prompt: read at most. max_body: bytes of a request.
        max_upload: bytes of a context's file that is imported.
        timeout: seconds a request may take.
        schema_bytes, schema_seconds: as `llm_mlp.infer.Grammars`: the size of a JSON schema or expression that an
            answer has to follow, and how long compiling it may take.
    """

    name: str = "llm-mlp"
    keys: tuple[str, ...] = ()
    slots: int = 16
    chunk: int = 512
    queue: int = 256
    invariant: bool = False
    memory: int | None = None
    store: Path | None = None
    store_bytes: int | None = None
    max_tokens: int = 4096
    max_prompt: int = 10_000_000
    max_body: int = 32 * 2**20
    max_upload: int = 2 * GIB
    timeout: float = 600.0
    schema_bytes: int = 1 << 16
    schema_seconds: float = 5.0


class Refused(Exception):
    """A request that cannot be served: HTTP status, the reason, and the field it is about."""

    def __init__(self, status: int, message: str, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.code = status, message, field, code


UNSERVED = (Refused, Full, Stopped, ContextError)  # what a client is told of: `Service.refusal`


@dataclass
class Piece:
    """Text of an answer as it comes, with what stands behind it."""

    index: int
    text: str
    tokens: list[tuple[int, float, tuple[tuple[int, float], ...]]] = field(default_factory=list)
    finish: str | None = None
    read: int = 0
    final: Start | None = None
    lost: Exception | None = None  # why a text that is whole has no ``final``
    transition: State | None = None  # of the text behind ``final``, where it was asked for
    joules: float | None = None  # of what ended with it
    versions: tuple[str, ...] = ()  # ids of what was stored of its text on the way


class Text:
    """Ids to text, a token at a time, up to the first of some stop texts; what may begin one is held back."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._stream, self._stops, self._held = tokenizer.stream(), list(stops), ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that this token makes certain."""
        return self._out(self._stream.step(token), False)

    def finish(self) -> str:
        """What was held back, at the end of the ids."""
        return "" if self.stopped else self._out(self._stream.finish(), True)

    def _out(self, text: str, end: bool) -> str:
        if not self._stops:
            return text
        self._held += text
        places = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            return self._held[: min(places)]
        keep = 0
        if not end:
            longest = min(len(self._held), max(len(stop) for stop in self._stops) - 1)
            tails = (n for n in range(longest, 0, -1) if any(stop.startswith(self._held[-n:]) for stop in self._stops))
            keep = next(tails, 0)
        out = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return out


class _Mail:
    """Events for an event loop's queues. However many come before the loop looks, it is woken once for all of them:
    waking it takes longer than all else of a token."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._waiting = deque[tuple[asyncio.Queue, Any]]()
        self._told = False

    def put(self, queue: asyncio.Queue, item: Any) -> None:
        """From any thread."""
        self._waiting.append((queue, item))
        if not self._told:
            self._told = True
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._told = False  # first: what comes from here on wakes the loop again
        while self._waiting:
            queue, item = self._waiting.popleft()
            queue.put_nowait(item)


@dataclass(frozen=True)
class Prompt:
    """What is read for a request: ids behind a start, and where the start came from."""

    ids: list[int]
    start: Start | None = None
    base: Context | None = None
    cached: int = 0
    reason: str = ""

    @property
    def tokens(self) -> int:
        """Of the whole text before the answer."""
        return self.cached + len(self.ids)


class Service:
    """A model behind an engine in a thread of its own. `start`, then requests, then `close`."""

    def __init__(
        self,
        model: LM,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        settings: Settings,
        energy: Energy | None = None,
    ) -> None:
        """``energy``: None: what this machine tells of the model's device."""
        self.model, self.tokenizer, self.template, self.settings = model, tokenizer, template, settings
        self.energy = energy or Energy(next(model.parameters()).device)
        stored = 0 if settings.memory is None else settings.memory // 4
        slots, line = slots_within(model, settings.slots, settings.memory, stored, settings.invariant)
        log.info("%s", line)
        self.capacity = line
        self.engine = Engine(
            model,
            slots=slots,
            chunk=settings.chunk,
            queue=settings.queue,
            invariant=settings.invariant,
            vocabulary=tokenizer.vocab_size,
            energy=self.energy,
        )
        self.reader = Reader(model, tokenizer)
        self.grammars = Grammars(tokenizer, max_bytes=settings.schema_bytes, seconds=settings.schema_seconds)
        # Not asyncio's threads: schemas that take long may keep only one another waiting.
        self._compilers = ThreadPoolExecutor(2, "grammar")
        held = "device_bytes" if self.reader.device.type == "cuda" else "ram_bytes"
        self._loaded = Loaded() if settings.memory is None else Loaded(**{held: stored})
        self._stores: dict[str, Store] = {}
        self._lock = threading.Lock()
        self._mail: _Mail | None = None
        self._thread = threading.Thread(target=self._run_engine, name="engine", daemon=True)
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("llm_mlp_requests", "Requests by path and status.", ["path", "status"], **own)
        self.written = Counter("llm_mlp_tokens", "Tokens written.", **own)
        self.prompted = Counter("llm_mlp_prompt_tokens", "Tokens of prompts.", ["source"], **own)
        self.lookups = Counter("llm_mlp_cache_lookups", "Prompts by what was stored.", ["result", "reason"], **own)
        self.first = Histogram("llm_mlp_first_token_seconds", "Until the first token.", buckets=SECONDS, **own)
        self.between = Histogram("llm_mlp_token_seconds", "Between two tokens.", buckets=SECONDS, **own)
        self.registry.register(_Gauges(self))

    def start(self) -> None:
        """Start the engine; the first requests need not wait for fingerprints and kernels."""
        _ = self.reader.fingerprints
        self._thread.start()

    def close(self, timeout: float | None = None) -> None:
        """No more requests; waits until those under way are done."""
        self._compilers.shutdown(wait=False, cancel_futures=True)
        self.engine.close()
        self._thread.join(timeout)

    def _run_engine(self) -> None:
        try:
            self.engine.run()
        except BaseException:  # everybody who waits has been told, nobody of what it was
            log.critical("the engine has failed: nothing is written or read until the server restarts", exc_info=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def pieces(self) -> int | None:
        """Of what length texts are read in, where their bits count."""
        return self.settings.chunk if self.settings.invariant else None

    # -- keys ------------------------------------------------------------------------------------------------------

    def user(self, key: str | None) -> str | None:
        """Whose key that is ("" where there are no keys), None if nobody's. Takes as long for every key."""
        if not self.settings.keys:
            return ""
        given = hashlib.sha256((key or "").encode("utf8", "surrogatepass")).digest()
        found = [hmac.compare_digest(hashlib.sha256(own.encode()).digest(), given) for own in self.settings.keys]
        return hashlib.sha256((key or "").encode("utf8", "surrogatepass")).hexdigest()[:16] if any(found) else None

    def store(self, user: str) -> Store:
        """Of one user; nobody sees another's."""
        with self._lock:
            if user not in self._stores:
                folder = self.settings.store or default_folder()
                own = folder / "users" / user if user else folder
                limits = {"disk_bytes": self.settings.store_bytes} if self.settings.store_bytes else {}
                self._stores[user] = Store(own, loaded=self._loaded, **limits)
            return self._stores[user]

    # -- prompts ---------------------------------------------------------------------------------------------------

    def prompt(self, text: str | Sequence[int], user: str, context: str | None) -> Prompt:
        """Ids of a text, behind a named context or whatever stored text it begins with.

        Raises:
            Refused: ids that are none, no such context, too long a prompt.
        """
        ids = self.prompt_ids(text, begin=context is None)
        if context is not None:
            found = self.context(user, context)
            n = len(found.tokens)
            self.lookups.labels("hit", "context").inc()
            return Prompt(ids, found.start, found, n, f"hit: context {context!r}, {n} tokens")
        if not ids:
            raise Refused(400, "the prompt is empty", "prompt")
        known = self.store(user).find(ids, self.reader, pieces=self.pieces)
        self.lookups.labels("miss" if known.context is None else "hit", known.kind).inc()
        if known.context is None:
            return Prompt(ids, reason=self.told(known.reason))
        n = known.cached_tokens
        return Prompt(ids[n:], known.context.start, known.context, n, known.reason)

    def prompt_ids(self, text: str | Sequence[int], *, begin: bool = True) -> list[int]:
        """Ids of a text, or the ids given, checked; ``begin``: behind the separator that starts a text.

        Raises:
            Refused: what cannot be encoded, ids that are none, too many.
        """
        if isinstance(text, str):
            try:
                ids = self.reader.encode(text, begin=begin)
            except ValueError as error:
                raise Refused(400, f"the text cannot be encoded: {error}") from None
        else:
            ids = list(text)
            if bad := [i for i in ids if not 0 <= i < self.tokenizer.vocab_size]:
                raise Refused(400, f"token {bad[0]} is outside the vocabulary of {self.tokenizer.vocab_size}", "prompt")
        if len(ids) > self.settings.max_prompt:
            raise Refused(400, f"the prompt has {len(ids):,} tokens; {self.settings.max_prompt:,} are read", "prompt")
        return ids

    def chat_ids(self, messages: Sequence[Message], tools: Any, *, begin: bool) -> list[int]:
        """Ids of a conversation up to where the assistant answers; ``begin`` as for `prompt_ids`.

        Raises:
            Refused: messages that the template refuses or does not show, or that cannot be encoded.
        """
        if tools and not self.template.shows_tools:
            raise Refused(400, "tools: this model's chat template does not show them; leave them out", "tools")
        if any(m.tool_calls for m in messages) and not self.template.shows_calls:
            why = "messages: this model's chat template does not show tool_calls; write them in the content"
            raise Refused(400, why, "messages")
        try:
            ids = self.template.encode([m.plain() for m in messages], tools, generate=True).ids
        except ValueError as error:  # ChatError, TokenizerError, and parts that are no text
            raise Refused(400, str(error), "messages") from None
        return [*([self.tokenizer.eos] if begin else []), *ids]

    def context(self, user: str, name: str) -> Context:
        """A stored context, on the model's device.

        Raises:
            Refused: 404 where there is none, 409 where it does not fit the model.
        """
        store = self.store(user)
        self.known(user, name)
        try:
            return store.get(name, self.reader)
        except ContextError as error:
            raise self.refusal(error) from None

    def refusal(self, error: Exception) -> Refused:
        """What a client is told of one of `UNSERVED`: of a context's error 507 where the store failed, else 409."""
        if isinstance(error, Refused):
            return error
        if isinstance(error, Full):
            return Refused(429, f"busy: {error}", code="queue_full")
        if isinstance(error, Stopped):
            return Refused(503, str(error), code="engine_stopped")
        return Refused(507 if isinstance(error, StorageError) else 409, self.told(str(error)), "context")

    def told(self, text: str) -> str:
        """A message of the store's, without where it lies."""
        return text.replace(str(self.settings.store or default_folder()), "the store")

    def known(self, user: str, name: str) -> None:
        """Raises `Refused` unless ``name`` is a context's."""
        try:
            there = self.store(user).look(name)
        except ContextError as error:
            raise Refused(400, self.told(str(error)), "context") from None
        if there is None:
            raise Refused(404, f"context {name!r} does not exist", "context", "context_not_found")

    def free(self, user: str, name: str, field: str, base: Context | None = None) -> None:
        """Raises `Refused` unless something new, or what continues ``base``, can be stored as ``name``."""
        try:
            there = self.store(user).look(name)
        except ContextError as error:
            raise Refused(400, self.told(str(error)), field) from None
        if there is not None and (base is None or there.id != base.id):
            raise Refused(409, f"context {name!r} exists; choose another name", field)

    async def save(
        self, user: str, name: str, end: Start, base: Context | None, closing: Sequence[int]
    ) -> dict[str, Any]:
        """Store the state after an answer and ``closing`` ids behind it: a new version where ``name`` means ``base``,
        what was gone on from.

        Raises:
            ContextError: the name means another text by now, or there is no room. `llm_mlp.infer.Stopped`: the engine
                has failed, or is closing.
        """
        if closing:
            end = await self.between_steps(partial(self._read_on, end, closing))

        def commit() -> Context:
            context = self.reader.wrap(end, base)
            self.store(user).commit(context, name)
            return context

        context = await asyncio.to_thread(commit)
        return {"name": name, "id": context.id, "tokens": len(context.tokens)}

    async def grammar(self, body: Generation) -> Grammar | None:
        """What the answer has to follow, compiled.

        Raises:
            Refused: 400 with the field, for what cannot be compiled within the limits. `llm_mlp.infer.Full`: others
                keep the compilers busy.
        """
        schema, regex = body.schema_asked, body.regex
        if schema is None and regex is None:
            return None
        field = "regex" if schema is None else "response_format"

        def compiled() -> Grammar:
            return self.grammars.regex(regex or "") if schema is None else self.grammars.schema(schema)

        work = asyncio.wrap_future(self._compilers.submit(compiled))
        try:
            # Each ends within its own time; longer than that is the time of those before it.
            return await asyncio.wait_for(work, 4 * self.settings.schema_seconds)
        except ConstraintError as error:
            raise Refused(400, f"{field}: {error}", field) from None
        except TimeoutError:
            raise Full("other requests' schemas are being compiled") from None

    # -- running ---------------------------------------------------------------------------------------------------

    def deadline(self) -> float:
        """Of a request that comes now, by the running loop's clock."""
        return asyncio.get_running_loop().time() + self.settings.timeout

    def late(self) -> Refused:
        """What is told of a request that is not done by its `deadline`."""
        return Refused(504, f"not done within {self.settings.timeout:g} s", code="timeout")

    async def run(
        self,
        request: Request,
        stops: Sequence[str],
        n: int = 1,
        grammar: Grammar | None = None,
        deadline: float | None = None,
    ) -> AsyncGenerator[Piece, None]:
        """Pieces of n answers to one request, as they come; leaving early cancels them.

        ``grammar``: what each of them follows. ``deadline``: by the loop's clock; None: the timeout from now. Where a
        stop text has ended an answer no state is kept, for that has read the stop text: `state_after` makes one.

        Raises:
            Refused: 504 over time, 400 where a grammar becomes too complex on the way, 500 where a step failed.
            `llm_mlp.infer.Full`: the queue is full. `llm_mlp.infer.Stopped`: the engine has failed, or is closing.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event] | None]()
        started = loop.time()
        deadline = deadline or self.deadline()
        before: float | None = None  # joules
        if n > 1:
            load = self.engine.load
            if load["waiting"] + n > self.engine.queue + load["free"]:  # before anything is read for them
                raise Full(f"{load['waiting']} requests are waiting already, and this one asks for {n} answers")
            if len(request.prompt):
                # Read once; the answers go on from copies of the state, as separate requests would from their own.
                end = await self.read(replace(request, max_tokens=0, keep=True))
                request, before = replace(request, prompt=[], start=end.final), end.joules

        mail = self._mail = self._mail if self._mail is not None and self._mail.loop is loop else _Mail(loop)

        def emitter(index: int) -> Callable[[Event], None]:
            return lambda event: mail.put(queue, (index, event))

        texts = [Text(self.tokenizer, stops) for _ in range(n)]
        tickets = []
        # One for all of its tokens: to set a limit for each wait costs more than the wait.
        timer = loop.call_at(deadline, queue.put_nowait, None)
        last = [started] * n
        try:
            for index in range(n):
                own = request if request.seed is None or n == 1 else _reseeded(request, index)
                if grammar is not None:
                    own = replace(own, constraint=grammar.matcher())
                try:
                    tickets.append(self.engine.submit(own, emitter(index)))
                except ValueError as error:
                    raise Refused(400, str(error)) from None
            open_ = set(range(n))
            while open_:
                item = await queue.get()
                if item is None:
                    raise self.late()
                index, event = item
                now, text = loop.time(), texts[index]
                if event.finish == "error" and not text.stopped:  # an answer that a stop text has ended is whole
                    raise self._failure(event.error)
                if event.token is not None and text.stopped:
                    continue  # written before the engine heard of it
                piece = Piece(index, "", read=event.read, finish=event.finish, final=event.final, joules=event.joules)
                if before is not None:
                    piece.joules, before = before + (piece.joules or 0), None
                if event.token is not None:
                    (self.between if last[index] > started else self.first).observe(now - last[index])
                    last[index] = now
                    self.written.inc()
                    piece.text = text.feed(event.token)
                    piece.tokens = [(event.token, event.logprob, event.top)]
                    if text.stopped:
                        tickets[index].cancel()
                elif text.stopped:
                    # Within a step the engine has heard of it, and says what the answer took.
                    piece.finish, piece.final = "stop" if event.finish is not None else None, None
                elif event.finish is not None:
                    piece.text = text.finish()
                    piece.lost = self._failure(event.error) if event.error else None
                if piece.finish is not None:
                    open_.remove(index)
                yield piece
        finally:
            timer.cancel()
            for ticket in tickets:
                ticket.cancel()

    def _failure(self, error: str) -> Exception:
        """What is told of a request that the engine has ended with an error."""
        if self.engine.failed is not None:
            return self.engine.stopped()
        if error.startswith("constraint: "):  # the engine's word for it
            return Refused(400, f"the schema or expression cannot be followed: {error[12:]}")
        return Refused(500, f"the engine failed: {error}")

    async def read(self, request: Request, deadline: float | None = None) -> Piece:
        """With the state after a prompt of which nothing is written."""
        return await last_piece(self.run(request, [], deadline=deadline))

    async def state_after(self, prompt: Prompt, answer: str, deadline: float) -> Piece:
        """With the state after a prompt and a whole answer to it, which are read as any prompt is. Raises as `run`."""
        ids = [*prompt.ids, *self.reader.encode(answer, begin=False)]
        return await self.read(Request(ids, 0, start=prompt.start, keep=True), deadline)

    async def between_steps(self, function: Callable[[], Found]) -> Found:
        """What ``function`` gives, run where the model is free."""
        return await asyncio.wrap_future(self.engine.call(function))

    async def in_pieces(self, work: Generator[object, None, Found]) -> Found:
        """What a generator returns, each of its pieces run between two of the engine's steps.

        Raises:
            Refused: 504 over time.
        """
        deadline = self.deadline()

        def piece() -> tuple[Found] | None:
            try:
                next(work)
            except StopIteration as end:
                return (end.value,)
            return None

        while (done := await self.between_steps(piece)) is None:
            if asyncio.get_running_loop().time() > deadline:
                raise self.late()
        return done[0]

    def _read_on(self, start: Start, ids: Sequence[int]) -> Start:
        """A few ids more. Not a request of its own: that would wait behind all others, or find the queue full."""
        state, logits = read_tokens(self.model, ids, start.state, position=len(start.tokens))
        tokens = torch.cat([torch.as_tensor(start.tokens), torch.tensor(ids, dtype=torch.int32)])
        return Start(tokens, state, logits)

    async def embed(self, ids: list[int]) -> torch.Tensor:
        """The mean of the final normed hidden states, of length 1, float32."""
        return await self.in_pieces(self._embedding(ids))

    def _embedding(self, ids: list[int]) -> Generator[None, None, torch.Tensor]:
        state, total = None, torch.zeros((), dtype=torch.float64)
        device = next(self.model.parameters()).device
        for a in range(0, len(ids), self.settings.chunk):
            x, state = self.model.hidden(torch.tensor([ids[a : a + self.settings.chunk]], device=device), state)
            total = total + x[0].double().sum(0).cpu()
            yield
        return torch.nn.functional.normalize(total, dim=0).float()


async def last_piece(pieces: AsyncGenerator[Piece, None]) -> Piece:
    """The piece with the state after what is read.

    Raises:
        Refused: as reading ``pieces`` does.
    """
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            if piece.final is not None:
                return piece
    raise Refused(500, "the reading ended without a state")


def _reseeded(request: Request, index: int) -> Request:
    """Several answers of one seed are several, and the same each time."""
    seed = int.from_bytes(hashlib.sha256(f"{request.seed}/{index}".encode()).digest()[:7], "big")
    return request if index == 0 else replace(request, seed=seed)


class _Gauges:
    """What is asked for at each scrape."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Any:
        load = self._service.engine.load
        found = GaugeMetricFamily("llm_mlp_engine_requests", "Requests by what they do.", labels=["state"])
        for state in ("waiting", "reading", "running"):
            found.add_metric([state], load[state])
        yield found
        yield GaugeMetricFamily("llm_mlp_engine_free_slots", "Slots without a request.", load["free"])
        steps = self._service.engine.counters.steps
        yield GaugeMetricFamily("llm_mlp_engine_steps", "Decoding steps since the start.", steps)
        tiers = GaugeMetricFamily("llm_mlp_context_bytes", "Bytes of contexts.", labels=["tier"])
        usage = [store.usage() for store in list(self._service._stores.values())]
        for tier in ("disk", "ram", "device"):
            tiers.add_metric([tier], sum(row[f"{tier}_bytes"] for row in usage))
        yield tiers
        joules, watts = self._service.energy.joules(), self._service.energy.watts()
        if joules is not None:  # a number that nobody knows is absent, not zero
            yield CounterMetricFamily("llm_mlp_energy_joules", "Of the device since the start.", joules)
        if watts is not None:
            yield GaugeMetricFamily("llm_mlp_energy_watts", "Mean power of the device between two scrapes.", watts)
