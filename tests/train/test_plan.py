"""Plans: counts equal what is built, bytes equal what real runs hold, every number says where it comes from."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

from llm_mlp.cli import app
from llm_mlp.config import ModelConfig, ModulePrecisionConfig, OptimizerConfig, ParallelConfig, RoutingConfig, build
from llm_mlp.data import Batch
from llm_mlp.models import build_model, model_cost
from llm_mlp.models.lm import LM, Block
from llm_mlp.ops.backend import assuming
from llm_mlp.precision import Precision
from llm_mlp.train import optim
from llm_mlp.train.context import SplitSequence
from llm_mlp.train.float8 import use_float8
from llm_mlp.train.optim import make_optimizers
from llm_mlp.train.parallel import World
from llm_mlp.train.pipeline import Stage, cut, layers_of
from llm_mlp.train.plan import GPUS, Job, PlanError, make_plan, scaled, trace
from llm_mlp.train.plan.figures import ORIGINS, WORKSPACE, rate
from llm_mlp.train.plan.layout import MODES, Layout
from llm_mlp.train.plan.trace import block_trace, held_bytes, saved_bytes, step_bytes, weights_of

DEMO = build(ModelConfig, {"preset": "demo", "n_layers": 2})
HYBRID = build(
    ModelConfig,
    {
        "preset": "demo",
        "n_layers": 4,
        "pattern": ["perception", "attention"],
        "attention": {"heads": 3, "head_dim": 64},
        "routing": {"last_layers": 1},
    },
)
SMALL = build(
    ModelConfig, {"preset": "demo", "n_layers": 1, "perception": {"heads_per_group": 2, "block": 32, "slots": 8}}
)


def on_meta(config):
    with torch.device("meta"):
        return LM(config)


# -- size -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("demo", 5e6), ("30m", None), ("900m", 7e9), ("900m-transformer", 7e9), ("360m", 7e10), ("900m", 1e12)],
)
def test_scaled_counts_are_the_built_models(preset, parameters):
    config = scaled(preset, parameters)
    count = sum(p.numel() for p in on_meta(config).parameters())
    assert count == model_cost(config).parameters
    base = build(ModelConfig, {"preset": preset})
    if parameters is None:
        assert config == base
        return
    assert count == pytest.approx(parameters, rel=0.05)
    assert config.vocab_size == base.vocab_size
    if "perception" in config.mixers:
        p, q = config.perception, base.perception
        assert config.d_model / p.groups == base.d_model / q.groups and p.heads <= 512
        assert (p.read_width, p.features, p.block, p.slots) == (q.read_width, q.features, q.block, q.slots)
        assert p.heads_per_group * p.value_width == q.heads_per_group * q.value_width
    growth = parameters / model_cost(base).parameters
    assert config.d_model == pytest.approx(base.d_model * growth**0.4, rel=0.2)


# -- what a process holds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["same", "8bit"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize(("shards", "zero"), [(1, 0), (8, 0), (3, 3), (8, 1), (1000, 2)])
def test_held_bytes_are_those_of_the_formula(optimizer, shards, zero, state):
    for config in (DEMO, HYBRID):
        found = weights_of(config, optimizer, state)
        cut = shards if zero else 1
        weights = 4 * sum(w.local(cut) for w in found)
        of_state = sum(w.state_bytes(cut) for w in found)
        assert held_bytes(config, optimizer, shards, zero, state) == (weights, weights, of_state)


@pytest.mark.parametrize("state", ["same", "8bit"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_held_bytes_are_those_of_a_training_step(optimizer, state):
    model = build_model(DEMO)
    optimizers = make_optimizers(model, OptimizerConfig(name=optimizer, state=state))
    tokens = torch.randint(DEMO.vocab_size, (1, 65))
    model(tokens[:, :-1], targets=tokens[:, 1:]).loss.backward()
    for o in optimizers:
        o.step()
    real = (
        sum(p.nbytes for p in model.parameters()),
        sum(p.grad.nbytes for p in model.parameters()),
        sum(t.nbytes for o in optimizers for state in o.state.values() for t in state.values()),
    )
    assert held_bytes(DEMO, optimizer, 1, 0, state) == real
    if state == "8bit":  # of which small tensors are in full
        assert real[2] < 0.28 * held_bytes(DEMO, optimizer, 1, 0)[2]


def test_a_step_makes_what_8_bits_need():
    """AdamW's own code a parameter at a time: its two means in full, and what makes codes of the second."""
    largest = max(p.numel() for p in on_meta(DEMO).parameters())
    assert 4 * 4 * largest <= step_bytes(DEMO, "adamw", "8bit", True) <= 5 * 4 * largest
    assert step_bytes(DEMO, "adamw", "same", True) == 0
    assert step_bytes(DEMO, "muon", "8bit", True) >= step_bytes(DEMO, "muon", "same", True) > 0
    plans = [make_plan("900m", parameters=7e9, gpus=64, optimizer_state=state) for state in ("same", "8bit")]
    same, coded = (plan["memory"]["optimizer"]["value"] for plan in plans)
    assert coded < 0.3 * same


def test_a_connected_process_makes_no_plan():
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(PlanError, match="part of one already"):
            held_bytes(DEMO, "muon", 2, 3)
    finally:
        dist.destroy_process_group()


def test_muon_in_parts_changes_the_same(monkeypatch):
    found = []
    for numbers in (optim.AT_ONCE, 1):
        monkeypatch.setattr(optim, "AT_ONCE", numbers)
        model = build_model(DEMO).double()
        optimizers = make_optimizers(model, OptimizerConfig())
        tokens = torch.arange(65)[None]
        model(tokens[:, :-1], targets=tokens[:, 1:]).loss.backward()
        for o in optimizers:
            o.step()
        found.append([p.detach() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# -- what a micro-batch makes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("modules", [{}, {"mixer": "bf16"}, {"ffn": "bf16"}], ids=str)
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_saved_bytes_are_those_of_a_real_run(layer, modules):
    B, T = 2, 320
    block = Block(HYBRID, layer)
    block.init_weights()
    parts = ModulePrecisionConfig(**modules)
    Precision("fp32", torch.device("cpu"), parts).apply(SimpleNamespace(blocks=[block]))
    x = torch.randn(B, T, HYBRID.d_model, requires_grad=True)
    earlier = [torch.zeros_like(x).requires_grad_() for _ in range(layer)] if block.routing is not None else []
    real = saved_bytes(lambda: block(x, earlier, None, None), [x, *earlier, *block.parameters()])
    assert block_trace(HYBRID, layer, B, T, False, modules=parts).saved == real


def test_saved_bytes_of_the_kernels_are_those_of_a_real_run():
    """The kernels themselves, interpreted, against their registered shapes, in bfloat16."""
    B, T = 1, 96
    block = Block(SMALL, 0)
    block.init_weights()

    def run(block, x):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return block(x, None, None, None)

    with assuming("triton"):
        x = torch.randn(B, T, SMALL.d_model, requires_grad=True)
        real = saved_bytes(lambda: run(block, x), [x, *block.parameters()])
        with torch._subclasses.FakeTensorMode():
            trace._with_fake_parameters(block)
            x = torch.empty(B, T, SMALL.d_model, requires_grad=True)
            assert saved_bytes(lambda: run(block, x), [x, *block.parameters()]) == real


def as_on_cuda(forward):
    """``forward`` in the mode that a backward pass, which may call it again, does not have."""

    def run(*args):
        with trace._AsCuda():
            return forward(*args)

    return run


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("preset", "routed", "modules"),
    [
        ("demo", 0, {}),
        ("demo", 2, {}),
        ("demo", 0, {"mixer": "fp32"}),
        ("demo", 0, {"ffn": "fp8", "head": "fp32"}),
        ("demo-transformer", 0, {}),
        pytest.param("30m", 0, {}, marks=pytest.mark.slow),
        # Whose keys and values make the peak under "full".
        pytest.param("30m-transformer", 0, {}, marks=pytest.mark.slow),
    ],
)
def test_layers_add_up_to_the_model(mode, preset, routed, modules):
    """A whole model's forward and backward pass, followed at once, peaks where the sum over its layers does."""
    config = build(ModelConfig, {"preset": preset, "routing": {"last_layers": routed}})
    B, T = 8, 1024
    parts = ModulePrecisionConfig(**modules)
    job = Job(config, GPUS["h100"], 1, T, B, "adamw", modules=parts)
    predicted = job.memory(Layout(1, 1, 1, 1, 0, B, mode))
    model = on_meta(config)
    if parts.ffn == "fp8":
        use_float8(model)
    Precision("bf16", torch.device("cpu"), parts).apply(model)
    model.activation_checkpointing = mode
    with trace._fake(True):
        trace._with_fake_parameters(model)
        tokens = torch.empty((B, T), dtype=torch.int64)
        model._check_tokens = lambda _: None  # fake tokens have no values
        for block in model.blocks:
            block.forward = as_on_cuda(block.forward)
        with trace._Live(list(model.parameters())) as live:
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                loss = model(tokens, targets=tokens, reduction="sum").loss
            torch.autograd.backward((loss,))
            peak = live.peak
    held = predicted.weights + predicted.optimizer + WORKSPACE
    # With float8 under "full" the sum is 1.2 % below.
    assert predicted.peak - held == pytest.approx(peak, rel=0.02 if parts.ffn == "fp8" else 0.01)


def test_context_bytes_are_those_that_are_sent():
    """The tensors that `SplitSequence` counts as sent, of a process of four, against the plan's."""
    B, T, ranks = 2, 512, 4
    config = build(ModelConfig, {"preset": "demo", "n_layers": 1})
    dist.init_process_group("fake", rank=1, world_size=ranks, store=FakeStore())
    try:
        split = SplitSequence(dist.group.WORLD)
        model = build_model(config).bfloat16()
        tokens = torch.randint(config.vocab_size, (B, T))
        with split.reading(model, Batch(tokens, tokens, None, None, None, [0, 1])) as part:
            loss = model(part.tokens, targets=part.targets).loss
            forward, split.bytes = split.bytes, 0
            loss.backward()
        own = Job.context_bytes(config, B)
        assert [forward, split.bytes] == [ranks * sum(sizes) for sizes in own]
    finally:
        dist.destroy_process_group()


ROUTED = build(ModelConfig, {"preset": "demo", "n_layers": 5, "routing": {"last_layers": 2}})


@pytest.mark.parametrize("config", [ROUTED, ROUTED.model_copy(update={"routing": RoutingConfig()})])
@pytest.mark.parametrize("pp", [2, 4])
def test_bytes_between_stages_are_those_that_are_sent(config, pp):
    """What the engine's stages give to the one behind, and gradients of what they are given: the most of a process."""
    micro, T = 2, 64
    sent = []
    for rank in range(pp):
        dist.init_process_group("fake", rank=rank, world_size=pp, store=FakeStore())
        try:
            world = World(ParallelConfig(pipeline=pp), torch.device("cpu"), rank, pp)
            stage = Stage(cut(build_model(config), world), rank, world, Precision("fp32", torch.device("cpu")))
            on = stage.outputs((micro, T), device="meta") if not stage.last else ()
            back = stage.inputs((micro, T), device="meta") if not stage.first else ()
            sent.append(sum(t.nbytes for t in (*on, *back)))
        finally:
            dist.destroy_process_group()
    layout = Layout(1, pp, 1, 1, 0, micro, "none")
    job = Job(config, GPUS["h100"], pp, T, 8 * micro, "muon")
    assert job.time(layout).links["pp"] == (8 * max(sent), "nvlink")
    routes = config.routing.last_layers > 0
    assert (max(sent) > 2 * 4 * micro * T * config.d_model) == routes


@pytest.mark.parametrize("zero", [0, 3])
def test_a_stage_that_routes_holds_what_the_engine_makes_of_it(zero):
    pp, shards = 2, 3 if zero else 1
    job = Job(ROUTED, GPUS["h100"], pp * shards, 64, 12, "adamw")
    layout = Layout(shards, pp, 1, 1, zero, 1, "none")
    stage, memory = job.stage(layout), job.memory(layout)
    built = held_bytes(stage.config, "adamw", shards, zero, layers=stage.layers)
    assert built == (memory.weights, memory.gradients, memory.optimizer)
    model = build_model(ROUTED)
    own = [*model.head.parameters(), *(p for i in layers_of(1, pp, 5) for p in model.blocks[i].parameters())]
    assert stage.numbers() == sum(p.numel() for p in own)
    # The second of two stages has one micro-batch under way, with what three layers before it read; the first has two.
    plain = Job(ROUTED.model_copy(update={"routing": RoutingConfig()}), GPUS["h100"], pp * shards, 64, 12, "adamw")
    assert memory.activations > plain.memory(layout).activations


def test_later_stages_keep_what_layers_before_them_read():
    """With nothing else kept, a stage in the middle has most: fewer micro-batches under way, but more of each."""
    config = build(ModelConfig, {"preset": "demo", "n_layers": 8, "routing": {"last_layers": 1}})
    job = Job(config, GPUS["h100"], 4, 64, 16, "adamw")
    stream = 4 * 64 * config.d_model
    found = job.memory(Layout(1, 4, 1, 1, 0, 1, "full")).activations
    # A stage's two layers keep three tensors of a micro-batch (embedding's or stage's input, and a layer's input each).
    assert found == max((4 - s) * (3 + 2 * s) for s in range(4)) * stream == 15 * stream


# -- plans ------------------------------------------------------------------------------------------------------------


def leaves(part, path=""):
    if isinstance(part, dict) and "value" in part:
        yield path, part
        return
    assert isinstance(part, dict) and part, path
    for name, inner in part.items():
        yield from leaves(inner, f"{path}/{name}")


def run(*words):
    return CliRunner().invoke(app, ["plan", *words])


@pytest.mark.parametrize(
    "words",
    [
        ["--preset", "30m"],
        ["--preset", "30m", "--gpus", "16", "--gpu", "a100", "--seq", "8192", "--optimizer", "adamw"],
        ["--preset", "demo", "--gpu", "cpu", "--seq", "512", "--batch", "2048", "--tokens", "1e6"],
        ["--preset", "demo-transformer", "--gpus", "8", "--layout", "zero=2", "--checkpointing", "full"],
        ["--preset", "demo", "--module-precision", "mixer=fp32,ffn=fp8"],
    ],
    ids=lambda words: " ".join(words[1:3]),
)
def test_every_number_says_where_it_comes_from(words):
    found = json.loads(run(*words, "--json").stdout)
    rejected = found.pop("rejected")
    assert {"layout", "memory", "link_bytes", "flops", "seconds", "efficiency", "bubble", "cost", "energy"} < set(found)
    for path, part in leaves(found):
        assert set(part) == {"value", "unit", "source"} and part["unit"] and part["source"].startswith(ORIGINS), path
        assert isinstance(part["value"], str) or part["value"] >= 0, path
    assert all(set(row) == {"layout", "why"} and row["why"] for row in rejected)
    value = {name: part["value"] for name, part in leaves(found)}
    assert value["/memory/peak"] <= value["/memory/usable"]
    assert value["/seconds/run"] == pytest.approx(value["/seconds/step"] * value["/model/steps"])
    plain = run(*words)
    assert plain.exit_code == 0 and "bubble" in plain.stdout and "as given by --preset" in plain.stdout


def test_a_trillion_parameters_on_1024_gpus():
    begin = time.perf_counter()
    found = make_plan("900m", parameters=1e12, gpus=1024, length=131_072)
    assert time.perf_counter() - begin < 60
    value = {name: part["value"] for name, part in leaves({k: v for k, v in found.items() if k != "rejected"})}
    sizes = [value[f"/layout/{name}"] for name in ("fsdp", "pp", "cp", "tp")]
    assert torch.Size(sizes).numel() == 1024
    assert value["/model/parameters"] == pytest.approx(1e12, rel=0.02)
    assert value["/memory/peak"] <= value["/memory/usable"] < 80e9
    assert 0 < value["/efficiency/mfu"] < value["/efficiency/parallel"] < 1
    # Weights, gradients and Muon's state of a trillion parameters over 1,024 processes, and a little unevenness.
    held = sum(value[f"/memory/{name}"] for name in ("weights", "gradients", "optimizer"))
    assert held == pytest.approx(12e12 / 1024, rel=0.1)
    assert any("needs" in row["why"] for row in found["rejected"])
    assert any("tp = 16 leaves" in row["why"] for row in found["rejected"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preset", "90m"], "did you mean"),
        (["--preset", "30m", "--params", "1e3"], "embedding and head alone"),
        (["--preset", "30m", "--gpus", "0"], "--gpus 0: expected at least 1"),
        (["--preset", "30m", "--gpu", "h10"], "--gpu 'h10' is not in the table; did you mean 'h100'"),
        (["--preset", "30m", "--seq", "4"], "--seq 4: expected at least 8"),
        (["--preset", "30m", "--batch", "5000"], "the nearest is 4096"),
        (["--preset", "30m", "--tokens", "-1"], "--tokens -1: expected"),
        (["--preset", "30m", "--optimizer", "sgd"], "expected muon or adamw"),
        (["--preset", "30m", "--optimizer-state", "4bit"], "--optimizer-state '4bit': expected same or 8bit"),
        (["--preset", "30m", "--gpus", "2", "--layout", "tp=2", "--optimizer-state", "8bit"], "that share a scale"),
        (["--preset", "30m", "--module-precision", "mixer"], "expected for example mixer=fp32,ffn=fp8"),
        (["--preset", "30m", "--module-precision", "mixer=fp8"], "mixer: Input should be 'same', 'fp32' or 'bf16'"),
        (["--preset", "30m", "--module-precision", "ffm=fp8"], "ffm: unknown field; did you mean 'ffn'?"),
        (["--preset", "30m", "--gpu", "cpu", "--module-precision", "ffn=fp8"], "ffn=fp8 needs a GPU"),
        (["--preset", "30m", "--checkpointing", "some"], "expected auto, none, selective, full"),
        (["--preset", "30m", "--layout", "pq=4"], "unknown name 'pq'; did you mean"),
        (["--preset", "30m", "--layout", "pp=x"], "pp needs a whole number"),
        (["--preset", "30m", "--gpus", "8", "--layout", "pp=3"], "3 processes do not divide --gpus 8"),
        (["--preset", "30m", "--gpus", "16", "--layout", "tp=16"], "tp = 16 leaves the 8 GPUs of a node"),
        (["--preset", "30m-transformer", "--gpus", "2", "--layout", "cp=2"], "attention layers are not split"),
        (["--preset", "30m", "--gpus", "11", "--batch", "2048"], "cannot share 1 sequences a step"),
        (["--preset", "900m", "--params", "1e11"], "no layout fits the 74 GB"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_planned_is_refused(words, said):
    result = run(*words)
    assert isinstance(result.exception, PlanError)
    assert said in str(result.exception)


def test_parts_in_other_precisions_keep_other_bytes_and_the_plan_says_what_it_counts():
    plain, wide = (make_plan("30m", checkpointing="none", module_precision=m) for m in ("", "mixer=fp32"))
    activations = [found["memory"]["activations"] for found in (plain, wide)]
    assert activations[1]["value"] > 1.2 * activations[0]["value"] and "bf16 but mixer=fp32" in activations[1]["source"]
    assert "as if mixer=fp32 took no other time" in wide["seconds"]["rate"]["source"]
    assert "as if" not in plain["seconds"]["rate"]["source"]


def test_nothing_fits_says_what_the_nearest_need():
    with pytest.raises(PlanError, match=r"Nearest: fsdp=.* needs [\d,]+ GB.*Take more --gpus"):
        make_plan("900m", parameters=3e11, gpus=8)


def test_rates_are_the_measured_ones():
    """The package's table against the benchmark's lines."""
    from pathlib import Path

    import llm_mlp
    from llm_mlp.train.plan.figures import _MEASURED

    file = Path(llm_mlp.__file__).parent.parent / "benchmarks/results/speed.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf8").splitlines()]
    for preset, where, table in _MEASURED.values():
        commit = where.rpartition(" ")[2]
        found = {
            r["length"]: r["tokens_per_second"] for r in rows if r["kind"] == "train-speed" and r["commit"] == commit
        }
        for mixer, speeds in table.items():
            name = preset + ("-transformer" if mixer == "attention" else "")
            assert speeds == {n: pytest.approx(found[n][name], rel=1e-3) for n in speeds}
    for gpu, kind in (("h100", "measured"), ("cpu", "measured"), ("b200", "assumed")):
        assert rate(GPUS[gpu], DEMO, 2048)[1].startswith(kind)


def test_checkpointing_keeps_a_layers_input():
    """What "full" is taken to keep is what torch's checkpoint keeps: nothing by its hooks, but its arguments."""
    block = Block(DEMO, 0)
    x = torch.randn(1, 64, DEMO.d_model, requires_grad=True)
    run = lambda: checkpoint(block, x, None, None, None, use_reentrant=False, preserve_rng_state=False)  # noqa: E731
    assert saved_bytes(run, [x, *block.parameters()]) == 0
