"""Composing contexts and measuring what they recall."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from model_cases import random_model

from llm_mlp.config import ModelConfig, build
from llm_mlp.context import Context, ContextError, Reader, Store, compose, composing, measure_composed, measure_recall
from llm_mlp.context.recall import CUE, VALUE, Recall
from llm_mlp.models import LM, build_model
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


def test_composing_is_cut_into_pieces():
    """One for each layer and order, and one for each layer's units: others may use the model between them."""
    reader = reader_of()
    parts = [reader.create(x) for x in (A, B, C)]
    assert len(list(composing(reader, parts, [3]))) == 2 * (3 + 1)


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


# -- recall of what was composed -----------------------------------------------------------------------------------


def associative(half_life: float | None = None) -> LM:
    """A layer of one head made by hand: its second layer maps the last `CUE` tokens to the token behind them, and what
    it reads there is what it writes next. ``half_life``: tokens after which it has forgotten half; None: it never does.
    """
    D, R = 128, 512
    perception = {"groups": 1, "heads_per_group": 1, "read_width": R, "features": R, "value_width": D, "conv_width": 4}
    perception |= {"erase": "none", "decay": half_life is not None, "write_gate": False, "output_gate": False}
    shape = {"vocab_size": 256, "d_model": D, "n_layers": 1, "logit_cap": 0.0, "tie_embeddings": True}
    shape |= {"perception": {**perception, "block": 0, "slots": 0}, "ffn": {"hidden": 8}}
    model = build_model(build(ModelConfig, shape)).eval()
    mixer = model.blocks[0].mixer
    same, nothing = torch.eye(D), torch.zeros(D, D)
    with torch.no_grad():
        mixer.in_proj.weight.copy_(torch.cat([*[same] * 3, nothing, *[same] * 3, nothing, same]))
        mixer.conv.zero_()
        for n in range(CUE):  # a key is of the tokens before, a query of these and the one that is read
            mixer.conv[n * D : (n + 1) * D, 3 - n] = 1
            mixer.conv[R + n * D : R + (n + 1) * D, 2 - n] = 1
        mixer.conv[2 * R :, 3] = 1
        mixer.slope.zero_()  # no activation
        mixer.out_proj.weight.copy_(100 * same)
        if half_life is not None:
            mixer.log_rate.fill_(-torch.tensor(half_life).log())
    return model


def documents(reader: Reader, *lengths: int) -> list[Context]:
    g = torch.Generator().manual_seed(3)
    vocabulary = reader.model.config.vocab_size
    return [reader.create(torch.randint(vocabulary, (n,), generator=g)) for n in lengths]


def test_a_memory_that_forgets_nothing_recalls_each_document_composed_as_in_one_text():
    reader = Reader(associative(), None, transitions=True)
    parts = documents(reader, 400, 300)
    states = [{n: t.clone() for n, t in c.state.items()} for c in parts]
    found = measure_composed(reader, parts, [3])
    for each in found:
        # Sums do not depend on the order; the documents differ by a few tokens at their borders alone.
        assert sum(a != b for a, b in zip(each.composed.hits, each.concatenated.hits, strict=True)) <= 1
        assert each.composed.rate > 0.75 and each.composed.interval[0] > 0.6 > each.composed.chance == 1 / 64
        assert each.composed.pairs == 64 and each.composed.depths == each.concatenated.depths
        assert each.report().keys() == {"composed", "concatenated"}
    planted = 64 * (CUE + VALUE)
    first, second = (each.composed.depths for each in found)
    assert (
        second[0] == 1 + 1 and first[0] == 1 + 300 + planted + 1
    )  # behind: the separator; the other text with its own
    for part, state in zip(parts, states, strict=True):  # all of it was on the side
        assert all(torch.equal(t, state[n]) for n, t in part.state.items())


def test_a_memory_that_forgets_loses_the_first_document_in_one_text_but_not_composed():
    reader = Reader(associative(half_life=300.0), None, transitions=True)
    first, second = measure_composed(reader, documents(reader, 400, 300), [3])
    assert first.concatenated.found < 25 < 50 < second.concatenated.found
    assert min(first.composed.found, second.composed.found) > 40  # each is the last one in half of the orders


def test_recall_by_chance_is_told_as_such():
    reader = Reader(random_model({"vocab_size": 256}), None, transitions=True)
    for each in measure_composed(reader, documents(reader, 200, 150, 130), [3]):
        for found in (each.composed, each.concatenated):
            assert found.found <= 6 and found.interval[0] <= found.chance and "by chance" in str(found.warning)


def test_what_is_too_short_to_be_measured_is_said():
    reader = Reader(random_model({"vocab_size": 256}), None, transitions=True)
    for lengths, pairs, says in (((200, 90), 64, "too short for 64 pairs"), ((200, 200), 10, "at least 64")):
        with pytest.raises(ContextError, match=says):
            measure_composed(reader, documents(reader, *lengths), [3], pairs=pairs)
