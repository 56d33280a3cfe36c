"""Contexts over HTTP as files: sent, taken in, compared, composed, asked; and several answers behind one reading."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from functools import partial

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from serve_cases import TEXT, serving, small_model

from llm_mlp.context import Context, Reader, compose, composing, measure_composed, measure_recall, measure_surprise
from llm_mlp.context.format import digest
from llm_mlp.infer import Request
from llm_mlp.serve.service import _reseeded

DOCS = {"a": TEXT[:200], "b": "No mill stood there. " * 6}


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    with serving(folder, model=model, slots=4, max_body=50_000, max_upload=400_000, invariant=True) as found:
        yield found


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server[0], timeout=60) as found:
        yield found


def made(http, name, text=TEXT[:700], **more):
    found = http.post("/v1/contexts", json={"name": name, "text": text, **more})
    assert found.status_code == 201, found.text
    return found.json()


def says(answer, status, *words):
    assert answer.status_code == status, answer.text
    message = answer.json()["error"]["message"]
    assert all(word in message for word in words), message
    return answer.json()["error"]["param"]


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_file_goes_out_and_comes_in(http, server, tmp_path):
    row = made(http, "out")
    with http.stream("GET", "/v1/contexts/out/file") as answer:
        body = b"".join(answer.iter_bytes())
    assert answer.headers["Content-Length"] == str(len(body)) and answer.headers["ETag"] == f'"{row["id"]}"'
    assert 'filename="out.safetensors"' in answer.headers["Content-Disposition"]
    (tmp_path / "x").write_bytes(body)
    assert Context.load(tmp_path / "x").id == row["id"]
    assert http.delete("/v1/contexts/out").status_code == 200
    pieces = (body[a : a + 10_000] for a in range(0, len(body), 10_000))  # chunked, as a client streams it
    back = http.put("/v1/contexts/back/file?expires_seconds=3600", content=pieces)
    assert back.status_code == 201 and back.json()["id"] == row["id"] and back.json()["expires"]
    ask = {"prompt": " And", "max_tokens": 5, "temperature": 0, "context": "back"}
    assert http.post("/v1/completions", json=ask).json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
    made(http, "taken", "Another text.")
    says(http.put("/v1/contexts/taken/file", content=body), 409, "exists and means another text")
    assert http.put("/v1/contexts/taken/file?replace=true", content=body).json()["id"] == row["id"]
    assert not list(server[1].store("").folder.rglob("*.tmp"))


def test_files_that_are_not_taken_in(http, server, tmp_path):
    row = made(http, "sound")
    body = http.get("/v1/contexts/sound/file").content
    altered = body[:-100] + bytes([body[-100] ^ 1]) + body[-99:]
    other = Reader(small_model(d_model=48)[0], server[1].tokenizer)
    other.create(range(9)).save(tmp_path / "other")
    for given, words in (
        (body[: len(body) // 2], ["the file", "truncated"]),
        (altered, ["altered since it was written"]),
        (b"", ["truncated or not a safetensors file"]),
        (b"\x80\x04pickle", ["truncated or not a safetensors file"]),
        ((tmp_path / "other").read_bytes(), ["made with another"]),
    ):
        answer = http.put("/v1/contexts/bad/file", content=given)
        assert says(answer, 400, *words) == "file" and str(tmp_path.parent) not in answer.text
    for chunked in (False, True):
        large = bytes(500_000)
        given = (large[a : a + 50_000] for a in range(0, len(large), 50_000)) if chunked else large
        says(http.put("/v1/contexts/bad/file", content=given), 413, "400,000 bytes")
    for name in ("..", "a%20b", ".hidden", "x.json"):
        answer = http.put(f"/v1/contexts/{name}/file", content=body)
        assert answer.status_code in (400, 404, 405), answer.text
    says(http.put("/v1/contexts/.hidden/file", content=body), 400, "is no name")
    assert http.get("/v1/contexts/bad").status_code == 404
    assert http.get("/v1/contexts/sound").json()["id"] == row["id"]
    folder = server[1].store("").folder
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob(".*.tmp"))


@pytest.mark.parametrize(
    ("part", "change", "word"),
    [
        ("state.layers.0.fast_weights", lambda t: t.double(), "float64"),
        ("state.layers.0.fast_weights", lambda t: t * torch.nan, "not finite"),
        ("state.layers.0.fast_weights", lambda t: t[..., :-1], "shape"),
        ("state.layers.0.units.length", lambda t: t - 1000, "is no count"),
        ("logits", lambda t: t[:, :-1], "shape"),
        ("tokens", lambda t: t.long(), "token ids"),
    ],
)  # fmt: skip
def test_files_that_are_written_to_harm(http, server, tmp_path, part, change, word):
    """Their digest is right, since anybody can compute one."""
    if http.get("/v1/contexts/good").status_code == 404:
        made(http, "good")
    tensors = dict(server[1].store("").get("good").tensors())
    tensors[part] = change(tensors[part]).contiguous()
    manifest = server[1].store("").manifest("good")
    manifest = manifest.model_copy(update={"digest": digest(manifest, tensors)})
    save_file(tensors, tmp_path / "x", metadata={"manifest": manifest.model_dump_json()})
    assert says(http.put("/v1/contexts/harm/file", content=(tmp_path / "x").read_bytes()), 400, word) == "file"


def test_a_client_that_goes_while_sending_leaves_nothing(http, server):
    body = http.get(f"/v1/contexts/{made(http, 'whole')['name']}/file").content

    def half():
        yield body[: len(body) // 2]
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError), httpx.Client(base_url=server[0]) as own:
        own.put("/v1/contexts/half/file", content=half())
    deadline = time.time() + 10
    while list(server[1].store("").folder.rglob(".*.tmp")) and time.time() < deadline:
        time.sleep(0.02)
    assert not list(server[1].store("").folder.rglob(".*.tmp")) and http.get("/v1/contexts/half").status_code == 404


def test_nobody_reaches_anothers(model, tmp_path):
    with serving(tmp_path, model=model, keys=("one", "two")) as (url, _), httpx.Client(base_url=url) as http:
        one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        http.post("/v1/contexts", json={"name": "mine", "text": TEXT[:300], "composable": True}, headers=one)
        http.post("/v1/contexts", json={"name": "own", "text": "The river"}, headers=two)
        for status, headers in ((401, {}), (404, two)):
            for method, path, body in (
                ("GET", "mine/file", None),
                ("GET", "own/diff?other=mine", None),
                ("POST", "mine/recall", None),
                ("POST", "mine/surprise", None),
                ("POST", "new/compose", {"contexts": ["mine"]}),
            ):
                found = http.request(method, f"/v1/contexts/{path}", json=body, headers=headers)
                assert found.status_code == status, (path, found.text)
        file = http.get("/v1/contexts/mine/file", headers=one).content
        assert http.put("/v1/contexts/got/file", content=file).status_code == 401
        assert http.put("/v1/contexts/got/file", content=file, headers=two).status_code == 201
        assert http.get("/v1/contexts/got", headers=one).status_code == 404


# -- comparing, composing, asking ----------------------------------------------------------------------------------


def test_diff(http):
    row = made(http, "left")
    http.post("/v1/contexts/left/fork", json={"to": "right"})
    longer = http.post("/v1/contexts/right/append", json={"text": " More."}).json()
    found = http.get("/v1/contexts/left/diff", params={"other": "right"}).json()
    assert found["tokens"] == [row["tokens"], longer["tokens"]] and found["common_tokens"] == row["tokens"]
    assert found["layers"][0]["fast_weight_distance"] > 0 and found["same_weights"]
    assert says(http.get("/v1/contexts/left/diff"), 400, "other") == "other"
    says(http.get("/v1/contexts/left/diff?other=none"), 404, "'none' does not exist")
    says(http.get("/v1/contexts/left/diff?other=../left"), 400, "is no name")


def test_compose_is_that_of_the_library(http, server):
    lines = http.post("/v1/contexts", json={"name": "a", "text": DOCS["a"], "composable": True, "stream": True}).text
    rows = [json.loads(x[6:]) for x in lines.split("\n\n") if x.startswith("data: {")]
    assert len(rows) > 2 and rows[-1]["name"] == "a" and rows[-2]["read"] == rows[-1]["tokens"]
    made(http, "b", DOCS["b"][:40], composable=True)
    http.post("/v1/contexts/b/append", json={"text": DOCS["b"][40:]})  # stays composable
    found = http.post("/v1/contexts/both/compose", json={"contexts": ["a", "b"], "expires_seconds": 60})
    assert found.status_code == 201 and found.json()["expires"], found.text
    service = server[1]
    reader = Reader(service.model, service.tokenizer, transitions=True)
    a = reader.create(reader.encode(DOCS["a"], begin=True))
    b = reader.append(
        reader.create(reader.encode(DOCS["b"][:40], begin=True)), reader.encode(DOCS["b"][40:], begin=False)
    )
    want, got = compose(reader, [a, b], [service.tokenizer.eos]), service.store("").get("both")
    assert torch.equal(got.tokens, want.tokens) and got.manifest.composed
    assert (got.logits - want.logits).abs().max() < 1e-3
    ask = {"prompt": " on", "context": "both", "max_tokens": 1}
    assert http.post("/v1/completions", json=ask).status_code == 200
    made(http, "plain", "A text.")
    says(http.post("/v1/contexts/c/compose", json={"contexts": ["a", "plain"]}), 409, "without its transitions")
    says(http.post("/v1/contexts/both/compose", json={"contexts": ["a"]}), 409, "'both' exists")
    assert says(http.post("/v1/contexts/c/compose", json={"contexts": []}), 400, "contexts") == "contexts"
    assert says(http.post("/v1/contexts/a/fork", json={"to": "../c"}), 400, "is no name") == "to"


def test_recall_is_that_of_the_library(http, server):
    row = made(http, "long", TEXT[:1500])
    found = http.post("/v1/contexts/long/recall")
    assert found.status_code == 200, found.text
    want = measure_recall(server[1].reader, server[1].store("").get("long"))
    assert found.json()["pairs"] == 64 and found.json()["depths"] == list(want.depths)
    assert abs(found.json()["found"] - want.found) <= 1  # read in other pieces: within rounding
    assert http.get("/v1/contexts/long").json()["id"] == row["id"]
    made(http, "short", "A text.")
    says(http.post("/v1/contexts/short/recall"), 409, "too short for 64 pairs")


def test_surprise_is_that_of_the_library(http, server):
    row = made(http, "read", TEXT[:700])
    found = http.post("/v1/contexts/read/surprise")
    assert found.status_code == 200, found.text
    want = measure_surprise(server[1].reader, server[1].store("").get("read")).report()
    assert found.json()["ends"] == want["ends"] and found.json()["mean"] == pytest.approx(want["mean"], abs=1e-3)
    assert [each["layer"] for each in found.json()["layers"]] == [each["layer"] for each in want["layers"]]
    assert http.get("/v1/contexts/read").json()["id"] == row["id"]
    for name in ("one", "two"):
        made(http, name, TEXT[:300], composable=True)
    assert http.post("/v1/contexts/joined/compose", json={"contexts": ["one", "two"]}).status_code == 201
    says(http.post("/v1/contexts/joined/surprise"), 409, "is composed")


def test_recall_of_composed_contexts_is_that_of_the_library(http, server):
    names = ["first", "second"]
    for name, text in zip(names, (TEXT[:1500], "No mill stood there, but a boat. " * 30), strict=True):
        made(http, name, text, composable=True)
    read = server[1].engine.counters.prompt_tokens
    found = http.post("/v1/contexts/told/compose", json={"contexts": names, "recall": True})
    assert found.status_code == 201, found.text
    rows, store = found.json()["recall"], server[1].store("")
    parts = [store.get(name) for name in names]
    want = measure_composed(server[1].reader, parts, [server[1].tokenizer.eos])
    assert [row["source"] for row in rows] == names
    for row, each in zip(rows, want, strict=True):
        for how in ("composed", "concatenated"):
            own = getattr(each, how)
            assert row[how]["depths"] == list(own.depths) and row[how]["pairs"] == 64
            assert abs(row[how]["found"] - own.found) <= 2  # read in other pieces: within rounding
            assert row[how]["interval"][0] <= row[how]["rate"] <= row[how]["interval"][1]
    # The text with what is planted was read once as one, as prompts are.
    assert server[1].engine.counters.prompt_tokens - read == sum(len(c.tokens) + 4 * 64 for c in parts) + 1
    plain = http.post("/v1/contexts/quiet/compose", json={"contexts": names}).json()
    assert plain["recall"] is None and plain["tokens"] == found.json()["tokens"]
    made(http, "tiny", "A text.", composable=True)
    short = http.post("/v1/contexts/none/compose", json={"contexts": ["first", "tiny"], "recall": True})
    says(short, 409, "too short for 64 pairs")
    assert http.get("/v1/contexts/none").status_code == 404


# -- beside running streams ----------------------------------------------------------------------------------------


class Beside(threading.Thread):
    """A stream that runs while something else is done, and when its tokens came."""

    def __init__(self, url, service):
        super().__init__()
        self.url, self.service, self.times, self.leave = url, service, [], threading.Event()

    def run(self):
        bias = {str(self.service.tokenizer.eos): -100}
        body = {"prompt": "The mill", "max_tokens": 100_000, "stream": True, "logit_bias": bias, "logprobs": 0}
        with httpx.stream("POST", self.url + "/v1/completions", json=body, timeout=120) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    self.times.append(time.perf_counter())
                if self.leave.is_set():
                    return

    def __enter__(self):
        self.start()
        deadline = time.time() + 30
        while len(self.times) < 5 and time.time() < deadline:
            time.sleep(0.01)
        assert len(self.times) >= 5
        return self

    def __exit__(self, *_):
        self.leave.set()
        self.join(60)
        assert not self.is_alive()

    def keeps_its_pace(self, call, pieces):
        """What ``call`` gives, during which the stream gets a token for each of so many pieces (a few are its own)."""
        counters, began = self.service.engine.counters, time.perf_counter()
        written, first = counters.tokens, len(self.times) - 1
        found = call()
        took, written, times = time.perf_counter() - began, counters.tokens - written, self.times[first:]
        assert written >= 0.8 * pieces, (written, pieces)
        assert max(np.diff(times)) < max(0.5, took / 2), (max(np.diff(times)), took)
        return found


@contextlib.contextmanager
def quiet_server(model, folder):
    """(a client, URL, the service) of a server with room for one stream and what is done beside it."""
    with (
        serving(folder, model=model, slots=2, max_tokens=100_000) as (url, service),
        httpx.Client(base_url=url, timeout=120) as http,
    ):
        yield http, url, service


@pytest.mark.parametrize("composable", [False, True])
def test_streams_keep_their_pace_while_a_text_is_read_again(model, tmp_path, composable):
    with quiet_server(model, tmp_path) as (http, url, service):
        first = made(http, "long", TEXT * 8, composable=composable)
        http.post("/v1/contexts/long/append", json={"text": " And more."})
        service.store("")._delete(first["id"])
        with Beside(url, service) as beside:
            undo = partial(http.post, "/v1/contexts/long/undo", json={})
            found = beside.keeps_its_pace(undo, first["tokens"] // 32)
        assert found.status_code == 200 and found.json()["replayed"] and found.json()["tokens"] == first["tokens"]
        back = service.store("").get("long", service.reader)
    want = service.reader.create(back.tokens)
    assert (back.logits - want.logits).abs().max() < 1e-3 and back.manifest.marks == [first["tokens"]]
    assert (back.transition is not None) == composable


def test_streams_keep_their_pace_while_contexts_are_composed_and_texts_embedded(model, tmp_path):
    with quiet_server(model, tmp_path) as (http, url, service):
        names = [f"n{i}" for i in range(16)]
        for name in names:
            made(http, name, TEXT[:300] + name, composable=True)
        parts = [service.store("").get(name, service.reader) for name in names]
        pieces = len(list(composing(service.reader, parts, [service.tokenizer.eos])))
        assert pieces == len(service.model.blocks) * (16 + 1)
        with Beside(url, service) as beside:
            compose_all = partial(http.post, "/v1/contexts/all/compose", json={"contexts": names})
            assert beside.keeps_its_pace(compose_all, pieces).status_code == 201
            embed = partial(http.post, "/v1/embeddings", json={"input": TEXT * 4})
            tokens = len(service.prompt_ids(TEXT * 4))
            assert beside.keeps_its_pace(embed, tokens // 32).status_code == 200


def test_an_append_can_set_when_a_context_expires(http):
    made(http, "brief")
    assert http.post("/v1/contexts/brief/append", json={"text": " x", "expires_seconds": 1}).json()["expires"]
    time.sleep(1)
    assert http.get("/v1/contexts/brief").status_code == 404


# -- prompts that begin with a stored text, to the bit -------------------------------------------------------------


@pytest.mark.parametrize("how", ["whole", "append", "elsewhere", "answer", "composable"])
def test_what_is_stored_changes_no_bit_of_an_invariant_answer(model, tmp_path, how):
    """A stored text is gone on from at the last multiple of the chunk that it was read to; nothing else is used."""
    chunk, tokenizer = 32, model[1]
    ids = [tokenizer.eos, *tokenizer.encode(TEXT)][: 7 * chunk + 9]
    first, text = tokenizer.decode(ids[1 : 2 * chunk]), tokenizer.decode(ids[1:])
    with (
        serving(tmp_path, model=model, invariant=True, chunk=chunk) as (url, service),
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        store, reader = service.store(""), service.reader
        if how == "answer":  # as long as a multiple
            ask = {"prompt": ids[: 7 * chunk - 8], "max_tokens": 8, "logit_bias": {str(tokenizer.eos): -100}}
            assert http.post("/v1/completions", json=ask | {"save_context": "book"}).json()["context"]["tokens"] == 224
            ids = [*store.get("book").tokens.tolist(), *ids[7 * chunk :]]
            store.export("book", tmp_path / "kept")
            store.remove("book")
        body = {"prompt": [*ids, 5, 6, 7], "max_tokens": 8, "logprobs": 3, "seed": 1}

        def asked():
            found = http.post("/v1/completions", json=body).json()
            return found["choices"], found["usage"]["prompt_tokens_details"]

        want, used = asked()
        assert used["cached_tokens"] == 0
        if how == "whole":
            made(http, "book", text)
        elif how == "append":
            made(http, "book", first)
            http.post("/v1/contexts/book/append", json={"text": text[len(first) :]})
        elif how == "composable":
            made(http, "book", tokenizer.decode(ids[1 : 7 * chunk]), composable=True)
        elif how == "elsewhere":
            store.commit(reader.create(ids[: 7 * chunk]), "book")
        else:
            store.import_(tmp_path / "kept", "book")
        found, used = asked()
        assert found == want
        hit = how in ("whole", "append")
        assert used["cached_tokens"] == (7 * chunk if hit else 0), used
        assert hit or used["cache"].startswith("miss: 224 tokens are stored, but not as read in pieces of 32")
        assert f'reason="{"prefix" if hit else "unaligned"}"' in http.get("/metrics").text
        marks = store.get("book").manifest.marks
        if how == "append":  # what is kept for prompts is no mark of its own
            assert marks == [2 * chunk, len(ids)]
            undone = http.post("/v1/contexts/book/undo", json={}).json()
            assert undone["tokens"] == 2 * chunk and not undone["replayed"]


# -- several answers -----------------------------------------------------------------------------------------------


def test_several_answers_read_their_prompt_once_and_are_what_each_is_alone(http, server):
    prompt = TEXT[:333] + "Then"
    body = {"prompt": prompt, "max_tokens": 12, "seed": 7, "logprobs": 2, "repetition_penalty": 1.1}
    engine, tokens = server[1].engine, 1 + len(server[1].tokenizer.encode(prompt))
    before = engine.counters.prompt_tokens
    found = http.post("/v1/completions", json=body | {"n": 3}).json()
    assert engine.counters.prompt_tokens - before == tokens == found["usage"]["prompt_tokens"]
    assert found["usage"]["completion_tokens"] == sum(len(c["logprobs"]["tokens"]) for c in found["choices"])
    for index, choice in enumerate(found["choices"]):
        seed = _reseeded(Request([0], 1, seed=7), index).seed
        alone = http.post("/v1/completions", json=body | {"seed": seed}).json()["choices"][0]
        assert alone == choice | {"index": 0}
    assert len({c["text"] for c in found["choices"]}) == 3
    lines = http.post("/v1/completions", json=body | {"n": 3, "stream": True}).text.split("\n\n")
    rows = [json.loads(x[6:])["choices"][0] for x in lines if x.startswith("data: {")]
    assert ["".join(r["text"] for r in rows if r["index"] == n) for n in range(3)] == [
        c["text"] for c in found["choices"]
    ]


def test_more_answers_than_there_is_room_for(model, tmp_path):
    with serving(tmp_path, model=model, slots=2, queue=1) as (url, service):
        ask = {"prompt": "The mill", "max_tokens": 3}
        assert httpx.post(url + "/v1/completions", json=ask | {"n": 3}, timeout=60).status_code == 200
        read = service.engine.counters.prompt_tokens
        says(httpx.post(url + "/v1/completions", json=ask | {"n": 4}, timeout=60), 429, "4 answers")
        assert service.engine.counters.prompt_tokens == read
