"""What several processes say when one of them fails, dies, or was started differently, and that nothing is lost."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import outcomes
from safetensors import safe_open
from safetensors.torch import save_file
from train_cases import EXACT, many, run, tiny, trained, write_documents

from llm_mlp.checkpoint import CheckpointError, load_model
from llm_mlp.train.console import read_lines
from llm_mlp.train.gradients import Gradients
from llm_mlp.train.snapshot import checkpoints

pytestmark = pytest.mark.slow


def killed(folder: str, overrides: tuple[str, ...], rank: int, at: int, options: dict) -> list:
    """A run in which process ``rank`` is killed after step ``at``."""

    def on_step(step: int, loss: float) -> None:
        if step == at and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    return run(Path(folder), *overrides, on_step=on_step, **options).curve


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "layout",
    [[], ["parallel.data=fsdp"], ["parallel.pipeline=2", "micro_batch=2"]],
    ids=["ddp", "fsdp", "pipeline"],
)
def test_a_process_that_dies_is_named_and_the_run_goes_on_with_others(tmp_path, layout, rank):
    common = (*EXACT, "steps=8", "checkpoint.every=2", *layout)
    whole = many(tmp_path, 2, *common, out="whole")
    found = outcomes(2, killed, str(tmp_path), common, rank, 5, {"out": "run"})
    well, said = found[1 - rank]
    assert not well and f"RankError: rank {rank}" in said and "--resume" in said
    last = checkpoints(tmp_path / "run")[-1]
    assert last.name == "step-0000004" and (last / "shards").is_dir() == bool(layout)
    for size in (2, 4) if "parallel.pipeline=2" in layout else (1, 4):
        shutil.copytree(tmp_path / "run", tmp_path / str(size))
        options = {"out": str(size), "resume": True}
        rest = many(tmp_path, size, *common, **options) if size > 1 else trained(str(tmp_path), common, options)
        assert [step for step, _ in rest["curve"]] == [5, 6, 7, 8]
        for (_, a), (_, b) in zip(rest["curve"], whole["curve"][4:], strict=True):
            assert a == pytest.approx(b, rel=1e-9)
        load_model(tmp_path / str(size) / "model")


def fails(folder: str, overrides: tuple[str, ...], rank: int, what: str) -> list:
    """A run in which something goes wrong in process ``rank`` alone."""
    real = Gradients._loss
    seen = [0]

    def loss(self, batch, carried):
        seen[0] += 1
        if dist.get_rank() == rank and seen[0] == 3:
            if what == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            return real(self, batch, carried) * math.nan
        return real(self, batch, carried)

    Gradients._loss = loss
    result = run(Path(folder), *overrides)
    return [result.curve, [(a.step, a.what, a.value) for a in result.actions]]


def test_a_nan_of_one_process_is_skipped_by_all(tmp_path):
    tiny(tmp_path)
    (well, one), (_, other) = outcomes(2, fails, str(tmp_path), ("on_nan=skip",), 1, "nan")
    assert well and str(one[0]) == str(other[0]) and math.isnan(one[0][2][1]) and math.isfinite(one[0][3][1])
    (line,) = read_lines(tmp_path / "run/quarantine.jsonl")
    assert (line["step"], line["first_sample"], line["last_sample"]) == (3, 8, 11)


def test_memory_that_ends_before_gradients_meet_halves_the_part(tmp_path):
    """Under ``no_sync`` nothing of the step has travelled: that process alone reads smaller parts of the same sum."""
    common = (*EXACT, "steps=4", "micro_batch=2")
    (well, one), (_, other) = outcomes(2, fails, str(tmp_path), common, 1, "memory")
    assert well and one[0] == other[0] and other[1] == [(2, "micro_batch", 1)]
    whole = trained(str(tmp_path), common, {"out": "one"})
    for (_, a), (_, b) in zip(one[0], whole["curve"], strict=True):
        assert a == pytest.approx(b, rel=1e-9)


@pytest.mark.parametrize(
    "layout",
    [[], ["parallel.data=fsdp"], ["parallel.tensor=2", "batch_size=4"], ["parallel.context=2", "batch_size=4"]],
    ids=["ddp", "fsdp", "tensor", "context"],
)
def test_memory_that_ends_where_others_wait_ends_the_run_which_resumes_in_smaller_parts(tmp_path, layout):
    common = (*EXACT, "steps=4", "checkpoint.every=1", *layout, "micro_batch=4")
    found = outcomes(2, fails, str(tmp_path), common, 1, "memory")
    assert "step 3: rank 1 ran out of memory with 4 sequences" in found[1][1] and "takes 2" in found[1][1]
    assert "RankError: rank 1 of 2 failed: TrainingError: step 3: rank 1 ran out of memory" in found[0][1]
    rest = many(tmp_path, 2, *(o for o in common if "micro" not in o), resume=True)
    assert [step for step, _ in rest["curve"]] == [3, 4]
    facts = json.loads((checkpoints(tmp_path / "run")[-1] / "training.json").read_text())
    assert facts["micro_batch"] == 2 and not (tmp_path / "run/out_of_memory.json").exists()


def differently(folder: str, common: tuple[str, ...], own: tuple[str, ...], change: str, options: dict) -> list:
    """A run whose process 1 has overrides of its ``own``, and is another in what ``change`` says."""
    from llm_mlp.train import parallel, snapshot

    if dist.get_rank() == 0:
        return run(Path(folder), *common, **options).curve
    if change == "version":
        parallel.__version__ = "0.0.9"
    if change == "folder":  # of a machine that does not see the newest checkpoint
        real = snapshot.checkpoints
        snapshot.checkpoints = lambda run: real(run)[:1]
    return run(Path(folder), *common, *own, **options).curve


@pytest.mark.parametrize(
    ("own", "change", "says"),
    [
        (("steps=7", "optimizer.lr=0.02"), "", "optimizer.lr: 0.01 -> 0.02; steps: 6 -> 7"),
        (("parallel.data=fsdp",), "", "parallel.data: 'ddp' -> 'fsdp'"),
        (("parallel.context=2",), "", "parallel.context: 1 -> 2"),
        ((), "version", "llm-mlp: 0.1.0 -> 0.0.9"),
    ],
    ids=["config", "sharding", "layout", "version"],
)
def test_processes_that_were_started_differently_are_told_so(tmp_path, own, change, says):
    tiny(tmp_path)
    for well, said in outcomes(2, differently, str(tmp_path), (), own, change, {}):
        assert not well and f"ConfigError: rank 1 was not started as rank 0 was ({says})" in said
    assert not (tmp_path / "run").exists()


def test_processes_with_other_checkpoints_or_texts_are_told_so(tmp_path):
    common = ("steps=4", "checkpoint.every=2")
    many(tmp_path, 2, *common, stop_after=3)
    for well, said in outcomes(2, differently, str(tmp_path), common, (), "folder", {"resume": True}):
        assert not well and "where to start from: step-0000002 on rank 1, step-0000003 on rank 0" in said
    prepared = [prepared_data(tmp_path, name, count) for name, count in (("a", 40), ("b", 41))]
    given, own = (f"data.prepared={folder}" for folder in prepared)
    for well, said in outcomes(2, differently, str(tmp_path), (given,), (own,), "", {"out": "other"}):
        assert not well and "fingerprint of the tokenised data" in said and "on rank 1" in said


def prepared_data(folder: Path, name: str, documents: int) -> Path:
    """Tokenised documents, as each machine may have them in a folder of its own."""
    from llm_mlp.data import prepare

    (folder / name).mkdir()
    write_documents(folder / name, documents)
    config = tiny(folder / name).data
    prepare(config)
    return next(Path(config.cache_dir).iterdir())


def full(folder: str, overrides: tuple[str, ...], file: str = "") -> list:
    """A run on a disk that is full when the second checkpoint (or this file of it) is written."""
    import llm_mlp.train.snapshot as snapshot

    real = snapshot.save_file

    def save_file(tensors, path):
        if "step-0000004" in str(path) and file in str(path):
            raise OSError(28, "No space left on device")
        real(tensors, path)

    snapshot.save_file = save_file
    return run(Path(folder), *overrides).curve


@pytest.mark.parametrize(
    "layout",
    [[], ["parallel.data=fsdp"], ["parallel.pipeline=2", "micro_batch=2"]],
    ids=["ddp", "fsdp", "pipeline"],
)
def test_a_full_disk_ends_all_processes_and_the_last_checkpoint_stands(tmp_path, layout):
    tiny(tmp_path)
    common = (*EXACT, "steps=6", "checkpoint.every=2", *layout)
    found = outcomes(2, full, str(tmp_path), common)
    assert all(not well and "No space left on device" in said for well, said in found)
    assert "RankError: rank 0 failed while saving" in found[1][1]
    folder = tmp_path / "run/checkpoints"
    assert [p.name for p in folder.iterdir() if p.is_dir()] == ["step-0000002"]
    assert many(tmp_path, 2, *common, resume=True)["curve"][0][0] == 3


def test_a_disk_that_is_full_for_one_process_ends_all(tmp_path):
    """Of a checkpoint that several processes write, nothing gets its name before all of them are done."""
    tiny(tmp_path)
    common = ("steps=6", "checkpoint.every=2", "parallel.compress=powersgd", "model.ffn.hidden=512")
    (_, main), (_, other) = outcomes(2, full, str(tmp_path), common, "powersgd-00001")
    assert "RankError: rank 1 failed while saving" in main and "No space left on device" in main
    assert "CheckpointError" in other and "earlier checkpoints stand" in other
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir() if p.is_dir()] == ["step-0000002"]
    assert many(tmp_path, 2, *common, resume=True)["curve"][0][0] == 3


@pytest.mark.parametrize("damage", ["truncated", "missing", "foreign"])
def test_damaged_shards_are_named(tmp_path, damage):
    common = (*EXACT, "steps=2", "parallel.data=fsdp")
    many(tmp_path, 2, *common, stop_after=1)
    path = sorted((tmp_path / "run/checkpoints/step-0000001/shards").glob("*.safetensors"))[-1]
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "missing":
        path.unlink()
    else:
        save_file({"model/nothing": torch.zeros(2)}, path.with_name("other.safetensors"))
    with pytest.raises(CheckpointError, match="shards: (tensor .* is (missing|foreign)|truncated)"):
        run(tmp_path, *common, resume=True)


def test_shards_without_some_rows_are_refused(tmp_path):
    """Every name is there, so torch would read what is left and leave the rest as it was."""
    common = (*EXACT, "steps=2", "parallel.data=fsdp")
    many(tmp_path, 4, *common, stop_after=1)
    folder = tmp_path / "run/checkpoints/step-0000001"
    path = sorted((folder / "shards").glob("*.safetensors"))[1]
    with safe_open(path, framework="pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys() if name != "model/head.weight"}  # noqa: SIM118
        facts = file.metadata()
    save_file(kept, path, metadata=facts)
    says = "shards: tensor 'model/head.weight' is missing some of its rows"
    with pytest.raises(CheckpointError, match=says):
        run(tmp_path, *common, resume=True)
    with pytest.raises(CheckpointError, match=says):
        load_model(folder)
