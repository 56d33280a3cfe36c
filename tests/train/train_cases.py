"""A run of a second: a small model on bytes of short documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from model_cases import SMALL
from ranks import together

from llm_mlp.checkpoint import read_tensors, save_model
from llm_mlp.config import TrainConfig, apply_overrides, build
from llm_mlp.data import prepare
from llm_mlp.models import build_model
from llm_mlp.train import TrainResult, train
from llm_mlp.train.console import read_metrics

WORDS = ("the cat sat on a mat and saw how the sun went down over the old red barn by the sea").split()  # noqa: SIM905 (a sentence reads better)
# Layers whose matrices are large enough for state in 8 bits, and for Muon.
LARGER = ("model.d_model=64", "model.attention={heads: 4, head_dim: 16}", "model.ffn.hidden=96")
ANSWERS = {"sea": "blue", "sun": "warm", "barn": "red", "mat": "flat"}


def write_documents(folder: Path, count: int = 40, name: str = "docs.jsonl") -> Path:
    """Documents of 20 to 60 words, the same every time."""
    path = folder / name
    if not path.exists():
        lines = []
        for n in range(count):
            words = [WORDS[(n * 7 + i * i + i * n) % len(WORDS)] for i in range(20 + n % 41)]
            lines.append(json.dumps({"text": " ".join(words)}))
        path.write_text("\n".join(lines) + "\n")
    return path


def tiny(folder: Path, *overrides: str, out: str = "run") -> TrainConfig:
    """A config whose run takes about a second."""
    values: dict[str, Any] = {
        "model": {**SMALL, "vocab_size": 257},
        "data": {
            "sources": [{"path": str(write_documents(folder))}],
            "tokenizer": "byte",
            "held_out": 0.2,
            "seq_len": 32,
            "cache_dir": str(folder / "cache"),
        },
        "optimizer": {"lr": 0.01},
        "schedule": {"warmup": 2},
        "evaluation": {"every": 0, "tokens": 512},
        "checkpoint": {"every": 0, "keep_last": 10},
        "out": str(folder / out),
        "steps": 6,
        "batch_size": 4,
        "log_every": 1,
    }
    return build(TrainConfig, apply_overrides(values, overrides))


def run(folder: Path, *overrides: str, out: str = "run", **options: Any) -> TrainResult:
    return train(tiny(folder, *overrides, out=out), quiet=True, **options)


def write_records(folder: Path) -> Path:
    """What each thing is, asked in several ways; and conversations about two of them."""
    path = folder / "records.jsonl"
    if not path.exists():
        rows: list[dict] = []
        for thing, answer in ANSWERS.items():
            for question in ("{}?", "the {}?", "how is the {}?", "and the {}?"):
                rows.append({"prompt": question.format(thing), "completion": answer})
            for other, second in ANSWERS.items():
                words = [("user", f"{thing}?"), ("assistant", answer), ("user", f"{other}?"), ("assistant", second)]
                rows.append({"messages": [{"role": role, "content": content} for role, content in words]})
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def records(folder: Path, *more: str) -> tuple[str, ...]:
    source = f"data.sources=[{{path: '{write_records(folder)}', format: instruct}}]"
    return (source, "data.packing=reset", "data.seq_len=64", "data.held_out=0.1", *more)


# -- the same run by several processes -----------------------------------------------------------------------------

EXACT = (
    "precision=fp64",
    "steps=20",
    "batch_size=8",
    "optimizer.lr=0.002",
    "model.d_model=64",
    "model.attention={heads: 4, head_dim: 16}",
)


def started(folder: Path, overrides: tuple[str, ...]) -> Path:
    """A checkpoint whose weights are filled at random."""
    config = tiny(folder, *overrides)
    model = build_model(config.model).double().randomize_()
    save_model(folder / "start", model, prepare(config.data).tokenizer)
    return folder / "start"


def trained(folder: str, overrides: tuple[str, ...], options: dict) -> dict:
    result = run(Path(folder), *overrides, **options)
    return {
        "curve": result.curve,
        "evaluations": result.evaluations,
        "sent": result.sent_bytes,
        "plain": result.plain_bytes,
        "collectives": result.collectives,
        "actions": [a.as_dict() for a in result.actions],
    }


def many(folder: Path, size: int, *overrides: str, **options) -> dict:
    """The same run by ``size`` processes; all of them report the same."""
    found = together(size, trained, str(folder), overrides, options)
    assert all(f["curve"] == found[0]["curve"] for f in found)
    return found[0]


def assert_same(folder: Path, one: str, other: str, limit: float, kind: str = "model") -> None:
    a, b = (read_metrics(folder / name) for name in (one, other))
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for key in ("loss", "grad_norm", "held_out_loss", "held_out_loss_ema", "held_out_loss_mean"):
            if key in x:
                assert x[key] == pytest.approx(y[key], rel=limit), (x["step"], key)
    a, b = (read_tensors(folder / name / kind / "model.safetensors") for name in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= limit * a[name].norm(), name
