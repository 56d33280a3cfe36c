"""How surprise ran over a text: that of the heads, however the text is cut, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from model_cases import random_model

from llm_mlp.context import ContextError, Reader, measure_surprise, measuring
from llm_mlp.models.perception import surprise, watching

TEXT = [(7 * i * i + 3 * i) % 31 for i in range(90)]


@pytest.fixture(params=["plain", "hybrid", "wide"])
def reader(request) -> Reader:
    return Reader(random_model(request.param), None)


def test_it_is_that_of_the_heads(reader):
    context, read = reader.create(TEXT), []
    found = measure_surprise(reader, context, parts=7, progress=read.append)
    seen = {}
    with (
        torch.no_grad(),
        watching(reader.model, lambda n, k, w, decay, beta, residual: seen.update({n: surprise(w, residual)[0]})),
    ):
        reader.model(torch.tensor([TEXT]))
    assert found.layers.keys() == seen.keys() and read == [90]
    begin, sizes = 0, []
    for part, end in enumerate(found.ends):
        for layer, each in seen.items():
            assert found.layers[layer][part] == pytest.approx(float(each[begin:end].mean()), abs=1e-9)
        sizes, begin = [*sizes, end - begin], end
    assert begin == len(TEXT) and max(sizes) - min(sizes) <= 1
    assert all(0 < x < 1 for row in found.layers.values() for x in row)
    report = json.loads(json.dumps(found.report()))
    assert report["mean"] == pytest.approx(
        [sum(p) / len(seen) for p in zip(*found.layers.values(), strict=True)], abs=1e-4
    )
    assert all(block.mixer.watcher is None for block in reader.model.blocks if hasattr(block.mixer, "watcher"))


def test_pieces_do_not_matter_and_nothing_changes(reader):
    context = reader.append(reader.create(TEXT[:40]), TEXT[40:])
    before = {name: t.clone() for name, t in context.tensors().items()}
    pieces = measuring(reader, context, piece=13)
    read = []
    while True:
        try:
            read.append(next(pieces))
        except StopIteration as end:
            cut = end.value
            break
        assert all(block.mixer.watcher is None for block in reader.model.blocks if hasattr(block.mixer, "watcher"))
    assert read == [*range(13, 90, 13), 90]
    whole = measure_surprise(reader, context)
    assert cut.ends == whole.ends and len(whole.ends) == 32
    assert cut.overall == pytest.approx(whole.overall, abs=1e-6)
    assert all(torch.equal(t, before[name]) for name, t in context.tensors().items())


def test_what_is_repeated_surprises_less():
    """A head that takes away what it finds and forgets nothing knows a text's second half from the first."""
    model = random_model({"perception": {"decay": False, "read_width": 32, "features": 32}})
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.erase_up.weight.zero_()
            block.mixer.erase_up.bias.zero_()
    reader = Reader(model, None)
    text = torch.randperm(20, generator=torch.Generator().manual_seed(0)).repeat(8)
    first, *_, last = measure_surprise(reader, reader.create(text), parts=8).layers[0]
    assert last < 0.7 * first


def test_a_short_text_has_a_part_a_token():
    reader = Reader(random_model("plain"), None)
    found = measure_surprise(reader, reader.create(TEXT[:3]))
    assert found.ends == (1, 2, 3) and found.overall[0] == pytest.approx(0.5, abs=1e-4)  # nothing is known at first


def test_what_cannot_be_told_is_refused():
    reader = Reader(random_model("plain"), None)
    made = reader.create(TEXT)
    with pytest.raises(ContextError, match="0 parts: at least one"):
        measure_surprise(reader, made, parts=0)
    composed = SimpleNamespace(tokens=made.tokens, id="x", manifest=made.manifest.model_copy(update={"composed": True}))
    with pytest.raises(ContextError, match="context x is composed"):
        measure_surprise(reader, composed)
    with pytest.raises(ContextError, match="made with another config"):
        measure_surprise(Reader(random_model("wide"), None), made)
    twin = Reader(random_model("attention"), None)
    with pytest.raises(ContextError, match="no perception heads"):
        measure_surprise(twin, twin.create(TEXT))
