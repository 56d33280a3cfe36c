"""A server under load, beside the bare engine with the same requests: throughput, latencies, memory, CPU time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm_mlp.bench.plot import check_place, plot_serving
from llm_mlp.bench.record import record
from llm_mlp.bench.speed import joules_told, setup
from llm_mlp.checkpoint import load_model, save_model
from llm_mlp.config import ConfigError, ModelConfig, build
from llm_mlp.data.tokenizer import Tokenizer
from llm_mlp.energy import Energy, Spent
from llm_mlp.infer import Engine, Event, Request, Sampling
from llm_mlp.models import build_model

TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


@dataclass
class Stream:
    """One answer: which pair it was of, its text, and when its pieces came, in seconds."""

    pair: int
    text: str = ""
    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str = ""


@dataclass
class Load:
    """What came of some clients that asked for some time."""

    streams: list[Stream]
    seconds: float
    memory: list[tuple[float, int]]  # (seconds since the start, the server's resident bytes)
    cpu: float  # seconds of the server's threads outside the engine

    @property
    def tokens(self) -> int:
        return sum(s.tokens for s in self.streams)

    def summary(self) -> dict[str, Any]:
        """Tokens a second, percentiles in milliseconds, growth of memory from a fifth of the time on."""

        def milliseconds(values: Any) -> dict[str, float]:
            if not len(values):
                return {}
            return {f"p{p}": round(1e3 * float(np.percentile(values, p)), 2) for p in (50, 95, 99)}

        first = [s.times[0] - s.sent for s in self.streams if s.times]
        between = np.concatenate([np.diff(s.times) for s in self.streams if len(s.times) > 1] or [np.zeros(0)])
        settled = [size for at, size in self.memory if at >= self.seconds / 5]
        return {
            "streams": len(self.streams),
            "errors": sum(bool(s.error) for s in self.streams),
            "tokens_per_second": round(self.tokens / self.seconds, 1),
            "first_token_ms": milliseconds(first),
            "between_tokens_ms": milliseconds(between),
            "server_cpu_ms_a_token": round(1e3 * self.cpu / max(1, self.tokens), 4),
            "resident_bytes": settled[-1] if settled else None,
            "resident_growth": round(max(settled) / settled[0] - 1, 4) if settled else None,
        }


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, body: bytes, out: Stream) -> None:
    """One streamed completion over an open connection, as little as that takes."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    out.sent = time.perf_counter()
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    status = (await reader.readline()).split()
    while (await reader.readline()).strip():
        pass
    if status[1:2] != [b"200"]:
        out.error = b" ".join(status).decode()
        raise ConnectionError(out.error)
    while size := int(await reader.readline(), 16):
        chunk = await reader.readexactly(size)
        await reader.readline()
        now = time.perf_counter()
        for line in chunk.split(b"\n\n"):
            if line.startswith(b"data: {"):
                row = json.loads(line[6:])
                if "error" in row:
                    out.error = row["error"]["message"]
                elif row["choices"]:
                    out.text += row["choices"][0]["text"]
                    out.times.append(now)
                else:
                    out.tokens = row["usage"]["completion_tokens"]
    await reader.readline()


async def _clients(host: str, port: int, bodies: Sequence[dict], clients: int, seconds: float, pid: int) -> Load:
    began, streams, memory = time.perf_counter(), list[Stream](), list[tuple[float, int]]()
    payload = [json.dumps(b | {"stream": True, "stream_options": {"include_usage": True}}).encode() for b in bodies]
    cpu = _own_cpu(pid)

    async def client(number: int) -> None:
        turn, connection = number, None
        while time.perf_counter() < began + seconds:
            out = Stream(turn % len(payload))
            turn += 1
            try:
                if connection is None:
                    connection = await asyncio.open_connection(host, port)
                await _ask(*connection, host, payload[out.pair], out)
            except (OSError, ValueError, asyncio.IncompleteReadError) as error:
                out.error = out.error or f"{type(error).__name__}: {error}"
                connection = None
            streams.append(out)
        if connection is not None:
            connection[1].close()

    async def watch() -> None:
        while True:
            memory.append((time.perf_counter() - began, _resident(pid)))
            await asyncio.sleep(min(1.0, seconds / 20))

    watcher = asyncio.ensure_future(watch())
    await asyncio.gather(*(client(n) for n in range(clients)))
    watcher.cancel()
    return Load(streams, time.perf_counter() - began, memory, _own_cpu(pid) - cpu)


def load(url: str, bodies: Sequence[dict], *, clients: int, seconds: float, pid: int) -> Load:
    """Clients that each ask for one completion after another (``bodies`` in turn, streamed) until time is up."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    return asyncio.run(_clients(host, int(port), bodies, clients, seconds, pid))


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0  # not Linux


def _own_cpu(pid: int) -> float:
    """CPU seconds of a server's threads that are not the engine's: its event loop, and those that help it."""
    total = 0.0
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError, IndexError):
            name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
            if task.name == str(pid) or name.startswith(("asyncio", "AnyIO")):
                total += sum(map(int, rest.split()[11:13])) / TICKS
    return total


@contextlib.contextmanager
def server(folder: Path, *options: str) -> Iterator[tuple[str, int]]:
    """`llm-mlp serve` of a checkpoint in a process of its own: its address and process id."""
    command = [sys.executable, "-m", "llm_mlp", "serve", "--model", str(folder), "--port", "0", *options]
    with tempfile.TemporaryDirectory() as store, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*command, "--store", store], stderr=log)
        try:
            url, deadline = "", time.time() + 300
            while not url:
                log.seek(0)
                text = log.read()
                url = next((line.split()[-1] for line in text.splitlines() if line.startswith("listening on")), "")
                if process.poll() is not None or time.time() > deadline:
                    raise RuntimeError(f"the server did not start: {text[-500:]}")
                time.sleep(0.05)
            yield url, process.pid
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def bare_engine(
    folder: Path, bodies: Sequence[dict], *, clients: int, seconds: float, held: dict[str, Any], **how: Any
) -> tuple[float, float | None]:
    """Tokens a second, and joules a token, of the engine alone with the same requests, each followed by the next as
    soon as it ends. ``held``: how `load_model` loads it."""
    model, tokenizer = load_model(folder, **held)
    engine = Engine(model, vocabulary=tokenizer.vocab_size, **how)
    stop, turn = frozenset([tokenizer.eos]), iter(range(10**9))
    requests = [
        Request(
            [tokenizer.eos, *tokenizer.encode(b["prompt"])],
            b["max_tokens"],
            Sampling(b["temperature"], logit_bias={int(i): x for i, x in b["logit_bias"].items()}),
            b["seed"],
            stop,
        )
        for b in bodies
    ]
    began = time.perf_counter()

    def ask() -> None:
        engine.submit(requests[next(turn) % len(requests)], ask_again)

    def ask_again(event: Event) -> None:
        if event.finish is not None and time.perf_counter() < began + seconds:
            ask()

    for _ in range(clients):
        ask()
    with Spent(Energy(engine.device)) as spent:
        while engine.busy:
            engine.step()
    tokens = engine.counters.tokens
    return tokens / (time.perf_counter() - began), None if spent.joules is None else spent.joules / tokens


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
    """The engine alone, then a server of it, with each number of streaming clients; yields lines, records a JSON line
    for each."""
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
        bare = {}
        for number in clients:
            bare[number] = bare_engine(folder, bodies, clients=number, seconds=seconds / 2, held=held, **how)
            yield f"engine alone, {number} requests: {bare[number][0]:,.0f} tokens/s, {joules_told(bare[number][1])}"
        options = ["--slots", str(slots), "--queue", str(queue), "--device", str(on), "--threads", str(threads)]
        options += ["--weights", weights, "--state", kept]
        with server(folder, *options, *(["--invariant"] if invariant else [])) as (url, pid):
            load(url, bodies, clients=1, seconds=0.5, pid=pid)  # warm
            for number in clients:
                with Spent(energy) as spent:
                    measured = load(url, bodies, clients=number, seconds=seconds, pid=pid)
                found, (speed, joules) = measured.summary(), bare[number]
                ratio = found["tokens_per_second"] / speed
                each = None if spent.joules is None else spent.joules / max(1, measured.tokens)
                facts = {"model": folder.name, "clients": number, "slots": slots, "invariant": invariant}
                facts |= {"weights": weights, "state": kept}
                facts |= {"seconds": seconds, "prompt_tokens": prompt_tokens, "max_tokens": max_tokens}
                facts |= {"engine_tokens_per_second": round(speed, 1), "engine_joules_per_token": joules, **found}
                facts |= {"ratio": round(ratio, 3), "joules_per_token": each, "watts": spent.watts}
                rows.append(record(results, "serve-speed", facts, device=on, seed=0))
                yield from _told(number, found, ratio, each)
    if plot is not None:
        plot_serving(plot, rows)


def _told(clients: int, found: dict[str, Any], ratio: float, joules: float | None) -> Iterator[str]:
    """What a load's `Load.summary` says, in lines."""
    yield (
        f"server, {clients} clients: {found['tokens_per_second']:,.0f} tokens/s, {ratio:.2f} of the engine's, "
        f"{joules_told(joules)}; {found['streams']} streams, {found['errors']} errors"
    )
    for name in ("first_token_ms", "between_tokens_ms"):
        values = ", ".join(f"{p} {v} ms" for p, v in found[name].items())
        yield f"{name.removesuffix('_ms').replace('_', ' ')}: {values}"
    growth = "" if found["resident_growth"] is None else f"; its memory grew by {found['resident_growth']:.1%}"
    yield f"server CPU outside the engine: {found['server_cpu_ms_a_token']} ms a token{growth}"
