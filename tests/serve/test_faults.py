"""What goes wrong around a server: disks, files, clients. Whoever is meant is told, nobody else notices."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from serve_cases import TEXT, serving, small_model

from llm_mlp.context import format as files
from llm_mlp.infer import Full
from llm_mlp.serve import reading as reading_module
from llm_mlp.serve.service import Refused

STREAM = {"prompt": "The mill", "max_tokens": 200, "stream": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def served(model, tmp_path):
    store = tmp_path / "store"
    with serving(store, model=model, slots=4) as (url, service), httpx.Client(base_url=url, timeout=60) as http:
        yield http, service, store


def made(http, name, text, **more):
    found = http.post("/v1/contexts", json={"name": name, "text": text, **more})
    assert found.status_code == 201, found.text
    return found.json()


@pytest.mark.parametrize("how", ["create", "append", "upload"])
def test_a_full_disk_is_told_and_loses_nothing(served, how, monkeypatch):
    http, service, folder = served
    before = made(http, "book", "The mill stood by the river.")
    file = http.get("/v1/contexts/book/file").content

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if how == "upload":
            patch.setattr("tempfile.NamedTemporaryFile", full)
            found = http.put("/v1/contexts/again/file", content=file)
        else:
            patch.setattr(files, "save_file", full)
            found = {
                "create": lambda: http.post("/v1/contexts", json={"name": "new", "text": "More."}),
                "append": lambda: http.post("/v1/contexts/book/append", json={"text": " More."}),
            }[how]()
    message = found.json()["error"]["message"]
    assert found.status_code == 507 and "No space left on device" in message
    assert str(folder) not in message  # where it lies is nobody's business
    assert [row["id"] for row in http.get("/v1/contexts").json()["data"]] == [before["id"]]
    assert not list(folder.rglob("*.tmp"))
    assert http.post("/v1/contexts/book/append", json={"text": " More."}).status_code == 201


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "asked"),
    [("completions", {"prompt": " It"}), ("chat/completions", {"messages": [{"role": "user", "content": "It"}]})],
)
@pytest.mark.parametrize(
    ("how", "code", "says"),
    [
        ("disk", None, "No space left"),
        ("queue", "queue_full", "busy"),
        ("error", None, "its log has it"),
        ("step", None, "the engine failed: ZeroDivisionError"),
    ],
)
def test_an_answer_that_cannot_be_saved_is_told_whole(
    served, monkeypatch, caplog, path, asked, stream, how, code, says
):
    """With 200 and the reason beside it, whole or as a stream to its end."""
    http, service, folder = served
    before = made(http, "book", "The mill stood by the river.")
    body = {**asked, "max_tokens": 12, "temperature": 0, "context": "book", "stream": stream}

    def ask(**more):
        answer = http.post(f"/v1/{path}", json=body | {"stream_options": {"include_usage": True}} | more)
        assert answer.status_code == 200, answer.text
        if not stream:
            found = answer.json()
            text = found["choices"][0].get("text") or found["choices"][0]["message"]["content"]
            return text, found["choices"][0]["finish_reason"], found["usage"]["completion_tokens"], found
        *rows, done = (line.removeprefix("data: ") for line in answer.text.split("\n\n") if line)
        *rows, used = map(json.loads, rows)
        assert done == "[DONE]"
        choices = [row["choices"][0] for row in rows]
        text = "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)
        return text, choices[-1]["finish_reason"], used["usage"]["completion_tokens"], rows[-1]

    more = {"stop": ask()[0][3:6]} if how == "queue" else {}  # the state behind a stop text is read again
    want = ask(**more)
    submit = service.engine.submit

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    def busy(request, emit):
        if request.max_tokens == 0:
            raise Full("others wait")
        return submit(request, emit)

    decode = service.engine._decode

    def last_fails():
        if any(ticket.closing for ticket in service.engine._running):
            raise ZeroDivisionError("injected")
        decode()

    with monkeypatch.context() as patch:
        if how == "disk":
            patch.setattr(files, "save_file", full)
        elif how == "queue":
            patch.setattr(service.engine, "submit", busy)
        elif how == "step":
            patch.setattr(service.engine, "_decode", last_fails)
        else:
            patch.setattr(service.reader, "wrap", lambda *_: 1 / 0)
        found = ask(save_context="book", **more)
    assert found[:3] == want[:3]
    error = found[3]["context_error"]
    assert says in error["message"] and error["code"] == code and str(folder) not in error["message"]
    assert error["param"] == "save_context" and found[3]["context"] is None
    assert [r for r in caplog.records if r.exc_info] == [] or how in ("error", "step")
    assert [row["id"] for row in http.get("/v1/contexts").json()["data"]] == [before["id"]]
    saved = ask(save_context="book", **more)
    assert saved[:3] == want[:3] and saved[3]["context"]["name"] == "book" and saved[3]["context_error"] is None


def test_a_name_that_cannot_be_saved_to_is_refused_before_anything_is_written(served):
    http, service, _ = served
    made(http, "book", "The mill stood by the river.")
    made(http, "other", "No mill stood there.")
    for name, status, more in (("other", 409, {"context": "book"}), ("book", 409, {}), ("../x", 400, {})):
        ask = {"prompt": " It", "max_tokens": 4, "save_context": name, **more}
        for stream in (False, True):
            answer = http.post("/v1/completions", json={**ask, "stream": stream})
            assert answer.status_code == status and answer.json()["error"]["param"] == "save_context", answer.text
    assert service.engine.counters.tokens == 0


def test_no_room_is_told(model, tmp_path):
    with (
        serving(tmp_path, model=model, store_bytes=100_000) as (url, _),
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        statuses = [
            http.post("/v1/contexts", json={"name": f"n{i}", "text": f"Text {i}."}).status_code for i in range(12)
        ]
        assert statuses[0] == 201 and statuses[-1] == 507
        kept = {row["name"] for row in http.get("/v1/contexts").json()["data"]}
        assert kept == {f"n{i}" for i, status in enumerate(statuses) if status == 201}


def test_damaged_files_are_refused_where_they_are_asked_for_and_nowhere_else(served):
    http, service, folder = served
    ids = {name: made(http, name, f"The {name} stood by the river.")["id"] for name in ("mill", "house", "barn")}
    (folder / "objects" / f"{ids['mill']}.safetensors").write_bytes(b"not a context")
    object_ = folder / "objects" / f"{ids['house']}.safetensors"
    raw = bytearray(object_.read_bytes())
    raw[-5] ^= 1
    object_.write_bytes(raw)
    service._loaded.ram.drop(folder, ids["mill"])
    service._loaded.ram.drop(folder, ids["house"])
    (folder / "names" / "barn.json").write_text("{")
    for name, says in (("mill", "safetensors"), ("house", "altered"), ("barn", "damaged")):
        found = http.post("/v1/completions", json={"prompt": "x", "context": name, "max_tokens": 1})
        assert 400 <= found.status_code < 500 and says in found.json()["error"]["message"], found.text
        assert str(folder) not in found.text
    # A prompt that begins with a damaged text is read, and the reason told.
    found = http.post("/v1/completions", json={"prompt": "The house stood by the river. It", "max_tokens": 1}).json()
    assert "altered" in found["usage"]["prompt_tokens_details"]["cache"]
    assert str(folder) not in json.dumps(found)
    assert 'llm_mlp_cache_lookups_total{reason="unusable",result="miss"} 1.0' in http.get("/metrics").text
    assert {row["name"] for row in http.get("/v1/contexts").json()["data"]} == {"mill", "house"}
    assert made(http, "other", "Another text.")["tokens"]


def test_slow_readers_hold_nobody_up(served):
    """Who asks for a stream and does not read it gets no slot for longer than the answer takes."""
    http, service, _ = served
    host, port = http.base_url.host, http.base_url.port
    body = json.dumps({**STREAM, "max_tokens": 2000, "n": 4, "logprobs": 20}).encode()
    with contextlib.ExitStack() as stack:
        slow = stack.enter_context(socket.socket())
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((host, port))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        slow.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        deadline = time.time() + 60
        while not service.engine.counters.tokens:
            assert time.time() < deadline
            time.sleep(0.01)
        bias = {str(service.tokenizer.eos): -100}  # nothing ends before its length
        found = http.post("/v1/completions", json={"prompt": "The mill", "max_tokens": 5, "logit_bias": bias})
        assert found.json()["usage"]["completion_tokens"] == 5
        while service.engine.load["free"] < 4:
            assert time.time() < deadline
            time.sleep(0.05)
        assert http.get("/ready").json()["free"] == 4


def test_fields_that_mean_nothing_are_named_in_the_log(served, caplog):
    http, *_ = served
    caplog.set_level(logging.INFO, "llm_mlp.serve")
    body = {"prompt": "x", "max_tokens": 1, "contxt": "book", "user": "me"}
    assert http.post("/v1/completions", json=body).status_code == 200
    [row] = [json.loads(r.getMessage()) for r in caplog.records if "completions" in r.getMessage()]
    assert row["ignored"] == ["contxt", "user"]


# -- an engine that fails ------------------------------------------------------------------------------------------


def test_a_failed_engine_is_told_at_once(model, tmp_path, monkeypatch, caplog):
    """To who waits, who comes, and whoever asks after the server; what needs no engine goes on."""
    with (
        serving(tmp_path, model=model, slots=1) as (url, service),
        httpx.Client(base_url=url, timeout=20) as http,  # far less than the server's own timeout
        ThreadPoolExecutor(4) as pool,
    ):
        made(http, "book", "The mill stood by the river.")
        bias = {str(service.tokenizer.eos): -100}
        long = {"prompt": "The mill", "max_tokens": 4096, "logit_bias": bias}
        with http.stream("POST", "/v1/completions", json={**long, "stream": True, "logprobs": 0}) as running:
            lines = (line for line in running.iter_lines() if line)
            next(lines)
            waiting = [pool.submit(http.post, "/v1/completions", json=long) for _ in range(2)]
            waiting.append(pool.submit(http.post, "/v1/contexts", json={"name": "new", "text": "No mill."}))
            deadline = time.time() + 20
            while service.engine.load["waiting"] < 3:
                assert time.time() < deadline
                time.sleep(0.01)

            def fail():
                raise RuntimeError("injected")

            monkeypatch.setattr(service.engine, "_read_some", fail)
            last = json.loads(list(lines)[-1].removeprefix("data: "))
        answers = [one.result() for one in waiting]
        embeddings = http.post("/v1/embeddings", json={"input": "The mill"})
        answers += [http.post("/v1/completions", json=long), embeddings, http.get("/health"), http.get("/ready")]
        for answer in answers:
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_stopped"
            assert "the engine has failed (RuntimeError)" in answer.json()["error"]["message"]
        assert "the engine has failed" in last["error"]["message"]
        assert http.get("/v1/contexts/book").status_code == http.get("/metrics").status_code == 200
    [row] = [r for r in caplog.records if r.exc_info]  # one traceback, however many were told
    assert row.levelname == "CRITICAL" and "injected" in str(row.exc_info[1]) and "restarts" in row.getMessage()


# -- long readings -------------------------------------------------------------------------------------------------


def ends_as(http, path, body, most):
    """A streamed reading that its client leaves once ``most`` tokens are read."""
    with http.stream("POST", path, json={**body, "stream": True}) as answer:
        rows = (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {"))
        assert next(row for row in rows if row["read"] >= most)["tokens"] > most + 128


@pytest.mark.parametrize("composable", [False, True])
@pytest.mark.parametrize("append", [False, True])
def test_a_reading_that_was_cut_off_goes_on(model, tmp_path, monkeypatch, append, composable):
    """In another server, by the same request: what was read is found, and the context is that of an uninterrupted
    one."""
    monkeypatch.setattr(reading_module, "STRIDE", 100)  # rounded up to 128
    first, text = "The mill stood by the river.", TEXT * 4
    path, body = "/v1/contexts", {"text": text, "name": "book", "composable": composable}
    if append:
        path, body = "/v1/contexts/book/append", {"text": text}

    def begin(http):
        return made(http, "book", first, composable=composable) if append else {"tokens": 0}

    with serving(tmp_path / "whole", model=model) as (url, service), httpx.Client(base_url=url, timeout=60) as http:
        begin(http)
        whole = http.post(path, json=body).json()
        assert [row["name"] for row in http.get("/v1/contexts").json()["data"]] == ["book"]
        want = service.store("").get("book")
    with serving(tmp_path / "cut", model=model) as (url, service), httpx.Client(base_url=url, timeout=60) as http:
        before = begin(http)
        ends_as(http, path, body, 300)
        deadline = time.time() + 20
        while service.engine.busy:
            assert time.time() < deadline
            time.sleep(0.01)
        left = http.get("/v1/contexts").json()["data"][-1]
        assert left["name"] == "book.reading" and left["unfinished"] and left["expires"]
        assert left["tokens"] % 128 == 0 and left["tokens"] >= 256
        assert not append or http.get("/v1/contexts/book").json()["id"] == before["id"]
    with serving(tmp_path / "cut", model=model) as (url, service), httpx.Client(base_url=url, timeout=60) as http:
        again = http.post(path, json=body).json()
        assert again["cached_tokens"] == left["tokens"] and again["tokens"] == whole["tokens"]
        assert again["cache"].startswith(f"hit: {left['tokens']} of {whole['tokens']} tokens from ")
        assert [row["name"] for row in http.get("/v1/contexts").json()["data"]] == ["book"]
        now = service.store("").get("book")
        assert again["versions"] == (2 if append else 1)
        if append:
            assert http.post("/v1/contexts/book/undo", json={}).json()["id"] == before["id"]
    assert torch.equal(now.logits, want.logits) and torch.equal(now.tokens, want.tokens)
    assert now.manifest.marks == want.manifest.marks and (now.transition is not None) == composable
    tensors = now.tensors()
    assert all(torch.equal(tensors[name], t) for name, t in want.tensors().items())


@pytest.mark.parametrize(
    ("what", "composable"), [("undo", False), ("undo", True), ("recall", False), ("compose", True)]
)
def test_what_is_read_again_goes_on_where_it_was_cut_off(model, tmp_path, monkeypatch, what, composable):
    """The text of an undo, and those that are planted with pairs; the result is that of an uninterrupted reading."""
    monkeypatch.setattr(reading_module, "STRIDE", 100)  # rounded up to 128
    observed, keep = [], reading_module.Readings._keep

    def read_tokens(model, ids, *more, **how):
        observed.append(len(ids))
        return real(model, ids, *more, **how)

    real = reading_module.read_tokens
    monkeypatch.setattr(reading_module, "read_tokens", read_tokens)

    def cut(self, reading, piece):
        keep(self, reading, piece)
        if len(piece.final.tokens) >= 512:
            raise Refused(503, "injected")

    path, body = f"/v1/contexts/book/{what}", {} if what == "undo" else None
    if what == "compose":
        path, body = "/v1/contexts/both/compose", {"contexts": ["book", "copy"], "recall": True}
    left = {"undo": "book.undo.reading", "recall": "book.recall.reading", "compose": "both.recall.reading"}[what]
    found, read = {}, {}
    for case in ("whole", "cut"):
        with serving(tmp_path / case, model=model) as (url, service), httpx.Client(base_url=url, timeout=60) as http:
            first = made(http, "book", TEXT, composable=composable)
            if what == "undo":
                http.post("/v1/contexts/book/append", json={"text": " More."})
                service.store("")._delete(first["id"])
            elif what == "compose":
                made(http, "copy", TEXT[::-1], composable=True)
            names = {row["name"] for row in http.get("/v1/contexts").json()["data"]}
            if case == "cut":
                with monkeypatch.context() as patch:
                    patch.setattr(reading_module.Readings, "_keep", cut)
                    assert http.post(path, json=body).status_code == 503
                rows = {row["name"]: row for row in http.get("/v1/contexts").json()["data"]}
                assert rows.keys() - names == {left} and rows[left]["unfinished"] and rows[left]["expires"]
            observed.clear()
            before = service.engine.counters.prompt_tokens
            answer = http.post(path, json=body)
            assert answer.status_code in (200, 201), answer.text
            found[case] = answer.json()
            read[case] = service.engine.counters.prompt_tokens - before + sum(observed)
            names |= {"both"} if what == "compose" else set()
            assert {row["name"] for row in http.get("/v1/contexts").json()["data"]} == names
            if what == "undo":
                kept = service.store("").get("book")
                assert kept.manifest.replayed and len(kept.tokens) == first["tokens"]
                found[case] = kept
    assert read["whole"] - read["cut"] == 512
    if what == "undo":
        tensors = found["cut"].tensors()
        assert (found["cut"].transition is not None) == composable
        assert all(torch.equal(tensors[name], t) for name, t in found["whole"].tensors().items())
    else:
        assert found["cut"].get("recall", found["cut"]) == found["whole"].get("recall", found["whole"])


def test_what_is_left_of_another_reading_is_not_gone_on_from(served, monkeypatch):
    """Of another text, or behind another version; and a context of one's own that has its name stays as it is."""
    http, service, _ = served
    monkeypatch.setattr(reading_module, "STRIDE", 64)
    path, text = "/v1/contexts/book/append", TEXT * 4
    made(http, "book", "The mill.")
    ends_as(http, path, {"text": text}, 200)
    assert service.store("").entry("book.reading").unfinished
    other = http.post(path, json={"text": "No mill. " * 80}).json()
    assert other["cache"].startswith("hit: context 'book'")
    assert [row["name"] for row in http.get("/v1/contexts").json()["data"]] == ["book"]
    http.post("/v1/contexts/book/undo", json={})
    ends_as(http, path, {"text": text}, 200)
    kept = service.store("").get("book.reading", service.reader)
    assert http.post(path, json={"text": text[:50]}).status_code == 201
    http.post("/v1/contexts/book/fork", json={"to": "copy"})
    store = service.store("")
    store.keep_reading(kept, "copy")  # of the same text, behind the version before
    again = http.post("/v1/contexts/copy/append", json={"text": text[50:]}).json()
    assert again["cache"].startswith("hit: context 'copy'")
    own = made(http, "new.reading", "Mine.")
    assert made(http, "new", text)["tokens"] and http.get("/v1/contexts/new.reading").json()["id"] == own["id"]


def test_a_reading_over_time_says_how_to_go_on(model, tmp_path, monkeypatch):
    monkeypatch.setattr(reading_module, "STRIDE", 64)
    text = TEXT * 100
    with serving(tmp_path, model=model, timeout=1.0) as (url, _), httpx.Client(base_url=url, timeout=120) as http:
        cached = []
        for _ in range(2):
            found = http.post("/v1/contexts", json={"name": "book", "text": text})
            assert found.status_code == 504 and "ask again to go on from there" in found.json()["error"]["message"]
            cached.append(http.get("/v1/contexts").json()["data"][0]["tokens"])
    assert 0 < cached[0] < cached[1]


# -- keys ----------------------------------------------------------------------------------------------------------


def test_memory_for_contexts_is_shared_by_all_keys(model, tmp_path):
    """More keys take no more memory, and none finds what another one has loaded."""
    with serving(tmp_path, model=model, keys=("a", "b", "c"), memory=8_000_000) as (url, service):
        limit = service._loaded.ram.limit
        assert limit == 2_000_000
        for n in range(3):
            for key in "abc":
                headers = {"Authorization": f"Bearer {key}"}
                body = {"name": f"n{n}", "text": f"Text {n}: {TEXT}"}
                assert httpx.post(url + "/v1/contexts", json=body, headers=headers, timeout=60).status_code == 201
        stores = list(service._stores.values())
        usage = [store.usage() for store in stores]
        assert len(stores) == 3 and 0 < sum(row["ram_bytes"] for row in usage) <= limit
        assert all(row["objects"] == 3 for row in usage)
        # The same text is another object to each, loaded for itself.
        held = [service._loaded.ram.held(store.folder) for store in stores]
        assert len({id(context.tokens) for own in held for context in own}) == sum(map(len, held))
