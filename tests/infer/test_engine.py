"""The engine: what a request gets beside others is what it gets alone; slots come back whatever happens."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from model_cases import random_model

from llm_mlp.infer import (
    Engine,
    Full,
    Request,
    Sampling,
    Stopped,
    generate,
    read_tokens,
    sample,
    slots_within,
    state_bytes,
)
from llm_mlp.infer import engine as engine_module
from llm_mlp.infer.engine import CALLS

GREEDY = Sampling(0)


def prompts(n, longest=40, vocabulary=61):
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest, (n,), generator=g).tolist()
    return [torch.randint(vocabulary, (k,), generator=g).tolist() for k in lengths]


class Listener:
    """Collects a request's events."""

    def __init__(self):
        self.events = []

    def __call__(self, event):
        self.events.append(event)

    @property
    def tokens(self):
        return [e.token for e in self.events if e.token is not None]

    @property
    def logprobs(self):
        return [(e.logprob, e.top) for e in self.events if e.token is not None]

    @property
    def finish(self):
        assert sum(e.finish is not None for e in self.events) <= 1
        return self.events[-1].finish if self.events else None


def until_idle(engine, limit=2000):
    for _ in range(limit):
        if not engine.busy:
            return
        engine.step()
    raise AssertionError("the engine is not done")


def run(engine, requests, late=0):
    """All of them, each ``late`` steps after the one before."""
    listeners = [Listener() for _ in requests]
    for request, listener in zip(requests, listeners, strict=True):
        engine.submit(request, listener)
        for _ in range(late):
            engine.step()
    until_idle(engine)
    assert engine.load == {"waiting": 0, "reading": 0, "running": 0, "free": engine.slots}
    return listeners


@pytest.mark.parametrize("case", ["plain", "wide", "erase-diagonal", "routing"])
@pytest.mark.parametrize("late", [0, 2])
def test_many_are_as_one(case, late):
    model = random_model(case)
    asked = [Request(p, 12, GREEDY) for p in prompts(9)]
    found = run(Engine(model, slots=4, chunk=16), asked, late)
    for request, listener in zip(asked, found, strict=True):
        assert listener.tokens == list(generate(model, request.prompt, max_tokens=12, sampling=GREEDY))
        assert listener.finish == "length"


def test_invariant_to_the_bit():
    """Tokens and log probabilities beside others, in whatever slot, are those of a run alone."""
    model = random_model("plain").float()
    rules = [GREEDY, Sampling(0.9, top_p=0.9), Sampling(1.1, repetition_penalty=1.2, presence_penalty=0.3)]
    asked = [Request(p, 10, rules[i % 3], seed=i, logprobs=3) for i, p in enumerate(prompts(10))]
    together = run(Engine(model, slots=5, chunk=16, invariant=True), asked, late=1)
    other_way = run(Engine(model, slots=5, chunk=16, invariant=True), asked[::-1])[::-1]
    for request, a, b in zip(asked, together, other_way, strict=True):
        [alone] = run(Engine(model, slots=5, chunk=16, invariant=True), [request])
        assert alone.tokens == a.tokens == b.tokens
        assert alone.logprobs == a.logprobs == b.logprobs


def test_seeds_and_logprobs():
    model = random_model("plain")
    warm = Sampling(1.0)
    a, b, c = run(Engine(model, slots=3), [Request([1, 2], 20, warm, seed=s, logprobs=61) for s in (1, 1, 2)])
    assert a.tokens == b.tokens != c.tokens
    for listener in (a, c):
        state, logits = read_tokens(model, [1, 2])
        for token, (logprob, top) in zip(listener.tokens, listener.logprobs, strict=True):
            want = torch.log_softmax(logits[0].double(), -1)
            assert logprob == pytest.approx(float(want[token]), abs=1e-6)
            assert sum(2.718281828459045**p for _, p in top) == pytest.approx(1)
            assert [p for _, p in top] == sorted((p for _, p in top), reverse=True)
            logits = model.step(torch.tensor([token]), state)


def test_sampled_tokens_are_those_of_generate():
    """Of each request by its own seed and rules, also where rows of the pool change places."""
    model = random_model("plain")
    rules = [
        Sampling(1.0),
        Sampling(0.9, repetition_penalty=1.5),
        Sampling(1.2, top_k=7, presence_penalty=1.0, frequency_penalty=0.5),
        Sampling(1.5, top_p=0.8, repetition_penalty=0.8, logit_bias={3: 2.0}),
        GREEDY,
        Sampling(0, frequency_penalty=1.5),
    ]
    asked = [
        Request(p, (5, 70, 12)[n % 3], rules[n % len(rules)], seed=n % 4) for n, p in enumerate(prompts(12, longest=9))
    ]
    for late in (0, 1):
        for request, listener in zip(asked, run(Engine(model, slots=5), asked, late), strict=True):
            how = {"max_tokens": request.max_tokens, "sampling": request.sampling, "seed": request.seed}
            assert listener.tokens == list(generate(model, request.prompt, **how))


def test_stop_and_vocabulary():
    model = random_model("plain")
    free = list(generate(model, [5], max_tokens=30, sampling=GREEDY))
    stop = free[4]
    [one] = run(Engine(model), [Request([5], 30, GREEDY, stop=frozenset([stop]))])
    assert one.tokens == free[: free.index(stop)] and one.finish == "stop"
    [bound] = run(Engine(model, vocabulary=20), [Request([5], 30, Sampling(3.0), seed=0)])
    assert max(bound.tokens) < 20


@pytest.mark.parametrize("stop", [False, True])
def test_what_is_kept_is_the_state_after_the_text(stop):
    model = random_model("plain")
    free = list(generate(model, [5, 6], max_tokens=9, sampling=GREEDY))
    ends = frozenset(free[-1:]) if stop else frozenset()
    [one] = run(Engine(model, chunk=4), [Request([5, 6], 9, GREEDY, stop=ends, keep=True)])
    text = [5, 6, *one.tokens]
    final = one.events[-1].final
    assert final.tokens.tolist() == text
    state, logits = read_tokens(model, text)
    assert (final.logits - logits).abs().max() < 1e-9
    for name, t in state.items():
        assert (final.state[name].double() - t.double()).nan_to_num().abs().max() < 1e-9
    # And one goes on from it, twice: it is not changed.
    want = list(generate(model, [*text, 7], max_tokens=6, sampling=GREEDY))
    found = run(Engine(model, chunk=4), [Request([7], 6, GREEDY, start=final)] * 2)
    assert all(listener.tokens == want for listener in found)


def test_reading_alone():
    model = random_model("plain")
    [one] = run(Engine(model, chunk=8), [Request(list(range(30)), 0, keep=True)])
    assert one.tokens == [] and one.finish == "length"
    assert [e.read for e in one.events[:-1]] == [8, 16, 24, 30]
    _, logits = read_tokens(model, list(range(30)))
    assert (one.events[-1].final.logits - logits).abs().max() < 1e-9


def test_streams_keep_their_pace():
    """A long prompt is read between the tokens of a running request, a piece at a time."""
    engine, long, short = Engine(random_model("plain"), slots=2, chunk=8), Listener(), Listener()
    engine.submit(Request([1], 40, GREEDY), short)
    engine.step()
    engine.submit(Request([2] * 80, 3, GREEDY), long)
    while not long.tokens:
        before = len(short.tokens)
        engine.step()
        assert len(short.tokens) == before + 1
    assert [e.read for e in long.events if e.token is None][:10] == list(range(8, 81, 8))
    until_idle(engine)


def test_a_long_prompt_keeps_short_ones_waiting_for_a_step():
    engine, long, short = Engine(random_model("plain"), slots=3, chunk=8), Listener(), Listener()
    engine.submit(Request([2] * 800, 0), long)
    engine.step()
    engine.submit(Request([1], 4, GREEDY), short)
    engine.submit(Request([3] * 24, 4, GREEDY), Listener())
    for _ in range(2):
        engine.step()
    assert len(short.tokens) >= 1 and long.finish is None
    until_idle(engine)
    assert long.finish == "length"


def test_short_prompts_that_keep_coming_let_a_long_one_be_read():
    engine, long = Engine(random_model("plain"), slots=3, chunk=8), Listener()
    engine.submit(Request([2] * 80, 0), long)
    for _ in range(21):  # half of the steps are its
        engine.submit(Request([1] * 8, 0), Listener())
        engine.step()
    assert long.finish == "length"


def test_calls_let_streams_write():
    """Work that asks for more as soon as some is done: a token between any two that are long, several short ones."""
    engine, stream, done = Engine(random_model("plain"), slots=1), Listener(), []

    def work(seconds):
        time.sleep(seconds)
        done.append(seconds)
        if len(done) < 40:
            engine.call(lambda: work(seconds))

    engine.submit(Request([1], 200, GREEDY), stream)
    engine.step()
    for _ in range(3):
        engine.call(lambda: work(2 * CALLS))
    for _ in range(5):
        before, written = len(done), len(stream.tokens)
        engine.step()
        assert (len(done), len(stream.tokens)) == (before + 1, written + 1)
    done.clear()
    for _ in range(3):
        engine.call(lambda: done.append(0))
    for _ in range(3):
        engine.step()
    assert done == [2 * CALLS] * 3  # those that were there before
    engine.step()
    assert done[3:6] == [0] * 3
    until_idle(engine)


def test_first_tokens_that_fail_end_their_requests_alone(monkeypatch, caplog):
    """Prompts that were read in one go are not read again when what follows fails."""
    engine, running, others = Engine(random_model("plain"), slots=4), Listener(), [Listener(), Listener()]
    engine.submit(Request([1], 9, GREEDY), running)
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(
            engine_module, "sample", lambda logits, *rest: 1 / 0 if len(logits) == 2 else sample(logits, *rest)
        )
        for n, listener in enumerate(others):
            engine.submit(Request([2 + n] * 3, 5, GREEDY), listener)
        engine.step()
    assert [x.finish for x in others] == ["error"] * 2 and "ZeroDivisionError" in others[0].events[-1].error
    assert [e.read for e in others[0].events] == [3, 3] and engine.load["free"] == 3
    until_idle(engine)
    assert running.finish == "length" and len(running.tokens) == 9


@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_cancelling_frees_the_slot_within_a_step(after):
    engine, other = Engine(random_model("plain"), slots=2, chunk=8), Listener()
    tickets = [engine.submit(Request([3] * 30, 50, GREEDY), Listener()) for _ in range(3)]
    engine.submit(Request([4], 5, GREEDY), other)
    for _ in range(after):
        engine.step()
    for ticket in tickets:
        ticket.cancel()
    engine.step()
    assert engine.load["free"] >= 1
    until_idle(engine)
    assert engine.load["free"] == 2 and other.finish == "length"
    assert engine.counters.finished == {"cancelled": 3, "length": 1}


def test_a_failing_listener_and_a_failing_prompt_harm_nobody_else(monkeypatch, caplog):
    model = random_model("plain")
    engine, good, bad = Engine(model, slots=3), Listener(), Listener()
    whole = model.forward

    def forward(ids, *args, **kwargs):
        if (ids == 13).any():
            raise RuntimeError("CUDA out of memory")
        return whole(ids, *args, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    engine.submit(Request([1], 6, GREEDY), good)
    engine.submit(Request([13], 6, GREEDY), bad)
    engine.submit(Request([2], 6, GREEDY), lambda event: 1 / 0)
    until_idle(engine)
    assert good.finish == "length" and len(good.tokens) == 6
    assert bad.finish == "error" and "out of memory" in bad.events[-1].error
    assert engine.load["free"] == 3


def test_a_failed_engine_tells_everybody_at_once(monkeypatch):
    """Whatever they are doing, also one that the failure has left in no queue; and it takes nothing more."""
    engine, found = Engine(random_model("plain"), slots=3, chunk=8), [Listener() for _ in range(5)]
    sizes = (1, 1, 200, 1, 1)
    for size, listener in zip(sizes, found, strict=True):
        engine.submit(Request([1] * size, 100, GREEDY), listener)
    for _ in range(3):
        engine.step()
    assert engine.load == {"waiting": 2, "reading": 1, "running": 2, "free": 0}

    def fail():
        engine._running.pop()
        raise MemoryError("no more")

    monkeypatch.setattr(engine, "_read_some", fail)
    call = engine.call(lambda: engine.call(lambda: 1))  # the inner one is still to be run when the step fails
    with pytest.raises(MemoryError, match="no more"):
        engine.run()
    assert isinstance(engine.failed, MemoryError) and not engine.busy and engine.load["free"] == 3
    for listener in found:
        assert listener.finish == "error" and "the engine has failed (MemoryError)" in listener.events[-1].error
    with pytest.raises(Stopped, match="MemoryError"):
        call.result(0).result(0)
    for again in (lambda: engine.submit(Request([1], 1), Listener()), lambda: engine.call(lambda: 1)):
        with pytest.raises(Stopped, match="has failed"):
            again()


@pytest.mark.parametrize("whole_engine", [False, True])
def test_a_text_that_is_whole_is_told_where_the_step_behind_it_fails(whole_engine, monkeypatch):
    """A step that only completes a state to be kept costs that state alone; one that has to write more ends as an
    error."""
    model = random_model("plain")
    engine, kept, longer = Engine(model, slots=2), Listener(), Listener()
    engine.submit(Request([1], 3, GREEDY, keep=True), kept)
    engine.submit(Request([1], 9, GREEDY), longer)
    while len(kept.tokens) < 3:
        engine.step()
    monkeypatch.setattr(engine, "_read_some" if whole_engine else "_decode", lambda: 1 / 0)
    if whole_engine:
        with pytest.raises(ZeroDivisionError):
            engine.run()
    else:
        engine.step()
    last = kept.events[-1]
    assert kept.finish == "length" and last.final is None and "ZeroDivisionError" in last.error
    assert longer.finish == "error" and "ZeroDivisionError" in longer.events[-1].error
    assert kept.tokens == list(generate(model, [1], max_tokens=3, sampling=GREEDY)) and engine.load["free"] == 2


def test_the_queue_is_bounded_and_closing_drains():
    engine, found = Engine(random_model("plain"), slots=1, queue=1), Listener()
    engine.submit(Request([1], 4, GREEDY), found)
    engine.submit(Request([2], 4, GREEDY), Listener())
    with pytest.raises(Full, match="2 requests are waiting"):
        engine.submit(Request([3], 4, GREEDY), Listener())
    thread = threading.Thread(target=engine.run)
    thread.start()
    assert engine.call(lambda: 6 * 7).result(10) == 42
    engine.close()
    thread.join(30)
    assert not thread.is_alive() and found.finish == "length"
    with pytest.raises(Stopped, match="closing"):
        engine.submit(Request([1], 4), Listener())


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request([], 4), "needs a prompt or a start"),
        (Request([61], 4), "token 61 is outside"),
        (Request([1], -1), "max_tokens"),
        (Request([1], 4, Sampling(logit_bias={99: 1.0})), "logit_bias: token 99"),
    ],
)
def test_bad_requests(request_, says):
    with pytest.raises(ValueError, match=says):
        Engine(random_model("plain")).submit(request_, Listener())


def test_slots_fit_a_budget():
    model = random_model("plain")
    each = state_bytes(model)
    assert each == sum(t.numel() * t.element_size() for t in model.init_state(1).values())
    assert slots_within(model, 4, None) == (4, f"4 active + 0 stored contexts of {each / 1e6:.2f} MB")
    fit, line = slots_within(model, 100, 10 * each, stored=3 * each)
    assert fit == 7 and line.startswith("7 active + 3 stored contexts") and "100 were asked for" in line
    fit, line = slots_within(model, 4, 10)
    assert fit == 1 and line.endswith("; that is more than the 10 bytes allow")  # never a refusal to start
    with pytest.raises(ValueError, match=r"layers\.\d: attention keeps keys and values"):
        Engine(random_model("attention"))


@pytest.mark.parametrize(
    ("wanted", "room", "fits", "says"),
    [
        (40, None, 40, "holds 64 states"),
        (40, 64, 40, "holds 64 states"),
        (40, 63, 32, "40 were asked for"),
        (8, 32, 8, "holds 32 states"),
        (40, 31, 32, "is more than the"),
        (8, 8, 8, "is more than the"),
    ],
)
def test_an_invariant_pool_is_counted_with_its_padding(wanted, room, fits, says):
    model = random_model("plain")
    each = state_bytes(model)
    fit, line = slots_within(model, wanted, None if room is None else room * each, invariant=True)
    assert fit == fits and says in line
    pool = Engine(model, slots=fit, invariant=True).pool
    taken = sum(t.numel() * t.element_size() for t in pool.values())
    assert (room is not None and taken > room * each) == ("is more than" in line)


class Work:
    """A meter that tells a joule for each prompt token read and each decoding step."""

    def __init__(self, unavailable_at: int | None = None) -> None:
        self.engine, self.unavailable_at = None, unavailable_at

    def joules(self) -> float | None:
        done = 0 if self.engine is None else self.engine.counters.prompt_tokens + self.engine.counters.steps
        return None if self.unavailable_at is not None and done >= self.unavailable_at else float(done)


def metered(work: Work, **more) -> Engine:
    work.engine = Engine(random_model("plain"), chunk=16, energy=work, **more)
    return work.engine


def test_energy_is_shared_among_those_who_run():
    engine = metered(Work(), slots=3)
    alone = run(engine, [Request([1, 2, 3], 5, GREEDY)])[0]
    assert alone.events[-1].joules == 3 + 4  # the first token comes of the prompt
    assert [e.joules for e in alone.events[:-1]] == [None] * (len(alone.events) - 1)
    two = run(engine, [Request([1, 2, 3], 5, GREEDY)] * 2)
    assert [x.events[-1].joules for x in two] == [3 + 4 / 2] * 2  # read in one go, decoded together
    before = engine.counters.prompt_tokens + engine.counters.steps
    many = run(engine, [Request(p, 3 + n, GREEDY) for n, p in enumerate(prompts(8))], late=2)
    used = engine.counters.prompt_tokens + engine.counters.steps - before
    assert sum(x.events[-1].joules for x in many) == pytest.approx(used)  # none is lost, none is counted twice


def test_energy_that_nobody_tells():
    for engine in (Engine(random_model("plain"), chunk=16), metered(Work(0)), metered(Work(5))):
        found = run(engine, [Request([1, 2, 3], 5, GREEDY)])[0]
        assert found.finish == "length" and found.events[-1].joules is None
