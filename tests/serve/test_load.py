"""A server under load: nobody's answer depends on the others, nothing grows, nothing leaks."""

from __future__ import annotations

import json
import random
import threading
import time

import httpx
import pytest
from serve_cases import serving, small_model

from llm_mlp.bench.load import load, server
from llm_mlp.bench.serving import pairs
from llm_mlp.checkpoint import save_model
from llm_mlp.config import ModelConfig, build
from llm_mlp.data.tokenizer import Tokenizer
from llm_mlp.models import build_model


def test_load_of_a_few_seconds(tmp_path):
    model = small_model()
    save_model(tmp_path / "model", *model)
    asked = pairs(4, 8, 12, model[1])
    with server(tmp_path / "model", "--slots", "4", "--queue", "100", "--invariant") as (url, pid):
        alone = [load(url, [body], clients=1, seconds=0.01, pid=pid).streams[0] for body in asked]
        found = load(url, asked, clients=9, seconds=3, pid=pid)
    assert all(s.tokens == 12 and not s.error for s in alone) and len({s.text for s in alone}) == 4
    assert len(found.streams) > 20 and all(s.text == alone[s.pair].text and not s.error for s in found.streams)
    summary = found.summary()
    assert summary["errors"] == 0 and summary["tokens_per_second"] > 0
    assert summary["first_token_ms"]["p50"] <= summary["first_token_ms"]["p95"]


@pytest.mark.slow
def test_64_clients_for_five_minutes(tmp_path):
    tokenizer = Tokenizer.bytes()
    save_model(tmp_path / "demo", build_model(build(ModelConfig, {"preset": "demo"})).randomize_(), tokenizer)
    asked = pairs(16, 32, 64, tokenizer)
    options = ("--slots", "64", "--queue", "100", "--invariant", "--threads", "2")
    with server(tmp_path / "demo", *options) as (url, pid):
        alone = [load(url, [body], clients=1, seconds=0.01, pid=pid).streams[0] for body in asked]
        found = load(url, asked, clients=64, seconds=300, pid=pid)
        ready = httpx.get(url + "/ready").json()
    assert ready["free"] == 64
    summary = found.summary()
    print(json.dumps(summary))
    assert summary["errors"] == 0
    assert all(s.text == alone[s.pair].text for s in found.streams)
    assert summary["resident_growth"] <= 0.05  # from minute 1
    assert summary["server_cpu_ms_a_token"] <= 0.2


@pytest.mark.slow
def test_a_soak_of_cancellations_leaks_nothing(tmp_path):
    """Clients that leave at any moment, bodies that are too large, and some that stay; then all slots are free."""
    model = small_model()
    with serving(tmp_path, model=model, slots=4, queue=50, max_body=50_000) as (url, service):
        until, seen = time.time() + 60, set()

        def client(number: int) -> None:
            chance = random.Random(number)
            while time.time() < until:
                body = {"prompt": "The mill " * chance.randint(1, 300), "max_tokens": 200, "stream": True}
                kind = chance.choice(("leave", "leave", "huge", "stay"))
                try:
                    if kind == "huge":
                        body["prompt"] = "x" * 60_000
                    if kind in ("huge", "stay"):
                        body["max_tokens"] = 3
                        seen.add(httpx.post(url + "/v1/completions", json=body, timeout=60).status_code)
                    else:
                        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as answer:
                            for _, _ in zip(range(chance.randint(0, 30)), answer.iter_bytes(), strict=False):
                                pass
                except httpx.HTTPError:
                    seen.add("cut")

        threads = [threading.Thread(target=client, args=(n,)) for n in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        deadline = time.time() + 10
        while service.engine.busy and time.time() < deadline:
            time.sleep(0.05)
        assert service.engine.load == {"waiting": 0, "reading": 0, "running": 0, "free": 4}
        assert {200, 413} <= seen <= {200, 413, "cut"}
