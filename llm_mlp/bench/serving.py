"""A server under load beside the bare engine with the same requests: throughput, latencies, memory, CPU time.

Both run in turn, a few seconds each, for a machine's own speed changes from minute to minute: while one runs the other
is stopped where it is, with all its requests under way, and goes on from there. So each pair of windows gives a ratio,
and how far the ratios lie apart tells what one of them is worth.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_mlp.bench.load import Clock, Load, clients_of, load, server
from llm_mlp.bench.plot import check_place, plot_serving
from llm_mlp.bench.record import record
from llm_mlp.bench.speed import joules_told, setup
from llm_mlp.checkpoint import load_model, save_model
from llm_mlp.config import ConfigError, ModelConfig, build
from llm_mlp.data.tokenizer import Tokenizer
from llm_mlp.energy import Energy, Spent
from llm_mlp.infer import Engine, Event, Request, Sampling
from llm_mlp.models import build_model

SECONDS = 3.0  # of a window: less than the 5 after which a server closes a connection that it has heard nothing from
LAST = 0.05  # seconds in which what a stopped server has sent is read


class BareEngine:
    """An engine without a server, whose requests are each followed by the next as soon as they end."""

    def __init__(self, folder: Path, bodies: Sequence[dict], held: dict[str, Any], **how: Any) -> None:
        """``held``: how `load_model` loads the model. ``how``: of `Engine`."""
        model, self._tokenizer = load_model(folder, **held)
        self._engine = Engine(model, vocabulary=self._tokenizer.vocab_size, **how)
        self._requests, self._turn = [self._request(body) for body in bodies], 0

    def _request(self, body: dict) -> Request:
        bias = {int(i): x for i, x in body["logit_bias"].items()}
        return Request(
            [self._tokenizer.eos, *self._tokenizer.encode(body["prompt"])],
            body["max_tokens"],
            Sampling(body["temperature"], logit_bias=bias),
            body["seed"],
            frozenset([self._tokenizer.eos]),
        )

    def begin(self, openings: Sequence[dict]) -> None:
        """Submit a request for each of those who ask."""
        for body in openings:
            self._engine.submit(self._request(body), self._next)

    def _next(self, event: Event) -> None:
        if event.finish is not None:
            self._turn += 1
            self._engine.submit(self._requests[self._turn % len(self._requests)], self._next)

    def run(self, seconds: float) -> tuple[int, float]:
        """Steps for so long: tokens written, and the seconds that it took."""
        began, before = time.perf_counter(), self._engine.counters.tokens
        while time.perf_counter() < began + seconds:
            self._engine.step()
        return self._engine.counters.tokens - before, time.perf_counter() - began


@dataclass(frozen=True)
class Pair:
    """A window of the server and one of the engine behind it."""

    begin: float  # of the server's, by the load's clock; what came up to ``end`` is of it
    end: float
    seconds: float  # that the server ran
    engine_tokens: int
    engine_seconds: float
    joules: float | None
    engine_joules: float | None


async def _in_turn(
    clock: Clock, pid: int, engine: BareEngine, energy: Energy, seconds: float, found: list[Pair]
) -> None:
    """Pairs of windows for about ``seconds`` of each; those of the first pair, which warm both, do not count."""
    count = max(1, round(seconds / SECONDS))
    each = seconds / count
    for number in range(1 + count):
        begin = clock()
        with Spent(energy) as spent:
            await asyncio.sleep(each)
        os.kill(pid, signal.SIGSTOP)
        try:
            ran = clock() - begin
            await asyncio.sleep(LAST)
            end = clock()
            clock.pause()
            with Spent(energy) as alone:
                tokens, took = engine.run(each)
        finally:
            os.kill(pid, signal.SIGCONT)
        clock.resume()
        if number:
            found.append(Pair(begin, end, ran, tokens, took, spent.joules, alone.joules))


def compare(
    url: str, pid: int, engine: BareEngine, bodies: Sequence[dict], clients: int, seconds: float, energy: Energy
) -> tuple[Load, list[Pair]]:
    """A server under load and the bare engine in turn. The first request of each client is the shorter the lower its
    number, so that they do not all end at once."""
    openings = [
        bodies[n % len(bodies)] | {"max_tokens": -(-bodies[n % len(bodies)]["max_tokens"] * (n + 1) // clients)}
        for n in range(clients)
    ]
    engine.begin(openings)
    clock, found = Clock(), list[Pair]()
    turns = _in_turn(clock, pid, engine, energy, seconds, found)
    return asyncio.run(clients_of(url, bodies, clients, pid, clock, turns, openings)), found


def _compared(measured: Load, found: Sequence[Pair]) -> dict[str, Any]:
    """Tokens a second and joules a token of both, and the ratio of the speeds: the median over the pairs, and between
    which values the middle half of them lies."""
    tokens = [measured.tokens_within(pair.begin, pair.end) for pair in found]
    speeds = [n / pair.seconds for n, pair in zip(tokens, found, strict=True)]
    alone = [pair.engine_tokens / pair.engine_seconds for pair in found]
    ratios = [a / b for a, b in zip(speeds, alone, strict=True)]

    def joules(parts: Sequence[float | None], of: float) -> float | None:
        known = [part for part in parts if part is not None]
        return sum(known) / of if len(known) == len(parts) and of else None

    written = sum(pair.engine_tokens for pair in found)
    return {
        "tokens_per_second": round(sum(tokens) / sum(pair.seconds for pair in found), 1),
        "engine_tokens_per_second": round(written / sum(pair.engine_seconds for pair in found), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(float(x), 3) for x in np.percentile(ratios, (25, 75))],
        "pairs": len(found),
        "joules_per_token": joules([pair.joules for pair in found], sum(tokens)),
        "engine_joules_per_token": joules([pair.engine_joules for pair in found], written),
        "watts": joules([pair.joules for pair in found], sum(pair.seconds for pair in found)),
    }


def pairs(count: int, prompt_tokens: int, max_tokens: int, tokenizer: Tokenizer) -> list[dict]:
    """Requests that differ in prompt and seed; the end of text is never chosen, so that all write as much."""
    generator = np.random.default_rng(0)
    words = ["the", "mill", "by", "a", "river", "turned", "all", "day", "and", "its", "wheel", "was", "old"]
    bias = {str(tokenizer.eos): -100}
    return [
        {
            "prompt": " ".join(generator.choice(words, max(1, prompt_tokens // 2))),
            "seed": i,
            "max_tokens": max_tokens,
            "temperature": 0.8,
            "logit_bias": bias,
        }
        for i in range(count)
    ]


def bench_serving(
    folder: Path | None,
    preset: str,
    clients: list[int],
    seconds: float,
    slots: int,
    prompt_tokens: int,
    max_tokens: int,
    invariant: bool,
    weights: str,
    kept: str,
    results: str | Path | None,
    plot: Path | None,
    threads: int,
    device: str,
) -> Iterator[str]:
    """A server and the engine alone in turn, with each number of streaming clients; yields lines, records a JSON line
    for each.

    Raises:
        ConfigError: a preset whose vocabulary is too small, or a system that cannot stop a process.
    """
    if not hasattr(signal, "SIGSTOP"):
        raise ConfigError("bench serve stops the server while the engine runs alone, which this system cannot do")
    check_place(plot)
    on = setup(device, threads)
    energy, rows = Energy(on), []
    with tempfile.TemporaryDirectory() as place:
        if folder is None:
            tokenizer = Tokenizer.bytes()
            config = build(ModelConfig, {"preset": preset})
            if tokenizer.vocab_size > config.vocab_size:
                raise ConfigError(f"--preset {preset}: its vocabulary is smaller than 257 bytes")
            folder = Path(place) / preset
            save_model(folder, build_model(config).randomize_(), tokenizer)
        _, tokenizer = load_model(folder)
        bodies = pairs(16, prompt_tokens, max_tokens, tokenizer)
        queue = 10 * max(clients)
        held = {"device": on, "weights": weights, "state": kept}
        how: dict[str, Any] = {"slots": slots, "invariant": invariant, "queue": queue}
        options = ["--slots", str(slots), "--queue", str(queue), "--device", str(on), "--threads", str(threads)]
        options += ["--weights", weights, "--state", kept]
        with server(folder, *options, *(["--invariant"] if invariant else [])) as (url, pid):
            load(url, bodies, clients=1, seconds=0.5, pid=pid)  # warm
            for number in clients:
                engine = BareEngine(folder, bodies, held, **how)
                measured, found = compare(url, pid, engine, bodies, number, seconds, energy)
                facts = {"model": folder.name, "clients": number, "slots": slots, "invariant": invariant}
                facts |= {"weights": weights, "state": kept}
                facts |= {"seconds": seconds, "prompt_tokens": prompt_tokens, "max_tokens": max_tokens}
                facts |= measured.summary() | _compared(measured, found)
                rows.append(record(results, "serve-speed", facts, device=on, seed=0))
                yield from _told(facts)
    if plot is not None:
        plot_serving(plot, rows)


def _told(facts: dict[str, Any]) -> Iterator[str]:
    """What was measured, in lines."""
    clients, (low, high) = facts["clients"], facts["ratio_quartiles"]
    yield (
        f"server, {clients} clients: {facts['tokens_per_second']:,.0f} tokens/s, "
        f"{joules_told(facts['joules_per_token'])}; {facts['streams']} streams, {facts['errors']} errors"
    )
    yield (
        f"engine alone, {clients} requests: {facts['engine_tokens_per_second']:,.0f} tokens/s, "
        f"{joules_told(facts['engine_joules_per_token'])}"
    )
    yield f"ratio: {facts['ratio']:.2f}, median of {facts['pairs']} pairs of windows (half in {low:.2f} to {high:.2f})"
    for name in ("first_token_ms", "between_tokens_ms"):
        values = ", ".join(f"{p} {v} ms" for p, v in facts[name].items())
        yield f"{name.removesuffix('_ms').replace('_', ' ')}: {values}"
    growth = "" if facts["resident_growth"] is None else f"; its memory grew by {facts['resident_growth']:.1%}"
    yield f"server CPU outside the engine: {facts['server_cpu_ms_a_token']} ms a token{growth}"
