"""Bits per byte: equal to what the logits say, in pieces, carried on, and by position."""

from __future__ import annotations

import json
import math

import pytest
import torch
from model_cases import SMALL

from llm_mlp.config import DataConfig, ModelConfig, SourceConfig, build
from llm_mlp.data import Tokenizer, held_out_batches, prepare
from llm_mlp.eval.text import TextScore, position_bins, score_batches, score_text
from llm_mlp.models import build_model

TEXT = "The sea was dark, and über the hills a light went out. " * 12


@pytest.fixture
def model():
    return build_model(build(ModelConfig, {**SMALL, "vocab_size": 257})).randomize_().double().eval()


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf8")
    return path


def losses(model, pieces: list[list[int]]) -> list[torch.Tensor]:
    out = []
    for ids in pieces:
        row = torch.tensor([[256, *ids]])
        logits = model(row[:, :-1]).logits[0]
        out.append(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none"))
    return out


def test_pieces_from_an_empty_state(model, path):
    ids = list(TEXT.encode())
    with torch.no_grad():
        expected = losses(model, [ids[a : a + 100] for a in range(0, len(ids), 100)])
    score, by_position = score_text(model, Tokenizer.bytes(), path, context=100)
    total = torch.cat(expected)
    assert score.tokens == score.bytes == len(ids)
    assert score.loss == pytest.approx(total.mean().item())
    assert score.bits_per_byte == pytest.approx(total.mean().item() / math.log(2))
    assert score.perplexity == pytest.approx(math.exp(total.mean().item()))
    assert by_position == {"0-100": pytest.approx(score.loss)}


def test_carried_is_the_whole_document(model, path):
    with torch.no_grad():
        (whole,) = losses(model, [list(TEXT.encode())])
    score, by_position = score_text(model, Tokenizer.bytes(), path, context=300, carry=True)
    assert score.loss == pytest.approx(whole.mean().item())
    pieces = whole.split(300)
    first = torch.cat([p[:256] for p in pieces]).mean().item()
    rest = torch.cat([p[256:] for p in pieces]).mean().item()
    assert by_position == {"0-256": pytest.approx(first), "256-300": pytest.approx(rest)}


def test_it_stops_after_enough_tokens(model, path):
    score, _ = score_text(model, Tokenizer.bytes(), path, context=50, max_tokens=120)
    assert score.tokens == 150


def test_bytes_of_a_subword_tokenizer(model, path):
    tokenizer = Tokenizer.train([TEXT], 257 + 30)
    wide = build_model(build(ModelConfig, {**SMALL, "vocab_size": tokenizer.vocab_size})).randomize_()
    score, _ = score_text(wide, tokenizer, path, context=64)
    assert score.bytes == len(TEXT.encode()) > score.tokens


def test_held_out_batches_are_scored_as_text(model, tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} {TEXT[: 60 + n]}"}) + "\n" for n in range(30)))
    data = prepare(
        DataConfig(
            sources=(SourceConfig(path=str(path)),), tokenizer="byte", held_out=0.3, cache_dir=str(tmp_path / "cache")
        ),
        progress=False,
    )
    # One window holds each document: the scores agree but for the separators, which here are targets too.
    batches = list(held_out_batches(data, seq_len=4096, batch_size=2, max_tokens=10**6))
    score = score_batches(model, batches)
    assert score.bytes == data.held_out[0].bytes
    rows = [(b.tokens, b.targets) for b, _ in batches]
    with torch.no_grad():
        nats = sum(float(model(t, targets=y, reduction="sum").loss) for t, y in rows)
    assert score.nats == pytest.approx(nats)
    assert score.tokens == sum(int((y >= 0).sum()) for _, y in rows)


def test_bins():
    assert position_bins(100) == [(0, 100)]
    assert position_bins(1500) == [(0, 256), (256, 512), (512, 1024), (1024, 1500)]
    assert position_bins(8192)[-1] == (4096, 8192)


def test_nothing_scored():
    assert TextScore(0, 0, 0.0).bits_per_byte == 0 == TextScore(0, 0, 0.0).loss
