"""Clients of a server: streamed completions over raw sockets, as little as that takes, and what came of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm_mlp.bench.record import milliseconds

TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


@dataclass
class Stream:
    """One answer: which of the requests it was of (-1: of an opening one), its text, and when its pieces came, in
    seconds."""

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

    def tokens_within(self, begin: float, end: float) -> float:
        """That came in a stretch of time; a piece of text counts as many as its stream's do on average."""
        parts = (s.tokens * sum(begin < at <= end for at in s.times) / len(s.times) for s in self.streams if s.times)
        return sum(parts)

    def summary(self) -> dict[str, Any]:
        """Tokens a second, percentiles in milliseconds, growth of memory from a fifth of the time on."""

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


class Clock:
    """Seconds, those not counted in which it is paused."""

    def __init__(self) -> None:
        self._away, self._since = 0.0, float("inf")

    def __call__(self) -> float:
        return min(time.perf_counter(), self._since) - self._away

    def pause(self) -> None:
        self._since = time.perf_counter()

    def resume(self) -> None:
        self._away, self._since = self._away + time.perf_counter() - self._since, float("inf")


async def _ask(
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], host: str, body: bytes, clock: Clock, out: Stream
) -> None:
    """One streamed completion over an open connection."""
    reader, writer = connection
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    out.sent = clock()
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
        now = clock()
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


async def clients_of(
    url: str,
    bodies: Sequence[dict],
    clients: int,
    pid: int,
    clock: Clock,
    meanwhile: Coroutine[Any, Any, Any],
    openings: Sequence[dict] = (),
) -> Load:
    """Clients that each ask for one completion after another (``bodies`` in turn, streamed) until ``meanwhile`` is
    done, and then read their last ones. ``openings``: what each of them asks for first."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    began, streams, memory = clock(), list[Stream](), list[tuple[float, int]]()
    payload, first = (
        [json.dumps(b | {"stream": True, "stream_options": {"include_usage": True}}).encode() for b in some]
        for some in (bodies, openings)
    )
    cpu, asking = _own_cpu(pid), True

    async def client(number: int) -> None:
        turn, connection, opening = number, None, first[number : number + 1]
        while asking:
            out = Stream(-1 if opening else turn % len(payload))
            body = opening.pop() if opening else payload[out.pair]
            turn += 1
            try:
                if connection is None:
                    connection = await asyncio.open_connection(host, int(port))
                await _ask(connection, host, body, clock, out)
            except (OSError, ValueError, asyncio.IncompleteReadError) as error:
                out.error = out.error or f"{type(error).__name__}: {error}"
                connection = None
            streams.append(out)
        if connection is not None:
            connection[1].close()

    async def watch() -> None:
        while True:
            memory.append((clock() - began, _resident(pid)))
            await asyncio.sleep(0.25)

    tasks = [asyncio.ensure_future(client(n)) for n in range(clients)]
    watcher = asyncio.ensure_future(watch())
    try:
        await meanwhile
        asking = False
        await asyncio.gather(*tasks)
    finally:
        for task in (watcher, *tasks):
            task.cancel()
    return Load(streams, clock() - began, memory, _own_cpu(pid) - cpu)


def load(url: str, bodies: Sequence[dict], *, clients: int, seconds: float, pid: int) -> Load:
    """What comes of so many clients in so many seconds, and until their last answers have ended."""
    return asyncio.run(clients_of(url, bodies, clients, pid, Clock(), asyncio.sleep(seconds)))


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
