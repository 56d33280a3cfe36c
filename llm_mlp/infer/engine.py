"""Many requests over one model: prompts are read in pieces between decoding steps, which all running requests share.

The state of a sequence has a fixed size, so a request is a row of a pool and nothing grows. A step of the engine reads
at most `Engine.chunk` tokens of prompts and then decodes one token of every running request: streams keep their pace
however long a prompt is that joins them.

Running requests are the pool's first rows: where one leaves, the last takes its place, so a step works on the pool's
own memory and copies nothing.

What a request gets does not depend on the others, within rounding; with ``invariant`` to the bit: every decoding step
has the pool's own batch size, rows without a request computing something that nobody reads, and every prompt is read
alone (else several are packed). Pieces end at multiples of the chunk from the text's start.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from llm_mlp.energy import Energy, Shares
from llm_mlp.infer.constraint import Constraint, allowed
from llm_mlp.infer.generate import Start
from llm_mlp.infer.prefill import check_tokens
from llm_mlp.infer.sampling import Sampling, sample
from llm_mlp.models import LM
from llm_mlp.models.capture import CapturedStep
from llm_mlp.models.mixer import State
from llm_mlp.ops.backend import invariant_steps

log = logging.getLogger("llm_mlp.infer")

Finish = Literal["stop", "length", "cancelled", "error"]
CHUNK = 512
# Rows of an invariant step are a multiple of this. Torch's loops on a CPU take the numbers left over behind the last
# full vector one by one, by functions that round differently: a row may not be among those.
ROWS = 32
CALLS = 0.02  # seconds that `Engine.call`s may take between two steps, or one of them as long as it takes
DRAWN = 64  # random numbers of a request that are drawn at a time: one by one they take longer than all else of a token


class Full(RuntimeError):
    """The queue is full; ask again later."""


class Stopped(RuntimeError):
    """The engine takes nothing more: it is closing, or has failed."""


@dataclass(frozen=True)
class Request:
    """A text to go on from.

    Args:
        prompt: token ids; may be empty after a ``start``. max_tokens: to write at most; 0 only reads.
        seed: of the sampling; None draws one. stop: ids that end the text and are not part of it.
        start: what was read before the prompt; it is not changed.
        logprobs: how many alternatives to tell the log probabilities of, beside the token's own; None: none.
        keep: the last event carries the state after the whole text (the tokens written included).
        constraint: of this request alone. Where it lets nothing follow the request ends ("stop"); ``stop`` ids are
            chosen only where it lets the text end.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    stop: frozenset[int] = frozenset()
    start: Start | None = None
    logprobs: int | None = None
    keep: bool = False
    constraint: Constraint | None = None


class Event(NamedTuple):
    """What happened to a request: prompt tokens read so far, or a token written, or its end."""

    read: int = 0
    token: int | None = None
    logprob: float = 0.0  # of the token, of the model's own distribution
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens and their log probabilities
    finish: Finish | None = None
    final: Start | None = None
    error: str = ""  # why it ended so; beside another end than "error": the text is whole, its state is lost
    joules: float | None = None  # at the end: its share of the device's; None: unavailable, or too little to be told


class Ticket:
    """A request under way. `cancel` ends it within a step, whatever it is doing."""

    def __init__(self, number: int, request: Request, emit: Callable[[Event], None], wake: Callable[[], None]) -> None:
        self.number, self.request, self._emit, self._wake = number, request, emit, wake
        self.cancelled = False
        self.submitted = time.perf_counter()
        self.position = len(request.start.tokens) if request.start is not None else 0  # tokens before the next to read
        self.done = 0  # of the prompt
        self.state: State | None = None  # while the prompt is read
        self.logits: Tensor | None = None
        self.row = -1
        self.written: list[int] = []
        self.last = -1  # the token that the next step takes
        self.closing: Finish | None = None  # the last token is written and only has to be read into the state
        self.generator = torch.Generator()
        if request.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(request.seed)
        self._uniforms: list[float] = []
        self.joined: float | None = None  # what `Shares.mark` said then
        self.joules: float | None = None

    def cancel(self) -> None:
        self.cancelled = True
        self._wake()

    def emit(self, event: Event) -> None:
        try:
            self._emit(event)
        except Exception:  # a listener that has gone may not stop the others
            log.exception("request %d: its listener failed; it is cancelled", self.number)
            self.cancelled, self._emit = True, lambda event: None

    def uniform(self) -> float:
        """The next of its random numbers, which are the generator's, one after another."""
        if not self._uniforms:
            self._uniforms = torch.rand(DRAWN, dtype=torch.float64, generator=self.generator).tolist()[::-1]
        return self._uniforms.pop()


@dataclass
class Counters:
    """Since the engine was made."""

    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    finished: dict[str, int] = field(default_factory=dict)


def state_bytes(model: LM) -> int:
    """Of the state of one sequence.

    Raises:
        ValueError: a layer's state grows with the text (attention), so it has no place in a pool.
    """
    sizes = model.init_state(1, device="meta")
    if growing := [name for name, t in sizes.items() if not t.numel() and name.endswith(("keys", "values"))]:
        layer = growing[0].rsplit(".", 1)[0]
        raise ValueError(
            f"{layer}: attention keeps keys and values of every token, and the engine serves states of a fixed size; "
            "`llm-mlp generate` runs such models one text at a time"
        )
    return sum(t.numel() * t.element_size() for t in sizes.values())


def pool_rows(slots: int, invariant: bool) -> int:
    """States in the pool of an engine with so many slots."""
    return -(-slots // ROWS) * ROWS if invariant else slots


def slots_within(
    model: LM, wanted: int, budget: int | None, stored: int = 0, invariant: bool = False
) -> tuple[int, str]:
    """How many requests can run at a time within a budget of bytes (None: as many as wanted), at least one, and a line
    that says so.

    ``stored``: bytes set aside for stored contexts. ``invariant``: as `Engine`, whose pool then has rows that no
    request takes; where not even the least pool fits the line says what it takes.
    """
    each = state_bytes(model)
    room = None if budget is None else max(0, budget - stored) // each
    fit = wanted
    if room is not None and pool_rows(wanted, invariant) > room:
        whole = room // ROWS * ROWS if invariant else room
        fit = min(wanted, max(whole, pool_rows(1, invariant)))
    rows, kept = pool_rows(fit, invariant), stored // each
    line = f"{fit} active + {kept} stored contexts of {each / 1e6:.2f} MB"
    if fit < wanted:
        line += f" ({wanted} were asked for; {budget:,} bytes hold no more)"
    if rows > fit:
        line += f"; the batch-invariant mode holds {rows} states for them, {rows * each / 1e6:,.1f} MB"
    if room is not None and rows > room:
        line += f"; that is more than the {budget:,} bytes allow"
    return fit, line


class Engine:
    """Runs requests; `step` from one thread, `submit`, `call` and `Ticket.cancel` from any.

    Args:
        slots: requests that decode at a time; others wait their turn.
        chunk: prompt tokens read at most between two decoding steps.
        queue: requests that may wait; more are refused.
        invariant: what a request gets is the same to the bit whatever else runs (slower where few run).
        vocabulary: ids from here on are never chosen.
        graphs: decoding steps as CUDA graphs, one for each power of two of running requests.
        energy: of the device, shared among the requests that are read or decode at a time.

    Raises:
        ValueError: a model whose state grows (`state_bytes`).
    """

    def __init__(
        self,
        model: LM,
        *,
        slots: int = 8,
        chunk: int = CHUNK,
        queue: int = 256,
        invariant: bool = False,
        vocabulary: int | None = None,
        graphs: bool = True,
        energy: Energy | None = None,
    ) -> None:
        if slots < 1 or chunk < 1 or queue < 0:
            raise ValueError(f"slots = {slots} and chunk = {chunk} must be at least 1, queue = {queue} at least 0")
        state_bytes(model)
        self.model = model.eval()
        self.slots, self.chunk, self.queue, self.invariant = slots, chunk, queue, invariant
        self.vocabulary = vocabulary or model.config.vocab_size
        self.device = next(model.parameters()).device
        self.pool = model.init_state(pool_rows(slots, invariant))
        # What penalties ask for, a row as in the pool: which tokens were seen, how often each was written.
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None
        self.counters = Counters()
        self._shares = Shares(energy) if energy is not None else None
        self._graphs: dict[int, tuple[CapturedStep, Tensor]] | None = (
            {} if graphs and self.device.type == "cuda" else None
        )
        self._waiting: deque[Ticket] = deque()
        self._reading: deque[Ticket] = deque()
        self._shortest_first = False  # in the next step
        self._running: list[Ticket] = []  # a request's place here is its row of the pool
        self._calls: deque[tuple[Callable[[], Any], Future]] = deque()
        self._numbers = itertools.count(1)
        self._open: dict[int, Ticket] = {}  # whose end nobody has been told, by number, wherever they are
        self._changed = threading.Condition()
        self._closed = False
        self.failed: BaseException | None = None  # what `run` ended with

    # -- from any thread -------------------------------------------------------------------------------------------

    def submit(self, request: Request, emit: Callable[[Event], None]) -> Ticket:
        """Queue a request; ``emit`` gets its events, in the engine's thread, the last one with ``finish``.

        Raises:
            Full: the queue is full. Stopped: the engine is closing, or has failed. ValueError: ids that are no tokens
                of the model, or a start whose state is kept in other dtypes.
        """
        if request.max_tokens < 0 or (request.start is None and not len(request.prompt)):
            raise ValueError("a request needs a prompt or a start, and max_tokens of at least 0")
        check_tokens(self.model, torch.as_tensor(request.prompt, dtype=torch.int64))
        for name, t in request.start.state.items() if request.start is not None else ():
            if name in self.pool and t.dtype != self.pool[name].dtype:
                kept = self.pool[name].dtype
                raise ValueError(f"start: {name} is {t.dtype}, the model keeps {kept} (`LM.keep_state`, --state)")
        if bad := [i for i in request.sampling.logit_bias if not 0 <= i < self.vocabulary]:
            raise ValueError(f"logit_bias: token {bad[0]} is outside the vocabulary of {self.vocabulary}")
        with self._changed:
            if self._closed:
                raise self.stopped()
            if len(self._waiting) >= self.queue + self._free:
                raise Full(f"{len(self._waiting)} requests are waiting already")
            ticket = Ticket(next(self._numbers), request, emit, self._wake)
            self._waiting.append(ticket)
            self._open[ticket.number] = ticket
            self._changed.notify()
        return ticket

    def call(self, function: Callable[[], Any]) -> Future:
        """Run ``function`` between two steps, where it may use the model; its result.

        Raises:
            Stopped: the engine is closing, or has failed; the result raises it too where that comes before its turn.
        """
        future: Future = Future()
        with self._changed:
            if self._closed:
                raise self.stopped()
            self._calls.append((function, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """No more requests; `run` returns when those it has are done."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def stopped(self) -> Stopped:
        """Why nothing more is taken, as an error."""
        if self.failed is None:
            return Stopped("the engine is closing")
        why = type(self.failed).__name__  # its text may tell of the machine; the log has it
        return Stopped(f"the engine has failed ({why}) and takes no more requests until it is started again")

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    @property
    def load(self) -> dict[str, int]:
        """Requests by what they do, and slots that are free."""
        with self._changed:
            return {
                "waiting": len(self._waiting),
                "reading": len(self._reading),
                "running": len(self._running),
                "free": self._free,
            }

    @property
    def _free(self) -> int:
        return self.slots - len(self._reading) - len(self._running)

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._reading or self._running or self._calls)

    # -- from the engine's thread ----------------------------------------------------------------------------------

    def run(self) -> None:
        """Step while there is work, wait while there is none, return after `close` when all is done.

        Raises:
            BaseException: what a step could not deal with. All requests and calls have then ended with an error, and
                `submit` and `call` refuse more.
        """
        try:
            while self._has_work():
                self.step()
        except BaseException as error:
            self._abandon(error)
            raise

    def _has_work(self) -> bool:
        """Waits until there is some; False: `close` was called and all is done."""
        with self._changed:
            while not self.busy and not self._closed:
                self._changed.wait()
            return self.busy

    def _abandon(self, error: BaseException) -> None:
        """Tell everybody who waits that nothing more comes: no step will."""
        with self._changed:
            self.failed, self._closed = error, True
            tickets, calls = list(self._open.values()), list(self._calls)
            for held in (self._waiting, self._reading, self._running, self._calls):
                held.clear()
        for ticket in tickets:
            self._finish(ticket, ticket.closing or "error", error=str(self.stopped()))
        for _, future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(self.stopped())

    @torch.no_grad()
    def step(self) -> None:
        """Read up to `chunk` prompt tokens, then decode one token of every running request."""
        until = time.perf_counter() + CALLS
        for _ in range(len(self._calls)):
            function, future = self._calls.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:  # it is the caller's
                    future.set_exception(error)
            if time.perf_counter() > until:
                break
        with self._changed:
            for ticket in [t for t in self._waiting if t.cancelled]:
                self._waiting.remove(ticket)
                self._finish(ticket, "cancelled")
            joined = self._mark() if self._waiting and self._free else None
            while self._waiting and self._free:
                self._waiting[0].joined = joined
                self._reading.append(self._waiting.popleft())
        for ticket in [t for t in (*self._reading, *self._running) if t.cancelled]:
            self._leave(ticket, "cancelled")
        self._read_some()
        if self._running:
            try:
                self._decode()
            except Exception as error:
                log.exception("a decoding step failed; its %d requests end", len(self._running))
                self._fail(list(self._running), error)

    def _read_some(self) -> None:
        """Up to `chunk` prompt tokens: of one request after another, or (not invariant) of several in one go.

        Those who have waited longest and those with the least left come first in turn: no long text keeps short prompts
        waiting until it is read, nor they it.
        """
        order = list(self._reading)
        if self._shortest_first:
            order.sort(key=lambda ticket: len(ticket.request.prompt) - ticket.done)
        self._shortest_first = not self._shortest_first
        budget, together = self.chunk, list[tuple[Ticket, int]]()
        for ticket in order:
            size = min(len(ticket.request.prompt) - ticket.done, self.chunk - ticket.position % self.chunk)
            if together and size > budget:
                break
            budget -= max(1, size)
            together.append((ticket, size))
        groups = [[one] for one in together] if self.invariant else [together] if together else []
        while groups:
            group = groups.pop(0)
            try:
                self._read(group)
            except Exception as error:  # out of memory, say
                if len(group) > 1:
                    log.warning("reading %d prompts in one go failed (%s); they are read apart", len(group), error)
                    groups = [[one] for one in group]
                    continue
                log.exception("request %d: reading its prompt failed", group[0][0].number)
                self._fail([group[0][0]], error)
                continue
            self._begin_writing([ticket for ticket, _ in group if ticket.done == len(ticket.request.prompt)])

    def _begin_writing(self, tickets: list[Ticket]) -> None:
        """First tokens of requests whose prompts are read; those that ask for none end."""
        try:
            self._start([ticket for ticket in tickets if not self._only_read(ticket)])
        except Exception as error:
            log.exception("the first tokens of %d requests failed", len(tickets))
            self._fail([t for t in tickets if t.row >= 0 or t in self._reading], error)

    def _fail(self, tickets: list[Ticket], error: Exception) -> None:
        for ticket in tickets:
            self._leave(ticket, ticket.closing or "error", error=f"{type(error).__name__}: {error}")

    def _begin(self, ticket: Ticket) -> State:
        """The state before a ticket's next piece."""
        start = ticket.request.start
        if ticket.state is None and start is not None:
            # Copied: what continues a context leaves it as it is.
            ticket.state = {n: t.to(self.device, copy=True) for n, t in start.state.items()}
            ticket.logits = start.logits.to(self.device, copy=True)
        elif ticket.state is None:
            ticket.state = self.model.init_state(1)
        return ticket.state

    def _read(self, group: list[tuple[Ticket, int]]) -> None:
        """Read the next pieces of some prompts, packed where there are several."""
        states = [self._begin(ticket) for ticket, _ in group]
        reading = [n for n, (_, size) in enumerate(group) if size]
        if reading:
            sizes = [group[n][1] for n in reading]
            ids: list[int] = []
            for ticket, size in (group[n] for n in reading):
                ids += ticket.request.prompt[ticket.done : ticket.done + size]
            state = {name: torch.cat([states[n][name] for n in reading]) for name in states[reading[0]]}
            packed = None
            if len(reading) > 1:
                packed = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
            out = self.model(torch.tensor([ids], device=self.device), state, packed, logits="last")
            for row, n in enumerate(reading):
                ticket, size = group[n]
                ticket.state = {name: t[row : row + 1] for name, t in out.state.items()}
                ticket.logits = out.logits[:, row]
                ticket.done, ticket.position = ticket.done + size, ticket.position + size
                self.counters.prompt_tokens += size
        for ticket, _ in group:
            ticket.emit(Event(read=ticket.done))

    def _only_read(self, ticket: Ticket) -> bool:
        """Ends a request that asks for no token."""
        if ticket.request.max_tokens > 0:
            return False
        assert ticket.state is not None and ticket.logits is not None
        final = None
        if ticket.request.keep:
            state = {name: t.clone() for name, t in ticket.state.items()}
            final = Start(self._tokens(ticket), state, ticket.logits.clone())
        self._leave(ticket, "length", final)
        return True

    def _start(self, tickets: list[Ticket]) -> None:
        """Requests whose prompts are read join those that decode; their first tokens."""
        if not tickets:
            return
        logits = torch.cat([t.logits for t in tickets if t.logits is not None])
        for ticket in tickets:
            state = ticket.state or {}
            with self._changed:
                self._reading.remove(ticket)
                ticket.row = len(self._running)
                self._running.append(ticket)
            for name, pool in self.pool.items():
                pool[ticket.row].copy_(state[name][0])
            ticket.state = None
            self._remember(ticket)
        self._choose(tickets, logits)

    def _remember(self, ticket: Ticket) -> None:
        """What penalties ask for."""
        sampling, size = ticket.request.sampling, (self.slots, self.model.config.vocab_size)
        if sampling.repetition_penalty != 1.0:
            if self._seen is None:
                self._seen = torch.zeros(size, dtype=torch.bool, device=self.device)
            self._seen[ticket.row] = False
            self._seen[ticket.row, self._tokens(ticket).long().to(self.device)] = True
        if sampling.counts:
            if self._counts is None:
                self._counts = torch.zeros(size, dtype=torch.int32, device=self.device)
            self._counts[ticket.row] = 0

    def _decode(self) -> None:
        running = list(self._running)
        count, size = len(running), len(running)
        if self.invariant:
            size = len(next(iter(self.pool.values())))
        elif self._graphs is not None:
            size = min(self.slots, 1 << (count - 1).bit_length())
        ids = torch.tensor([t.last for t in running] + [0] * (size - count), device=self.device)
        captured = self._captured(size) if self._graphs is not None else None
        if captured is not None:
            step, place = captured
            place.copy_(torch.tensor([*range(count), *[-1] * (size - count)]))
            logits = step(ids)
        else:
            with invariant_steps(self.invariant):
                logits = self.model.step(ids, {name: t[:size] for name, t in self.pool.items()})
        self.counters.steps += 1
        self._choose(running, logits[:count])

    def _captured(self, size: int) -> tuple[CapturedStep, Tensor] | None:
        """The step of a batch size as a CUDA graph, and where the rows it uses are told; None where there is none."""
        if self._graphs is not None and size not in self._graphs:
            place = torch.full((size,), -1, device=self.device)
            try:
                self._graphs[size] = CapturedStep(self.model, self.pool, size, place), place
            except (RuntimeError, ValueError) as error:
                log.warning("steps are launched one by one, not as CUDA graphs: %s", str(error).splitlines()[0])
                self._graphs = None
        return None if self._graphs is None else self._graphs[size]

    def _choose(self, tickets: list[Ticket], logits: Tensor) -> None:
        """Sample the next token of each, logits ``[len(tickets), vocabulary]``, and tell it."""
        masks: dict[int, Tensor] = {}  # by the tickets' numbers
        for n in reversed(range(len(tickets))):
            ticket, constraint = tickets[n], tickets[n].request.constraint
            if ticket.closing:  # its text was complete; the state now is as well
                self._leave(ticket, ticket.closing, self._final(ticket, logits[n : n + 1]))
            elif constraint is not None:
                try:
                    mask = allowed(constraint, logits.shape[1], self.vocabulary, ticket.request.stop)
                except Exception as error:  # it is this request's alone
                    self._leave(ticket, "error", error=f"constraint: {error}")
                    continue
                if mask is None:
                    self._leave(ticket, "stop", self._final(ticket, logits[n : n + 1]))
                else:
                    masks[ticket.number] = mask
        keep = [n for n, t in enumerate(tickets) if t.row >= 0]
        if not keep:
            return
        tickets, own = [tickets[n] for n in keep], logits[keep]  # a copy
        own[:, self.vocabulary :] = -torch.inf
        settings = [t.request.sampling for t in tickets]
        uniform = torch.tensor(
            [t.uniform() if s.temperature > 0 else 0.0 for t, s in zip(tickets, settings, strict=True)],
            dtype=torch.float64,
        )
        bound = own
        if masks:
            at = [n for n, t in enumerate(tickets) if t.number in masks]
            may = torch.stack([masks[tickets[n].number] for n in at]).to(self.device)
            bound = own.clone()  # log probabilities and kept states are of the model's own logits
            bound[at] = bound[at].masked_fill(~may, -torch.inf)
        rows = [t.row for t in tickets]
        seen = self._seen[rows] if self._seen is not None and any(s.repetition_penalty != 1 for s in settings) else None
        counts = self._counts[rows] if self._counts is not None and any(s.counts for s in settings) else None
        chosen = sample(bound, settings, uniform, seen, counts)
        if seen is not None and self._seen is not None:
            self._seen[rows, chosen] = True
        if counts is not None and self._counts is not None:
            self._counts[rows, chosen] += 1
        logprobs = _logprobs(own, chosen, [t.request.logprobs for t in tickets])
        for n, (ticket, token) in enumerate(zip(tickets, chosen.tolist(), strict=True)):
            self._wrote(ticket, token, own[n : n + 1], *logprobs.get(n, (0.0, ())))

    def _wrote(self, ticket: Ticket, token: int, logits: Tensor, logprob: float, top: tuple) -> None:
        if token in ticket.request.stop:
            self._leave(ticket, "stop", self._final(ticket, logits))
            return
        ticket.last = token
        ticket.written.append(token)
        self.counters.tokens += 1
        ticket.emit(Event(token=token, logprob=logprob, top=top))
        finish: Finish | None = "length" if len(ticket.written) >= ticket.request.max_tokens else None
        if (constraint := ticket.request.constraint) is not None:
            try:
                constraint.take(token)
            except Exception as error:  # it is this request's alone
                self._leave(ticket, "error", error=f"constraint: {error}")
                return
            if constraint.finished:
                finish = "stop"
        if finish is not None:
            if ticket.request.keep:
                ticket.closing = finish
            else:
                self._leave(ticket, finish)

    def _tokens(self, ticket: Ticket) -> Tensor:
        """Of the whole text so far, int32 on the CPU."""
        before = [] if ticket.request.start is None else [torch.as_tensor(ticket.request.start.tokens)]
        own = torch.tensor([*ticket.request.prompt, *ticket.written], dtype=torch.int32)
        return torch.cat([*(x.to(torch.int32).cpu() for x in before), own])

    def _final(self, ticket: Ticket, logits: Tensor) -> Start | None:
        """The state after the text, which the pool's row holds."""
        if not ticket.request.keep:
            return None
        state = {name: t[ticket.row : ticket.row + 1].clone() for name, t in self.pool.items()}
        return Start(self._tokens(ticket), state, logits.clone())

    def _mark(self) -> float | None:
        """`Shares.mark`, before a request joins those under way or leaves them."""
        return None if self._shares is None else self._shares.mark(len(self._reading) + len(self._running))

    def _leave(self, ticket: Ticket, finish: Finish, final: Start | None = None, error: str = "") -> None:
        now = self._mark()
        if now is not None and ticket.joined is not None:
            ticket.joules = now - ticket.joined or None  # a counter that has not moved tells nothing
        with self._changed:
            if ticket in self._reading:
                self._reading.remove(ticket)
            if ticket.row >= 0:
                last = self._running.pop()
                if last is not ticket:  # it takes the place that becomes free
                    for pool in (*self.pool.values(), self._seen, self._counts):
                        if pool is not None:
                            pool[ticket.row].copy_(pool[last.row])
                    self._running[ticket.row], last.row = last, ticket.row
        ticket.row, ticket.state, ticket.logits = -1, None, None
        self._finish(ticket, finish, final, error)

    def _finish(self, ticket: Ticket, finish: Finish, final: Start | None = None, error: str = "") -> None:
        self._open.pop(ticket.number, None)
        self.counters.finished[finish] = self.counters.finished.get(finish, 0) + 1
        ticket.emit(Event(read=ticket.done, finish=finish, final=final, error=error, joules=ticket.joules))


def _logprobs(logits: Tensor, chosen: Tensor, alternatives: Sequence[int | None]) -> dict[int, tuple[float, tuple]]:
    """By row, where it has a number of alternatives: the log probability of what was chosen, and the likeliest tokens
    with theirs."""
    asked = [(n, k) for n, k in enumerate(alternatives) if k is not None]
    if not asked:
        return {}
    lines = [torch.log_softmax(logits[n].double(), -1) for n, _ in asked]  # of several rows it depends on their number
    best = [line.topk(k) for line, (_, k) in zip(lines, asked, strict=True)]
    own = torch.stack([line[chosen[n]] for line, (n, _) in zip(lines, asked, strict=True)]).tolist()
    pairs = zip(
        torch.cat([b.indices for b in best]).tolist(), torch.cat([b.values for b in best]).tolist(), strict=True
    )
    return {n: (value, tuple(itertools.islice(pairs, k))) for value, (n, k) in zip(own, asked, strict=True)}
