"""Composing contexts and measuring what they recall."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from model_cases import random_model

from llm_mlp.context import Context, ContextError, Reader, Store, compose, measure_recall
from llm_mlp.context.recall import CUE, Recall
from llm_mlp.ops import Units, units_merge

A = [(7 * i * i + 3 * i) % 31 for i in range(70)]
B = [(5 * i * i + i) % 29 for i in range(45)]
C = [(3 * i * i + 2 * i) % 23 for i in range(20)]


def reader_of(case: str = "plain", **more) -> Reader:
    return Reader(random_model(case, **more), None, transitions=True)


def test_the_transition_is_the_texts_own():
    """S from another start = a P S + Z: in the first layer, whose inputs do not depend on what came before."""
    reader = reader_of("no-conv")
    a, b = reader.create(A), reader.create(B)
    both = reader.append(a, B)
    assert b.transition is not None and both.transition is not None and a.transition is not None
    name, P, log_a = "layers.0.fast_weights", b.transition["layers.0.P"], b.transition["layers.0.log_a"]
    S = torch.einsum("bgij,bgjmv->bgimv", P, a.state[name]) * log_a.exp()[:, :, None, :, None] + b.state[name]
    assert (S - both.state[name]).abs().max() < 1e-4
    assert (both.transition["layers.0.P"] - P @ a.transition["layers.0.P"]).abs().max() < 1e-5


def test_one_document_is_itself():
    reader = reader_of()
    a = reader.create(A)
    made, want = compose(reader, [a], [3]), reader.append(a, [3])
    assert made.manifest.composed and torch.equal(made.tokens, want.tokens) and torch.equal(made.logits, want.logits)


def test_documents_are_averaged_over_cyclic_orders():
    reader = reader_of("no-conv")
    a, b, c = (reader.create(x) for x in (A, B, C))
    made = compose(reader, [a, b, c], [3])
    name = "layers.0.fast_weights"
    orders = [(A, B, C), (B, C, A), (C, A, B)]
    want = sum(reader.create([t for x in order for t in x]).state[name] for order in orders) / 3
    # The separator was read last: one more step of the recurrence on both sides.
    mean = Context(a.manifest, a.tokens, {**compose_state(reader, [a, b, c]), name: want}, a.logits)
    after = reader.append(mean, [3])
    assert (made.state[name] - after.state[name]).abs().max() < 1e-4
    assert len(made.tokens) == len(A) + len(B) + len(C) + 1


def compose_state(reader, contexts):
    """Units merged by hand; second layers of the first document."""
    perception, state = reader.model.config.perception, dict(contexts[0].state)
    size = {"block": perception.block, "slots": perception.slots}
    for n in range(len(reader.model.blocks)):
        names = [f"layers.{n}.units.{f}" for f in Units._fields]
        merged = Units(*(contexts[0].state[x] for x in names))
        for c in contexts[1:]:
            merged = units_merge(merged, Units(*(c.state[x] for x in names)), **size)
        state.update(zip(names, merged, strict=True))
    return state


def test_what_cannot_be_composed_is_said(tmp_path):
    reader = reader_of()
    a, b = reader.create(A), reader.create(B)
    made = compose(reader, [a, b], [3])
    plain = Reader(reader.model, None).create(A)
    hybrid = reader_of("hybrid")
    for given, of, says in (
        ([], reader, "nothing to compose"),
        ([a, plain], reader, "read without its transitions"),
        ([a, made], reader, "is composed itself"),
        ([a], reader_of(seed=1), "made with another weight"),
        ([hybrid.create(A)], hybrid, "has no second layers to compose"),
    ):
        with pytest.raises(ContextError, match=says):
            compose(of, given, [3])
    store = Store(tmp_path)
    store.commit(made, "both")
    assert store.find([*A, *B, 3], reader).context is None  # composed contexts are no text's own
    store.commit(a, "a")
    found = store.get("a", reader)
    assert found.transition is not None and torch.equal(found.transition["layers.1.P"], a.transition["layers.1.P"])
    with pytest.raises(ContextError, match="is composed; measure the documents"):
        measure_recall(SimpleNamespace(tokenizer=None, model=SimpleNamespace(config=SimpleNamespace(vocab_size=300))),
                       Context(made.manifest, torch.zeros(400, dtype=torch.int32), {}, made.logits))  # fmt: skip


# -- recall --------------------------------------------------------------------------------------------------------


class Memory(torch.nn.Module):
    """Remembers the last ``span`` tokens and continues a cue as it was continued there."""

    def __init__(self, span: int) -> None:
        super().__init__()
        self.span, self.config = span, SimpleNamespace(vocab_size=500)
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, ids, state=None, logits="all"):
        before = state["text"] if state else ids[:, :0]
        text = torch.cat([before, ids], 1)
        out = torch.zeros(len(ids), 1, 500)
        for row, own in zip(out, text.tolist(), strict=True):
            cue = own[-CUE:]
            for a in range(len(own) - CUE - 1, max(len(own) - self.span, 0), -1):
                if own[a : a + CUE] == cue:
                    row[0, own[a + CUE]] = 1
                    break
        return SimpleNamespace(state={"text": text}, logits=out)


def recall_of(span: int) -> Recall:
    reader = Reader(Memory(span), None)
    text = torch.randint(500, (3000,), generator=torch.Generator().manual_seed(7)).to(torch.int32)
    manifest = SimpleNamespace(composed=False, id="x")
    return measure_recall(reader, Context(manifest, text, {}, torch.zeros(1, 500)))


def test_recall_of_a_memory_that_forgets_nothing():
    found = recall_of(10_000)
    assert found.found == found.pairs == 64 and found.rate == 1 and found.warning is None
    assert found.reach == found.depths[-1] > 2500
    assert 0.93 < found.interval[0] < found.interval[1] == 1
    assert list(found.depths) == sorted(found.depths)


def test_recall_of_a_short_memory():
    found = recall_of(400)
    known = sum(d < 400 for d in found.depths)
    assert abs(found.found - known) <= 2 and known < 64
    assert found.reach is not None and found.reach < 500
    assert "further back than about" in str(found.warning)
    nothing = recall_of(0)
    assert nothing.found <= 3 and nothing.chance == 1 / 64 and "by chance" in str(nothing.warning)


def test_recall_asks_for_enough():
    reader = reader_of()
    made = reader.create(A)
    for pairs, says in ((10, "at least 64"), (64, "too few tokens")):
        with pytest.raises(ContextError, match=says):
            measure_recall(reader, made, pairs=pairs)
    with pytest.raises(ContextError, match="too short for 64 pairs; give at least 128"):
        measure_recall(Reader(Memory(10), None), made)
