"""Several processes train what one trains: losses, gradients, checkpoints, and what is said when one of them fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import together
from train_cases import records, run, tiny

from llm_mlp.checkpoint import read_tensors, save_model
from llm_mlp.models import build_model
from llm_mlp.train.console import read_metrics

pytestmark = pytest.mark.slow

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
    from llm_mlp.data import prepare

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


def assert_same(folder: Path, one: str, other: str, limit: float) -> None:
    a, b = (read_metrics(folder / name) for name in (one, other))
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for key in ("loss", "grad_norm", "held_out_loss"):
            if key in x:
                assert x[key] == pytest.approx(y[key], rel=limit), (x["step"], key)
    a, b = (read_tensors(folder / name / "model/model.safetensors") for name in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= limit * a[name].norm(), name


LAYOUTS = {
    "ddp": (2, []),
    "ddp, four processes": (4, []),
    "ddp in parts": (2, ["micro_batch=2"]),
    "zero-3": (2, ["parallel.data=fsdp"]),
    "zero-2 in parts": (2, ["parallel.data=fsdp", "parallel.zero=2", "micro_batch=2"]),
    "zero-1 in parts": (2, ["parallel.data=fsdp", "parallel.zero=1", "micro_batch=2"]),
    "hybrid": (4, ["parallel.data=fsdp", "parallel.replicas=2"]),
    "context": (2, ["parallel.context=2"]),
    "context of four": (4, ["parallel.context=4"]),
    "context and data": (4, ["parallel.context=2", "micro_batch=2"]),
    "context and zero-3": (4, ["parallel.context=2", "parallel.data=fsdp", "activation_checkpointing=true"]),
}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_processes_train_as_one(tmp_path, layout, optimizer):
    size, overrides = LAYOUTS[layout]
    common = (*EXACT, f"optimizer.name={optimizer}")
    start = started(tmp_path, common)
    run(tmp_path, *common, out="one", init_from=start)
    many(tmp_path, size, *common, *overrides, out="many", init_from=start)
    assert_same(tmp_path, "one", "many", 1e-9)


@pytest.mark.parametrize("layout", ["ddp in parts", "zero-3", "context and data"])
def test_processes_read_instruction_records(tmp_path, layout):
    """Rows of different numbers of records and targets; the mean is over the targets of all processes."""
    size, overrides = LAYOUTS[layout]
    common = (*EXACT, *records(tmp_path), "evaluation.every=10")
    start = started(tmp_path, common)
    run(tmp_path, *common, out="one", init_from=start)
    many(tmp_path, size, *common, *overrides, out="many", init_from=start)
    assert_same(tmp_path, "one", "many", 1e-9)
