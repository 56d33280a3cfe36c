"""Output by a JSON schema or an expression: always satisfied, beside others nothing changes, and bounded."""

from __future__ import annotations

import json
import re
import time
from typing import Literal

import pytest
import torch
from model_cases import SMALL
from pydantic import BaseModel, ConfigDict, Field, conlist
from test_engine import GREEDY, Listener, run, until_idle

from llm_mlp.config import ModelConfig, _merge, build
from llm_mlp.data.tokenizer import Tokenizer
from llm_mlp.infer import ConstraintError, Engine, Grammars, Request, Sampling, generate
from llm_mlp.infer import constraint as constraint_file
from llm_mlp.models import build_model

TEXT = "The mill stood by the river, and the wheel turned all day. " * 40


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=6)
    weight: float = Field(ge=0, le=100)


class Machine(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: Literal["mill", "wheel", "été"]
    count: int = Field(ge=-3, le=12)
    parts: conlist(Part, max_length=2)
    old: bool | None


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    # Padded beyond the tokenizer's vocabulary, as models are.
    return build_model(build(ModelConfig, _merge(SMALL, {"vocab_size": tokenizer.vocab_size + 7}))).randomize_().eval()


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, seconds=20)


def engine_of(model, tokenizer, **more):
    return Engine(model, slots=6, chunk=16, vocabulary=tokenizer.vocab_size, **more)


def test_schemas_are_satisfied(model, tokenizer, grammars):
    grammar = grammars.schema(Machine.model_json_schema())
    rules = [GREEDY, Sampling(1.5), Sampling(1.5, top_p=0.5, repetition_penalty=1.3, presence_penalty=1.0)]
    rules += [Sampling(1.0, top_k=3, min_p=0.1, logit_bias={tokenizer.eos: 100.0})]
    stop = frozenset([tokenizer.eos])
    asked = [
        Request([1, 2], 400, rules[seed % 4], seed, stop, logprobs=2, constraint=grammar.matcher())
        for seed in range(12)
    ]
    found = run(engine_of(model, tokenizer), asked)
    texts = [tokenizer.decode(one.tokens) for one in found]
    for text, one in zip(texts, found, strict=True):
        assert one.finish == "stop"
        Machine.model_validate_json(text, strict=True)
        assert list(json.loads(text)) == ["kind", "count", "parts", "old"]
        assert all(-1e3 < value <= 0 for value, _ in one.logprobs)  # finite: of the model's own distribution
    assert len(set(texts[1::4])) == 3


@pytest.mark.parametrize(
    "pattern", ["[0-9]{3}-[a-z]+", "(mill|wheel)s?", "é{2,4}|[α-ω]{5}", r"a/b\"\n[^x]{3}", "(?i)river ?", "x*"]
)
def test_expressions_match(model, tokenizer, grammars, pattern):
    grammar = grammars.regex(pattern)
    for seed in range(4):
        request = Request([1], 300, Sampling(1.5), seed, frozenset([tokenizer.eos]), constraint=grammar.matcher())
        [one] = run(engine_of(model, tokenizer), [request])
        text = tokenizer.decode(one.tokens)
        assert one.finish == "stop" or len(one.tokens) == 300
        assert one.finish == "length" or re.fullmatch(pattern, text), text


def test_generate_does_what_the_engine_does(model, tokenizer, grammars):
    grammar = grammars.schema(Machine.model_json_schema())
    how = {"max_tokens": 60, "stop": tokenizer.eos, "vocabulary": tokenizer.vocab_size, "sampling": GREEDY}
    alone = list(generate(model, [1, 2], **how, constraint=grammar.matcher()))
    request = Request([1, 2], 60, GREEDY, stop=frozenset([tokenizer.eos]), constraint=grammar.matcher())
    assert run(engine_of(model, tokenizer), [request])[0].tokens == alone
    assert tokenizer.decode(alone).startswith('{"kind"')


def test_others_get_what_they_get_without(model, tokenizer, grammars):
    """To the bit in the invariant mode; greedy also else."""
    grammar = grammars.schema(Machine.model_json_schema())

    def free():
        return [Request([i + 1, 2], 20, Sampling(i % 2 * 1.0), seed=i, logprobs=2) for i in range(4)]

    def bound():
        return Request([3], 40, GREEDY, stop=frozenset([tokenizer.eos]), constraint=grammar.matcher())

    without = run(engine_of(model, tokenizer, invariant=True), free())
    beside = run(engine_of(model, tokenizer, invariant=True), [bound(), *free(), bound()], late=1)
    [alone] = run(engine_of(model, tokenizer, invariant=True), [bound()])
    for a, b in zip(without, beside[1:-1], strict=True):
        assert (a.tokens, a.logprobs) == (b.tokens, b.logprobs)
    assert beside[0].tokens == beside[-1].tokens == alone.tokens


@pytest.mark.parametrize("keep", [False, True])
def test_ends(model, tokenizer, grammars, keep):
    """Complete is "stop" also at the last token and without a stop id; cut off is "length"."""
    for pattern, most, finish in (("[0-9]{3}", 3, "stop"), ("[0-9]{3}", 2, "length"), ("[0-9]{3}", 9, "stop")):
        grammar = grammars.regex(pattern)
        request = Request([1], most, Sampling(1.0), 0, keep=keep, constraint=grammar.matcher())
        [one] = run(engine_of(model, tokenizer), [request])
        assert one.finish == finish and len(tokenizer.decode(one.tokens)) == min(3, most)
        if keep:
            final = one.events[-1].final
            assert final.tokens.tolist() == [1, *one.tokens]
            assert torch.isfinite(final.logits).all()
    # A stop id that is an ordinary token ends nothing where the text may not end.
    zero = tokenizer.encode("0")[0]
    request = Request([1], 9, GREEDY, stop=frozenset([zero]), constraint=grammars.regex("0{3}1").matcher())
    [one] = run(engine_of(model, tokenizer), [request])
    assert one.finish == "error" and "no token" in one.events[-1].error  # and it is not "stop"


def test_a_failing_constraint_ends_its_request_alone(model, tokenizer, grammars):
    class Bad:
        finished = False

        def __init__(self, where):
            self.where = where

        def allowed(self):
            if self.where == "allowed":
                raise ConstraintError("too complex")
            return torch.ones(5, dtype=torch.bool), False

        def take(self, token):
            raise ConstraintError("too complex")

    others = [Request([1], 5, GREEDY), Request([2], 5, GREEDY)]
    want = [one.tokens for one in run(engine_of(model, tokenizer), others)]
    for where in ("allowed", "take"):
        found = run(engine_of(model, tokenizer), [others[0], Request([4], 9, constraint=Bad(where)), others[1]])
        assert [one.tokens for one in (found[0], found[2])] == want
        assert found[1].finish == "error" and "constraint: too complex" in found[1].events[-1].error


def test_cancelled_ones_free_their_slots(model, tokenizer, grammars):
    engine, listener = engine_of(model, tokenizer), Listener()
    ticket = engine.submit(Request([1], 4000, constraint=grammars.regex("[a-z]+").matcher()), listener)
    for _ in range(5):
        engine.step()
    assert listener.tokens
    ticket.cancel()
    until_idle(engine)
    assert listener.finish == "cancelled" and engine.load["free"] == engine.slots


# -- compiling -----------------------------------------------------------------------------------------------------


def references(n):
    """A chain of them."""
    defs = {f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(n)}
    return {"$ref": "#/$defs/a0", "$defs": {**defs, f"a{n}": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "objekt"}, "objekt"),
        ({"type": "object", "if": {"type": "object"}}, 'Unimplemented keys: ["if"]'),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum"),
        ({"enum": []}, "nsatisfiable"),
        ({"$ref": "http://example.com/a.json"}, "example.com"),
        ({"x-guidance": {"whitespace_flexible": 5}}, "boolean"),
        ({"x-guidance": 5}, "not a JSON schema"),
        ({"const": "a" * 70_000}, "at most 65,536"),
        ({"const": "\ud800"}, "surrogate"),
        ({"type": "object", "properties": {f"k{i}": {} for i in range(4000)}}, "too large"),
        (references(800), "too deep"),  # fills the library's stack, which ends a process
    ],
    ids=lambda x: str(x)[:40],
)
def test_schemas_that_are_refused(grammars, schema, says):
    with pytest.raises(ConstraintError, match=re.escape(says)):
        grammars.schema(schema)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("", "empty"),
        ("([0-9", "unclosed"),
        (r"(?=a)b", "look-ahead"),
        (r"(a)\1", "backreferences"),
        (r"[^\s\S]", "no text"),
        ("a\\\\\\", "backslash"),
        ("(" * 20_000 + "a" + ")" * 20_000, "nest"),
        ("x?" * 30_000, "too big"),  # 15 s and 2 GB by the library's own limits
        ("a" * 70_000, "at most 65,536"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_expressions_that_are_refused(grammars, pattern, says):
    began = time.perf_counter()
    with pytest.raises(ConstraintError, match=says):
        grammars.regex(pattern)
    assert time.perf_counter() - began < 10


def test_what_backtracks_elsewhere_is_followed(model, tokenizer, grammars):
    request = Request([1], 30, Sampling(1.0), 0, constraint=grammars.regex("(a+)+b|((a{0,9}){0,9}){0,9}c").matcher())
    [one] = run(engine_of(model, tokenizer), [request])
    assert one.finish in ("stop", "length") and set(tokenizer.decode(one.tokens)) <= set("abc")


def test_a_time_limit(tokenizer):
    began = time.perf_counter()
    with pytest.raises(ConstraintError, match=r"not compiled within 0\.5 s"):
        Grammars(tokenizer, seconds=0.5).schema({"type": "integer", "multipleOf": 999_983})
    assert time.perf_counter() - began < 5


def test_compiled_once_and_a_few_are_kept(tokenizer, monkeypatch):
    grammars = Grammars(tokenizer, keep=2)
    tried = []
    monkeypatch.setattr(grammars, "_try", tried.append)
    a = grammars.regex("a")
    assert grammars.regex("a") is a and len(tried) == 1
    grammars.regex("b"), grammars.regex("a"), grammars.regex("c")
    assert grammars.regex("a") is a and len(tried) == 3  # b was the one asked for longest ago
    grammars.regex("b")
    assert len(tried) == 4
    two = [{"type": "object", "properties": {k: {} for k in names}} for names in ("xy", "yx")]
    assert grammars.schema(two[0]) is not grammars.schema(two[1])  # the order of properties counts


def test_without_the_library(tokenizer, monkeypatch):
    monkeypatch.setattr(constraint_file.importlib.util, "find_spec", lambda name: None)
    for ask in (lambda g: g.regex("a"), lambda g: g.schema({})):
        with pytest.raises(ConstraintError, match=r"pip install 'llm-mlp\[serve\]'"):
            ask(Grammars(tokenizer))


def test_sentencepiece(tmp_path):
    """Its decoding drops the space ahead of a text: the text that comes out is what has to match."""
    pieces = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "▁▁", "ab"]
    added = [{"id": i, "content": c, "special": True} for i, c in enumerate(pieces[:2])]
    for row in added:
        row.update(dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False))
    merges = [["▁", "a"], ["▁", "▁"], ["a", "b"]]
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}]
    decoders += [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    prepend = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    spec = {"version": "1.0", "added_tokens": added, "decoder": {"type": "Sequence", "decoders": decoders}}
    spec["normalizer"] = {"type": "Sequence", "normalizers": prepend}
    spec["model"] = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "merges": merges}
    spec["model"]["vocab"] = {p: i for i, p in enumerate(pieces)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    own = Tokenizer.load(tmp_path)
    model = build_model(build(ModelConfig, _merge(SMALL, {"vocab_size": own.vocab_size}))).randomize_().eval()
    grammars = Grammars(own)
    for pattern in ("abab aba", " {1,3}a+b", "[a-b]{2,5}"):
        grammar = grammars.regex(pattern)
        for seed in range(4):
            how = {"max_tokens": 60, "sampling": Sampling(1.2), "seed": seed, "stop": own.eos}
            text = own.decode(generate(model, [1], **how, constraint=grammar.matcher()))
            assert re.fullmatch(pattern, text), (pattern, text)
