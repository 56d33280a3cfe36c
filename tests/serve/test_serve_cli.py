"""`llm-mlp serve` and `llm-mlp chat` as a user starts them, chat templates, and the text of an answer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from serve_cases import TEXT, small_model

from llm_mlp.checkpoint import save_model
from llm_mlp.cli.serving import KEYS, read_keys
from llm_mlp.config import ConfigError
from llm_mlp.context import Reader, Store
from llm_mlp.data.chat import ChatTemplate
from llm_mlp.infer import Sampling
from llm_mlp.serve.service import Text
from llm_mlp.serve.talk import Talk, TalkError


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "model"
    save_model(path, *model)
    return path


def command(*args):
    return [sys.executable, "-m", "llm_mlp", *map(str, args)]


def test_serve_answers_and_ends_on_a_signal(folder, tmp_path):
    key = tmp_path / "keys"
    key.write_text("# ours\nsecret\n")
    args = ("serve", "--model", folder, "--port", 0, "--api-keys", key, "--store", tmp_path / "store")
    args = (*args, "--memory-gb", 0.0001)
    process = subprocess.Popen(command(*args), stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        lines = []
        while not lines or not lines[-1].startswith("listening on "):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        url = lines[-1].split()[-1]
        assert any("active + " in line and "were asked for" in line for line in lines)
        headers = {"Authorization": "Bearer secret"}
        assert httpx.get(url + "/v1/models").status_code == 401
        assert httpx.get(url + "/v1/models", headers=headers).json()["data"][0]["id"] == folder.parent.name
        body = {"prompt": "The mill", "max_tokens": 4}
        assert httpx.post(url + "/v1/completions", json=body, headers=headers, timeout=60).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
    finally:
        process.kill()


@contextlib.contextmanager
def killed(folder, store):
    """(URL, the process) of a server that is killed at the end, if not before."""
    args = ("serve", "--model", folder, "--port", 0, "--store", store)
    process = subprocess.Popen(command(*args), stderr=subprocess.PIPE, text=True)
    try:
        line = ""
        while not line.startswith("listening on "):
            line = process.stderr.readline()
            assert line
        yield line.split()[-1], process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)


def test_a_killed_server_loses_no_context(folder, tmp_path, model):
    """Contexts whose creation was answered are whole after kill -9."""
    made = []
    with killed(folder, tmp_path) as (url, _):
        until = time.time() + 1.5
        while time.time() < until:
            found = httpx.post(url + "/v1/contexts", json={"name": f"c{len(made)}", "text": f"The river {len(made)}"})
            made.append(found.json()["id"])
    store, reader = Store(tmp_path), Reader(*model)
    assert made and [store.get(f"c{i}", reader).id for i in range(len(made))] == made


@pytest.mark.slow
@pytest.mark.parametrize("composable", [False, True])
def test_a_killed_servers_reading_goes_on(folder, tmp_path, composable):
    """An append that kill -9 has cut off, asked for again, gives to the bit what one left alone gives."""
    long, kept = {"text": TEXT * 250}, {}
    for name in ("whole", "cut"):
        store = tmp_path / name
        with killed(folder, store) as (url, process), ThreadPoolExecutor(1) as pool:
            paths = url + "/v1/contexts", url + "/v1/contexts/book/append"
            first = {"name": "book", "text": "The mill.", "composable": composable}
            assert httpx.post(paths[0], json=first, timeout=60).status_code == 201
            asked = pool.submit(httpx.post, paths[1], json=long, timeout=300)
            if name == "cut":
                while not (store / "names" / "book.reading.json").exists():
                    assert not asked.done()
                    time.sleep(0.01)
                process.send_signal(signal.SIGKILL)
                with pytest.raises(httpx.TransportError):
                    asked.result()
            else:
                assert asked.result().json()["cached_tokens"] < 10
        if name == "cut":
            with killed(folder, store) as (url, _):
                again = httpx.post(url + "/v1/contexts/book/append", json=long, timeout=300).json()
                assert again["cached_tokens"] >= 65_536 and "an interrupted reading" in again["cache"]
        kept[name] = Store(store).get("book").tensors()
    assert kept["whole"].keys() == kept["cut"].keys()
    assert all(torch.equal(kept["cut"][part], t) for part, t in kept["whole"].items())


@pytest.mark.slow
def test_a_killed_reading_of_a_book_goes_on(folder, tmp_path):
    """5 MB by `llm-mlp context create`, kill -9 on the way and the same again: the bits of one that was left alone, in
    a file that is larger than a sentence's by its token ids alone."""
    book = tmp_path / "book.txt"
    book.write_text("".join(f"Chapter {n}. {TEXT}" for n in range(2200)), encoding="utf8")
    assert book.stat().st_size > 5_000_000

    def create(name, text):
        args = ("context", "create", name, "--model", folder, "--store", tmp_path, "--every", 65_536, *text)
        return subprocess.Popen(command(*args), stdout=subprocess.PIPE, text=True)

    cut, deadline = create("cut", ("--file", book)), time.time() + 300
    while not (tmp_path / "names" / "cut.reading.json").exists():
        assert cut.poll() is None and time.time() < deadline
        time.sleep(0.01)
    cut.send_signal(signal.SIGKILL)
    assert cut.wait(30) == -signal.SIGKILL
    texts = {"cut": ("--file", book), "whole": ("--file", book), "sentence": ("--text", "The mill stood.")}
    for name, text in texts.items():
        assert create(name, text).wait(600) == 0
    found = {name: Store(tmp_path).get(name) for name in texts}
    tensors = found["cut"].tensors()
    assert len(found["whole"].tokens) > 1_000_000
    assert all(torch.equal(tensors[part], t) for part, t in found["whole"].tensors().items())
    longer = len(found["whole"].tokens) - len(found["sentence"].tokens)
    assert found["whole"].bytes - found["sentence"].bytes == 4 * longer


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--host", "0.0.0.0"), "without API keys only this machine is served"),
        (("--api-keys", "/nowhere/keys"), "cannot be read"),
        (("--weights", "fp4"), "expected fp32"),
    ],
)
def test_serve_refuses(folder, more, says):
    environment = {k: v for k, v in os.environ.items() if k != KEYS}
    done = subprocess.run(
        command("serve", "--model", folder, *more), capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ") and says in done.stderr


def test_keys(tmp_path, monkeypatch):
    monkeypatch.setenv(KEYS, " a, b ,")
    assert read_keys(None) == ("a", "b")
    (tmp_path / "keys").write_text("one # first\n\n# none\ntwo\n")
    assert read_keys(tmp_path / "keys") == ("one", "two")
    (tmp_path / "none").write_text("# nothing\n")
    with pytest.raises(ConfigError, match="holds no key"):
        read_keys(tmp_path / "none")


def chats(folder, store, said, *more):
    """What `llm-mlp chat` writes on stdout, and its notes."""
    args = ("chat", "--model", folder, "--temperature", 0, "--max-tokens", 8, "--store", store, *more)
    done = subprocess.run(command(*args), input="\n".join(said), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "INFO" not in line]


def test_chat_talks_takes_back_and_saves(folder, tmp_path):
    said = ["The mill", "/undo", "/undo", "The wheel", "/save talk", "/what", "/save ../x", "/undo 2", "/load"]
    _, lines = chats(folder, tmp_path, [*said, "/load no", "/help", "/quit", "No"])
    first, second = lines[0], lines[3]
    assert re.fullmatch(
        r"8 tokens, [\d.]+ tokens/s \| \d+ tokens held in [\d.]+ MB \| cached 0 \(miss: nothing was said yet\)", first
    )
    assert lines[1:3] == ["taken back", "nothing to take back"] and "cached 0 (" in second
    assert lines[4].startswith("saved talk: ") and lines[5] == "/what: unknown; /help lists what there is"
    assert "is no name for a context" in lines[6] and lines[7].startswith("/undo takes nothing: ")
    assert lines[8].startswith("/load takes NAME: ") and "'no' does not exist" in lines[9]
    words = [line.split()[0] for line in lines[10:]]
    assert words == ["/save", "/load", "/fork", "/undo", "/contexts", "/help", "/quit"]
    assert Store(tmp_path).get("talk").manifest.tokens > 8


def test_chat_goes_on_from_contexts(folder, tmp_path):
    """Loaded, saved again as the next version, forked under a name that has to be new, and listed."""
    said = ["/save", "/save a", "/fork a", "The mill", "on", "/save a", "and on", "/save", "/save copy", "/contexts"]
    _, lines = chats(folder, tmp_path, said)
    assert lines[:3] == ["under which name? /save NAME", *["nothing was said yet"] * 2]
    store = Store(tmp_path)
    a, size = store.entry("a"), store.get("a").manifest.tokens
    assert len(a.history) == 2 and store.entry("copy").id == a.id
    assert "from the conversation)" in lines[4] and lines[-3].startswith("a ") and lines[-1].endswith(" MB")
    said = ["/fork a", "/fork b", "The wheel", "/save", "/load a", "The wheel", "/undo", "/undo"]
    again, lines = chats(folder, tmp_path, said, "--context", "a")
    assert lines[0] == f"context a: {size:,} tokens, none read again" and "'a' exists" in lines[1]
    assert lines[2] == f"forked to b: {size:,} tokens" and f"cached {size:,} (hit: {size} of " in lines[3]
    assert f" tokens from {a.id})" in lines[3] and lines[4].startswith("saved b: ") and lines[5] == lines[0]
    assert lines[-2:] == ["taken back", "nothing to take back"]
    answers = again.splitlines()
    assert answers[: len(answers) // 2] == answers[len(answers) // 2 :]  # the same words behind the same context
    now, b = store.entry("a"), store.get("b")
    assert now == a and b.manifest.parent == a.id and store.entry("b").history == (*a.history, b.id)


def test_a_conversation_can_be_taken_back_exchange_by_exchange_wherever_it_is_stored(folder, tmp_path, model):
    """Saved or forked: each version's end and, without one, each exchange's is a mark of the context."""
    store, reader = Store(tmp_path), Reader(*model)
    chats(folder, tmp_path, ["The mill", "/save a", "on", "and on", "/save", "The wheel", "/fork b", "/save c"])
    first, second = store.entry("a").history
    forked = store.entry("b")
    assert forked.history == (first, second, forked.id) and store.entry("c").history == forked.history
    marks = store.get("b").manifest.marks
    assert len(marks) == 4 and marks[0] == len(store._load(first).tokens)  # the second one was never stored
    again = store.undo("b", reader, steps=2)
    assert again.manifest.replayed and len(again.tokens) == marks[1]
    assert torch.equal(again.tokens, store._load(second).tokens[: marks[1]])
    assert store.undo("b", reader).id == first and store.entry("a").id == second


def test_talk_goes_on_from_its_state(model):
    reader, rule = Reader(*model), Sampling(0)
    talk = Talk(reader, ChatTemplate(reader.tokenizer))
    first = "".join(talk.say("The mill", 6, rule, None))
    kept = talk.context()
    second = "".join(talk.say("on", 6, rule, None))
    assert talk.undo() and "".join(talk.say("on", 6, rule, None)) == second
    other = Talk(reader, ChatTemplate(reader.tokenizer), kept)
    assert "".join(other.say("on", 6, rule, None)) == second
    text = reader.tokenizer.decode(talk.context().tokens.tolist())
    assert text == f"user: The mill\nassistant: {first}\nuser: on\nassistant: {second}\n"


def test_talk_keeps_an_answer_whose_state_was_lost_and_nothing_of_one_that_failed(model, monkeypatch):
    reader, rule = Reader(*model), Sampling(0)
    want, found = (Talk(reader, ChatTemplate(reader.tokenizer)) for _ in range(2))
    texts = ["".join(want.say(text, 6, rule, None)) for text in ("The mill", "on")]
    engine = found._engine
    decode = engine._decode

    def last_fails():
        if any(ticket.closing for ticket in engine._running):
            raise ZeroDivisionError("injected")
        decode()

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_decode", last_fails)
        assert "".join(found.say("The mill", 6, rule, None)) == texts[0]  # its state is read instead
        patch.setattr(engine, "_decode", lambda: 1 / 0)
        with pytest.raises(TalkError, match="ZeroDivisionError: division by zero"):
            list(found.say("no", 6, rule, None))
        patch.setattr(engine, "_read", lambda group: 1 / 0)
        with pytest.raises(TalkError, match="ZeroDivisionError: division by zero"):
            list(found.say("no", 6, rule, None))
    assert "".join(found.say("on", 6, rule, None)) == texts[1]
    assert torch.equal(found.context().tokens, want.context().tokens)


# -- the text of an answer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [[], ["wheel"], ["r, and", "zzz"], ["rive", "river"], ["."]])
def test_text_up_to_a_stop(model, stops):
    _, tokenizer = model
    whole = "The mill stood by the river, and the wheel turned. é€😀 end"
    places = [whole.find(stop) for stop in stops if stop in whole]
    want = whole[: min(places)] if places else whole
    text, out = Text(tokenizer, stops), ""
    for token in tokenizer.encode(whole):
        out += text.feed(token)
        assert want.startswith(out)  # nothing has to be taken back
        if text.stopped:
            break
    out += text.finish()
    assert out == want and text.stopped == bool(places)


def test_bench_serve_plots_each_number_of_clients(folder, tmp_path):
    results, plot = tmp_path / "serve.jsonl", tmp_path / "serve.html"
    args = ("--clients", "1,3", "--seconds", 0.5, "--slots", 2, "--max-tokens", 4, "--threads", 1)
    args = ("bench", "serve", "--model", folder, *args, "--results", results, "--plot", plot)
    done = subprocess.run(command(*args), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert "server, 1 clients" in out and "server, 3 clients" in out and out.count("0 errors") == 2
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["clients"] for line in lines] == [1, 3]
    for line in lines:
        assert line["tokens_per_second"] > 0 and line["first_token_ms"]["p50"] <= line["first_token_ms"]["p99"]
        assert line["joules_per_token"] is None or line["joules_per_token"] > 0
        assert (line["joules_per_token"] is None) == ("energy unavailable" in out)
    page = plot.read_text()
    for title in ("Throughput", "Time to the first token", "Time between tokens"):
        assert f"<figcaption>{title}</figcaption>" in page
    assert "p95 from" in page and "engine alone" in page  # the descriptions of the plots
