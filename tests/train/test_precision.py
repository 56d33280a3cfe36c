"""Parts of a model in a precision of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import together
from train_cases import run, tiny

from llm_mlp.checkpoint import read_tensors
from llm_mlp.config import ConfigError, ModelConfig, ModulePrecisionConfig, build
from llm_mlp.models import build_model, lm
from llm_mlp.precision import Precision
from llm_mlp.train.snapshot import checkpoints

PARTS = ("mixer", "ffn", "head")


def everywhere(name: str) -> list[str]:
    return [f"module_precision.{part}={name}" for part in PARTS]


def same_weights(folder: Path, one: str, other: str) -> bool:
    a, b = (read_tensors(folder / name / "model/model.safetensors") for name in (one, other))
    return all(torch.equal(t, b[name]) for name, t in a.items())


@pytest.mark.parametrize("packing", ["joined", "reset", "streams"])
@pytest.mark.parametrize(("around", "within"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_all_parts_in_a_precision_are_a_run_in_it(tmp_path, around, within, packing):
    """To the bit: nothing but these parts computes products (without routing)."""
    common = (f"data.packing={packing}", "steps=4", "evaluation.every=2")
    one = run(tmp_path, *common, f"precision={within}", out="one")
    other = run(tmp_path, *common, f"precision={around}", *everywhere(within), out="other")
    around_it = run(tmp_path, *common, f"precision={around}", out="around")
    assert other.curve == one.curve != around_it.curve and other.evaluations == one.evaluations
    assert same_weights(tmp_path, "one", "other")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_alone_computes_in_it(part, monkeypatch):
    model = build_model(build(ModelConfig, {"preset": "demo", "n_layers": 1, "vocab_size": 300})).randomize_()
    seen = {}
    for name in ("mixer", "ffn"):
        module = getattr(model.blocks[0], name)
        module.register_forward_hook(lambda m, i, out, name=name: seen.update({name: out}))
    real = lm.linear_cross_entropy

    def loss(x, *args, **options):
        seen["head"] = x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else x
        return real(x, *args, **options)

    monkeypatch.setattr(lm, "linear_cross_entropy", loss)
    precision = Precision("bf16", torch.device("cpu"), ModulePrecisionConfig(**{part: "fp32"}))
    precision.apply(model)
    tokens = torch.arange(40)[None]
    with precision.autocast():
        model(tokens, targets=tokens).loss.backward()
    seen["mixer"] = seen["mixer"][0]
    assert {name: t.dtype for name, t in seen.items()} == {
        name: torch.float32 if name == part else torch.bfloat16 for name in PARTS
    }
    assert precision.of(part) is None and all(precision.of(p) == torch.bfloat16 for p in PARTS if p != part)


@pytest.mark.parametrize("ffn", ["same", "fp8"])
def test_a_run_made_under_the_earlier_name_is_resumed(tmp_path, ffn):
    overrides = ("steps=2", "precision=bf16", f"module_precision.ffn={ffn}")
    run(tmp_path, *overrides, stop_after=1)
    path = checkpoints(tmp_path / "run")[-1] / "training.json"
    facts = json.loads(path.read_text())
    del facts["config"]["module_precision"]
    facts["config"]["ffn_precision"] = ffn
    path.write_text(json.dumps(facts))
    assert run(tmp_path, *overrides, resume=True).steps == 2


@pytest.mark.parametrize("precision", ["fp16", "fp64"])
def test_what_does_not_go_together_is_refused(tmp_path, precision):
    with pytest.raises(ConfigError, match="module_precision.head = fp32 needs precision = fp32 or bf16"):
        tiny(tmp_path, f"precision={precision}", "module_precision.head=fp32")


def curve(folder: str, overrides: tuple[str, ...], out: str) -> list:
    return run(Path(folder), *overrides, out=out).curve


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.data=fsdp", "activation_checkpointing=full"],
        ["parallel.context=2"],
        ["parallel.pipeline=2", "micro_batch=2"],
        ["parallel.tensor=2"],
    ],
    ids=" ".join,
)
def test_processes_train_as_one(tmp_path, layout):
    """In float32 all through, so that sums in another order differ by little."""
    common = ("precision=bf16", *everywhere("fp32"), "steps=6")
    one = curve(str(tmp_path), common, "one")
    for found in together(2, curve, str(tmp_path), (*common, *layout), "many"):
        for (_, a), (_, b) in zip(one, found, strict=True):
            assert b == pytest.approx(a, rel=1e-5)
