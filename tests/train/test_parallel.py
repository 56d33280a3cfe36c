"""Several processes train what one trains: losses, gradients, checkpoints."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import outcomes, together
from train_cases import EXACT, LARGER, assert_same, many, records, run, started, tiny, trained

from llm_mlp.checkpoint import load_model, read_shards, read_tensors, shards_in
from llm_mlp.models import build_model
from llm_mlp.train import loop
from llm_mlp.train.console import read_lines, read_metrics
from llm_mlp.train.control import Action, BatchNoise
from llm_mlp.train.pipeline import Stage
from llm_mlp.train.snapshot import checkpoints

pytestmark = pytest.mark.slow

FOUR = ["model.n_layers=4"]
INTERLEAVED = ["parallel.pipeline=2", "parallel.schedule=interleaved"]
PIPELINED_ZERO = ["parallel.pipeline=2", "micro_batch=1", "parallel.data=fsdp"]
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
    "pipeline": (2, ["parallel.pipeline=2", "micro_batch=2"]),
    "pipeline of four": (4, ["parallel.pipeline=4", "micro_batch=2", *FOUR]),
    "interleaved": (2, [*INTERLEAVED, "micro_batch=2", *FOUR]),
    "pipeline and data": (4, ["parallel.pipeline=2", "micro_batch=1"]),
    "interleaved and data": (4, [*INTERLEAVED, "micro_batch=1", *FOUR]),
    "pipeline and zero-3": (4, ["parallel.pipeline=2", "micro_batch=2", "parallel.data=fsdp"]),
    "pipeline and zero-2, recomputed": (4, [*PIPELINED_ZERO, "parallel.zero=2", "activation_checkpointing=full"]),
    "pipeline and zero-1": (4, [*PIPELINED_ZERO, "parallel.zero=1"]),
    "interleaved and zero-3": (4, [*INTERLEAVED, "micro_batch=1", "parallel.data=fsdp", *FOUR]),
    "pipeline, packed": (2, ["parallel.pipeline=2", "micro_batch=2", "data.packing=reset"]),
    "pipeline, streams": (2, ["parallel.pipeline=2", "micro_batch=2", "data.packing=streams"]),
    "pipeline, routed": (4, ["parallel.pipeline=4", "micro_batch=2", "model.routing.last_layers=2", *FOUR]),
    "interleaved, packed, routed": (
        2,
        [*INTERLEAVED, "micro_batch=2", "data.packing=reset", "model.routing.last_layers=2", "model.n_layers=5"],
    ),
    "context and zero-3": (4, ["parallel.context=2", "parallel.data=fsdp", "activation_checkpointing=full"]),
}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_processes_train_as_one(tmp_path, layout, optimizer):
    size, overrides = LAYOUTS[layout]
    model = [o for o in overrides if o.startswith(("model.", "data."))]
    common = (*EXACT, f"optimizer.name={optimizer}", "evaluation.every=10", *model)
    start = started(tmp_path, common)
    run(tmp_path, *common, out="one", init_from=start)
    many(tmp_path, size, *common, *overrides, out="many", init_from=start)
    assert_same(tmp_path, "one", "many", 1e-9)


@pytest.mark.parametrize("layout", ["ddp in parts", "zero-3", "context and data", "pipeline and data"])
def test_processes_read_instruction_records(tmp_path, layout):
    """Rows of different numbers of records and targets; the mean is over the targets of all processes."""
    size, overrides = LAYOUTS[layout]
    common = (*EXACT, *records(tmp_path), "evaluation.every=10")
    start = started(tmp_path, common)
    run(tmp_path, *common, out="one", init_from=start)
    many(tmp_path, size, *common, *overrides, out="many", init_from=start)
    assert_same(tmp_path, "one", "many", 1e-9)


# -- optimizer state in 8 bits -------------------------------------------------------------------------------------

CODED = ["ddp", "zero-3", "zero-1 in parts", "hybrid", "context and zero-3", "pipeline and zero-3", "pipeline"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("layout", CODED)
def test_state_in_8_bits_is_cut_between_blocks(tmp_path, layout, optimizer):
    """Processes train as one, rows of an odd number among them; and any other layout goes on from their checkpoint."""
    size, overrides = LAYOUTS[layout]
    common = (*EXACT, *LARGER, f"optimizer.name={optimizer}", "optimizer.state=8bit", "steps=12")
    common += tuple(o for o in overrides if not o.startswith(("parallel.", "micro_batch")))  # must stay
    start = started(tmp_path, common)
    run(tmp_path, *common, out="one", init_from=start)
    many(tmp_path, size, *common, *overrides, out="many", init_from=start, stop_after=6)
    if layout == "ddp":
        other, more = LAYOUTS["zero-3"]
        many(tmp_path, other, *common, *more, out="many", resume=True)
    else:
        run(tmp_path, *common, out="many", resume=True)
    assert_same(tmp_path, "one", "many", 1e-9)


# -- tensor parallelism --------------------------------------------------------------------------------------------

# Every kind of parameter there is, and matrices that are large enough for Muon.
WIDE = (
    "model.perception={groups: 4, heads_per_group: 2, read_width: 32, features: 64, value_width: 8, gate_rank: 32}",
    "model.perception={erase: diagonal, surprise: true}",
    "model.ffn={activation: adaptive, hidden: 96, adaptive_groups: 4}",
    "model.routing.last_layers=1",
)
TENSOR = {
    "tensor": (2, ["parallel.tensor=2"]),
    "tensor of four": (4, ["parallel.tensor=4"]),
    "tensor in parts": (2, ["parallel.tensor=2", "micro_batch=2", "activation_checkpointing=full"]),
    "tensor and data": (4, ["parallel.tensor=2"]),
    "tensor and data in parts": (4, ["parallel.tensor=2", "micro_batch=2"]),
    "tensor and context": (4, ["parallel.tensor=2", "parallel.context=2"]),
    "tensor and pipeline": (4, ["parallel.tensor=2", "parallel.pipeline=2", "micro_batch=2"]),
    "tensor and zero-3": (4, ["parallel.tensor=2", "parallel.data=fsdp"]),
    "tensor and zero-2 in parts": (4, ["parallel.tensor=2", "parallel.data=fsdp", "parallel.zero=2", "micro_batch=2"]),
}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("layout", TENSOR)
def test_parts_of_layers_train_as_one(tmp_path, layout, optimizer):
    size, overrides = TENSOR[layout]
    common = (
        *EXACT,
        *WIDE,
        f"optimizer.name={optimizer}",
        "evaluation.every=10",
        "average={ema: 0.9, last: 2, every: 5}",
    )
    start = started(tmp_path, common)
    run(tmp_path, *common, out="one", init_from=start)
    many(tmp_path, size, *common, *overrides, out="many", init_from=start)
    for kind in ("model", "model-ema", "model-mean"):
        assert_same(tmp_path, "one", "many", 1e-9, kind)


@pytest.mark.parametrize("packing", ["joined", "reset"])
def test_parts_of_layers_drop_the_same_and_measure_the_same(tmp_path, packing):
    common = (*EXACT, *WIDE, f"data.packing={packing}", "model.dropout=0.2", "control.rate_from_gradients=true")
    start = started(tmp_path, common)
    run(tmp_path, *common, out="one", init_from=start)
    many(tmp_path, 2, *common, "parallel.tensor=2", out="many", init_from=start)
    assert_same(tmp_path, "one", "many", 1e-9)
    one, other = (
        json.loads((checkpoints(tmp_path / name)[-1] / "training.json").read_text())["controllers"]["gradient_noise"]
        for name in ("one", "many")
    )
    assert other["recent"] == pytest.approx(one["recent"], rel=1e-9)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_goes_on_in_other_parts(tmp_path, optimizer):
    """From layout to layout, with and without shards and stages, and in one process again; checkpoints are whole."""
    common = (*EXACT, *WIDE, "steps=12", f"optimizer.name={optimizer}", "average={ema: 0.9, last: 2, every: 2}")
    common = (*common, "checkpoint.every=2", "evaluation.every=5")
    start = started(tmp_path, common)
    run(tmp_path, *common, out="one", init_from=start)
    run(tmp_path, *common, out="many", init_from=start, stop_after=2)
    layouts = TENSOR["tensor"], LAYOUTS["zero-3"], TENSOR["tensor and zero-3"], TENSOR["tensor and pipeline"]
    for step, (size, overrides) in zip((4, 6, 8, 10), layouts, strict=True):
        many(tmp_path, size, *common, *overrides, out="many", resume=True, stop_after=step)
    run(tmp_path, *common, out="many", resume=True)
    for kind in ("model", "model-ema", "model-mean"):
        assert_same(tmp_path, "one", "many", 1e-9, kind)
    for step in (4, 6, 8, 10):
        one, several = (tmp_path / name / f"checkpoints/step-{step:07d}" for name in ("one", "many"))
        weights = {f"model/{name}": t for name, t in read_tensors(one / "model.safetensors").items()}
        expected = weights | read_tensors(one / "training.safetensors")
        assert not (several / "model.safetensors").exists() and shards_in(several / "shards").keys() == expected.keys()
        found = {name: torch.full_like(t, math.nan) for name, t in expected.items()}
        read_shards(several / "shards", found, together=False)
        model = load_model(several)[0].double().state_dict()
        for name, t in expected.items():
            assert (found[name] - t).norm() <= 1e-9 * t.norm(), name
        for name, t in weights.items():
            assert (model[name.removeprefix("model/")] - t).norm() <= 1e-6 * t.norm(), name


@pytest.mark.parametrize("layout", ["tensor", "tensor and data", "tensor and zero-3", "tensor and pipeline"])
def test_every_process_stores_a_share_of_layers_in_parts(tmp_path, layout):
    """No file holds a whole matrix, each number is written once; the same processes go on, others from its weights."""
    size, overrides = TENSOR[layout]
    common = (*EXACT, *WIDE, "steps=6", "optimizer.name=adamw", "average.ema=0.9")
    start = started(tmp_path, common)
    run(tmp_path, *common, out="one", init_from=start)
    many(tmp_path, size, *common, *overrides, out="many", init_from=start, stop_after=3)
    folder = checkpoints(tmp_path / "many")[-1]
    files = sorted((folder / "shards").glob("*.safetensors"))
    sizes = [sum(t.nbytes for t in read_tensors(path).values()) for path in files]
    whole = shards_in(folder / "shards")
    assert len(files) == size
    assert sum(sizes) == sum(size.numel() * dtype.itemsize for size, dtype in whole.values())
    for path in files:
        held = {name: t for name, t in read_tensors(path).items() if "mixer.in_proj" in name and t.ndim}
        assert held and all(len(t) < whole[name][0][0] for name, t in held.items())
    many(tmp_path, size, *common, *overrides, out="many", resume=True)
    assert_same(tmp_path, "one", "many", 1e-9)
    run(tmp_path, *common, "optimizer.lr=1e-30", "steps=1", out="other", init_from=folder)
    model, own = (load_model(path)[0].state_dict() for path in (tmp_path / "other", folder))
    assert all(torch.equal(model[name], t) for name, t in own.items())


# -- the noise of gradients ----------------------------------------------------------------------------------------

PARTS = ["micro_batch=2"]
NOISE = {  # those of one reader against one process, the others against as many readers that share nothing else
    "tensor": ((1, PARTS), TENSOR["tensor in parts"]),
    "tensor and data": (LAYOUTS["ddp in parts"], TENSOR["tensor and data in parts"]),
    "tensor and zero-2": (LAYOUTS["zero-2 in parts"], TENSOR["tensor and zero-2 in parts"]),
    "context": ((1, PARTS), (2, ["parallel.context=2", *PARTS])),
    "context and data": (LAYOUTS["ddp in parts"], LAYOUTS["context and data"]),
    "context and zero-3": ((1, PARTS), (2, ["parallel.context=2", "parallel.data=fsdp", *PARTS])),
    "tensor and context": ((1, PARTS), (4, ["parallel.tensor=2", "parallel.context=2", *PARTS])),
    "pipeline": ((1, PARTS), LAYOUTS["pipeline"]),
    "pipeline and data": ((2, ["micro_batch=1"]), LAYOUTS["pipeline and data"]),
    "pipeline and zero-2": (
        (2, ["micro_batch=1", "parallel.data=fsdp", "parallel.zero=2"]),
        (4, [*PIPELINED_ZERO, "parallel.zero=2", "activation_checkpointing=full"]),
    ),
    "interleaved and zero-3": (
        (2, ["micro_batch=1", "parallel.data=fsdp"]),
        (4, [*INTERLEAVED, "micro_batch=1", "parallel.data=fsdp"]),
    ),
    "tensor and pipeline": ((1, PARTS), TENSOR["tensor and pipeline"]),
}


def noise_of(folder: Path, name: str) -> dict:
    return json.loads((checkpoints(folder / name)[-1] / "training.json").read_text())["controllers"]["batch_noise"]


@pytest.mark.parametrize("layout", NOISE)
def test_gradient_noise_is_that_of_as_many_readers(tmp_path, layout):
    (few, apart), (size, overrides) = NOISE[layout]
    common = (*EXACT, *WIDE, "model.n_layers=4", "steps=6", "optimizer.name=adamw")
    start = started(tmp_path, common)
    for out, count, more in (("few", few, apart), ("many", size, overrides)):
        if count == 1:
            run(tmp_path, *common, *more, out=out, init_from=start)
        else:
            many(tmp_path, count, *common, *more, out=out, init_from=start)
    assert_same(tmp_path, "few", "many", 1e-9)
    expected, found = noise_of(tmp_path, "few"), noise_of(tmp_path, "many")
    assert found["count"] == expected["count"] == 6 and found["noise"] != 0
    for name in ("signal", "noise"):
        assert found[name] == pytest.approx(expected[name], rel=1e-9), name


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        (LAYOUTS["zero-1 in parts"], "parallel.zero = 1 gives no part's gradients away before the last"),
        (LAYOUTS["zero-3"], "in a single part; set a smaller micro_batch"),
        (LAYOUTS["context"], "in a single part; set a smaller micro_batch"),
        (TENSOR["tensor and data"], "in a single part; set a smaller micro_batch"),
    ],
)
def test_noise_that_cannot_be_measured_is_unavailable_and_no_ramp(tmp_path, layout, says):
    size, overrides = layout
    common = (*EXACT, "steps=2")
    tiny(tmp_path)
    many(tmp_path, size, *common, *overrides)
    assert noise_of(tmp_path, "run")["count"] == 0
    assert [line["noise_scale"] for line in read_metrics(tmp_path / "run") if "loss" in line] == [None] * 2
    found = outcomes(size, misfit, str(tmp_path), (*common, *overrides, "control.batch=ramp", f"out={tmp_path}/ramp"))
    assert all(not well and "ramp cannot measure the gradient noise: " in said and says in said for well, said in found)


def held_by_all(folder: str, overrides: tuple[str, ...]) -> dict[str, bytes]:
    """Weights that every process of a tensor group holds, after a run."""
    from llm_mlp.train.loop import _Run

    real, found = _Run.go, {}

    def go(self):
        result = real(self)
        for name, p in self.model.named_parameters():
            found[name] = b"".join(t.contiguous().numpy().tobytes() for t in self.cuts._alike(name, p.detach()))
        return result

    _Run.go = go
    run(Path(folder), *overrides)
    return found


@pytest.mark.parametrize("compress", ["none", "powersgd"])
def test_what_all_hold_stays_the_same_bit_for_bit(tmp_path, compress):
    common = ("batch_size=8", *WIDE, "model.d_model=64", "model.attention={heads: 4, head_dim: 16}", "steps=10")
    tiny(tmp_path)
    layout = ("parallel.tensor=2", f"parallel.compress={compress}")
    first, *others = together(4, held_by_all, str(tmp_path), (*common, *layout))
    assert any("in_proj" in name and held for name, held in first.items())
    assert all(other == first for other in others)


def summed(folder: str) -> list[int]:
    """Sums over a tensor group of a forward pass, and of it with a backward pass; layers."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from llm_mlp.config import ParallelConfig
    from llm_mlp.train.parallel import World
    from llm_mlp.train.tensor import share_out

    config = tiny(Path(folder), *EXACT)
    model = build_model(config.model).double()
    share_out(model, World(ParallelConfig(tensor=2), torch.device("cpu"), dist.get_rank(), 2))
    tokens = torch.arange(64).view(2, -1)
    sums = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            sums.extend([func] if "all_reduce" in str(func) else [])
            return func(*args, **(kwargs or {}))

    with Seen():
        loss = model(tokens, targets=tokens).loss
        forward = len(sums)
        loss.backward()
    return [forward, len(sums), config.model.n_layers]


def test_parts_of_a_layer_meet_twice_each_way(tmp_path):
    tiny(tmp_path)
    for forward, both, layers in together(2, summed, str(tmp_path)):
        assert forward == 2 * layers and both == 4 * layers


# -- pipeline parallelism ------------------------------------------------------------------------------------------

ONE = (1, [])
STREAMS = ["data.packing=streams"]


@pytest.mark.parametrize(
    ("before", "after", "more"),
    [
        (LAYOUTS["pipeline"], ONE, []),
        (ONE, LAYOUTS["pipeline"], []),
        (LAYOUTS["zero-3"], LAYOUTS["interleaved and data"], ["optimizer.name=adamw"]),
        (LAYOUTS["interleaved and zero-3"], LAYOUTS["pipeline of four"], []),
        (LAYOUTS["pipeline and zero-3"], LAYOUTS["ddp"], []),
        (LAYOUTS["pipeline and data"], ONE, STREAMS),
        (ONE, LAYOUTS["pipeline and data"], STREAMS),
    ],
)
def test_checkpoints_know_no_stages(tmp_path, before, after, more):
    """Weights, optimizer, averages and streams' states, under any layout; and what is decided by running means."""
    common = (*EXACT, *FOUR, "steps=8", "average={ema: 0.9, last: 2, every: 2}", "evaluation.every=4", *more)
    common = (*common, "control.rate_from_gradients=true")
    trained(str(tmp_path), common, {"out": "one"})
    for (size, overrides), options in ((before, {"stop_after": 5}), (after, {"resume": True})):
        if size == 1:
            trained(str(tmp_path), common, options)
        else:
            many(tmp_path, size, *common, *overrides, **options)
    assert_same(tmp_path, "one", "run", 1e-9)
    for kind in ("model-ema", "model-mean"):
        a, b = (read_tensors(tmp_path / name / kind / "model.safetensors") for name in ("one", "run"))
        assert a.keys() == b.keys() and all((a[n] - b[n]).norm() <= 1e-9 * a[n].norm() for n in a)


@pytest.mark.parametrize("compress", ["bf16", "powersgd"])
def test_compressed_gradients_of_stages(tmp_path, compress):
    """Each stage's copies exchange their own; the loss stays near that of whole gradients."""
    size, overrides = LAYOUTS["interleaved and data"]
    common = (*EXACT, *FOUR, "optimizer.name=adamw")
    start = started(tmp_path, common)
    whole = trained(str(tmp_path), common, {"out": "one", "init_from": start})
    found = many(tmp_path, size, *common, *overrides, f"parallel.compress={compress}", init_from=start)
    assert found["sent"] < (0.51 if compress == "bf16" else 0.9) * found["plain"]
    assert found["curve"][-1][1] == pytest.approx(whole["curve"][-1][1], rel=0.05)


def test_bfloat16_between_stages(tmp_path):
    size, overrides = LAYOUTS["interleaved"]
    common = ("precision=bf16", *FOUR)
    one = trained(str(tmp_path), common, {"out": "one"})
    found = many(tmp_path, size, *common, *(o for o in overrides if "micro" not in o), "micro_batch=1")
    assert found["curve"][-1][1] == pytest.approx(one["curve"][-1][1], rel=0.02)


def troubled(folder: str, overrides: tuple[str, ...], rank: int, what: str) -> list:
    """A run in which something goes wrong in the eighth forward pass of a stage of process ``rank``."""
    real = Stage.forward
    seen = [0]

    def forward(self, *args, number):
        out = real(self, *args, number=number)
        seen[0] += 1
        if dist.get_rank() == rank and seen[0] == 8:
            if what == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            return out * math.nan if isinstance(out, torch.Tensor) else (out[0] * math.nan, *out[1:])
        return out

    Stage.forward = forward
    return run(Path(folder), *overrides).curve


@pytest.mark.parametrize("rank", [0, 1])
def test_a_nan_of_one_stage_is_skipped_by_all(tmp_path, rank):
    tiny(tmp_path)
    common = ("parallel.pipeline=2", "micro_batch=1", "on_nan=skip")
    (well, one), (_, other) = outcomes(2, troubled, str(tmp_path), common, rank, "nan")
    assert well and str(one) == str(other) and math.isnan(one[1][1]) and math.isfinite(one[2][1])
    (line,) = read_lines(tmp_path / "run/quarantine.jsonl")
    assert (line["step"], line["first_sample"], line["last_sample"]) == (2, 4, 7)


@pytest.mark.parametrize("schedule", [[], ["parallel.schedule=interleaved", *FOUR]], ids=["1f1b", "interleaved"])
def test_memory_that_ends_in_a_stage_ends_the_run_which_resumes_in_smaller_parts(tmp_path, schedule):
    common = (*EXACT, "steps=4", "checkpoint.every=1", "parallel.pipeline=2", "micro_batch=2", *schedule)
    found = outcomes(2, troubled, str(tmp_path), common, 1, "memory")
    step = 1 if schedule else 2  # a process of two stages has eight forward passes a step
    assert f"step {step}: rank 1 ran out of memory with 2 sequences" in found[1][1] and "takes 1" in found[1][1]
    assert f"RankError: rank 1 of 2 failed: TrainingError: step {step}: rank 1 ran out of memory" in found[0][1]
    # Without a checkpoint yet the run is started again, and knows all the same.
    rest = many(tmp_path, 2, *common, resume=step > 1)
    assert [n for n, _ in rest["curve"]] == list(range(step, 5))
    assert json.loads((checkpoints(tmp_path / "run")[-1] / "training.json").read_text())["micro_batch"] == 1


# -- context parallelism -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("packing", "seq_len", "size"),
    [
        ("joined", 40, 2),  # blocks of 8: each process begins at tokens 0 and 20, in the middle of a block
        ("joined", 52, 4),
        ("reset", 64, 2),
        ("reset", 44, 4),  # documents end within spans, begin in one and end in another, and go through whole ones
    ],
)
def test_spans_of_one_text_are_read_as_one(tmp_path, packing, seq_len, size, optimizer):
    common = (*EXACT, f"optimizer.name={optimizer}", f"data.seq_len={seq_len}")
    common = (*common, f"data.packing={packing}", "model.perception.block=8")
    start = started(tmp_path, common)
    run(tmp_path, *common, out="one", init_from=start)
    many(tmp_path, size, *common, f"parallel.context={size}", out="many", init_from=start)
    assert_same(tmp_path, "one", "many", 1e-9)


def exchanged(folder: str, seq_len: int) -> tuple[int, int]:
    """Bytes and exchanges of a forward and backward pass of a split text."""
    from llm_mlp.data import Batch
    from llm_mlp.train.context import SplitSequence

    config = tiny(Path(folder), *EXACT)
    model = build_model(config.model).double()
    split = SplitSequence(dist.group.WORLD)
    tokens = torch.arange(2 * seq_len).view(2, -1) % 257
    with split.reading(model, Batch(tokens, tokens, None, None, None, [0, 1])) as part:
        model(part.tokens, None, None, targets=part.targets).loss.backward()
    return split.bytes, split.exchanges


def test_what_is_exchanged_does_not_grow_with_the_text(tmp_path):
    tiny(tmp_path)  # the documents, before the processes look for them
    short, long = (together(2, exchanged, str(tmp_path), n) for n in (64, 512))
    assert short == long and short[0] == short[1] and short[0][0] > 0


def test_streams_go_on_with_another_number_of_processes(tmp_path):
    """Carried states belong to streams; they are dealt anew."""
    common = (*EXACT, "steps=6", "data.packing=streams")
    whole = trained(str(tmp_path), common, {"out": "whole"})
    many(tmp_path, 4, *common, stop_after=3)
    rest = many(tmp_path, 2, *common, resume=True)
    for (_, a), (_, b) in zip(rest["curve"], whole["curve"][3:], strict=True):
        assert a == pytest.approx(b, rel=1e-9)


def ramped(folder: str, overrides: tuple[str, ...], options: dict, decide: bool) -> dict:
    """A run whose batch is doubled after step 3, if it may decide."""

    def observe(self, m):
        if decide and m.step == 3:
            return [Action(3, "batch_noise", "batch_size", 16, "asked by the test")]
        return []

    BatchNoise.observe = observe
    if dist.get_rank():  # a slower process may find the record cut off already
        loop.read_lines = lambda path: []
    return trained(folder, overrides, options)


def test_a_ramp_is_repeated_as_recorded_with_another_number_of_processes(tmp_path):
    common = (*EXACT, "steps=8", "control.batch=ramp", "checkpoint.every=2")
    tiny(tmp_path)
    whole = together(2, ramped, str(tmp_path), common, {}, True)[0]
    assert len(whole["curve"]) == 6  # three of 8 samples, two of 16 and what is left
    for path in checkpoints(tmp_path / "run")[1:]:
        shutil.rmtree(path)
    rest = together(4, ramped, str(tmp_path), common, {"resume": True}, False)[0]
    assert [step for step, _ in rest["curve"]] == [3, 4, 5, 6]
    for (_, a), (_, b) in zip(rest["curve"], whole["curve"][2:], strict=True):
        assert a == pytest.approx(b, rel=1e-9)


@pytest.mark.parametrize("layout", ["tensor in parts", "pipeline", "interleaved"])
def test_a_ramp_in_parts_of_layers_and_in_stages(tmp_path, layout):
    size, overrides = {**TENSOR, **LAYOUTS}[layout]
    common = (*EXACT, *WIDE, *FOUR, "steps=8", "control.batch=ramp")
    start = started(tmp_path, common)
    whole = together(2, ramped, str(tmp_path), common, {"out": "whole", "init_from": start}, True)[0]
    options = {"out": "many", "init_from": start}
    found = together(size, ramped, str(tmp_path), (*common, *overrides), options, True)[0]
    assert len(found["curve"]) == 6
    for (_, a), (_, b) in zip(found["curve"], whole["curve"], strict=True):
        assert a == pytest.approx(b, rel=1e-9)


def misfit(folder: str, overrides: tuple[str, ...]) -> None:
    run(Path(folder), *overrides)


@pytest.mark.parametrize(
    ("size", "overrides", "says"),
    [
        (2, ["parallel.context=4"], "parallel.context = 4 does not divide the 2 processes"),
        (2, ["parallel.tensor=3", "model.perception.groups=3"], "parallel.tensor = 3 does not divide the 2 processes"),
        (2, ["parallel.tensor=2", "micro_batch=auto"], "micro_batch: auto tries sizes on each process alone"),
        (2, ["batch_size=5"], "batch_size = 5 cannot be dealt to 2 processes"),
        (2, ["batch_size=8", "micro_batch=8"], "micro_batch = 8 does not divide the 4 sequences"),
        (2, ["parallel.data=fsdp", "parallel.replicas=4"], "parallel.replicas = 4 does not divide"),
        (
            2,
            ["parallel.pipeline=2", "micro_batch=4", "batch_size=4"],
            "parallel.pipeline = 2 needs as many micro-batches",
        ),
        (2, [*INTERLEAVED, *FOUR, "micro_batch=1", "batch_size=5"], "cannot deal 5 micro-batches to parallel.pipeline"),
        (
            2,
            [*INTERLEAVED, *FOUR, "micro_batch=1", "batch_size=3", "control.batch=ramp"],
            "needs micro-batches in multiples of parallel.pipeline = 2, but micro_batch = 1 makes 3",
        ),
        (3, ["parallel.pipeline=2", "micro_batch=1"], "parallel.pipeline = 2 does not divide the 3 processes"),
        (4, ["parallel.context=4", "data.seq_len=8"], "shorter than the convolution's past"),
    ],
)
def test_layouts_that_do_not_fit(tmp_path, size, overrides, says):
    tiny(tmp_path)
    assert all(not well and says in said for well, said in outcomes(size, misfit, str(tmp_path), tuple(overrides)))
