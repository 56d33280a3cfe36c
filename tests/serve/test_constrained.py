"""``response_format`` and ``regex``, as clients see them."""

from __future__ import annotations

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field
from serve_cases import TEXT, serving, small_model

from llm_mlp.infer.constraint import Matcher

HELLO = [{"role": "user", "content": "The mill"}]


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: Literal["mill", "wheel"]
    count: int = Field(ge=0, le=20)
    words: list[Literal["a", "b\n"]] = Field(max_length=2)


FORM = {"type": "json_schema", "json_schema": {"name": "answer", "schema": Answer.model_json_schema(), "strict": True}}


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("store"), model=model, slots=4, schema_seconds=20) as found:
        yield found


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server[0] + "/v1", api_key="none", max_retries=0) as found:
        yield found


def post(server, body, path="chat/completions"):
    body = ({"messages": HELLO} if path.startswith("chat") else {"prompt": "The mill"}) | body
    return httpx.post(f"{server[0]}/v1/{path}", json=body, timeout=60)


def test_the_official_client(client):
    """It takes a class, and gives back an object of it."""
    found = client.chat.completions.parse(
        model="llm-mlp", messages=HELLO, response_format=Answer, n=3, seed=1, temperature=1.5, max_tokens=300
    )
    answers = [choice.message.parsed for choice in found.choices]
    assert all(isinstance(answer, Answer) for answer in answers) and len({repr(a) for a in answers}) > 1
    assert {choice.finish_reason for choice in found.choices} == {"stop"}
    how = {"model": "llm-mlp", "messages": HELLO, "response_format": FORM, "temperature": 0, "max_tokens": 300}
    whole = client.chat.completions.create(**how).choices[0].message.content
    Answer.model_validate_json(whole)
    chunks = list(client.chat.completions.create(**how, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_expressions(server, path):
    body = {"regex": "(yes|no), [0-9]{2}", "max_tokens": 60, "n": 4, "seed": 3, "temperature": 1.5, "top_p": 0.9}
    first, again = (post(server, body, path).json()["choices"] for _ in range(2))
    texts = [c["text"] if "text" in c else c["message"]["content"] for c in first]
    assert all(re.fullmatch("(yes|no), [0-9]{2}", text) for text in texts) and len(set(texts)) > 1
    assert first == again and {c["finish_reason"] for c in first} == {"stop"}


def test_json_objects_text_and_length(server):
    bias = {"response_format": {"type": "json_object"}, "temperature": 0}
    text = post(server, {**bias, "max_tokens": 1}).json()["choices"][0]
    assert text["message"]["content"] == "{" and text["finish_reason"] == "length"
    free = post(server, {"max_tokens": 8, "temperature": 0}).json()["choices"]
    assert (
        post(server, {"response_format": {"type": "text"}, "max_tokens": 8, "temperature": 0}).json()["choices"] == free
    )
    cut = post(server, {"regex": "abc-def", "stop": "-", "max_tokens": 30}).json()["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == ("abc", "stop")
    # The turns of a template without tokens of its own end no text that is allowed.
    whole = post(server, {"regex": "a\nuser: b", "max_tokens": 30}).json()["choices"][0]
    assert whole["message"]["content"] == "a\nuser: b"


def test_log_probabilities_are_the_models_own(server):
    free = post(server, {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}).json()
    bound = post(server, {"regex": "[0-9]{3}", "max_tokens": 9, "logprobs": True, "top_logprobs": 20}).json()
    first = [found["choices"][0]["logprobs"]["content"][0]["top_logprobs"] for found in (free, bound)]
    assert first[0] == first[1]
    assert all(-1e3 < row["logprob"] <= 0 for row in bound["choices"][0]["logprobs"]["content"])


def test_contexts_go_on(server):
    url, service = server
    made = httpx.post(url + "/v1/contexts", json={"name": "mill", "text": TEXT[:400]}, timeout=60).json()
    body = {"context": "mill", "save_context": "said", "regex": "[0-9]{4}", "max_tokens": 60}
    found = post(server, body).json()
    text = found["choices"][0]["message"]["content"]
    assert re.fullmatch("[0-9]{4}", text) and found["choices"][0]["finish_reason"] == "stop"
    kept = service.store("").get("said", service.reader)
    want = TEXT[:400] + "user: The mill\nassistant: " + text + "\n"
    assert service.tokenizer.decode(kept.tokens.tolist()) == want and len(kept.tokens) > made["tokens"]


def test_many_optional_properties(server):
    """Compiled, but too many alternatives to follow: by the library itself."""
    found = post(server, schema({"properties": {f"k{i}": {"type": "string"} for i in range(900)}, "type": "object"}))
    assert found.status_code == 400 and "cannot be followed: too complex" in found.json()["error"]["message"]


def test_beside_others_nothing_changes(model, tmp_path):
    with serving(tmp_path, model=model, slots=4, invariant=True) as found:
        bodies = [{"max_tokens": 20, "seed": i} | ({"response_format": FORM} if i % 2 else {}) for i in range(6)]
        alone = [post(found, body).json()["choices"] for body in bodies]
        with ThreadPoolExecutor(6) as pool:
            together = [one.json()["choices"] for one in pool.map(lambda body: post(found, body), bodies)]
        assert together == alone


def schema(inner):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": inner}}}


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ({"response_format": {"type": "grammar"}}, "response_format", "'grammar' is not served"),
        ({"response_format": {}}, "response_format", "None is not served"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format", "missing"),
        ({"response_format": {"type": "json_object"}, "regex": "a"}, None, "regex: response_format asks"),
        (schema({"type": "objekt"}), "response_format", "objekt"),
        (schema({"const": "a" * 70_000}), "response_format", "at most 65,536"),
        ({"regex": "x?" * 30_000}, "regex", "too big"),
        ({"regex": "(a"}, "regex", "unclosed group"),
        ({"regex": ""}, "regex", "empty"),
        ({"regex": 5}, "regex", "string"),
    ],
    ids=lambda x: str(x)[:40],
)
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_refusals(server, path, body, field, says):
    began = time.perf_counter()
    found = post(server, body, path)
    assert found.status_code == 400 and time.perf_counter() - began < 10
    error = found.json()["error"]
    assert error["param"] == field and says in error["message"]
    assert field is None or error["message"].startswith(field)


def test_a_schema_that_takes_too_long_keeps_nobody_waiting(model, tmp_path):
    """And the server lives on."""
    with serving(tmp_path, model=model, schema_seconds=1.5) as found:
        slow = schema({"type": "integer", "multipleOf": 999_983})
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(post(found, slow))) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        assert post(found, {"max_tokens": 3}).status_code == 200 and not answers
        for thread in threads:
            thread.join(60)
        assert {one.status_code for one in answers} == {400}
        assert "response_format: not compiled within 1.5 s" in answers[0].json()["error"]["message"]


def test_one_that_becomes_too_complex(server, monkeypatch):
    """A request's own fault, told as such; its slot is free again."""

    def give_up(self, token):
        self.error = "too complex: x"
        raise ValueError(self.error)

    monkeypatch.setattr(Matcher, "take", give_up)
    found = post(server, {"regex": "[a-z]+", "max_tokens": 9})
    assert found.status_code == 400 and "cannot be followed: too complex" in found.json()["error"]["message"]
    rows = post(server, {"regex": "[a-z]+", "max_tokens": 9, "stream": True}).text
    assert "cannot be followed: too complex" in rows
    assert server[1].engine.load["free"] == 4


def test_a_client_that_goes_frees_its_slot(server):
    _, service = server
    with httpx.stream(
        "POST", server[0] + "/v1/chat/completions",
        json={"messages": HELLO, "regex": "[a-z]{4000}", "max_tokens": 4096, "stream": True}, timeout=60,
    ) as answer:  # fmt: skip
        lines = answer.iter_lines()
        assert json.loads(next(line for line in lines if line.startswith("data: "))[6:])["choices"]
    deadline = time.time() + 10
    while service.engine.load["free"] < 4 and time.time() < deadline:
        time.sleep(0.05)
    assert service.engine.load["free"] == 4
