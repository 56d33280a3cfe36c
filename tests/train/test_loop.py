"""The training loop: what it learns, what it keeps, and that a resumed run is the uninterrupted one."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_cases import LARGER, run

from llm_mlp.checkpoint import CheckpointError, load_model, read_tensors
from llm_mlp.config import ConfigError
from llm_mlp.ops import tune
from llm_mlp.train import TrainingError, loop, snapshot
from llm_mlp.train.console import read_metrics
from llm_mlp.train.gradients import Gradients


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "model.safetensors")


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_learns_and_leaves_a_complete_run(tmp_path):
    result = run(tmp_path, "steps=60", "evaluation.every=30")
    assert result.curve[0][1] == pytest.approx(math.log(257), abs=0.01)  # the head starts at zero
    assert result.loss < 0.6 * result.curve[0][1]
    assert [step for step, _ in result.evaluations] == [30, 60]
    assert result.evaluations[1][1] < result.evaluations[0][1]
    assert result.tokens == 60 * 4 * 32 and result.tokens_per_second > 0
    model, tokenizer = load_model(tmp_path / "run")
    assert tokenizer.eos < model.config.vocab_size
    assert_equal(weights(tmp_path / "run/model"), weights(tmp_path / "run/checkpoints/step-0000060"))
    lines = read_metrics(tmp_path / "run")
    assert {"loss", "lr", "grad_norm", "tokens_per_second"} <= lines[0].keys()
    assert lines[-1]["bits_per_byte"] == result.bits_per_byte
    board = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [
        (line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in lines if "loss" in line
    ]
    shown = {"lr", "grad_norm", "tokens_per_second", "sample", "bits_per_byte", "heads/half_life/layer0"}
    assert shown <= set(board.Tags()["scalars"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.dropout=0.1"],
        ["data.packing=reset", "optimizer.name=adamw"],
        ["data.packing=streams", "micro_batch=2"],
        ["precision=bf16", "micro_batch=1"],
        ["precision=fp16"],
        ["precision=bf16", "module_precision.ffn=fp8"],
        ["optimizer.state=8bit", *LARGER],
        ["optimizer={state: 8bit, name: adamw}", "precision=fp16", *LARGER],
    ],
    ids=lambda o: " ".join(o),
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, overrides):
    whole = run(tmp_path, *overrides, out="whole")
    first = run(tmp_path, *overrides, stop_after=3)
    assert first.interrupted and first.steps == 3
    second = run(tmp_path, *overrides, resume=True)
    assert not second.interrupted
    assert first.curve + second.curve == whole.curve
    assert second.evaluations == whole.evaluations
    for part in ("model.safetensors", "training.safetensors"):
        one, other = (read_tensors(tmp_path / name / "checkpoints/step-0000006" / part) for name in ("whole", "run"))
        assert_equal(one, other)


@pytest.mark.parametrize("packing", ["joined", "reset"])
def test_accumulation_is_the_whole_batch(tmp_path, packing):
    ends = []
    for micro in (0, 2, 1):
        run(tmp_path, f"micro_batch={micro}", f"data.packing={packing}", "steps=3", out=str(micro))
        ends.append(weights(tmp_path / str(micro) / "model"))
    for other in ends[1:]:
        for name, t in ends[0].items():
            torch.testing.assert_close(other[name], t, rtol=0, atol=2e-4, msg=name)


def test_accumulation_to_32(tmp_path):
    result = run(tmp_path, "batch_size=32", "micro_batch=1", "steps=2")
    whole = run(tmp_path, "batch_size=32", "steps=2", out="whole")
    assert result.curve[1][1] == pytest.approx(whole.curve[1][1], abs=1e-4)


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("packing", ["joined", "reset"])
def test_activation_checkpointing_changes_nothing(tmp_path, mode, packing):
    run(tmp_path, f"data.packing={packing}", out="plain")
    run(tmp_path, f"data.packing={packing}", f"activation_checkpointing={mode}", out="recomputed")
    assert_equal(weights(tmp_path / "plain/model"), weights(tmp_path / "recomputed/model"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("packing", ["joined", "reset", "streams"])
def test_compiled(tmp_path, packing):
    way = f"data.packing={packing}"
    plain, compiled = run(tmp_path, way, out="plain"), run(tmp_path, way, "compile=true", out="compiled")
    for (_, a), (_, b) in zip(plain.curve, compiled.curve, strict=True):
        assert a == pytest.approx(b, abs=1e-3)


def test_the_last_and_the_best_are_kept(tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.2, 2.1])

    def scored(self, step):
        loss = next(losses)
        self._best = loss < self.progress.best_loss
        self.progress.best_loss = min(loss, self.progress.best_loss)

    monkeypatch.setattr(loop._Run, "_evaluate", scored)
    run(tmp_path, "checkpoint.every=1", "checkpoint.keep_last=2", "evaluation.every=1")
    names = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir() if p.is_dir())
    assert names == ["step-0000002", "step-0000005", "step-0000006"]
    assert json.loads((tmp_path / "run/checkpoints/best.json").read_text())["name"] == "step-0000002"


def test_starting_from_a_checkpoint(tmp_path):
    first = run(tmp_path, "steps=30", out="first")
    # Without warm-up's effect on the first step: the loss of step 1 is that of the weights taken over.
    second = run(tmp_path, "steps=2", "data.seed=1", out="second", init_from=tmp_path / "first")
    assert second.curve[0][1] < first.curve[0][1] - 1
    with pytest.raises(CheckpointError, match=r"tensor .* has shape .* the config says"):
        run(tmp_path, "model.d_model=40", "model.attention.heads=5", out="third", init_from=tmp_path / "first")


# -- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves(tmp_path, number, caplog):
    def interrupt(step: int, loss: float) -> None:
        if step == 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with caplog.at_level(logging.WARNING):
        result = run(tmp_path, on_step=interrupt)
    assert result.interrupted and result.steps == 2
    assert "a checkpoint will be saved" in caplog.text
    whole = run(tmp_path, out="whole")
    assert result.curve + run(tmp_path, resume=True).curve == whole.curve
    assert signal.getsignal(number) is before


def not_a_number(monkeypatch, at: int) -> None:
    """The loss of step ``at`` (from 1) is NaN."""
    real, seen = Gradients._loss, [0]

    def loss(self, batch, carried):
        seen[0] += 1
        return real(self, batch, carried) * (math.nan if seen[0] == at else 1.0)

    monkeypatch.setattr(Gradients, "_loss", loss)


def test_not_a_number_stops(tmp_path, monkeypatch):
    not_a_number(monkeypatch, 3)
    with pytest.raises(TrainingError, match=r"step 3: loss nan.*samples 8 to 11.*on_nan: skip"):
        run(tmp_path, "checkpoint.every=2")
    assert [p.name for p in snapshot.checkpoints(tmp_path / "run")] == ["step-0000002"]


def test_not_a_number_is_skipped(tmp_path, monkeypatch, caplog):
    not_a_number(monkeypatch, 3)
    with caplog.at_level(logging.WARNING):
        result = run(tmp_path, "on_nan=skip")
    assert "step 3: loss nan" in caplog.text and "samples 8 to 11: step skipped" in caplog.text
    assert math.isfinite(result.loss) and result.steps == 6
    facts = json.loads((tmp_path / "run/checkpoints/step-0000006/training.json").read_text())
    assert facts["skipped"] == [3]


def test_fp16_overflow_lowers_the_scale(tmp_path, monkeypatch, caplog):
    real = torch.nn.utils.clip_grad_norm_
    calls = [0]

    def overflowing(parameters, limit):
        calls[0] += 1
        parameters = list(parameters)
        if calls[0] == 2:
            return torch.tensor(math.inf)
        return real(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflowing)
    with caplog.at_level(logging.INFO):
        run(tmp_path, "precision=fp16", "steps=4")
    assert "step 2: fp16 gradients overflowed" in caplog.text
    facts = json.loads((tmp_path / "run/checkpoints/step-0000004/training.json").read_text())
    assert facts["scaler"]["scale"] == 2.0**16 and facts["skipped"] == []


def test_fp16_scale_starts_at_2_to_16_and_falls_on_overflow(tmp_path):
    # A loss scaled by 2^16 whose gradients overflow fp16: the scaler halves until they fit.
    run(tmp_path, "precision=fp16", "steps=3")
    facts = json.loads((tmp_path / "run/checkpoints/step-0000003/training.json").read_text())
    assert 0 < facts["scaler"]["scale"] <= 2.0**16


@pytest.mark.parametrize("where", ["step", "evaluation"])
def test_memory_that_ends_beside_the_passes_is_an_error_with_advice(tmp_path, monkeypatch, where):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")

    monkeypatch.setattr(*((torch.optim.AdamW, "step") if where == "step" else (loop._Run, "_score")), out_of_memory)
    says = r"rank 0 ran out of memory beside .* \(CUDA out of memory. Tried to allocate 1 GiB\).*optimizer.state: 8bit"
    with pytest.raises(TrainingError, match=says):
        run(tmp_path, "evaluation.every=2", "optimizer.name=adamw")


def test_a_disk_too_full_for_metrics_says_so_and_the_run_is_resumed(tmp_path, monkeypatch):
    whole = run(tmp_path, out="whole")
    real = loop.Console.step

    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, text):
            raise OSError(28, "No space left on device")

    def step(self, number, place, values):
        if number == 4:
            self._files["metrics"] = Full(self._files["metrics"])
        real(self, number, place, values)

    monkeypatch.setattr(loop.Console, "step", step)
    with pytest.raises(OSError, match=r"No space left on device; the last checkpoint stands.*metrics\.jsonl"):
        run(tmp_path, "checkpoint.every=2")
    monkeypatch.undo()
    assert run(tmp_path, "checkpoint.every=2", resume=True).curve == whole.curve[2:]


def test_resuming_with_another_config_says_what_differs(tmp_path):
    run(tmp_path, stop_after=2)
    with pytest.raises(CheckpointError, match=r"optimizer\.lr: 0\.01 -> 0\.02; steps: 6 -> 7.*--init-from"):
        run(tmp_path, "optimizer.lr=0.02", "steps=7", resume=True)
    assert run(tmp_path, "log_every=2", "checkpoint.keep_last=1", resume=True).steps == 6


def test_resuming_with_changed_data(tmp_path):
    run(tmp_path, stop_after=2)
    path = tmp_path / "docs.jsonl"
    path.write_text(path.read_text() + json.dumps({"text": "one more document that was not there"}) + "\n")
    with pytest.raises(ValueError, match="the data differ from those the run was started with"):
        run(tmp_path, resume=True)


def test_a_run_is_not_overwritten(tmp_path):
    run(tmp_path, "steps=1")
    with pytest.raises(CheckpointError, match=r"already holds a run \(step-0000001\); continue it with --resume"):
        run(tmp_path, "steps=1")
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        run(tmp_path, out="elsewhere", resume=True)


@pytest.mark.parametrize("part", ["model.safetensors", "training.safetensors", "training.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_checkpoint_is_named(tmp_path, part, damage):
    run(tmp_path, stop_after=2)
    path = tmp_path / "run/checkpoints/step-0000002" / part
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{part}.*(missing|truncated|not JSON)"):
        run(tmp_path, resume=True)


def test_a_foreign_tensor_in_the_training_state(tmp_path):
    from safetensors.torch import save_file

    run(tmp_path, stop_after=2)
    path = tmp_path / "run/checkpoints/step-0000002/training.safetensors"
    save_file({**read_tensors(path), "optimizer/blocks.9.nothing/momentum": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"blocks\.9\.nothing.*foreign"):
        run(tmp_path, resume=True)


def test_a_vocabulary_too_small_for_the_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 100 is smaller than the tokenizer's 257"):
        run(tmp_path, "model.vocab_size=100")


def test_a_device_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="device 'cuda:7' cannot be used"):
        run(tmp_path, "device=cuda:7")


def test_debug_checks_end_with_the_run(tmp_path, monkeypatch):
    from llm_mlp.ops import backend

    seen = []
    run(tmp_path, "debug_checks=true", "steps=1", on_step=lambda step, loss: seen.append(backend._debug))
    assert seen == [True] and backend._debug is False


def test_without_held_out_documents(tmp_path):
    result = run(tmp_path, "data.held_out=0", "steps=2")
    assert result.evaluations == [] and math.isnan(result.bits_per_byte)


def test_resuming_a_finished_run(tmp_path):
    """Nothing is trained; the result is the run's, and an export that is missing is made."""
    first = run(tmp_path, "steps=3")
    shutil.rmtree(tmp_path / "run/model")
    again = run(tmp_path, "steps=3", resume=True)
    assert again.tokens == 0 and again.steps == 3 and not again.interrupted
    assert again.bits_per_byte == first.bits_per_byte and again.evaluations == first.evaluations
    load_model(tmp_path / "run")


def test_the_kernels_choices_are_those_of_the_checkpoint(tmp_path, monkeypatch):
    """Where a cache has other ones, or none."""
    chosen = {"perceive on some device": {"plan": [0, ""], "failures": [], "slots": 0, "differing": 0}}
    monkeypatch.setattr(tune, "_rows", dict(chosen))
    run(tmp_path, stop_after=2)
    monkeypatch.setattr(tune, "_rows", {})
    run(tmp_path, resume=True)
    assert tune.choices() == chosen


def test_steps_that_are_repeated_are_recorded_once(tmp_path):
    class Killed(BaseException):
        pass

    def kill(step: int, loss: float) -> None:
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path, "checkpoint.every=3", on_step=kill)
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    run(tmp_path, "checkpoint.every=3", resume=True)
    steps = [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stop_after": 0}, "--stop-after 0: expected a step from 1 to steps = 6"),
        ({"stop_after": 7}, "--stop-after 7: expected"),
        ({"resume": True, "stop_after": 2}, "--stop-after 2: the run is already at step 2"),
        ({"resume": True, "init_from": "x"}, "cannot be combined with --init-from"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, says):
    run(tmp_path, stop_after=2)
    with pytest.raises(ConfigError, match=says):
        run(tmp_path, out="run" if options.get("resume") else "new", **options)


def test_training_state_that_was_edited(tmp_path):
    run(tmp_path, stop_after=2)
    path = tmp_path / "run/checkpoints/step-0000002/training.json"
    facts = json.loads(path.read_text())
    del facts["step"], facts["loader"]
    path.write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=r"training\.json: no loader, step"):
        run(tmp_path, resume=True)


def test_compiling_needs_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler on a CPU.*set compile: false"):
        run(tmp_path, "compile=true", "device=cpu")


class _Wandb:
    """What the package is asked for."""

    def __init__(self) -> None:
        self.started: list[dict] = []
        self.logged: list[tuple[int, dict]] = []

    def init(self, **options):
        self.started.append(options)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.logged.append((-1, {}))


def test_weights_and_biases(tmp_path, monkeypatch):
    """One run of theirs for a run of ours, resumed or not; what is unavailable is left out."""
    import importlib.machinery
    import sys

    with pytest.raises(ConfigError, match="pip install wandb"):
        run(tmp_path, "wandb=mine")
    package = _Wandb()
    package.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", package)
    run(tmp_path, "wandb=mine", stop_after=3)
    run(tmp_path, "wandb=mine", resume=True)
    assert [o["project"] for o in package.started] == ["mine", "mine"]
    assert package.started[0]["id"] == package.started[1]["id"] and package.started[0]["config"]["steps"] == 6
    assert [step for step, values in package.logged if "loss" in values] == [1, 2, 3, 4, 5, 6]
    assert package.logged[-1] == (-1, {}) and all(
        v is not None for _, values in package.logged for v in values.values()
    )
