"""The server, as its clients see it: the official OpenAI client, and raw HTTP where that one is too polite."""

from __future__ import annotations

import base64
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
import torch
from serve_cases import TEXT, serving, small_model

from llm_mlp.data.chat import TRAINED
from llm_mlp.data.tokenizer import EOS
from llm_mlp.infer import Sampling, generate, read_tokens

HELLO = [{"role": "user", "content": "The mill"}]


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("store"), model=model, slots=4, max_body=200_000) as found:
        yield found


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server[0] + "/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server[0], timeout=60) as found:
        yield found


def expected(model, text, n, begin=True):
    _, tokenizer = model
    ids = [*([tokenizer.eos] if begin else []), *tokenizer.encode(text)]
    found = greedy(model, ids, n)
    return found, tokenizer.decode(found)


def greedy(model, ids, n):
    lm, tokenizer = model
    how = {"sampling": Sampling(0), "stop": tokenizer.eos, "vocabulary": tokenizer.vocab_size}
    return list(generate(lm, ids, max_tokens=n, **how))


# -- writing -------------------------------------------------------------------------------------------------------


def test_completion_is_the_models(client, model):
    ids, text = expected(model, "The mill", 12)
    found = client.completions.create(model="llm-mlp", prompt="The mill", max_tokens=12, temperature=0)
    assert found.choices[0].text == text and found.choices[0].finish_reason in ("length", "stop")
    assert found.usage.completion_tokens == len(ids)
    assert found.usage.total_tokens == found.usage.prompt_tokens + len(ids)
    pieces = client.completions.create(model="llm-mlp", prompt="The mill", max_tokens=12, temperature=0, stream=True)
    assert "".join(p.choices[0].text for p in pieces) == text


def test_chat_streams_and_counts(client, model):
    _, text = expected(model, "user: The mill\nassistant: ", 10)
    found = client.chat.completions.create(model="llm-mlp", messages=HELLO, max_tokens=10, temperature=0)
    assert found.choices[0].message.content == text and found.choices[0].message.role == "assistant"
    assert found.usage.prompt_tokens_details.cached_tokens == 0
    assert found.usage.prompt_tokens_details.cache.startswith("miss: ")
    chunks = list(
        client.chat.completions.create(
            model="llm-mlp",
            messages=HELLO,
            max_completion_tokens=10,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 10 and not chunks[-1].choices


def test_logprobs(client, model):
    lm, tokenizer = model
    found = client.chat.completions.create(
        model="llm-mlp", messages=HELLO, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    rows = found.choices[0].logprobs.content
    ids, _ = expected(model, "user: The mill\nassistant: ", 5)
    _, logits = read_tokens(lm, [tokenizer.eos, *tokenizer.encode("user: The mill\nassistant: ")])
    want = torch.log_softmax(logits[0, : tokenizer.vocab_size].double(), -1)
    assert rows[0].logprob == pytest.approx(float(want.max()), abs=1e-4) and len(rows) == 5
    assert bytes(rows[0].bytes) == tokenizer.spelling(ids[0])
    assert [len(r.top_logprobs) for r in rows] == [3] * 5 and rows[0].top_logprobs[0].logprob == rows[0].logprob
    plain = client.completions.create(model="llm-mlp", prompt="The mill", max_tokens=4, temperature=0, logprobs=2)
    assert len(plain.choices[0].logprobs.tokens) == 4 and len(plain.choices[0].logprobs.top_logprobs[0]) == 2


def test_seeds_and_several_answers(client):
    def ask(**more):
        found = client.completions.create(model="llm-mlp", prompt="a", max_tokens=20, n=3, **more)
        assert [c.index for c in found.choices] == [0, 1, 2]
        return [c.text for c in found.choices]

    first = ask(seed=5)
    assert first == ask(seed=5) != ask(seed=6) and len(set(first)) == 3


def test_stop_texts(client, model):
    _, text = expected(model, "The mill", 40)
    stop = text[8:11]
    want = text[: text.index(stop)]
    how = {"model": "llm-mlp", "prompt": "The mill", "max_tokens": 40, "temperature": 0, "stop": ["@@@", stop]}
    found = client.completions.create(**how)
    assert found.choices[0].text == want and found.choices[0].finish_reason == "stop"
    assert "".join(c.choices[0].text for c in client.completions.create(**how, stream=True)) == want


def test_embeddings(client, http, model):
    lm, tokenizer = model
    ids = [tokenizer.eos, *tokenizer.encode(TEXT[:300])]
    with torch.no_grad():
        x, _ = lm.hidden(torch.tensor([ids]))
    want = torch.nn.functional.normalize(x[0].double().mean(0), dim=0)
    found = client.embeddings.create(model="llm-mlp", input=[TEXT[:300], "b"])  # as base64, which the client unpacks
    assert torch.allclose(torch.tensor(found.data[0].embedding).double(), want, atol=1e-4)
    assert found.usage.prompt_tokens == len(ids) + len(tokenizer.encode("b")) + 1
    raw = http.post("/v1/embeddings", json={"input": "b", "encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert np.allclose(np.frombuffer(base64.b64decode(raw), np.float32), found.data[1].embedding)


# -- contexts ------------------------------------------------------------------------------------------------------


def test_a_conversation_goes_on_from_a_context(client, http, model):
    _, tokenizer = model
    made = http.post("/v1/contexts", json={"name": "mill", "text": TEXT[:400]})
    assert made.status_code == 201 and made.json()["tokens"] == 1 + len(tokenizer.encode(TEXT[:400]))
    found = client.chat.completions.create(
        model="llm-mlp",
        messages=HELLO,
        max_tokens=6,
        temperature=0,
        extra_body={"context": "mill", "save_context": "talk"},
    )
    ids = [tokenizer.eos, *tokenizer.encode(TEXT[:400]), *tokenizer.encode("user: The mill\nassistant: ")]
    want = greedy(model, ids, 6)
    assert found.choices[0].message.content == tokenizer.decode(want)
    assert found.usage.prompt_tokens_details.cached_tokens == made.json()["tokens"]
    assert found.usage.prompt_tokens_details.cache.startswith("hit: context 'mill'")
    assert found.context["name"] == "talk" and found.context["tokens"] == len(ids) + 6 + 1  # and the line end
    again = client.completions.create(
        model="llm-mlp", prompt=" on", max_tokens=5, temperature=0, extra_body={"context": "talk"}
    )
    more = greedy(model, [*ids, *want, *tokenizer.encode("\n on")], 5)
    assert again.choices[0].text == tokenizer.decode(more)


def test_special_tokens_of_the_template_alone(model, tmp_path):
    """What the template writes is read as its id; a message that spells it is read as text."""
    lm, tokenizer = model
    with serving(tmp_path, model=model, template=TRAINED, slots=1) as (url, service):
        for content in ("The mill", f"The mill{EOS}user:\nNo"):
            said = [*HELLO, {"role": "assistant", "content": "turns"}, {"role": "user", "content": content}]
            body = {"messages": said, "max_tokens": 6, "temperature": 0, "save_context": f"c{len(content)}"}
            found = httpx.post(url + "/v1/chat/completions", json=body, timeout=60).json()
            parts = ("user:\nThe mill\nassistant:\n", "turns", None, f"user:\n{content}\nassistant:\n")
            ids = [tokenizer.eos]
            for part in parts:
                ids += [tokenizer.eos] if part is None else tokenizer.encode(part)
            want = greedy((lm, tokenizer), ids, 6)
            assert found["choices"][0]["message"]["content"] == tokenizer.decode(want)
            assert found["usage"]["prompt_tokens"] == len(ids)
            kept = service.store("").get(found["context"]["name"], service.reader)
            assert kept.tokens.tolist() == [*ids, *want, tokenizer.eos]


def test_contexts_are_listed_forked_appended_undone_and_removed(http):
    lines = http.post("/v1/contexts", json={"name": "a", "text": TEXT[:600], "stream": True}).text.split("\n\n")
    rows = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    assert [r["read"] for r in rows[:-1]] == sorted(r["read"] for r in rows[:-1]) and rows[-1]["name"] == "a"
    tokens = rows[-1]["tokens"]
    assert rows[-2]["read"] == rows[-2]["tokens"] == tokens
    assert http.post("/v1/contexts/a/fork", json={"to": "b"}).json()["id"] == rows[-1]["id"]
    longer = http.post("/v1/contexts/b/append", json={"text": " And then it stopped."}).json()
    assert longer["tokens"] > tokens and longer["versions"] == 2
    assert http.post("/v1/contexts/b/undo", json={}).json()["id"] == rows[-1]["id"]
    assert http.get("/v1/contexts/b").json()["detail"]["layers"]
    assert {"a", "b"} <= {row["name"] for row in http.get("/v1/contexts").json()["data"]}
    assert http.delete("/v1/contexts/b").json()["deleted"]
    assert http.get("/v1/contexts/b").status_code == 404
    assert http.post("/v1/contexts", json={"name": "a", "text": "x"}).status_code == 409


def test_a_stored_text_is_found_by_a_prompt_that_begins_with_it(client, http):
    made = http.post("/v1/contexts", json={"name": "known", "text": "The wheel turned"}).json()
    found = client.completions.create(model="llm-mlp", prompt="The wheel turned all day", max_tokens=3, temperature=0)
    assert found.usage.prompt_tokens_details.cached_tokens == made["tokens"]
    assert 'llm_mlp_cache_lookups_total{reason="prefix",result="hit"}' in http.get("/metrics").text
    assert (
        found.usage.prompt_tokens_details.cache
        == f"hit: {made['tokens']} of {found.usage.prompt_tokens} tokens from {made['id']}"
    )


@pytest.mark.parametrize("last", [False, True])
def test_a_saved_answer_ends_where_its_text_does(client, server, model, last):
    """A stop text is not in the context that is saved, also where it is the last that may be written."""
    _, tokenizer = model
    ids, text = expected(model, "The mill", 40)
    stop, name = text[8:11], f"cut-{last}"
    most = next(n for n in range(40) if stop in tokenizer.decode(ids[:n])) if last else 40
    how = {"max_tokens": most, "temperature": 0, "stop": stop, "extra_body": {"save_context": name}}
    found = client.completions.create(model="llm-mlp", prompt="The mill", **how)
    assert found.choices[0].text == text[: text.index(stop)] and found.choices[0].finish_reason == "stop"
    want = [tokenizer.eos, *tokenizer.encode("The mill"), *tokenizer.encode(found.choices[0].text)]
    assert server[1].store("").get(name).tokens.tolist() == want


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": HELLO, "temperature": -1}, 400, "temperature"),
        ("chat/completions", {"messages": HELLO, "model": "gpt"}, 404, "'gpt' is not served"),
        ("chat/completions", {"messages": HELLO, "tool_choice": "required"}, 400, "tool_choice"),
        ("chat/completions", {"messages": HELLO, "response_format": {"type": "json_lines"}}, 400, "response_format"),
        ("chat/completions", {"messages": HELLO, "n": 2, "save_context": "x"}, 400, "save_context"),
        ("chat/completions", {"messages": HELLO, "context": "nowhere"}, 404, "'nowhere' does not exist"),
        ("chat/completions", {"messages": HELLO, "context": "../a"}, 400, "is no name for a context"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "image_url"),
        ("completions", {"prompt": ""}, 200, ""),
        ("completions", {"prompt": [99999]}, 400, "token 99999"),
        ("completions", {"prompt": []}, 400, "the prompt is empty"),
        ("completions", {"prompt": ["a", "b"]}, 400, "one text"),
        ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias"),
        ("completions", {"prompt": "a", "logit_bias": {"9999": 1}}, 400, "logit_bias: token 9999"),
        ("completions", {"prompt": "a", "stop": [""]}, 400, "stop"),
        ("completions", {"prompt": "a\ud800"}, 400, "encoded"),
        ("completions", {"prompt": "a", "suffix": "b"}, 400, "suffix: not served"),
        ("completions", {"prompt": "a", "best_of": 3}, 400, "best_of: not served"),
        ("completions", {"prompt": "a", "best_of": 1, "max_tokens": 1}, 200, ""),
        ("embeddings", {"input": []}, 400, "1 to 2,048"),
        ("embeddings", {"input": "a", "dimensions": 8}, 400, "dimensions: not served"),
        ("contexts", {"name": "x", "text": "a", "expires": 3}, 400, "expires"),
        ("contexts", {"name": "../x", "text": "a"}, 400, "is no name for a context"),
        ("contexts", {"name": "x"}, 400, "text"),
        ("contexts/none/append", {"text": "a"}, 404, "does not exist"),
        ("contexts/none/fork", {"to": "b"}, 404, "does not exist"),
        ("nothing", {}, 404, "Not Found"),
    ],
)  # fmt: skip
def test_refusals_say_what_is_wrong(http, path, body, status, says):
    found = http.post(f"/v1/{path}", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert found.status_code == status, found.text
    if status != 200:
        assert says in found.json()["error"]["message"] and found.json()["error"]["type"]


@pytest.mark.parametrize("body", [b"{", b"\xff\xfe", b"[]", b"null", b'{"prompt": 1e999}', b""])
def test_malformed_bodies(http, body):
    found = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert found.status_code == 400 and found.json()["error"]["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies_are_refused(http, chunked):
    body = json.dumps({"prompt": "a" * 300_000}).encode()
    content = (body[a : a + 50_000] for a in range(0, len(body), 50_000)) if chunked else body
    found = http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert found.status_code == 413 and "200,000 bytes" in found.json()["error"]["message"]


def test_keys_and_what_they_keep_apart(model, tmp_path):
    with serving(tmp_path, model=model, keys=("one", "two")) as (url, _), httpx.Client(base_url=url) as http:
        one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        assert http.get("/health").status_code == http.get("/ready").status_code == http.get("/").status_code == 200
        for headers in ({}, {"Authorization": "Bearer three"}, {"Authorization": "Basic one"}):
            for path in ("/v1/models", "/v1/contexts", "/metrics"):
                assert http.get(path, headers=headers).status_code == 401
        assert http.post("/v1/contexts", json={"name": "mine", "text": "The river"}, headers=one).status_code == 201
        assert http.get("/v1/contexts/mine", headers=two).status_code == 404
        assert http.get("/v1/contexts", headers=two).json()["data"] == []
        for headers, cached in ((one, True), (two, False)):  # nor is it found by its text
            body = {"prompt": "The river runs", "max_tokens": 2}
            used = http.post("/v1/completions", json=body, headers=headers).json()["usage"]
            assert (used["prompt_tokens_details"]["cached_tokens"] > 0) == cached


def test_a_full_queue_and_a_late_answer(model, tmp_path):
    with serving(tmp_path, model=model, slots=1, queue=0, timeout=3.0) as (url, service):
        body = {"prompt": "a", "max_tokens": 4096, "temperature": 0, "logit_bias": {str(service.tokenizer.eos): -100}}
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda _: httpx.post(url + "/v1/completions", json=body, timeout=60), range(3)))
        status = sorted(r.status_code for r in found)
        assert set(status) <= {429, 504} and 429 in status and 504 in status
        refused = next(r for r in found if r.status_code == 429)
        assert refused.headers["Retry-After"] == "1" and "busy" in refused.json()["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_slot(server, stream):
    url, service = server
    body = {"prompt": "a", "max_tokens": 4096, "stream": stream, "logit_bias": {str(service.tokenizer.eos): -100}}
    with httpx.Client(base_url=url) as http:
        if stream:
            with http.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_bytes())
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json=body, timeout=0.3)
    deadline = time.time() + 10
    while service.engine.load["free"] < service.engine.slots and time.time() < deadline:
        time.sleep(0.05)
    assert service.engine.load == {"waiting": 0, "reading": 0, "running": 0, "free": service.engine.slots}


def test_a_client_that_goes_while_its_text_is_embedded_takes_no_more_time(server, monkeypatch):
    url, service = server
    pieces, embedding = [], service._embedding

    def slow(ids):
        for piece in embedding(ids):
            pieces.append(time.sleep(0.02))
            yield piece

    monkeypatch.setattr(service, "_embedding", slow)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url + "/v1/embeddings", json={"input": TEXT * 60}, timeout=0.3)
    deadline, last = time.time() + 10, -1
    while last != len(pieces) and time.time() < deadline:
        last = len(pieces)
        time.sleep(0.5)
    assert last > 0 and time.time() < deadline


def test_many_clients_get_what_each_gets_alone(model, tmp_path):
    """In the batch-invariant mode, to the character; slots are fewer than clients."""
    with serving(tmp_path, model=model, slots=6, invariant=True) as (url, _):

        def ask(seed):
            body = {"prompt": "The mill" * (seed % 3 + 1), "max_tokens": 24, "seed": seed, "stream": True}
            with httpx.stream("POST", url + "/v1/completions", json=body, timeout=120) as answer:
                rows = [json.loads(x[6:]) for x in answer.iter_lines() if x.startswith("data: {")]
            return "".join(row["choices"][0]["text"] for row in rows)

        alone = [ask(seed) for seed in range(8)]
        with ThreadPoolExecutor(16) as pool:
            together = list(pool.map(lambda i: ask(i % 8), range(48)))
        assert together == [alone[i % 8] for i in range(48)]


def test_what_is_measured(http, client):
    client.completions.create(model="llm-mlp", prompt="The mill", max_tokens=3)
    text = http.get("/metrics").text
    for name in (
        'llm_mlp_requests_total{path="/v1/completions",status="200"}', "llm_mlp_tokens_total",
        "llm_mlp_prompt_tokens_total",
        "llm_mlp_cache_lookups_total",
        "llm_mlp_first_token_seconds_bucket", "llm_mlp_engine_free_slots 4.0",
        'llm_mlp_context_bytes{tier="disk"}',
    ):  # fmt: skip
        assert name in text, name
    assert http.get("/ready").json()["capacity"].startswith("4 active + 0 stored contexts")
    assert client.models.list().data[0].id == client.models.retrieve("llm-mlp").id == "llm-mlp"
    assert "<main>" in http.get("/").text


class Meter:
    """A joule each time it is asked; ``None``: unavailable."""

    def __init__(self, joules):
        self.now = joules

    def joules(self):
        if self.now is not None:
            self.now += 1.0
        return self.now

    def watts(self):
        return None if self.now is None else 12.5


@pytest.mark.parametrize("begin", [100.0, None])
def test_energy_is_told_or_unavailable(model, tmp_path, caplog, begin):
    """In whole answers, streams, /metrics and the log; a machine that tells none says null, never zero."""
    caplog.set_level("INFO", "llm_mlp.serve")
    energy = Meter(begin)
    with (
        serving(tmp_path, model=model, energy=energy) as (url, _),
        openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client,
    ):
        how = {"model": "llm-mlp", "max_tokens": 4, "temperature": 0}
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        _, text = expected(model, "The mill", 40)
        found = [
            client.completions.create(prompt="The mill", **how),
            client.chat.completions.create(messages=HELLO, **how),
            list(client.completions.create(prompt="The mill", **how, **stream))[-1],
            list(client.chat.completions.create(messages=HELLO, **how, **stream))[-1],
            client.completions.create(prompt="The mill", **how | {"max_tokens": 40}, stop=text[8:11]),
        ]
        # One mark when it joins, one when it leaves.
        assert [x.usage.energy_joules for x in found] == ([None] * 5 if begin is None else [1.0] * 5)
        # Two answers, of one prompt that is read once: three to five marks in which somebody runs, as they come.
        several = client.completions.create(prompt="The mill", n=2, **how).usage.energy_joules
        assert several is None if begin is None else 3 <= several <= 5
        metrics = httpx.get(url + "/metrics").text
        assert (f"llm_mlp_energy_joules_total {energy.now}" in metrics) == (begin is not None)
        assert ("llm_mlp_energy_watts 12.5" in metrics) == ("llm_mlp_energy" in metrics) == (begin is not None)
    rows = [json.loads(r.message) for r in caplog.records if '"path": "/v1/' in r.message]
    assert [r["energy_joules"] for r in rows] == [x.usage.energy_joules for x in found] + [several]


def test_shutting_down_lets_answers_end(model, tmp_path):
    answers = []
    with serving(tmp_path, model=model) as (url, service):
        body = {"prompt": "a", "max_tokens": 60, "temperature": 0}
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(url + "/v1/completions", json=body, timeout=60))
        )
        thread.start()
        while not service.engine.busy and not answers:
            time.sleep(0.005)
    thread.join(60)
    assert answers[0].status_code == 200 and answers[0].json()["choices"][0]["finish_reason"] in ("length", "stop")
